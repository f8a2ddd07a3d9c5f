"""The bare loop that `visformer bench --what serve` holds the server against: decode and compute, nothing else.

The model is opened as the server opens it. Images are decoded and preprocessed in as many threads as the server has for
it; while a batch is computed, the next one is decoded, as in the server.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visformer.data.decode import open_reduced
from visformer.errors import VisformerError
from visformer.serving.model import Loaded, load
from visformer.serving.settings import Settings
from visformer.serving.sources import scan


@dataclass
class Pass:
    """Images computed, the seconds of the clock that it took, and of processors, in this process."""

    images: int
    seconds: float
    processor_s: float


class Loop:
    """A model and the bytes of images. `batches(size)` decodes ahead: keep the iterator from turn to turn."""

    def __init__(self, loaded: Loaded, images: list[bytes], threads: int) -> None:
        self.loaded = loaded
        self._images = itertools.cycle(images)
        self._pool = ThreadPoolExecutor(threads)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """float32 (size, C, H, W), without end; the next is being decoded while one is used. A single image is decoded
        when it is asked for, as nobody who waits for one could send the next."""
        if size == 1:
            while True:
                yield self._decoded(next(self._images))[None]
        ahead = self._begin(size)
        while True:
            batch, ahead = ahead, self._begin(size)
            yield np.stack([row.result() for row in batch])

    def turn(self, batches: Iterator[np.ndarray], seconds: float) -> Pass:
        """Compute batches for so long."""
        images, began, processor = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            images += len(self.loaded.run(next(batches)))
        return Pass(images, time.perf_counter() - began, time.process_time() - processor)

    def _begin(self, size: int) -> list[Future[np.ndarray]]:
        return [self._pool.submit(self._decoded, data) for data in itertools.islice(self._images, size)]

    def _decoded(self, data: bytes) -> np.ndarray:
        preprocessing = self.loaded.preprocessing
        pixels = preprocessing.pixels(*open_reduced(data, preprocessing.in_channels, preprocessing.reduces))
        return preprocessing.normalize(pixels[None])[0]


def run_loop(pipe: Any, target: str, folder: str, device: str, threads: int, batch_size: int) -> None:
    """The process of the loop: gets (batch size, seconds) from `pipe` and gives a `Pass`, until it gets None. Asked for
    "about" it says what it computes; what can't be opened is given as its error."""
    try:
        (found,) = scan([target]).values()
        settings = Settings(device=device, batch_size=batch_size, decode_threads=threads)
        loaded = load(found.versions[max(found.versions)], settings)
    except VisformerError as error:
        pipe.recv()
        pipe.send(error)
        return
    loop = Loop(loaded, [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))], threads)
    batches = {size: loop.batches(size) for size in {1, batch_size}}
    while (asked := pipe.recv()) is not None:
        if asked == "about":
            about = {"model": loaded.model_name, "engine": loaded.platform, "precision": loaded.precision}
            pipe.send(about | {"image_size": list(loaded.preprocessing.image_size)})
        else:
            size, seconds = asked
            pipe.send(loop.turn(batches[size], seconds))
