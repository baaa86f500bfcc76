"""Attacks on a gRPC server on this machine, for tests of its limits: each ends by itself and stops no process.

`python -m tests.attacks` runs them against a server that it starts and prints a table of the measurements and of the
limits that they must keep.

    http2        connections that send HTTP/2 frames of any kind
    floods       many frames, streams or connections
    stalls       messages that begin and never end
    payloads     request bodies that are expensive to parse
    image_bombs  image files that are expensive to decode
    rude_calls   correct calls of clients that cancel, vanish or never read
    catalogue    all of these by name; each runs for about the given time
    observers    measures the resources of a server and the answers to its honest clients meanwhile
"""
