"""The protocol's gRPC messages, made from `open_inference.binpb`, which is compiled from `open_inference.proto`.

They live in a pool of their own. Generated modules would register the names `inference.*` for the whole process, where
they collide with those of another client or server of the same protocol, and would demand one release of protobuf.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"
_FILE = Path(__file__).parent / "open_inference.binpb"


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(_FILE.read_bytes()).file:
        pool.Add(file)
    return pool


@functools.cache
def message(name: str) -> Any:
    """The class of a message, such as `ModelInferRequest`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"inference.{name}"))


def methods() -> list[tuple[str, Any, Any, bool]]:
    """(name, class of the request, class of the response, whether it streams) of each method of the service."""
    service = _pool().FindServiceByName(SERVICE)
    return [
        (one.name, message(one.input_type.name), message(one.output_type.name), one.client_streaming)
        for one in service.methods
    ]
