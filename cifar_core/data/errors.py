"""The error of this package, and the advice at the end of each of its messages."""

from cifar_core.errors import CifarError

OTHER_DATA = (
    "; or use other data: --data cifar10 (the official archive), --data FOLDER (with train/<class>/* and "
    "test/<class>/*, or only <class>/*), or --data synthetic (generated images, no download)"
)
"""The end of the message of every error of this package: how to continue with other data."""


class DataError(CifarError):
    """A data set that is missing, incomplete, corrupt or not in the expected form."""
