"""gRPC through Ray Serve: the protocol's methods under their own names, and what a handler asks of its context.

Serve's proxy asks a function to add the methods to its server, and sends what arrives to a replica, pickled. Our
messages live in a pool of their own and can't be pickled, so they travel as the bytes that they are on the wire.
"""

from __future__ import annotations

from typing import Any

import grpc

from visformer.serving.messages import SERVICE, methods


def add_to_server(servicer: Any, server: Any) -> None:
    """What `grpc_servicer_functions` of Serve's options names: every method, from bytes to bytes."""
    handlers = {}
    for name, _, _, streams in methods():
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        handlers[name] = make(getattr(servicer, name), request_deserializer=bytes, response_serializer=bytes)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class Refused(Exception):  # noqa: N818 (the client learns the code, which is no error of ours)
    """Ends a call whose code and details have been set: Serve sends them in place of its own."""


class Context:
    """Serve's context of a call in the place of gRPC's own, as far as `serving.grpc_server` uses it."""

    def __init__(self, given: Any) -> None:
        self._given = given

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return list(self._given.invocation_metadata())

    def time_remaining(self) -> None:
        """Not known here: the proxy keeps the client's deadline, and cancels."""

    def set_trailing_metadata(self, pairs: tuple[tuple[str, str], ...]) -> None:
        self._given.set_trailing_metadata(list(pairs))

    def set_code(self, code: grpc.StatusCode) -> None:
        self._given.set_code(code)

    def set_details(self, details: str) -> None:
        self._given.set_details(details)
