"""Batches: worker processes decode and augment, this process puts them in order.

A training batch is a function of the configuration's seed, the epoch and the batch's number: each sample is seeded from
(seed, epoch, index, copy) before it is transformed, so the number of workers changes nothing and a run resumes in the
middle of an epoch. The global generators of the process that iterates are left as they were.

An image that can't be read does not stop an epoch. In training a copy of its batch's first good sample stands in, so
that shapes stay; in evaluation it is left out, so that figures are exact. Either way the batch lists it.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from visformer.data.arrays import ArraySource
from visformer.data.decode import ImageError
from visformer.data.preprocessing import Preprocessing
from visformer.data.sampler import EpochSampler, Item
from visformer.data.sources import ImageSource, Subset
from visformer.data.transforms import TrainTransform, mix_seed
from visformer.errors import RunError, UsageError

if TYPE_CHECKING:
    from visformer.config import TrainConfig


@dataclass(frozen=True)
class Batch:
    """`images` uint8 (B, C, H, W) in channels_last memory, `targets` int64 (B,), `indices` of the samples in their
    source.

    `failures` are the (name, reason) of those that could not be read. With aug_splits, images are (3B, C, H, W), the B
    clean ones first.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: list[int]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which copies to the device run beside the computation."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TrainLoader:
    """One rank's batches of each epoch, each a `Batch`.

    `set_epoch` says where to begin; a loop that was abandoned can be begun again at any time. `len` is the number of
    batches of a full epoch, the same on every rank. `close` ends the workers, which otherwise wait for the next epoch.
    Iterating raises `RunError` when no image of a batch can be read, or when a worker dies.
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
        )
        whole = self.batch_size * world_size
        self._batches = self.sampler.total // whole if config.drop_remainder else -(-self.sampler.total // whole)
        if not self._batches:
            raise UsageError(
                f"batch_size: {whole} images are more than the {self.sampler.total} there are to train on; "
                "lower it or set drop_remainder to False"
            )
        dataset = _TrainBatches(source, TrainTransform(config), config.seed)
        workers = 0 if _is_small(source) else config.num_parallel_workers
        self._loader = _data_loader(dataset, _Grouped(self), workers, pin_memory)

    @property
    def num_workers(self) -> int:
        """Worker processes in use; 0 when this process does the work."""
        return self._loader.num_workers

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration draw epoch `epoch`, from its batch `start_batch` on."""
        self.sampler.set_epoch(epoch, start_batch * self.batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in _guarded(self._loader):
            if not len(batch):
                name, reason = batch.failures[0]
                raise RunError(
                    f"{name}: {reason}; and none of the other images of its batch can be read; check the data"
                )
            yield batch

    def close(self) -> None:
        """End the worker processes. The loader can be used again, and starts new ones."""
        _close(self._loader)


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
        groups = [list(own[i : i + batch_size]) for i in range(0, len(own), batch_size)]
        dataset = _EvalBatches(source, preprocessing)
        self._loader = _data_loader(dataset, groups, min(num_workers, len(groups)), pin_memory)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return _guarded(self._loader)

    def close(self) -> None:
        """End the worker processes. The loader can be used again, and starts new ones."""
        _close(self._loader)


def make_train_loader(
    source: ImageSource,
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int | None = None,
    pin_memory: bool = False,
) -> TrainLoader:
    """A `TrainLoader`; `batch_size` is per process and by default the configuration's."""
    return TrainLoader(source, config, rank=rank, world_size=world_size, batch_size=batch_size, pin_memory=pin_memory)


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


class _TrainBatches(Dataset):
    """Items of the sampler -> an augmented `Batch`; empty when none of them can be read."""

    def __init__(self, source: ImageSource, transform: TrainTransform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __getitem__(self, items: Sequence[Item]) -> Batch:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return _collect(self.source, items, self._sample)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _sample(self, item: Item, image: Image.Image) -> torch.Tensor:
        self.transform.seed(mix_seed(self.seed, *item))
        return self.transform(image)


class _EvalBatches(Dataset):
    """Indices -> a `Batch` of those that can be read."""

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self.source = source
        self.preprocessing = preprocessing

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        items = [Item(0, index, 0) for index in indices]
        return _collect(self.source, items, lambda _, image: self.preprocessing(image), stand_in=False)


def _collect(
    source: ImageSource,
    items: Sequence[Item],
    sample: Callable[[Item, Image.Image], torch.Tensor],
    *,
    stand_in: bool = True,
) -> Batch:
    """Load items into one batch; with `stand_in` the first good sample takes the place of each that can't be read."""
    tensors: list[torch.Tensor | None] = []
    failures: list[tuple[str, str]] = []
    for item in items:
        try:
            tensors.append(sample(item, source.load(item.index)))
        except ImageError as error:
            failures.append((source.name(item.index), error.reason))
            tensors.append(None)
    good = [place for place, tensor in enumerate(tensors) if tensor is not None]
    if not good:
        return Batch(torch.zeros(0, 0, 0, 0, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), [], failures)
    places = [place if tensors[place] is not None else good[0] for place in range(len(items))] if stand_in else good
    indices = [items[place].index for place in places]
    targets = torch.tensor([source.target(index) for index in indices])
    return Batch(_stack([tensors[place] for place in places]), targets, indices, failures)  # type: ignore


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """uint8 (C, H, W), views of (H, W, C) memory -> (B, C, H, W) channels_last; (S, C, H, W) -> (S * B, C, H, W).

    Of the S splits, the first of every sample comes first.
    """
    if tensors[0].ndim == 4:
        return torch.stack(tensors, dim=1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return torch.stack([tensor.permute(1, 2, 0) for tensor in tensors]).permute(0, 3, 1, 2)


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


def _data_loader(dataset: Dataset, groups, workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader whose samples are whole batches. Its own generator keeps it from drawing on torch's global one."""
    workers = min(workers, available_cores())
    return DataLoader(
        dataset,
        sampler=groups,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,  # type: ignore
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


def _as_is(batch: Batch) -> Batch:
    return batch


def _start_worker(_: int) -> None:
    """Leave Ctrl-C and `timeout` to the parent, which ends its workers once it has saved.

    Both signal the whole process group, so each worker gets a group of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    torch.set_num_threads(1)


def _guarded(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches; the death of a worker becomes one clear line."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            "a data worker died, most often for want of memory or shared memory (/dev/shm); "
            "lower num_parallel_workers or batch_size"
        ) from error


def _close(loader: DataLoader) -> None:
    iterator = loader._iterator
    if iterator is not None:
        iterator._shutdown_workers()  # type: ignore
        loader._iterator = None


def _is_small(source: ImageSource) -> bool:
    """True for images in memory that are prepared faster than they could be handed between processes."""
    while isinstance(source, Subset):
        source = source.source
    return isinstance(source, ArraySource) and len(source) <= 4000 and max(source.images.shape[1:3]) <= 64
