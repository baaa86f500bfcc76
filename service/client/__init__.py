"""The client of the service: `Client`, `AsyncClient`, and a command, `python -m service.client IMAGE…`.

    with Client("localhost:50051") as client:
        for image in client.classify(["cat.jpg", "ship.png"]):
            print(image.best.name, image.best.probability)

Long lists are sent in as few requests as the server's limits allow. Small calls that are made at the same time share
requests. A request that the server could not accept (UNAVAILABLE, RESOURCE_EXHAUSTED with a hint, CANCELLED by a server
that stops) is sent again, after pauses that grow.
"""

from service.client.aio import AsyncClient
from service.client.answers import Classification, ClassificationError, RankedClass
from service.client.options import Options
from service.client.sync import Client
from service.client.table import print_table

__all__ = ["AsyncClient", "Classification", "ClassificationError", "Client", "Options", "RankedClass", "print_table"]
