"""What a worker does with a group of items: read, transform, write the pixels of one batch into memory it is given.

In training a copy of the first good sample stands in for each that can't be read; in evaluation those are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from visformer.data.decode import ImageError
from visformer.data.preprocessing import Preprocessing
from visformer.data.sampler import Item
from visformer.data.sources import ImageSource, evaluation_image, training_image
from visformer.data.transforms import TrainTransform, mix_seed

if TYPE_CHECKING:
    from visformer.config import TrainConfig

Maker = Callable[[Item], np.ndarray]  # one sample, uint8 (S, H, W, C) with S splits; raises `ImageError`


class Told(NamedTuple):
    """What goes with a batch's images: the index and target of each, and (name, reason) of those that were not read."""

    indices: list[int]
    targets: list[int]
    failures: list[tuple[str, str]]


class BatchJob:
    """Groups of items -> images, as `workers.Job` says, and `Told`.

    `shape` is that of the largest batch, uint8 (S * N, H, W, C); of S splits, the first of every sample comes first.
    """

    def __init__(
        self, source: ImageSource, make: Maker, shape: tuple[int, int, int, int], *, splits: int = 1, stand_in: bool
    ) -> None:
        self.source = source
        self.make = make
        self.shape = shape
        self.splits = splits
        self.stand_in = stand_in

    def __call__(
        self, group: Sequence[Item], out: np.ndarray, given_up: frozenset[int], reading: Callable[[int], None]
    ) -> tuple[int, Told]:
        failures: list[tuple[str, str]] = []
        good: list[int] = []  # places in the group
        for place, item in enumerate(group):
            reading(item.index)
            try:
                if item.index in given_up:
                    raise ImageError("ended two of the workers that read it")
                sample = self.make(item)
            except ImageError as error:
                failures.append((self.source.name(item.index), error.reason))
                continue
            row = place if self.stand_in else len(good)
            out[row : self.splits * len(group) : len(group)] = sample
            good.append(place)
        if good and self.stand_in and failures:
            good = self._fill(out, good, len(group))
        indices = [group[place].index for place in good]
        told = Told(indices, [self.source.target(index) for index in indices], failures)
        return self.splits * len(good), told

    def _fill(self, out: np.ndarray, good: list[int], count: int) -> list[int]:
        """Copy the first good sample over those that are missing; for each place, the place that it shows."""
        first, end = good[0], self.splits * count
        places = [place if place in good else first for place in range(count)]
        for place, shown in enumerate(places):
            if place != shown:
                out[place:end:count] = out[first:end:count]
        return places

    def name(self, index: int) -> str:
        """The image's name in messages."""
        return self.source.name(index)


class _Training:
    """A sample as a function of the seed and the item alone."""

    def __init__(self, source: ImageSource, config: TrainConfig) -> None:
        self.source = source
        self.channels = config.in_channels
        self.seed = config.seed
        self.transform = TrainTransform(config)

    def __call__(self, item: Item) -> np.ndarray:
        image = training_image(self.source, item.index, self.channels)
        self.transform.seed(mix_seed(self.seed, *item))
        sample = self.transform(image).numpy()
        return sample.transpose(0, 2, 3, 1) if sample.ndim == 4 else sample.transpose(1, 2, 0)[None]


class _Evaluation:
    """A sample as the checkpoint's preprocessing has it."""

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self.source = source
        self.preprocessing = preprocessing

    def __call__(self, item: Item) -> np.ndarray:
        pixels = self.preprocessing(*evaluation_image(self.source, item.index, self.preprocessing))
        return pixels.permute(1, 2, 0).numpy()[None]


def train_job(source: ImageSource, config: TrainConfig, batch_size: int) -> BatchJob:
    """Batches of augmented samples, of which none is missing unless all are."""
    splits = config.aug_splits or 1
    shape = (splits * batch_size, *config.image_size, config.in_channels)
    return BatchJob(source, _Training(source, config), shape, splits=splits, stand_in=True)


def eval_job(source: ImageSource, preprocessing: Preprocessing, batch_size: int) -> BatchJob:
    """Batches of those images that can be read."""
    shape = (batch_size, *preprocessing.image_size, preprocessing.in_channels)
    return BatchJob(source, _Evaluation(source, preprocessing), shape, stand_in=False)
