"""The Open Inference Protocol over gRPC, on the same event loop and behind the same door as HTTP.

A client's deadline and its cancelling reach the work itself. A refusal's status becomes gRPC's code; with UNAVAILABLE
goes `grpc-retry-pushback-ms`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from visformer.errors import UsageError
from visformer.serving import grpc_methods, log
from visformer.serving.door import Call
from visformer.serving.front import access_record, check_key, internal
from visformer.serving.messages import SERVICE, methods
from visformer.serving.refusals import CLIENT_GONE, Refusal, busy, forget, late

if TYPE_CHECKING:
    from visformer.serving.app import Service

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CLIENT_GONE: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_OPEN = ("ServerLive", "ServerReady")
_ROOM = 2**16  # bytes of a message that are not the images


async def start_grpc(service: Service) -> tuple[grpc.aio.Server, int]:
    """A server that listens, and its port. Raises `UsageError` when the port can't be had."""
    settings = service.settings
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_bytes + _ROOM),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", int(settings.replicas > 1)),
        ],
        maximum_concurrent_rpcs=4 * settings.max_in_flight,
    )
    handlers = {}
    for name, request, response, streams in methods():
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        handlers[name] = make(
            streaming_method(service, name) if streams else unary_method(service, name, getattr(grpc_methods, name)),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        port = _add_port(server, address, service)
    except RuntimeError:
        await server.stop(None)
        raise UsageError(f"grpc_port: can't listen on {address}; choose with --host and --grpc_port") from None
    await server.start()
    log.event("listening", url=f"{'grpcs' if settings.tls_cert else 'grpc'}://{host}:{port}")
    return server, port


def _add_port(server: grpc.aio.Server, address: str, service: Service) -> int:
    settings = service.settings
    if not settings.tls_cert or not settings.tls_key:
        return server.add_insecure_port(address)
    with open(settings.tls_key, "rb") as key, open(settings.tls_cert, "rb") as certificate:
        pairs = [(key.read(), certificate.read())]
    return server.add_secure_port(address, grpc.ssl_server_credentials(pairs))


def unary_method(service: Service, name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A method of the service, as gRPC calls it."""

    async def handle(request: Any, context: Any) -> Any:
        call = _enter(service, context)
        try:
            return await _answer(service, name, method, request, context, call)
        except Refusal as refusal:
            forget(refusal)
            _refuse(context, refusal)
            return None  # with a status that is not OK, gRPC sends no message
        finally:
            service.door.leave(call)

    return handle


def _refuse(context: Any, refusal: Refusal) -> None:
    """Set the status; `context.abort` would raise an error that holds the request for a while."""
    code = _CODES.get(refusal.status, grpc.StatusCode.INTERNAL)
    if refusal.late:
        code = grpc.StatusCode.DEADLINE_EXCEEDED
    elif refusal.retry_after_s is not None:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", str(round(refusal.retry_after_s * 1000))),))
    context.set_code(code)
    context.set_details(refusal.message)


def streaming_method(service: Service, name: str) -> Callable[..., AsyncIterator[Any]]:
    """`ModelStreamInfer`: one answer for each request, in order, an error being an answer too."""

    async def handle(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            call = _enter(service, context)
            try:
                answer = await _answer(service, name, grpc_methods.ModelInfer, request, context, call)
                yield grpc_methods.stream_answer(answer)
            except Refusal as refusal:
                forget(refusal)
                yield grpc_methods.stream_error(request.id, refusal.message)
            finally:
                service.door.leave(call)

    return handle


async def _answer(
    service: Service, name: str, method: Callable[..., Awaitable[Any]], request: Any, context: Any, call: Call
) -> Any:
    """What a method gives; whatever comes of it is counted and logged. Raises `Refusal`."""
    status = CLIENT_GONE
    metadata = dict(context.invocation_metadata() or ())
    try:
        with service.tracing.request(call, name, {k: v for k, v in metadata.items() if isinstance(v, str)}):
            if name not in _OPEN:
                key, plain = metadata.get("authorization", ""), metadata.get("x-api-key", "")
                check_key(service.settings.api_keys, str(key), str(plain))
                if service.door.closing:  # gRPC would cancel what it has not handed over when it stops
                    raise busy("the server is stopping")
            remaining = context.time_remaining()
            if remaining is not None:
                if remaining <= 0:
                    raise late(0)
                call.shorten(remaining)
            answer = await method(service, call, request)
        status = 200
        return answer
    except Refusal as refusal:
        status = refusal.status
        raise
    except asyncio.CancelledError:
        raise
    except Exception as error:
        status = 500
        log.fault(error, request_id=call.request_id)
        forget(error)
        raise internal(call) from None
    finally:
        call.count(good=status == 200)
        service.metrics.request(call, f"grpc/{name}", status)
        if service.settings.access_log:
            log.event_soon("request", **access_record(call, "gRPC", name, status))


def _enter(service: Service, context: Any) -> Call:
    given = dict(context.invocation_metadata() or ()).get("x-request-id", "")
    return service.door.enter(given if isinstance(given, str) else "")
