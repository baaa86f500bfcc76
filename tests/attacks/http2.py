"""HTTP/2 connections over which any sequence of frames can be sent, also those that a correct client never sends.

Frames are written with `hyperframe` and header blocks with `hpack`, below the level of a protocol state machine,
because the state machine of a correct client refuses to send what an attacker sends.
"""

import socket
import ssl
import struct
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from hpack import Decoder, Encoder, HPACKError
from hpack.struct import NeverIndexedHeaderTuple
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import (
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CLASSIFY = "/cifar.v1.ImageClassifier/Classify"
CLASSIFY_STREAM = "/cifar.v1.ImageClassifier/ClassifyStream"
GET_MODEL = "/cifar.v1.ImageClassifier/GetModel"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"

DEFAULT_WINDOW = 65_535
MAX_WINDOW = 2**31 - 1
FRAME_BYTES = 16_384
SEND_SECONDS = 5.0


class ConnectionEnded(Exception):
    """The server closed the connection, or does not read from it any more."""


@dataclass(frozen=True)
class Target:
    """A server on 127.0.0.1.

    Attributes:
        port: Its port.
        ca: PEM file of the authority that signed its certificate; None for plaintext.
        token: Bearer token that attackers send, as they would have stolen it; None for none.
    """

    port: int
    ca: Path | None = None
    token: str | None = None

    @property
    def address(self) -> str:
        """For gRPC."""
        return f"127.0.0.1:{self.port}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For gRPC calls."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self) -> grpc.Channel:
        """A gRPC channel with a connection of its own, without retries and limits of the client."""
        arguments = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_retries", 0),
        ]
        if self.ca is None:
            return grpc.insecure_channel(self.address, arguments)
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(self.ca.read_bytes()), arguments)

    def connect(self, seconds: float = SEND_SECONDS) -> socket.socket:
        """A TCP connection, with TLS where the server has it.

        Raises:
            ConnectionEnded: The server does not accept it.
        """
        try:
            plain = socket.create_connection(("127.0.0.1", self.port), seconds)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.ca is None:
                return plain
            context = ssl.create_default_context(cafile=str(self.ca))
            context.set_alpn_protocols(["h2"])
            return context.wrap_socket(plain, server_hostname="127.0.0.1")
        except OSError as error:
            raise ConnectionEnded(f"no connection: {error}") from error


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """A frame of any kind, with any flags, valid or not."""
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 0x1, 0x4


def header_block(target: Target, method: str, extra: tuple[tuple[str, str], ...] = ()) -> bytes:
    """Headers of a gRPC call, encoded such that the same bytes are valid for every stream of every connection."""
    headers = [
        (":method", "POST"),
        (":scheme", "https" if target.ca else "http"),
        (":path", method),
        (":authority", target.address),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *target.metadata,
        *extra,
    ]
    return bytes(Encoder().encode([NeverIndexedHeaderTuple(*pair) for pair in headers], huffman=False))


def grpc_prefix(size: int) -> bytes:
    """Announces an uncompressed message of this many bytes."""
    return struct.pack(">BI", 0, size)


@dataclass
class Received:
    """What a server has sent over one connection.

    Attributes:
        ended: Streams that the server ended, each with its gRPC status, "RST" or "" where it sent no status.
        frames: Number of frames.
        goaway: Error code of the server's GOAWAY; None before it sends one.
    """

    ended: dict[int, str] = field(default_factory=dict)
    frames: int = 0
    goaway: int | None = None


class Connection:
    """One HTTP/2 connection.

    Args:
        target: The server.
        initial_window: Bytes that the server may send on each stream before it must wait; 0: none.
        settings: Further entries of the first SETTINGS frame.

    Raises:
        ConnectionEnded: The server does not accept it.
    """

    def __init__(
        self, target: Target, initial_window: int = DEFAULT_WINDOW, settings: dict[int, int] | None = None
    ) -> None:
        self.received = Received()
        self.connection_window = DEFAULT_WINDOW
        self.stream_windows: dict[int, int] = {}
        self.max_streams = MAX_WINDOW
        self._initial_window = DEFAULT_WINDOW
        self._next_stream = 1
        self._pending = b""
        self._decoder = Decoder()
        self._socket = target.connect()
        first = SettingsFrame(0)
        first.settings = {SettingsFrame.INITIAL_WINDOW_SIZE: initial_window, **(settings or {})}
        self.send(PREFACE + first.serialize())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes it without a GOAWAY."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Sends bytes as they are.

        Raises:
            ConnectionEnded: The server closed the connection or has not read from it for some seconds.
        """
        try:
            self._socket.settimeout(SEND_SECONDS)
            self._socket.sendall(data)
        except OSError as error:
            raise ConnectionEnded(f"cannot send: {error}") from error

    def new_stream(self) -> int:
        """The number of the next stream; the caller sends its headers."""
        stream = self._next_stream
        self._next_stream += 2
        self.stream_windows[stream] = self._initial_window
        return stream

    def receive(self, seconds: float) -> bool:
        """Handles what the server sent, waiting at most so long for it; False if there was nothing.

        Raises:
            ConnectionEnded: The server closed the connection.
        """
        try:
            self._socket.settimeout(seconds)
            data = self._socket.recv(2**18)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError as error:
            raise ConnectionEnded(f"cannot receive: {error}") from error
        if not data:
            raise ConnectionEnded("the server closed the connection")
        self._pending += data
        while len(self._pending) >= 9:
            parsed, length = Frame.parse_frame_header(memoryview(self._pending[:9]))
            if len(self._pending) < 9 + length:
                break
            try:
                parsed.parse_body(memoryview(self._pending[9 : 9 + length]))
            except HyperframeError as error:
                raise ConnectionEnded(f"the server sent an invalid frame: {error}") from error
            self._pending = self._pending[9 + length :]
            self.received.frames += 1
            self._handle(parsed)
        return True

    def discard(self) -> None:
        """Throws away what the server sent without looking at it, which costs an attacker little.

        Raises:
            ConnectionEnded: The server closed the connection.
        """
        try:
            self._socket.settimeout(0)
            while data := self._socket.recv(2**18):
                del data
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            raise ConnectionEnded(f"cannot receive: {error}") from error
        raise ConnectionEnded("the server closed the connection")

    def _handle(self, parsed: Frame) -> None:
        match parsed:
            case SettingsFrame() if "ACK" not in parsed.flags:
                self._apply(parsed.settings)
                self.send(SettingsFrame(0, flags=["ACK"]).serialize())
            case PingFrame() if "ACK" not in parsed.flags:
                self.send(PingFrame(0, parsed.opaque_data, flags=["ACK"]).serialize())
            case WindowUpdateFrame(stream_id=0):
                self.connection_window += parsed.window_increment
            case WindowUpdateFrame() if parsed.stream_id in self.stream_windows:
                self.stream_windows[parsed.stream_id] += parsed.window_increment
            case RstStreamFrame():
                self._end(parsed.stream_id, "RST")
            case HeadersFrame():
                self._headers(parsed)
            case GoAwayFrame():
                self.received.goaway = parsed.error_code
            case _:
                pass

    def _apply(self, settings: dict[int, int]) -> None:
        window = settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, self._initial_window)
        for stream in self.stream_windows:
            self.stream_windows[stream] += window - self._initial_window
        self._initial_window = window
        self.max_streams = settings.get(SettingsFrame.MAX_CONCURRENT_STREAMS, self.max_streams)

    def _headers(self, parsed: HeadersFrame) -> None:
        try:
            headers = dict(self._decoder.decode(parsed.data, raw=True))
        except HPACKError:
            headers = {}
        if "END_STREAM" in parsed.flags:
            self._end(parsed.stream_id, headers.get(b"grpc-status", b"").decode())

    def _end(self, stream: int, status: str) -> None:
        self.received.ended.setdefault(stream, status)
        self.stream_windows.pop(stream, None)
