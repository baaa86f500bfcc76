"""Parses protobuf messages, and counts their fields before.

An empty submessage takes two bytes, so parsing a message of a few MiB can cost hundreds of MiB and seconds.
`FieldCounter` looks at no more fields than it allows.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from service.errors import InvalidRequest, quoted

Request: TypeAlias = Any
Parse: TypeAlias = Callable[[bytes], Request]

# Largest message of a method whose requests hold no images, in bytes.
SMALL_MESSAGE_BYTES = 16_384
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MIN_FIELD_BYTES = 2
_MAX_DEPTH = 16

_COUNTED: Final = -1
_Kinds = dict[int, Any]
"""What has to be counted, by field number: for a submessage its own kinds; for packed values their limit in bytes, or
_COUNTED to count each value. Other fields are left out."""


class FieldCounter:
    """Counts the fields of one message type, in submessages too, and the values of packed repeated fields.

    Args:
        message_type: A generated class.
        max_fields: Largest number of fields and values that a message may have.
        max_bytes: Limits in bytes, by full name, of packed fields whose values are not counted.
    """

    def __init__(
        self, message_type: type[Message], max_fields: int, max_bytes: Mapping[str, int] | None = None
    ) -> None:
        self._max_fields = max_fields
        self._packed_bytes = 0  # of the message that is being looked at, in fields that `max_bytes` names
        self._kinds = _kinds(message_type, max_bytes or {}, {})

    def check(self, message: bytes) -> None:
        """Accepts a message whose parsing costs little.

        Raises:
            InvalidRequest: It has too many fields, or is not a protobuf message.
        """
        if len(message) <= self._max_fields * _MIN_FIELD_BYTES:
            return
        try:
            self._packed_bytes = 0
            self._walk(message, 0, len(message), self._kinds, 0, 0)
        except IndexError:
            raise _malformed("it is cut off") from None

    def _walk(self, data: bytes, place: int, end: int, kinds: _Kinds, count: int, depth: int) -> int:
        """Counts the fields from offset `place` to `end` and adds them to `count`; returns the new count."""
        if depth > _MAX_DEPTH:
            raise _malformed(f"it is nested more than {_MAX_DEPTH} levels deep")
        while place < end:
            count += 1
            self._check(count)
            tag = data[place]
            place += 1
            if tag >= 0x80:
                tag, place = _varint(data, place - 1)
            wire_type = tag & 7
            if wire_type == _LENGTH:
                length, place = _varint(data, place)
                if place + length > end:
                    raise _malformed("a field extends beyond its message")
                kind = kinds.get(tag >> 3)
                if isinstance(kind, int):
                    if kind == _COUNTED:
                        count += length  # at least a byte for each value
                        self._check(count)
                        place += length
                        continue
                    self._packed_bytes += length
                    if self._packed_bytes > kind:
                        raise InvalidRequest(
                            f"the message has {self._packed_bytes} bytes of numbers in one field; "
                            f"at most {kind} are allowed: send them as bytes, in raw_input_contents"
                        )
                elif kind is not None:
                    count = self._walk(data, place, place + length, kind, count, depth + 1)
                place += length
            elif wire_type == _VARINT:
                _, place = _varint(data, place)
            elif wire_type == _FIXED64:
                place += 8
            elif wire_type == _FIXED32:
                place += 4
            else:
                raise _malformed(f"wire type {wire_type} is not used by its message type")
        return count

    def _check(self, count: int) -> None:
        if count > self._max_fields:
            raise InvalidRequest(
                f"the message has more than {self._max_fields} fields, which is more than the allowed number of "
                "images needs: send fewer images in a request"
            )


def _kinds(message_type: type[Message], max_bytes: Mapping[str, int], known: dict[str, _Kinds]) -> _Kinds:
    descriptor = message_type.DESCRIPTOR
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    kinds: _Kinds = {}
    known[descriptor.full_name] = kinds
    for field in descriptor.fields:
        nested: Any = field.message_type  # its published type is wider than what GetMessageClass takes
        if nested is not None:
            kinds[field.number] = _kinds(GetMessageClass(nested), max_bytes, known)
        elif field.is_repeated and field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            kinds[field.number] = max_bytes.get(field.full_name, _COUNTED)
    return kinds


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise _malformed("a number has more than 10 bytes")


def _malformed(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the request is not a message of its type: {reason}")


def parse_message(deserialize: Parse, counter: FieldCounter | None, message: bytes) -> Request:
    """A request from its bytes.

    Raises:
        InvalidRequest: The bytes are not such a message, or have more fields than `counter` allows; without a counter,
            more bytes than a request without images needs.
    """
    if counter is not None:
        counter.check(message)
    else:
        check_small(message)
    try:
        return deserialize(message)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not a message of its type: {quoted(str(error))}") from error


def check_small(message: bytes) -> None:
    """Accepts the message of a method whose requests hold no images.

    Raises:
        InvalidRequest: It is larger than such a request needs.
    """
    if len(message) > SMALL_MESSAGE_BYTES:
        raise InvalidRequest(
            f"the message has {len(message)} bytes; at most {SMALL_MESSAGE_BYTES} are allowed for this method"
        )
