"""Images to labels with a trained checkpoint: `Predictor("best.safetensors").predict(["cat.jpg"])`.

Threads decode and preprocess ahead of the model (Pillow releases Python's lock while it does), the model takes whole
batches, and the records come out in the order of the images. At most two batches are held at a time, however many
images there are.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from visformer.bundles.bundle import is_bundle
from visformer.data import imagenet
from visformer.data.decode import MODES, ImageError, open_image
from visformer.data.loader import available_cores
from visformer.data.preprocessing import Preprocessing
from visformer.distributed import autocast, select_device
from visformer.errors import UsageError
from visformer.pretrained import load

T = TypeVar("T")
R = TypeVar("R")
ImageLike = str | Path | bytes | Image.Image | np.ndarray


class Predictor:
    """Labels images with a classifier.

    `model` is a checkpoint, as `visformer.load` takes it, an exported bundle, or a model as `load` returns it (it is
    moved to the device and set to eval mode; a bundle's engine computes on the CPU, in its own precision). `device` is
    auto, cpu, cuda, mps, xpu or npu; `amp_level` O0 computes in fp32, O1 to O3 in `amp_dtype` (bf16 or fp16).
    `num_workers` is the number of decoding threads (None: one for each core, at most 8; 0: none).
    Raises `UsageError` for a checkpoint that can't be used.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        device: str = "auto",
        top_k: int = 5,
        batch_size: int = 64,
        num_workers: int | None = None,
        amp_level: str = "O0",
        amp_dtype: str = "bf16",
    ) -> None:
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if value < 1:
                raise UsageError(f"{name}: {value} is out of range; it must be at least 1")
        self.device = select_device(device)
        loaded: Any = model if isinstance(model, nn.Module) else _load(model)
        self.class_names: list[str] = list(loaded.class_names)
        if not self.class_names:
            raise UsageError(f"{model}: has no classes, so it gives features and not labels")
        self.descriptions = imagenet.describe(self.class_names)
        self.preprocessing: Preprocessing = loaded.preprocessing
        self.model = loaded.to(self.device, memory_format=torch.channels_last).eval()
        self.top_k = min(top_k, len(self.class_names))
        self.batch_size = batch_size
        self.num_workers = min(8, available_cores()) if num_workers is None else num_workers
        self._precision = functools.partial(autocast, self.device, amp_level, amp_dtype)

    def predict(self, images: Iterable[ImageLike] | ImageLike) -> list[dict[str, Any]]:
        """One record for each image, in order; see `stream`."""
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageLike] | ImageLike) -> Iterator[dict[str, Any]]:
        """Yield one record for each image, in order, reading `images` no further ahead than two batches.

        An image is a path, the bytes of a file, a PIL image, or a uint8 array (H, W) or (H, W, C) in RGB order,
        values in [0, 255]. A record is `{"path", "predictions": [{"label", "index", "probability"}, ...]}` with the
        `top_k` best classes, best first, each with a "description" where its label is an ImageNet id; or `{"path",
        "error"}` for what can't be read. An image that is no file is called `image[position]`.
        """
        if isinstance(images, (str, Path, bytes, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        ready = _map_ahead(self._prepare, enumerate(images), self.num_workers, self.batch_size + 2 * self.num_workers)
        while batch := list(itertools.islice(ready, self.batch_size)):
            yield from self._records(batch)

    def _prepare(self, item: tuple[int, ImageLike]) -> tuple[str, torch.Tensor | str]:
        """An image by its position -> its name and its uint8 tensor (C, H, W), or the reason why there is none."""
        position, image = item
        name = os.fspath(image) if isinstance(image, (str, Path)) else f"image[{position}]"
        try:
            if isinstance(image, np.ndarray):
                picture = _from_array(image, name)
            elif isinstance(image, Image.Image):
                picture = ImageOps.exif_transpose(image)
            else:
                picture = open_image(image, self.preprocessing.in_channels)
            return name, self.preprocessing(picture)
        except ImageError as error:
            return name, error.reason
        except (OSError, SyntaxError, MemoryError) as error:  # a PIL image that is decoded only here
            return name, " ".join(str(error).split()) or type(error).__name__

    def _records(self, batch: list[tuple[str, torch.Tensor | str]]) -> Iterator[dict[str, Any]]:
        tensors = [result for _, result in batch if isinstance(result, torch.Tensor)]
        labelled = iter(self._label(torch.stack(tensors)) if tensors else [])
        for name, result in batch:
            if isinstance(result, str):
                yield {"path": name, "error": result}
            else:
                predictions = next(labelled)
                failure = "the model's output is not finite; try amp_level O0, or another checkpoint"
                yield {"path": name, "predictions": predictions} if predictions else {"path": name, "error": failure}

    @torch.no_grad()
    def _label(self, images: torch.Tensor) -> list[list[dict[str, Any]]]:
        """uint8 (B, C, H, W) -> for each image its best classes; an empty list where the logits are not finite."""
        images = images.to(self.device, memory_format=torch.channels_last)
        with self._precision():
            logits = self.model(self.preprocessing.normalize(images))
        finite = logits.isfinite().all(dim=1).tolist()
        # A stable sort, so that equal classes come in their order on every device.
        probabilities, order = logits.float().softmax(dim=1).sort(dim=1, descending=True, stable=True)
        best = zip(probabilities[:, : self.top_k].tolist(), order[:, : self.top_k].tolist(), strict=True)
        return [
            [self._prediction(index, probability) for probability, index in zip(values, indices, strict=True)]
            if good
            else []
            for good, (values, indices) in zip(finite, best, strict=True)
        ]

    def _prediction(self, index: int, probability: float) -> dict[str, Any]:
        """A class with its probability, and with words for a class of ImageNet, whose label is a WordNet id."""
        label = self.class_names[index]
        words = {"description": self.descriptions[label]} if label in self.descriptions else {}
        return {"label": label, **words, "index": index, "probability": probability}


def _load(source: str | Path) -> nn.Module:
    """The model of a checkpoint or a bundle."""
    if not is_bundle(source):
        return load(source)
    from visformer.bundles.adapter import bundle_model

    return bundle_model(source)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in MODES)
    if array.dtype != np.uint8 or not shape_fits or array.size == 0:
        raise UsageError(
            f"{name}: an array of shape {array.shape} and type {array.dtype} is no image; "
            "give uint8 (H, W) or (H, W, C) with 1, 3 or 4 channels"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _map_ahead(function: Callable[[T], R], items: Iterable[T], num_threads: int, ahead: int) -> Iterator[R]:
    """`map` in threads, in order, with at most `ahead` items taken from `items` and not yet yielded."""
    if num_threads < 1:
        yield from map(function, items)
        return
    items = iter(items)
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    try:
        while True:
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
