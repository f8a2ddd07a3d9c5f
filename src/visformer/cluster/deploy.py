"""The application that Ray Serve runs: in each replica the whole of our server, behind Serve's proxies.

`visformer.cluster.deploy:build` is the import path of a Serve config file (`document.py` writes one). A replica decodes
and batches as the server on one machine does; the proxies find it, keep it filled, and replace it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from visformer.cluster.document import DEPLOYMENT
from visformer.cluster.remote_calls import Context, Refused
from visformer.errors import UsageError, nearest
from visformer.serving import grpc_methods, log
from visformer.serving.app import Service, make_app
from visformer.serving.grpc_server import streaming_method, unary_method
from visformer.serving.messages import methods
from visformer.serving.repository import describe
from visformer.serving.settings import Settings


def build(arguments: dict[str, Any], options: dict[str, Any] | None = None) -> Application:
    """The application for `models` (a list of what to serve) and `settings` (fields of `Settings`).

    `options` are those of its deployment, which a config file has beside the arguments. Raises `UsageError` for names
    that mean nothing.
    """
    known = ("models", "settings", "content")
    for name in arguments:
        if name not in known:
            raise UsageError(f"{name}: no such argument{nearest(name, known)}")
    settings_of(arguments.get("settings") or {})
    models = arguments.get("models")
    if not isinstance(models, list) or not models:
        raise UsageError("models: must be a list of what to serve, one thing at least")
    deployment: Any = serve.deployment(name=DEPLOYMENT, **(options or {}))(serve.ingress()(Replica))
    return deployment.bind(models, arguments.get("settings") or {}, arguments.get("content"))


def settings_of(told: dict[str, Any]) -> Settings:
    """Settings from plain data. Raises `UsageError` for a name that there is not."""
    known = Settings.__dataclass_fields__
    for name in told:
        if name not in known:
            raise UsageError(f"settings: {name}: no such setting{nearest(name, known)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return Settings(**values)


class Replica:
    """One server without ports of its own. `content` is only there to be another when the models' files are."""

    async def __init__(self, models: list[str], settings: dict[str, Any], content: Any = None) -> None:
        self.service = Service(models, settings_of(settings))
        await self.service.repository.start()
        for model in self.service.repository.models():
            log.event("loaded", **describe(model))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The whole application, front door and all; Serve asks for it once the models are loaded."""
        return make_app(self.service)

    def check_health(self) -> None:
        """Asked by Serve every few seconds; a replica that raises here is replaced."""
        if not self.service.ready:
            raise RuntimeError("not every model is loaded")

    async def __del__(self) -> None:
        """Serve calls this when the last request has been answered."""
        if hasattr(self, "service"):
            self.service.door.draining = True
            await self.service.close()


def _unary(name: str, parse: Any) -> Any:
    async def method(self: Replica, request: bytes, grpc_context: Any) -> Any:
        handle = unary_method(self.service, name, getattr(grpc_methods, name))
        answer = await handle(parse(request), Context(grpc_context))
        if answer is None:
            raise Refused(grpc_context.details())
        return answer

    return method


def _streaming(name: str, parse: Any) -> Any:
    async def method(self: Replica, requests: AsyncIterator[bytes], grpc_context: Any) -> AsyncIterator[Any]:
        async def parsed() -> AsyncIterator[Any]:
            async for request in requests:
                yield parse(request)

        async for answer in streaming_method(self.service, name)(parsed(), Context(grpc_context)):
            yield answer

    return method


for _name, _request, _, _streams in methods():  # Serve's proxy calls them by the protocol's names
    setattr(Replica, _name, (_streaming if _streams else _unary)(_name, _request.FromString))
