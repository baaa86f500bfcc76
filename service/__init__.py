"""The gRPC service: a server, `python -m service`, and its client, `Client` and `AsyncClient`.

It imports neither torch nor the training part of `cifar_core`: the server knows a model by its export alone. Importing
this package imports nothing else; `Client` and `AsyncClient` are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- one of two classes
    if name in ("AsyncClient", "Client"):
        from service import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
