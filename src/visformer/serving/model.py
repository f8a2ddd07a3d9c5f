"""One version of a model, loaded: its engine behind a batcher, its labels, and a count of those who use it.

A model is leased for the whole of a request (`with model:`), so that an answer comes from one version however many
images it has, and `retire` waits for the last lease before the engine goes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from visformer.bundles.pixels import ImagePreprocessing
from visformer.data import imagenet
from visformer.errors import UsageError
from visformer.serving.batching import Batcher
from visformer.serving.insides import Inside, TorchInside, open_inside
from visformer.serving.settings import Settings
from visformer.serving.sources import Source
from visformer.serving.statistics import Statistics


@dataclass(frozen=True)
class Loaded:
    """What a source gives, before it is served. `run` takes float32 (B, C, H, W) and gives float32 (B, classes)."""

    run: Callable[[np.ndarray], np.ndarray]
    model_name: str
    labels: list[str]
    preprocessing: ImagePreprocessing
    platform: str
    precision: str
    any_size: bool  # takes every height and width that are multiples of 32
    open_inside: Callable[[], Inside | None] = lambda: None  # for heat maps; may take as long as loading
    warm: Callable[[], None] = lambda: None  # prepares for full batches; may take minutes, while others call `run`
    close: Callable[[], None] = lambda: None  # ends what `warm` has begun; `run` is not called any more


def load(source: Source, settings: Settings) -> Loaded:
    """Read a source and compute one image with it, so that the first request finds it warm; what full batches need is
    prepared in a thread that goes on.

    Raises `UsageError` or `RunError`; takes from tens of milliseconds to many seconds.
    """
    loaded = _load_bundle(source, settings) if source.bundle else _load_checkpoint(source, settings)
    shape = (1, loaded.preprocessing.in_channels, *loaded.preprocessing.image_size)
    loaded.run(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    threading.Thread(target=loaded.warm, name="visformer-warm").start()  # the process ends after it: no daemon
    return loaded


def _load_bundle(source: Source, settings: Settings) -> Loaded:
    from visformer.bundles.bundle import Bundle

    bundle = Bundle.open(source.path)
    engine = bundle.engine(threads=settings.model_threads, cache_dir=settings.cache_dir)
    return Loaded(
        run=engine.run,
        model_name=bundle.model_name,
        labels=bundle.labels,
        preprocessing=bundle.preprocessing,
        platform=bundle.engine_name,
        precision=bundle.precision,
        any_size=bundle.document["dynamic_image_size"],
        open_inside=partial(open_inside, bundle, settings.model_threads),
        warm=partial(engine.warm, settings.batch_size),
    )


def _load_checkpoint(source: Source, settings: Settings) -> Loaded:
    from visformer.bundles.checkpoint_engine import CheckpointEngine
    from visformer.pretrained import load as load_model

    model: Any = load_model(source.path)
    if not model.class_names:
        raise UsageError(f"{source.path}: its model has no classes, so it gives features and not labels")
    engine = CheckpointEngine(
        model,
        device=settings.device,
        precision=settings.precision,
        threads=settings.model_threads,
        batch_size=settings.batch_size,
    )
    return Loaded(
        run=engine.run,
        model_name=model.model_name,
        labels=list(model.class_names),
        preprocessing=engine.preprocessing,
        platform=f"torch_{engine.device.type}",
        precision=settings.precision,
        any_size=False,
        open_inside=partial(TorchInside, engine.model),
        warm=engine.warm,
        close=engine.close,
    )


class ServedModel:
    """A version that answers requests. It lives on the event loop."""

    def __init__(self, name: str, version: int, loaded: Loaded, settings: Settings, on_batch: Callable[..., None]):
        self.name, self.version = name, str(version)
        self.loaded = loaded
        self.labels, self.preprocessing = loaded.labels, loaded.preprocessing
        self.descriptions = imagenet.describe(loaded.labels)
        self.statistics = Statistics()
        self._on_batch = on_batch
        self.batcher = Batcher(
            loaded.run, max_batch=settings.batch_size, workers=settings.model_workers, on_batch=self._count
        )
        self._inside: list[Inside | None] = []  # one, once it has been asked for
        self._opening = threading.Lock()
        self._leases = 0
        self._unused = asyncio.Event()
        self._unused.set()

    def __enter__(self) -> ServedModel:
        self._leases += 1
        self._unused.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._leases -= 1
        if not self._leases:
            self._unused.set()

    def inside(self) -> Inside | None:
        """What heat maps look into, opened when first asked for; to be called in threads."""
        with self._opening:
            if not self._inside:
                self._inside.append(self.loaded.open_inside())
            return self._inside[0]

    async def retire(self) -> None:
        """Wait until nobody uses it, and let it go. It must not be leased any more."""
        await self._unused.wait()
        self.batcher.close()
        self.loaded.close()

    def _count(self, size: int, seconds: float) -> None:
        self.statistics.batch(size, seconds)
        self._on_batch(self.name, self.version, size, seconds)
