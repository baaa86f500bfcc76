"""The error of offline scoring."""

from cifar_core.errors import CifarError


class ScoreError(CifarError):
    """The run cannot start or go on. Parts that are written already stay valid; `--resume` continues after them."""
