"""`POST /explain`: where the model looked, as a small grid over the part of the image that it saw (`heatmaps.py`).

    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/explain?method=attention'

The answer names the class (without `index` the best one), the method and the others that the model allows, and has

    values   rows of numbers from -1 to 1; times `scale` they are in `unit`
    image    width and height of the upright image, pixels
    crop     left, top, width and height of the part that the model saw, in these pixels
    grid     the same of what the rows of `values` cover evenly: the crop, or more where its last row and column are
             filled up with zeros for the model's patches
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from visformer.data.decode import upright_size
from visformer.serving import heatmaps
from visformer.serving.decoding import decoded
from visformer.serving.door import Call, disconnected
from visformer.serving.insides import Inside
from visformer.serving.model import ServedModel
from visformer.serving.predict import files_of
from visformer.serving.refusals import bad

if TYPE_CHECKING:
    from visformer.serving.app import Service

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": _BINARY, "image/*": _BINARY}}}


def explain_router(service: Service) -> APIRouter:
    """The route, for an application."""
    router = APIRouter(tags=["predict"])

    @router.post("/explain", summary="Where the model looked in one image", openapi_extra=_BODY)
    async def explain(
        request: Request,
        model: Annotated[str, Query(description="name; needed when there are several", max_length=200)] = "",
        version: Annotated[str, Query(description="empty: the newest", max_length=20)] = "",
        method: Annotated[str, Query(description="activation, attention or occlusion", max_length=20)] = "",
        index: Annotated[int | None, Query(description="number of the class; none: the best one", ge=0)] = None,
        timeout_s: Annotated[float | None, Query(description="deadline, in seconds", gt=0, le=86_400)] = None,
    ) -> JSONResponse:
        call: Call = request.scope["call"]
        if timeout_s is not None:
            call.shorten(timeout_s)
        with service.repository.lease(model, version) as leased:
            call.model, call.version, call.images = leased.name, leased.version, 1
            if index is not None and index >= len(leased.labels):
                raise bad(f"index: {index} is out of range; the model has {len(leased.labels)} classes, from 0 up")
            body = await service.door.body(call, request)
            work = _explain(service, leased, body, request.headers.get("content-type", ""), method, index)
            return await service.door.work(call, work, lambda: disconnected(request))

    return router


def methods(inside: Inside | None) -> list[str]:
    """What can be done with a model, the best first: a last map of a single place tells nothing apart."""
    if inside is None or inside.grid == (1, 1):
        return [heatmaps.OCCLUSION]
    return [heatmaps.ACTIVATION, *([heatmaps.ATTENTION] if inside.attends else []), heatmaps.OCCLUSION]


async def _explain(
    service: Service, model: ServedModel, body: bytes, content_type: str, method: str, index: int | None
) -> JSONResponse:
    call = service.decoder.call
    files = await call(files_of, body, content_type, 1)
    row, (height, width) = await call(_decoded, files[0][1], model, service.settings.max_pixels)
    inside = await call(model.inside)
    possible = methods(inside)
    if method and method not in possible:
        raise bad(f"method: {method!r} is not possible with model {model.name}; it must be {' or '.join(possible)}")
    method = method or possible[0]
    crop = grid = heatmaps.crop_box(model.preprocessing, height, width)
    if inside is None or method == heatmaps.OCCLUSION:
        index, values = await _occlusion(model, row, index, service.settings.batch_size)
    else:
        index, values = await call(_looked, inside, row, method, index)
        grid = _covered(crop, inside, model)
    if not np.isfinite(values).all():
        raise bad("the image can't be explained: the model's output for it is not finite")
    numbers, scale = heatmaps.scaled(values)
    label = model.labels[index]
    words = {"description": model.descriptions[label]} if label in model.descriptions else {}
    answer: dict[str, Any] = {
        "model": model.name,
        "version": model.version,
        "method": method,
        "methods": possible,
        "label": label,
        **words,
        "index": index,
        "unit": heatmaps.UNITS[method],
        "scale": scale,
        "values": numbers,
        "image": {"width": width, "height": height},
        "crop": crop.to_dict(),
        "grid": grid.to_dict(),
    }
    return JSONResponse(answer)


def _covered(crop: heatmaps.Box, inside: Inside, model: ServedModel) -> heatmaps.Box:
    """What the last map stands for: patches are whole, so it may reach over the crop's right and lower edge."""
    height, width = model.preprocessing.image_size
    rows, columns = inside.grid
    return heatmaps.Box(
        crop.left, crop.top, crop.width * columns * inside.stride / width, crop.height * rows * inside.stride / height
    )


def _decoded(data: bytes, model: ServedModel, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """An image file -> the model's input, float32 (C, H, W), and (height, width) of the upright image"""
    row = decoded(data, model.preprocessing, max_pixels)
    width, height = upright_size(data)
    return row, (height, width)


def _looked(inside: Inside, row: np.ndarray, method: str, index: int | None) -> tuple[int, np.ndarray]:
    last = inside.last_map(row)
    index = int(last.logits.argmax()) if index is None else index
    if method == heatmaps.ATTENTION:
        assert last.attention is not None
        return index, last.attention
    return index, heatmaps.class_activation(last.features, *inside.head(index))


async def _occlusion(model: ServedModel, row: np.ndarray, index: int | None, batch_size: int) -> tuple[int, np.ndarray]:
    """The images go through the model's queue, a batch at a time, so that other requests come in between."""
    whole = await _logits(model, [row])
    index = int(whole[0].argmax()) if index is None else index
    grid = heatmaps.occlusion_grid(*row.shape[1:])
    covered = iter(heatmaps.occluded(row, grid))
    parts = []
    while rows := list(islice(covered, batch_size)):
        parts.append(await _logits(model, rows))
    return index, heatmaps.occlusion(whole[0], np.concatenate(parts), index, grid)


async def _logits(model: ServedModel, rows: Iterable[np.ndarray]) -> np.ndarray:
    computed = await asyncio.gather(*model.batcher.submit(list(rows)))
    return np.stack([one.logits for one in computed])
