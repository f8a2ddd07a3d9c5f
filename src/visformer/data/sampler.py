"""Which samples an epoch consists of, and in which order: a function of the seed and the epoch alone.

The order is global: rank r of W takes positions r, r + W, r + 2W, ... of it, so a global batch holds the same samples
however many processes share it, and a run that was stopped can go on at any position.

Data that has to be fetched is read in blocks: a few shards at a time, drawn at random, with their samples mixed. The
shards of the next block are fetched while those of this one are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

BLOCK_SHARDS = 8  # whose samples are mixed; part of what makes an order, as the seed is


class Item(NamedTuple):
    """One sample to be drawn: its epoch, its index in the source, and which of its repeated copies it is."""

    epoch: int
    index: int
    copy: int


@dataclass(frozen=True)
class Blocks:
    """`shard_of` is the shard of each sample, int (N,). `fetch(shards, now)` is called with those of a block before its
    first sample is drawn, `now` being True, and one block earlier, `now` being False."""

    shard_of: np.ndarray
    fetch: Callable[[Sequence[int], bool], None]


class EpochSampler(Sampler[Item]):
    """The samples of one epoch for one rank.

    `num_samples` restricts every epoch to the same subset, drawn with the seed. With `repeats` above 1 (repeated
    augmentation, Hoffer et al. arXiv:1901.09335) each image comes that many times in a row and the epoch keeps its
    length, so that it sees 1 / repeats of the images. `total` is the number of samples of the epoch over all ranks; it
    is filled up from the front to a multiple of `world_size`. With `blocks` a shuffled epoch goes through the shards in
    blocks of `BLOCK_SHARDS`.
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
        blocks: Blocks | None = None,
    ) -> None:
        self.seed = seed
        self.shuffle = shuffle
        self.repeats = max(repeats, 1)
        self.rank = rank
        self.world_size = world_size
        self.blocks = blocks
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
        order, blocks = self._order()
        fetch = _Fetching(blocks, self.blocks)
        epoch = self.epoch
        for position in range(self.start, len(self)):
            place = (position * self.world_size + self.rank) % self.total
            image, copy = divmod(place, self.repeats)
            fetch.until(image)
            yield Item(epoch, int(order[image]), copy)

    def _order(self) -> tuple[np.ndarray, list[tuple[int, Sequence[int]]]]:
        """The samples of the epoch, and of each block where it begins among them and its shards."""
        order, random = self.subset, np.random.default_rng([self.seed, 2, self.epoch])
        if self.blocks is None or not self.shuffle:
            return (order[random.permutation(self.total)] if self.shuffle else order), []
        shard = self.blocks.shard_of[order]
        drawn = random.permutation(np.flatnonzero(np.bincount(shard)))
        block_of = np.zeros(shard.max(initial=0) + 1, np.uint32)
        block_of[drawn] = np.arange(len(drawn)) // BLOCK_SHARDS
        mixed = random.permutation(self.total)
        mixed = mixed[np.argsort(block_of[shard[mixed]], kind="stable")]
        begins = np.searchsorted(block_of[shard[mixed]], np.arange(-(-len(drawn) // BLOCK_SHARDS)))
        shards = [drawn[i : i + BLOCK_SHARDS].tolist() for i in range(0, len(drawn), BLOCK_SHARDS)]
        return order[mixed], list(zip(begins.tolist(), shards, strict=True))


class _Fetching:
    """Has shards fetched as an epoch comes to them: those of this block now, those of the next one meanwhile."""

    def __init__(self, order: list[tuple[int, Sequence[int]]], blocks: Blocks | None) -> None:
        self.order = order
        self.blocks = blocks
        self.begins = [begin for begin, _ in order] if blocks is not None else []
        self.within = range(0) if self.begins else range(1 << 62)

    def until(self, image: int) -> None:
        """Be ready for the image at place `image` of the epoch."""
        if image in self.within:
            return
        number = int(np.searchsorted(self.begins, image, side="right")) - 1
        end = self.begins[number + 1] if number + 1 < len(self.begins) else 1 << 62
        self.within = range(self.begins[number], end)
        assert self.blocks is not None
        self.blocks.fetch(self.order[number][1], True)
        if number + 1 < len(self.order):
            self.blocks.fetch(self.order[number + 1][1], False)
