"""What `Client` and `AsyncClient` share: everything but sending and waiting."""

import collections
import operator
from typing import SupportsIndex

from service.client.addresses import Addresses
from service.client.answers import Results
from service.client.contents import Capacity, Content
from service.client.options import DEFAULT_TARGET, Options, channel_options
from service.client.packing import is_small
from service.client.retrying import Deadline, RequestFailed
from service.generated.cifar.v1 import image_classifier_pb2 as messages

_WINDOW = 4
# How many answers about limits are compared if a name may stand for several servers.
_MODELS_TO_ASK = 4


class BaseClient:
    """The options of a client and what it knows about its server.

    Args:
        target: Address of the server, HOST:PORT. Several servers take turns: IP:PORT,IP:PORT,…, or dns:///NAME:PORT
            for all addresses of a name.
        options: Security, time limits and coalescing.

    Raises:
        OSError: A file that the options name cannot be read.
        ValueError: A file is not a PEM file, the token would be sent to another machine without TLS, the address is
            empty or its port invalid, or several addresses are not IP:PORT each.
    """

    def __init__(self, target: str = DEFAULT_TARGET, options: Options | None = None) -> None:
        self.target = target
        self.options = options or Options()
        addresses = Addresses.parse(target)
        self.options.check_safe(addresses)
        self._grpc_target = addresses.target
        self._credentials = self.options.credentials()
        self._channel_options = channel_options(addresses, self.options.server_name)
        # Largest number of shared requests in progress, and of requests of one call: each server computes one while the
        # next is sent.
        self._shared_requests = self.options.max_shared_requests * len(addresses.hosts)
        self._window = max(_WINDOW, 2 * len(addresses.hosts))
        self._window_of_each = -(-self._window // len(addresses.hosts))
        # Several servers may have several limits, for example while they are restarted one after another. They take
        # turns, so the last few answers are those of all.
        self._models_to_ask = 1 if addresses.is_one_server else max(_MODELS_TO_ASK, 2 * len(addresses.hosts))
        self._capacities: collections.deque[Capacity] = collections.deque(maxlen=self._models_to_ask)
        self._known_capacity: Capacity | None = None
        self._known_classes: tuple[str, ...] = ()
        self._known_version = ""
        self._limits_may_have_changed = True

    def _remember(self, model: messages.GetModelResponse) -> messages.GetModelResponse:
        self._capacities.append(Capacity.of(model.limits, self._window_of_each))
        known = self._capacities.copy()
        self._known_capacity = Capacity(min(each.images for each in known), min(each.size for each in known))
        self._known_classes, self._known_version = tuple(model.classes), model.version
        self._limits_may_have_changed = False
        return model

    def _capacity(self) -> Capacity:
        """What one request may hold, as far as the client knows."""
        if self._known_capacity is None:
            raise RuntimeError("the server's limits are needed before any request is made")
        return self._known_capacity

    def _note_failure(self, failure: RequestFailed) -> None:
        # A server that was restarted with lower limits refuses requests that it took before.
        if failure.may_be_too_large:
            self._limits_may_have_changed = True

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.options.timeout if timeout is None else timeout)

    def _is_shared(self, content: Content) -> bool:
        return self.options.coalesce and is_small(content)

    def _error_of(self, content: Content) -> Results | None:
        """The results of a content that cannot be sent; None if it can."""
        if content.error is None:
            return None
        return Results.of_error(content.error, self._known_classes, self._known_version)

    def _smaller(self, content: Content, failure: RequestFailed | None) -> list[Content]:
        """The contents to send instead of one that did not fit, after the limits were fetched again.

        Args:
            content: The content.
            failure: How the server refused it; None if it was not sent.

        Raises:
            RequestFailed: The content is within the limits: `failure` is the outcome.
        """
        capacity = self._capacity()
        if not content.fits(capacity):
            return content.split(capacity)
        if failure is not None:
            raise failure
        return [content]


def check_top_k(top_k: SupportsIndex) -> int:
    """The number of classes per image, 0 for all.

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is negative.
    """
    try:
        number = operator.index(top_k)
    except TypeError:
        raise TypeError(f"top_k is {top_k!r}; it must be a whole number, of classes per image, or 0 for all") from None
    if number < 0:
        raise ValueError(f"top_k is {number}; it must be the number of classes per image, or 0 for all")
    return number
