"""The Open Inference Protocol over REST: health, metadata, configuration, statistics, infer and the repository."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from visformer.serving import documents
from visformer.serving.door import Call, disconnected
from visformer.serving.infer import answer
from visformer.serving.refusals import bad, busy
from visformer.serving.request import InferRequest, Output
from visformer.serving.wire import packed, read_infer, read_json, unpacked, write_infer

if TYPE_CHECKING:
    from visformer.serving.app import Service

_INFER = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "parameters": {"type": "object"},
                        "inputs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name", "datatype", "shape"],
                                "properties": {
                                    "name": {"type": "string", "enum": ["image", "images"]},
                                    "datatype": {"type": "string", "enum": ["BYTES", "FP32"]},
                                    "shape": {"type": "array", "items": {"type": "integer"}},
                                    "parameters": {"type": "object"},
                                    "data": {"type": "array", "items": {}},
                                },
                            },
                        },
                        "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                    },
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_INFERRED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["model_name", "model_version", "outputs"]}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def protocol_router(service: Service) -> APIRouter:
    """Every route below /v2, for an application."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    _add_server(router, service)
    _add_models(router, service)
    _add_infer(router, service)
    _add_repository(router, service)
    return router


def _both(router: APIRouter, way: Callable[..., Any], path: str, summary: str, **more: Any) -> Callable[..., Any]:
    """Register an endpoint for a model's newest version and for a version that is named."""

    def register(endpoint: Callable[..., Any]) -> Callable[..., Any]:
        for place in ("/models/{name}", "/models/{name}/versions/{version}"):
            way(place + path, summary=summary, **more)(endpoint)
        return endpoint

    return register


def _add_server(router: APIRouter, service: Service) -> None:
    @router.get("", summary="What the server is")
    async def metadata() -> dict[str, Any]:
        return documents.server_metadata(service.release)

    @router.get("/health/live", summary="200 while the process answers")
    async def live() -> dict[str, Any]:
        return {"live": True}

    @router.get("/health/ready", summary="200 when every model is loaded; 503 before, and while stopping")
    async def ready() -> dict[str, Any]:
        return _yes({}, service.ready, "the server is loading or stopping")


def _add_models(router: APIRouter, service: Service) -> None:
    repository = service.repository

    @router.get("/models/stats", summary="Counts and times of every model")
    async def all_statistics() -> dict[str, Any]:
        return {"model_stats": [m.statistics.to_dict(m.name, m.version) for m in repository.models()]}

    @_both(router, router.get, "", "Inputs and outputs of a model")
    async def metadata(name: str, version: str = "") -> dict[str, Any]:
        return documents.model_metadata(repository.lease(name, version), repository.versions(name))

    @_both(router, router.get, "/ready", "200 when the model can be used")
    async def ready(name: str, version: str = "") -> dict[str, Any]:
        repository.lease(name, version)
        return _yes({"name": name}, not service.door.draining, "the server is stopping")

    @_both(router, router.get, "/config", "Configuration of a model")
    async def config(name: str, version: str = "") -> dict[str, Any]:
        return documents.model_config(repository.lease(name, version), service.settings)

    @_both(router, router.get, "/stats", "Counts and times of a model")
    async def statistics(name: str, version: str = "") -> dict[str, Any]:
        model = repository.lease(name, version)
        return {"model_stats": [model.statistics.to_dict(model.name, model.version)]}


def _yes(about: dict[str, Any], good: bool, otherwise: str) -> dict[str, Any]:
    if not good:
        raise busy(otherwise)
    return {**about, "ready": True}


def _add_infer(router: APIRouter, service: Service) -> None:
    about = "Logits, probabilities or labels of images"

    @_both(router, router.post, "/infer", about, openapi_extra=_INFER, responses=_INFERRED)
    async def infer(request: Request, name: str, version: str = "") -> Response:
        call: Call = request.scope["call"]
        headers = request.headers
        with service.repository.lease(name, version) as model:
            body = await service.door.body(call, request)

            async def work() -> Response:
                asked = await service.decoder.call(
                    _read,
                    body,
                    headers.get("content-encoding", ""),
                    headers.get("inference-header-content-length"),
                    service.settings.max_bytes,
                )
                accepted = headers.get("accept-encoding", "")

                def write(outputs: list[Output]) -> Response:
                    return _response(*write_infer(model.name, model.version, asked.id, outputs), accepted)

                return await answer(service, call, model, asked, write)

            return await service.door.work(call, work(), lambda: disconnected(request))


def _read(body: bytes, encoding: str, header_length: str | None, max_bytes: int) -> InferRequest:
    return read_infer(unpacked(body, encoding, max_bytes), header_length)


def _response(data: bytes, json_length: int | None, accepted: str) -> Response:
    headers = {} if json_length is None else {"Inference-Header-Content-Length": str(json_length)}
    data, encoding = packed(data, accepted)
    if encoding:
        headers["Content-Encoding"] = encoding
    kind = "application/json" if json_length is None else "application/octet-stream"
    return Response(data, media_type=kind, headers={**headers, "Vary": "Accept-Encoding"})


def _add_repository(router: APIRouter, service: Service) -> None:
    async def parameters(request: Request) -> dict[str, Any]:
        body = await service.door.body(request.scope["call"], request)
        document = read_json(body) if body.strip() else {}
        if not isinstance(document, dict) or not isinstance(document.get("parameters") or {}, dict):
            raise bad("the request must be a JSON object")
        return {**document, **(document.get("parameters") or {})}

    @router.post("/repository/index", summary="Every model and version, with its state")
    async def index(request: Request) -> JSONResponse:
        return JSONResponse(service.repository.index(ready=(await parameters(request)).get("ready") is True))

    @router.post("/repository/models/{name}/load", summary="Load a model, or its newest version")
    async def load(request: Request, name: str) -> JSONResponse:
        given = await parameters(request)
        service.check_control(given)
        await service.repository.load(name)
        return JSONResponse({})

    @router.post("/repository/models/{name}/unload", summary="Stop serving a model")
    async def unload(request: Request, name: str) -> JSONResponse:
        await parameters(request)
        service.check_control({})
        await service.repository.unload(name)
        return JSONResponse({})
