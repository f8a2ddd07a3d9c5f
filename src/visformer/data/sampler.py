"""Which samples an epoch consists of, and in which order: a function of the seed and the epoch alone.

The order is global: rank r of W takes positions r, r + W, r + 2W, ... of it, so a global batch holds the same samples
however many processes share it, and a run that was stopped can go on at any position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Item(NamedTuple):
    """One sample to be drawn: its epoch, its index in the source, and which of its repeated copies it is."""

    epoch: int
    index: int
    copy: int


class EpochSampler(Sampler[Item]):
    """The samples of one epoch for one rank.

    `num_samples` restricts every epoch to the same subset, drawn with the seed. With `repeats` above 1 (repeated
    augmentation, Hoffer et al. arXiv:1901.09335) each image comes that many times in a row and the epoch keeps its
    length, so that it sees 1 / repeats of the images. `total` is the number of samples of the epoch over all ranks; it
    is filled up from the front to a multiple of `world_size`.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        shuffle: bool = True,
        repeats: int = 0,
        num_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.seed = seed
        self.shuffle = shuffle
        self.repeats = max(repeats, 1)
        self.rank = rank
        self.world_size = world_size
        self.total = size if num_samples is None else min(size, num_samples)
        subset = (
            np.random.default_rng([seed, 1]).permutation(size)[: self.total] if self.total < size else np.arange(size)
        )
        self.subset = np.sort(subset)
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw epoch `epoch` from this rank's position `start` on."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        """Samples of a full epoch on this rank; the same on every rank."""
        return -(-self.total // self.world_size)

    def __iter__(self) -> Iterator[Item]:
        order = self.subset
        if self.shuffle:
            order = order[np.random.default_rng([self.seed, 2, self.epoch]).permutation(self.total)]
        epoch = self.epoch
        for position in range(self.start, len(self)):
            place = (position * self.world_size + self.rank) % self.total
            image, copy = divmod(place, self.repeats)
            yield Item(epoch, int(order[image]), copy)
