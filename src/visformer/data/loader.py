"""Batches: worker processes decode and augment, this process puts them in order. With `decode: device` the workers
read, and the device decodes and augments; see device_feed.py.

A training batch is a function of the configuration's seed, the epoch and the batch's number: each sample is seeded from
(seed, epoch, index, copy) before it is transformed, so the number of workers changes nothing and a run resumes in the
middle of an epoch. The global generators of the process that iterates are left as they were.

An image that can't be read does not stop an epoch. In training a copy of its batch's first good sample stands in, so
that shapes stay; in evaluation it is left out, so that figures are exact. Either way the batch lists it, and training
stops once there are more of them than `max_bad_images` allows. What happens when a worker dies is in workers.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from visformer.data.arrays import ArraySource
from visformer.data.batch import Batch
from visformer.data.device_feed import DeviceFeed
from visformer.data.device_jobs import ByteJob
from visformer.data.jobs import Told, eval_job, train_job
from visformer.data.packed import blocks_of
from visformer.data.preprocessing import Preprocessing
from visformer.data.sampler import EpochSampler, Item
from visformer.data.sources import ImageSource, Subset
from visformer.data.workers import SPARE, Job, WorkerPool
from visformer.errors import RunError, UsageError
from visformer.machine import available_cores

if TYPE_CHECKING:
    from visformer.config import TrainConfig

LEAST_BAD_IMAGES = 10  # that a small set may have, however few a hundredth of it is
TIMEOUT_S = 120.0  # that evaluation, which has no option for it, grants a worker for one image


class TrainLoader:
    """One rank's batches of each epoch, each a `Batch`.

    `set_epoch` says where to begin; a loop that was abandoned can be begun again at any time. `len` is the number of
    batches of a full epoch, the same on every rank. `close` ends the workers, which otherwise wait for the next epoch.
    `bad_images` holds the name and reason of each image that could not be read so far. Iterating raises `RunError` when
    they are more than the configuration's `max_bad_images`, when no image of a batch can be read, or when workers die
    time and again.
    """

    def __init__(
        self,
        source: ImageSource,
        config: TrainConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
        pin_memory: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.batch_size = batch_size or config.batch_size
        self.sampler = EpochSampler(
            len(source),
            seed=config.seed,
            shuffle=config.shuffle,
            repeats=config.aug_repeats,
            num_samples=config.num_samples,
            rank=rank,
            world_size=world_size,
            blocks=blocks_of(source),
        )
        whole = self.batch_size * world_size
        self._batches = self.sampler.total // whole if config.drop_remainder else -(-self.sampler.total // whole)
        if not self._batches:
            raise UsageError(
                f"batch_size: {whole} images are more than the {self.sampler.total} there are to train on; "
                "lower it or set drop_remainder to False"
            )
        allowed = max(LEAST_BAD_IMAGES, len(source) // 100)
        self.max_bad_images = allowed if config.max_bad_images is None else config.max_bad_images
        self.bad_images: dict[str, str] = {}
        workers = 0 if _is_small(source) else config.num_parallel_workers
        if config.decode == "device":
            feed = DeviceFeed(config, device or torch.device("cpu"))
            job = ByteJob(source, config, self.batch_size)
            self._batches_of = _Batches(job, workers, config.data_timeout_s, feed, spare=SPARE + feed.ahead + 1)
        else:
            job = train_job(source, config, self.batch_size)
            self._batches_of = _Batches(job, workers, config.data_timeout_s, partial(_as_made, pin_memory))

    @property
    def num_workers(self) -> int:
        """Worker processes in use; 0 when this process does the work."""
        return self._batches_of.num_workers

    @property
    def processes(self) -> list[Any]:
        """The worker processes that run now."""
        return self._batches_of.processes

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration draw epoch `epoch`, from its batch `start_batch` on."""
        self.sampler.set_epoch(epoch, start_batch * self.batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches_of(_Grouped(self)):
            self._count(batch)
            yield batch

    def _count(self, batch: Batch) -> None:
        self.bad_images.update(batch.failures)
        if len(self.bad_images) > self.max_bad_images:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad_images.items())[-3:])
            raise RunError(
                f"{len(self.bad_images)} training images could not be read, more than the {self.max_bad_images} that "
                f"max_bad_images allows; the latest: {some}. Check the data, or raise --max_bad_images"
            )
        if not len(batch):
            name, reason = batch.failures[0]
            raise RunError(f"{name}: {reason}; and none of the other images of its batch can be read; check the data")

    def close(self) -> None:
        """End the worker processes. The loader can be used again, and starts new ones."""
        self._batches_of.close()


class EvalLoader:
    """Every image of a source once, in order, in `Batch`es without those that can't be read; nothing is dropped or
    padded.

    Of `world_size` processes, rank r sees the images r, r + world_size, ... A batch may be empty and still list
    failures.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        num_workers: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        own = range(rank, len(source), world_size)
        self._groups = [[Item(0, i, 0) for i in own[i : i + batch_size]] for i in range(0, len(own), batch_size)]
        job = eval_job(source, preprocessing, min(batch_size, len(own)))
        workers = min(num_workers, len(self._groups))
        self._batches_of = _Batches(job, workers, TIMEOUT_S, partial(_as_made, pin_memory))

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches_of(self._groups)

    def close(self) -> None:
        """End the worker processes. The loader can be used again, and starts new ones."""
        self._batches_of.close()


def make_train_loader(
    source: ImageSource,
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int | None = None,
    pin_memory: bool = False,
    device: torch.device | None = None,
) -> TrainLoader:
    """A `TrainLoader`; `batch_size` is per process and by default the configuration's. `device` is where images are
    decoded if the configuration asks for that."""
    return TrainLoader(
        source,
        config,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        pin_memory=pin_memory,
        device=device,
    )


def make_eval_loader(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> EvalLoader:
    """An `EvalLoader`; at most as many workers as there are cores and batches."""
    return EvalLoader(
        source,
        preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        pin_memory=pin_memory,
    )


class _Grouped:
    """The sampler's items, batch by batch, up to the epoch's last."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Item]]:
        size = self.loader.batch_size
        group: list[Item] = []
        left = len(self.loader) - self.loader.sampler.start // size
        for item in self.loader.sampler:
            if not left:
                return
            group.append(item)
            if len(group) == size:
                yield group
                group, left = [], left - 1
        if group and left:
            yield group


Made = tuple[torch.Tensor, Any]  # the memory that a job wrote into, as far as it is used, and what it told


class _Batches:
    """Groups of items -> `Batch`es: a job done by workers or, with none, by this process; then `finish`."""

    def __init__(
        self,
        job: Job,
        workers: int,
        timeout_s: float,
        finish: Callable[[Iterable[Made]], Iterator[Batch]],
        spare: int = SPARE,
    ) -> None:
        self.job = job
        self.finish = finish
        self.num_workers = min(workers, available_cores())
        self._pool = WorkerPool(job, self.num_workers, timeout_s=timeout_s, spare=spare)

    @property
    def processes(self) -> list[Any]:
        return self._pool.processes

    def __call__(self, groups: Iterable[Sequence[Item]]) -> Iterator[Batch]:
        return self.finish(self._pool.run(groups) if self.num_workers else map(self._make, groups))

    def _make(self, group: Sequence[Item]) -> Made:
        """What a worker would do, leaving the global generators as they are."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            out = np.empty(self.job.shape, np.uint8)
            count, told = self.job(group, out, frozenset(), lambda _: None)
            return torch.from_numpy(out[:count]), told
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def close(self) -> None:
        self._pool.close()


def _as_made(pin_memory: bool, made: Iterable[tuple[torch.Tensor, Told]]) -> Iterator[Batch]:
    """The workers' images as they are."""
    for images, told in made:
        targets = torch.tensor(told.targets, dtype=torch.int64)
        batch = Batch(images.permute(0, 3, 1, 2), targets, told.indices, told.failures)
        yield batch.pin_memory() if pin_memory else batch


def _is_small(source: ImageSource) -> bool:
    """True for images in memory that are prepared faster than they could be handed between processes."""
    while isinstance(source, Subset):
        source = source.source
    return isinstance(source, ArraySource) and len(source) <= 4000 and max(source.images.shape[1:3]) <= 64
