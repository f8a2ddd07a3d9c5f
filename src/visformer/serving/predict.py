"""`POST /predict`, for curl and browsers: images in, labels out, as `visformer predict` words them.

curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top_k=3'
curl -F image=@cat.jpg -F image=@dog.jpg http://127.0.0.1:8000/predict

FastAPI describes the route, and answers what is unusual or wrong. A plain request, as a service sends them by the
thousand, goes around it (`Shortcut`), as its routing and validation cost the event loop time for every image.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import ASGIApp, Receive, Scope, Send

from visformer.serving.batching import Computed
from visformer.serving.door import Call, Door, disconnected
from visformer.serving.infer import WRITTEN_AT_ONCE
from visformer.serving.inference import Inference, predictions
from visformer.serving.model import ServedModel
from visformer.serving.refusals import Refusal, bad
from visformer.serving.repository import Repository

PATH = "/predict"
_ROUTE = SimpleNamespace(path=PATH)  # where a router says which route it took
_PLAIN = re.compile(rb"(?:model=([A-Za-z0-9_-]{1,100}))?(?:^|&|$)(?:top_k=([1-9][0-9]{0,3}))?")
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": _BINARY,
            "image/*": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["image"],
                }
            },
        },
    }
}


class Predict:
    """What the route does, once its parameters are known."""

    def __init__(self, repository: Repository, inference: Inference, door: Door) -> None:
        self.repository, self.inference, self.door = repository, inference, door

    async def __call__(
        self, request: Request, model: str, version: str, top_k: int | None, timeout_s: float | None
    ) -> JSONResponse:
        """The answer to a request. Raises `Refusal`."""
        call: Call = request.scope["call"]
        if timeout_s is not None:
            call.shorten(timeout_s)
        with self.repository.lease(model, version) as leased:
            body = await self.door.body(call, request)
            content_type = request.headers.get("content-type", "")
            top_k = top_k or self.inference.settings.top_k
            work = _label(self.inference, call, leased, body, content_type, top_k)
            return await self.door.work(call, work, lambda: disconnected(request))


def predict_router(predict: Predict) -> APIRouter:
    """The route, for an application."""
    router = APIRouter(tags=["predict"])

    @router.post(PATH, summary="Label one image, or several", openapi_extra=_BODY)
    async def described(
        request: Request,
        model: Annotated[str, Query(description="name; needed when there are several", max_length=200)] = "",
        version: Annotated[str, Query(description="empty: the newest", max_length=20)] = "",
        top_k: Annotated[int | None, Query(description="labels for each image, best first", ge=1, le=100_000)] = None,
        timeout_s: Annotated[float | None, Query(description="deadline, in seconds", ge=0.001, le=86_400)] = None,
    ) -> JSONResponse:
        return await predict(request, model, version, top_k, timeout_s)

    return router


class Shortcut:
    """An application, but for plain requests to the route, which it answers itself: those without parameters, or with
    `model` and `top_k` that need no second look."""

    def __init__(self, app: ASGIApp, predict: Predict) -> None:
        self.app, self.predict = app, predict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        plain = _PLAIN.fullmatch(scope["query_string"])
        if plain is None:
            await self.app(scope, receive, send)
            return
        model, top_k = (value.decode() if value else "" for value in plain.groups())
        scope["route"] = _ROUTE
        response = await self.predict(Request(scope, receive), model, "", int(top_k) if top_k else None, None)
        await response(scope, receive, send)


async def _label(
    inference: Inference, call: Call, model: ServedModel, body: bytes, content_type: str, top_k: int
) -> JSONResponse:
    files = [("", body)]
    if is_form(content_type):
        files = await inference.decoder.call(files_of, body, content_type, inference.settings.max_images)
    results = await inference.images(call, model, [data for _, data in files])
    names = [name for name, _ in files]
    if len(results) * len(model.labels) <= WRITTEN_AT_ONCE:
        return _answer(model, names, results, top_k)
    return await inference.decoder.call(_answer, model, names, results, top_k)


def _answer(model: ServedModel, names: list[str], results: list[Computed | Refusal], top_k: int) -> JSONResponse:
    """A record for each image. Raises the first refusal when there is nothing else to tell."""
    records: list[dict[str, Any]] = []
    refused: list[Refusal] = []
    for name, result in zip(names, results, strict=True):
        if isinstance(result, Refusal):
            refused.append(result)
            records.append({"path": name, "error": result.message})
        else:
            records.append({"path": name, "predictions": predictions(model, result, top_k)})
    if len(refused) == len(records):
        raise refused[0]
    return JSONResponse({"model": model.name, "version": model.version, "images": records})


def is_form(content_type: str) -> bool:
    """True for a body of several parts, which takes a while to take apart."""
    return parse_options_header(content_type)[0] == b"multipart/form-data"


def files_of(body: bytes, content_type: str, at_most: int) -> list[tuple[str, bytes]]:
    """(file name, bytes) of each part of a form, or the whole body as one without a name. Raises `Refusal` 400."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return [("", body)]
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 200:
        raise bad("multipart/form-data: its header has no boundary")
    form = _Form(at_most)
    try:
        parser = MultipartParser(boundary, form.callbacks(), max_size=max(1, len(body)))
        parser.write(body)
        parser.finalize()
    except MultipartParseError:
        raise bad("multipart/form-data: the body is not what its header says") from None
    if not form.complete:
        raise bad("multipart/form-data: the body is cut short")
    if not form.files:
        raise bad("multipart/form-data: it has no part with an image")
    return form.files


class _Form:
    """Collects the parts of a form in memory; the body is there already, and is bounded."""

    def __init__(self, at_most: int) -> None:
        self.files: list[tuple[str, bytes]] = []
        self.complete = False
        self._at_most = at_most
        self._name, self._value, self._data = bytearray(), bytearray(), bytearray()
        self._disposition = b""

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self._data.extend(data[start:end]),
            "on_part_end": self._end,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        if len(self.files) >= self._at_most:
            raise bad(f"more than {self._at_most} images in one request")
        self._data, self._disposition = bytearray(), b""

    def _header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename", b"") or options.get(b"name", b"")
        self.files.append((name.decode("utf-8", "replace")[:200], bytes(self._data)))

    def _finish(self) -> None:
        self.complete = True
