"""Client of the service: `Client`, `AsyncClient`, and a command, `python -m service.client IMAGE…`."""

from service.client.client import (
    AsyncClient,
    Classification,
    ClassificationError,
    Client,
    Options,
    RankedClass,
    print_table,
)

__all__ = ["AsyncClient", "Classification", "ClassificationError", "Client", "Options", "RankedClass", "print_table"]
