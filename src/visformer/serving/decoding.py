"""Image bytes to model input, in threads, within limits; the event loop never decodes.

A thread hands what it has decoded to the model's batcher itself: there is no way back to the event loop in between.

Each image is decoded for itself, before it joins a batch, so a broken one is refused alone. Its size is read from the
header first: a file of a few kB that would unfold to gigapixels costs nothing.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from visformer.bundles.pixels import ImagePreprocessing
from visformer.data.decode import ImageError, open_reduced, stored_size
from visformer.serving.batching import Answer, Batcher, Waiting
from visformer.serving.refusals import Refusal, bad, forget

T = TypeVar("T")


class Decoder:
    """Threads that decode. An image whose request has given up before its turn is not decoded."""

    def __init__(self, threads: int, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def feed(self, data: bytes, preprocessing: ImagePreprocessing, batcher: Batcher) -> Answer:
        """Decode an image file for a batcher. The future raises `Refusal` 400 for what can't be read; cancel it to
        withdraw the image."""
        answer: Answer = asyncio.get_running_loop().create_future()
        fed = time.perf_counter()

        def decode() -> None:
            self._pool.submit(self._feed, data, preprocessing, batcher, answer, fed, time.perf_counter())

        batcher.when_room(decode)
        return answer

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run anything else that takes the processor's time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, functools.partial(function, *arguments))

    def _feed(
        self,
        data: bytes,
        preprocessing: ImagePreprocessing,
        batcher: Batcher,
        answer: Answer,
        fed: float,
        started: float,
    ) -> None:
        if answer.done():
            batcher.give_room(1)
            return
        try:
            row = decoded(data, preprocessing, self.max_pixels)
        except BaseException as error:
            batcher.give_room(1)
            if isinstance(error, Refusal):
                forget(error)
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                answer.get_loop().call_soon_threadsafe(_fail, answer, error)
            return
        now = time.perf_counter()
        batcher.put([Waiting(row, answer, now, waited_s=started - fed, decode_s=now - started, has_room=True)])

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def decoded(data: bytes, preprocessing: ImagePreprocessing, max_pixels: int) -> np.ndarray:
    """The bytes of an image file -> float32 (C, H, W), the model's input. Raises `Refusal` 400."""
    if not data:
        raise bad("the image is empty")
    try:
        _check_size(data, max_pixels)
        image, box = open_reduced(data, preprocessing.in_channels, preprocessing.reduces)
        return preprocessing.normalize(preprocessing.pixels(image, box)[None])[0]
    except ImageError as error:
        raise bad(f"the image can't be read: {error.reason}") from None


def _fail(answer: Answer, error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)


def _check_size(data: bytes, max_pixels: int) -> None:
    try:
        pixels = math.prod(stored_size(data))
    except Image.DecompressionBombError:
        pixels = math.inf
    except Exception:  # what is wrong with it, `open_reduced` says
        return
    if pixels > max_pixels:
        raise bad(f"the image has more pixels than the {max_pixels:,} allowed")
