"""The error that reading a data set ends with, and the advice that every such error closes with."""

from cifar_core.errors import CifarError

OTHER_DATA = (
    "; or use other data: --data cifar10 (the official archive), --data FOLDER (with train/<class>/* and "
    "test/<class>/*), or --data synthetic (generated images, no download)"
)
"""Closes the message of every error of this package: the ways to go on without the data that failed."""


class DataError(CifarError):
    """A data set that is missing, incomplete, corrupt or not in the expected form."""
