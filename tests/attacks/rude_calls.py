"""Correct gRPC calls of clients that misbehave: they cancel, vanish, never read, or send what is expensive."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from tests.attacks.http2 import (
    CLASSIFY,
    CLASSIFY_STREAM,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Connection,
    ConnectionEnded,
    Target,
    frame,
    grpc_prefix,
    header_block,
)

IMAGE_BYTES = 3072


def send_bodies(target: Target, method: str, requests: Sequence[bytes], timeout: float = 60.0) -> Counter[str]:
    """Sends serialised requests at once, each over a connection of its own; how many calls ended with which status."""

    def send(request: bytes) -> str:
        with target.channel() as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            try:
                call(request, timeout=timeout, metadata=target.metadata)
            except grpc.RpcError as error:
                return str(error.code().name)
        return "OK"

    with ThreadPoolExecutor(len(requests)) as pool:
        return Counter(pool.map(send, requests))


def send_files(target: Target, requests: Sequence[Sequence[bytes]], timeout: float = 60.0) -> Counter[str]:
    """Sends requests of image files at once; how many calls ended with which status."""
    bodies = [
        messages.ClassifyRequest(images=[messages.Image(encoded=file) for file in files]).SerializeToString()
        for files in requests
    ]
    return send_bodies(target, CLASSIFY, bodies, timeout)


def cancel_streams(target: Target, count: int = 500, at_once: int = 50) -> str:
    """Opens streams of ClassifyStream, sends one request over each, and cancels it."""
    request = messages.ClassifyRequest(packed_rgb=bytes(IMAGE_BYTES)).SerializeToString()

    def requests() -> Iterator[bytes]:
        yield request
        time.sleep(0.2)

    with target.channel() as channel:
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(CLASSIFY_STREAM)
        for _ in range(0, count, at_once):
            calls = [call(requests(), metadata=target.metadata, timeout=10) for _ in range(at_once)]
            time.sleep(0.05)
            for begun in calls:
                begun.cancel()
    return f"{count} streams cancelled"


def cancel_calls(target: Target, count: int = 500) -> str:
    """Begins calls with as many images as a request may have, and cancels each at once."""
    request = messages.ClassifyRequest(packed_rgb=bytes(1024 * IMAGE_BYTES)).SerializeToString()
    with target.channel() as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CLASSIFY)
        for _ in range(count):
            future = call.future(request, metadata=target.metadata, timeout=10)
            time.sleep(0.002)
            future.cancel()
    return f"{count} calls of 1,024 images cancelled"


def never_read(target: Target, connections: int = 50, calls: int = 90, seconds: float = 5.0) -> str:
    """Sends calls over connections whose windows for answers have size 0, and waits."""
    body = messages.ClassifyRequest(packed_rgb=bytes(4 * IMAGE_BYTES)).SerializeToString()
    message = grpc_prefix(len(body)) + body
    block = header_block(target, CLASSIFY)
    opened = []
    asked = 0
    try:
        for _ in range(connections):
            with suppress(ConnectionEnded):
                connection = Connection(target, initial_window=0)
                opened.append(connection)
                connection.receive(1.0)
                for _ in range(min(calls, connection.max_streams)):
                    stream = connection.new_stream()
                    while connection.connection_window < len(message) and connection.receive(0.5):
                        pass
                    connection.connection_window -= len(message)
                    connection.send(
                        frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, message)
                    )
                    asked += 1
        time.sleep(seconds)
    finally:
        for connection in opened:
            connection.close()
    return f"{asked} calls whose answers nobody reads"


def never_read_stream(target: Target, requests: int = 2000, seconds: float = 5.0) -> str:
    """Sends many requests over one ClassifyStream and reads no answer."""
    body = messages.ClassifyRequest(packed_rgb=bytes(4 * IMAGE_BYTES)).SerializeToString()
    message = grpc_prefix(len(body)) + body
    sent = 0
    with suppress(ConnectionEnded), Connection(target, initial_window=0) as connection:
        connection.receive(1.0)
        stream = connection.new_stream()
        connection.send(frame(HEADERS, END_HEADERS, stream, header_block(target, CLASSIFY_STREAM)))
        end = time.monotonic() + seconds
        while sent < requests and time.monotonic() < end:
            window = min(connection.connection_window, connection.stream_windows.get(stream, 0))
            if window < len(message):
                connection.receive(0.2)
                continue
            connection.send(frame(DATA, 0, stream, message))
            connection.connection_window -= len(message)
            connection.stream_windows[stream] -= len(message)
            sent += 1
        time.sleep(max(0.0, end - time.monotonic()))
    return f"{sent} requests of a stream whose answers nobody reads"
