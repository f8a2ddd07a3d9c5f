"""The HTTP application: routes, errors as `{"error": ...}`, and the front door around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from visformer.serving.decoding import Decoder
from visformer.serving.door import Door
from visformer.serving.explain import explain_router
from visformer.serving.front import Front, internal, refusal_response
from visformer.serving.inference import Inference
from visformer.serving.metrics import CONTENT_TYPE, Metrics
from visformer.serving.model import Loaded, load
from visformer.serving.predict import Predict, Shortcut, predict_router
from visformer.serving.refusals import Refusal, body_too_large, forget
from visformer.serving.repository import Repository
from visformer.serving.rest import protocol_router
from visformer.serving.settings import Settings
from visformer.serving.sources import Source
from visformer.serving.tracing import Tracing

PAGE = Path(__file__).parent / "page"  # the web page, where the package has one
_PAGE_HEADERS = {  # no code, no data and no frame of another host
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_STATUSES = {
    400: "The request is wrong",
    401: "An API key is needed",
    403: "Not allowed",
    404: "No such model, version or path",
    408: "The body came too slowly",
    413: "The body is too large",
    503: "Busy, loading or late; Retry-After says when to try again",
}


class Service:
    """Everything behind the ports, whichever protocol asks. It is made on no event loop, and used on one.

    Raises `UsageError` when the targets name nothing that can be served.
    """

    def __init__(
        self, targets: list[str], settings: Settings, loader: Callable[[Source, Settings], Loaded] = load
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.tracing = Tracing(settings.tracing)
        self.repository = Repository(targets, settings, on_batch=self.metrics.batch, loader=loader)
        self.door = Door(settings)
        self.decoder = Decoder(settings.decode_threads, settings.max_pixels)
        self.inference = Inference(self.decoder, settings)
        self.metrics.watch(
            lambda: self.door.in_flight,
            lambda: sum(model.batcher.waiting for model in self.repository.models()),
            lambda: self.ready,
        )

    @property
    def ready(self) -> bool:
        """True when every model has been loaded, until the server is told to stop."""
        return self.repository.ready and not self.door.draining

    @property
    def release(self) -> str:
        """The package's version."""
        return release()

    def check_control(self, parameters: Mapping[str, Any]) -> None:
        """Raise `Refusal` 403 when models may not be loaded and unloaded from outside, 400 for files and settings."""
        if not self.settings.model_control:
            raise Refusal(403, "loading and unloading is switched off; see --model_control")
        if "config" in parameters or any(key.startswith("file:") for key in parameters):
            raise Refusal(400, "config and files can't be sent; models come from where the server was told")

    async def close(self) -> None:
        """After the last request."""
        await self.repository.close()
        self.decoder.close()
        self.tracing.close()


def make_app(service: Service) -> ASGIApp:
    """The application, front door and all."""
    settings = service.settings
    api = FastAPI(
        title="visformer",
        version=release(),
        description="Image classification: POST /predict, and the Open Inference Protocol below /v2.",
        max_body_size=settings.max_bytes,
        redoc_url=None,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
        },  # ours is in tracing.py
        responses={
            status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
            for status, text in _STATUSES.items()
        },
    )
    _add_errors(api, settings)
    predict = Predict(service.repository, service.inference, service.door)
    api.include_router(predict_router(predict))
    api.include_router(explain_router(service))
    api.include_router(protocol_router(service))

    @api.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    page = _add_page(api, service)
    app: ASGIApp = Front(Shortcut(api, predict), service.door, service.metrics, service.tracing, open_paths=page)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Inference-Header-Content-Length", "X-Request-Id", "Retry-After", "Server-Timing"],
        )
    return app


def release() -> str:
    """The package's version."""
    try:
        return version("visformer")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "0+unknown"


def _add_errors(api: FastAPI, settings: Settings) -> None:
    @api.exception_handler(Refusal)
    async def refused(request: Request, error: Any) -> Response:
        forget(error)
        return refusal_response(error)

    @api.exception_handler(Exception)
    async def fault(request: Request, error: Any) -> Response:
        return refusal_response(internal(request.scope["call"]))  # the front logs it

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return refusal_response(Refusal(400, f"{where}: {first['msg']}" if where else first["msg"]))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: Any) -> Response:
        if error.status_code == 413:
            return refusal_response(body_too_large(settings.max_bytes))
        refusal = Refusal(error.status_code, str(error.detail))
        response = refusal_response(refusal)
        response.headers.update(error.headers or {})
        return response


def _add_page(api: FastAPI, service: Service) -> frozenset[str]:
    """The web page at `/` and its files beside it, or where the package has none, a list of what else there is.

    Returns the paths.
    """
    if (PAGE / "index.html").is_file():
        files = {f"/{path.name}": path for path in PAGE.iterdir() if path.is_file()}
        files["/"] = PAGE / "index.html"
        for place, path in files.items():
            api.add_route(place, _file(path), include_in_schema=False)
        return frozenset(files)

    @api.get("/", include_in_schema=False)
    async def root() -> Response:
        return JSONResponse(
            {
                "name": "visformer",
                "version": release(),
                "models": service.repository.names(),
                "endpoints": {
                    "/predict": "POST an image: curl --data-binary @cat.jpg http://HOST:PORT/predict",
                    "/v2": "the Open Inference Protocol",
                    "/docs": "every endpoint, to be tried",
                    "/metrics": "for Prometheus",
                },
            }
        )

    return frozenset({"/"})


def _file(path: Path) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:
        return FileResponse(path, headers=_PAGE_HEADERS)

    return endpoint
