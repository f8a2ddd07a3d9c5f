"""What a worker does when the device decodes: read files, look at their headers, draw what is to be done to them.

The bytes of a batch's JPEGs lie one after another in memory that is shared with the main process. An image that nvJPEG
does not decode as we do (another format, CMYK, a progressive JPEG, one that is cut short) is decoded, cropped, resized
and flipped here, as `--decode workers` does it, and goes along as pixels of the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from visformer.data.decode import ImageError
from visformer.data.device_policies import Look, look_drawer
from visformer.data.encoded import Encoded
from visformer.data.sampler import Item
from visformer.data.sources import ImageSource, training_image
from visformer.data.transforms import Placing, TrainTransform, mix_seed, size_of

if TYPE_CHECKING:
    from visformer.config import TrainConfig

_LOOKED_AT = 32  # images whose sizes tell how much memory a batch takes
_LEAST = 1 << 20  # bytes for a batch


class Sample(NamedTuple):
    """One image of a batch: its place there, its index, target and name, and what is to be done to it.

    `begin` and `end` say where in the batch's memory its bytes lie; what did not fit there is in `loose`. `stored` is
    (width, height) of a JPEG as stored, and None when the bytes are pixels (H, W, C) of the model's size. There is a
    look for each copy that is augmented.
    """

    place: int
    index: int
    target: int
    name: str
    begin: int
    end: int
    loose: bytes | None
    stored: tuple[int, int] | None
    upright: Image.Transpose | None
    placing: Placing
    looks: tuple[Look, ...]


class ToldBytes(NamedTuple):
    """What goes with the bytes: how many images the batch has, those that were read, and (place, name, reason) of those
    that were not."""

    count: int
    samples: list[Sample]
    failures: list[tuple[int, str, str]]


class ByteJob:
    """Groups of items -> bytes, as `workers.Job` says, and `ToldBytes`. `shape` is (bytes of a batch,)."""

    def __init__(self, source: ImageSource, config: TrainConfig, batch_size: int) -> None:
        self.source = source
        self.channels = config.in_channels
        self.seed = config.seed
        self.transform = TrainTransform(config)
        self.copies = max(config.aug_splits - 1, 1)
        self.draw_look = look_drawer(self.transform)
        self.shape = (_batch_bytes(source, config, batch_size),)

    def __call__(
        self, group: Sequence[Item], out: np.ndarray, given_up: frozenset[int], reading: Callable[[int], None]
    ) -> tuple[int, ToldBytes]:
        used = 0
        samples: list[Sample] = []
        failures: list[tuple[int, str, str]] = []
        for place, item in enumerate(group):
            reading(item.index)
            try:
                if item.index in given_up:
                    raise ImageError("ended two of the workers that read it")
                sample, data = self._sample(place, item)
            except ImageError as error:
                failures.append((place, self.source.name(item.index), error.reason))
                continue
            size = len(data)
            if used + size <= len(out):
                out[used : used + size] = data
                samples.append(sample._replace(begin=used, end=used + size))
                used += size
            else:
                samples.append(sample._replace(loose=data.tobytes()))
        return used, ToldBytes(len(group), samples, failures)

    def _sample(self, place: int, item: Item) -> tuple[Sample, np.ndarray]:
        """The sample without its place in memory, and its bytes, uint8 (any,)."""
        image = training_image(self.source, item.index, self.channels)
        self.transform.seed(mix_seed(self.seed, *item))
        placing = self.transform.draw_placing(*size_of(image))
        looks = tuple(self.draw_look() for _ in range(self.copies))
        target, name = self.source.target(item.index), self.source.name(item.index)
        sample = Sample(place, item.index, target, name, 0, 0, None, None, None, placing, looks)
        if not isinstance(image, Encoded) or (common := image.common()) is None:
            return sample, self.transform.placed(image, placing).reshape(-1)
        width, height, upright = common
        return sample._replace(stored=(width, height), upright=upright), np.frombuffer(image.data, np.uint8)

    def name(self, index: int) -> str:
        """The image's name in messages."""
        return self.source.name(index)


def _batch_bytes(source: ImageSource, config: TrainConfig, batch_size: int) -> int:
    """Memory that a batch's bytes seldom outgrow, from a look at some images."""
    finished = config.image_size[0] * config.image_size[1] * config.in_channels
    sizes = [finished]
    for index in np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).astype(int):
        try:
            image = training_image(source, int(index), config.in_channels)
        except ImageError:
            continue
        if isinstance(image, Encoded) and image.common() is not None:
            sizes.append(len(image.data))
        else:
            sizes.append(finished)
    return max(int(1.5 * np.mean(sizes) * batch_size), max(sizes), _LEAST)
