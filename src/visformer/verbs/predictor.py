"""Images to labels with a trained checkpoint: `Predictor("best.safetensors").predict(["cat.jpg"])`.

Threads decode and preprocess ahead of the model (Pillow releases Python's lock while it does), the model takes whole
batches, and the records come out in the order of the images. At most two batches are held at a time, however many
images there are. What computes is a `Classifier`: a checkpoint by torch (predictor_torch.py), or a bundle by its
engine, without torch, whose import takes longer than labelling a few pictures.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps

from visformer.bundles.bundle import Bundle, is_bundle
from visformer.data import imagenet
from visformer.data.decode import MODES, Box, ImageError, Resized, open_reduced
from visformer.errors import UsageError
from visformer.machine import available_cores

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
R = TypeVar("R")
ImageLike = str | Path | bytes | Image.Image | np.ndarray


class Classifier(Protocol):
    """What a `Predictor` asks."""

    class_names: list[str]

    @property
    def in_channels(self) -> int:
        """1, 3 or 4."""
        ...

    @property
    def reduces(self) -> Resized | None:
        """See `Preprocessing.reduces`."""
        ...

    def pixels(self, image: Image.Image, box: Box | None) -> np.ndarray:
        """PIL image, and the part of it that is the picture -> uint8 (height, width, C), resized and cropped."""
        ...

    def best(self, batch: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """uint8 (B, height, width, C) -> whether the logits are finite (B); the `count` highest probabilities, and the
        classes that have them, (B, count) each, the highest first and equal ones in the order of the classes."""
        ...


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
        model: str | Path | Bundle | nn.Module,
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
        self._classifier = _classifier(model, device, amp_level, amp_dtype)
        self.class_names = list(self._classifier.class_names)
        if not self.class_names:
            raise UsageError(f"{model}: has no classes, so it gives features and not labels")
        self.descriptions = imagenet.describe(self.class_names)
        self.top_k = min(top_k, len(self.class_names))
        self.batch_size = batch_size
        self.num_workers = min(8, available_cores()) if num_workers is None else num_workers

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

    def _prepare(self, item: tuple[int, ImageLike]) -> tuple[str, np.ndarray | str]:
        """An image by its position -> its name and its pixels, uint8 (H, W, C), or the reason why there are none."""
        position, image = item
        name = os.fspath(image) if isinstance(image, (str, Path)) else f"image[{position}]"
        box = None
        try:
            if isinstance(image, np.ndarray):
                picture = _from_array(image, name)
            elif isinstance(image, Image.Image):
                picture = ImageOps.exif_transpose(image)
            else:
                picture, box = open_reduced(image, self._classifier.in_channels, self._classifier.reduces)
            return name, self._classifier.pixels(picture, box)
        except ImageError as error:
            return name, error.reason
        except (OSError, SyntaxError, MemoryError) as error:  # a PIL image that is decoded only here
            return name, " ".join(str(error).split()) or type(error).__name__

    def _records(self, batch: list[tuple[str, np.ndarray | str]]) -> Iterator[dict[str, Any]]:
        pixels = [result for _, result in batch if isinstance(result, np.ndarray)]
        labelled = iter(self._label(np.stack(pixels)) if pixels else [])
        for name, result in batch:
            if isinstance(result, str):
                yield {"path": name, "error": result}
            else:
                predictions = next(labelled)
                failure = "the model's output is not finite; try amp_level O0, or another checkpoint"
                yield {"path": name, "predictions": predictions} if predictions else {"path": name, "error": failure}

    def _label(self, pixels: np.ndarray) -> list[list[dict[str, Any]]]:
        """uint8 (B, H, W, C) -> for each image its best classes; an empty list where the logits are not finite."""
        finite, probabilities, classes = (values.tolist() for values in self._classifier.best(pixels, self.top_k))
        return [
            [self._prediction(index, probability) for probability, index in zip(values, indices, strict=True)]
            if good
            else []
            for good, values, indices in zip(finite, probabilities, classes, strict=True)
        ]

    def _prediction(self, index: int, probability: float) -> dict[str, Any]:
        """A class with its probability, and with words for a class of ImageNet, whose label is a WordNet id."""
        label = self.class_names[index]
        words = {"description": self.descriptions[label]} if label in self.descriptions else {}
        return {"label": label, **words, "index": index, "probability": probability}


class BundleClassifier:
    """An exported bundle, computed by its engine."""

    def __init__(self, bundle: Bundle) -> None:
        self.class_names = bundle.labels
        self._preprocessing, self._engine = bundle.preprocessing, bundle.engine()
        self.in_channels, self.reduces = self._preprocessing.in_channels, self._preprocessing.reduces

    def pixels(self, image: Image.Image, box: Box | None) -> np.ndarray:
        """See `Classifier`."""
        return self._preprocessing.pixels(image, box)

    def best(self, batch: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Classifier`."""
        logits = self._engine.run(self._preprocessing.normalize(batch))
        finite = np.asarray(np.isfinite(logits).all(axis=1))
        powers = np.exp(np.where(finite[:, None], logits, 0) - np.where(finite, logits.max(axis=1), 0)[:, None])
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
        return finite, np.take_along_axis(probabilities, order, axis=1), order


def _classifier(model: str | Path | Bundle | nn.Module, device: str, amp_level: str, amp_dtype: str) -> Classifier:
    if isinstance(model, (str, Path)) and is_bundle(model):
        model = Bundle.open(model)
    if isinstance(model, Bundle):
        if device.lower() not in ("auto", "cpu"):
            from visformer.distributed import select_device

            select_device(device)  # says when there is none such; the engine computes on the CPU
        return BundleClassifier(model)
    from visformer.verbs.predictor_torch import TorchClassifier

    return TorchClassifier(model, device, amp_level, amp_dtype)


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
