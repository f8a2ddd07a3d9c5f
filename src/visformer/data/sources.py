"""What a dataset is to the rest of the package: labelled images by index, and views of them.

An `ImageSource` knows its targets and names without decoding anything; `load` decodes one image and may raise
`ImageError`. Sources hold no open files, so that they can be handed to worker processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from visformer.data.decode import Box, open_reduced
from visformer.data.encoded import Encoded
from visformer.data.preprocessing import Preprocessing
from visformer.errors import UsageError


class ImageSource(Protocol):
    """Labelled images by index."""

    @property
    def class_names(self) -> list[str]:
        """Name of each class; a target is an index into it."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The image, decoded and upright, in mode L, RGB or RGBA. Raises `ImageError`."""
        ...

    def target(self, index: int) -> int:
        """The index of its class in `class_names`."""
        ...

    def name(self, index: int) -> str:
        """What a message calls it: the path of its file, or `dataset[index]`."""
        ...

    def key(self, index: int) -> str:
        """What a record calls it: its path below the data's root, or its index; the same wherever the data lies."""
        ...


class Subset:
    """Some samples of a source, in the order of `indices`."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)

    @property
    def class_names(self) -> list[str]:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        return self.source.load(int(self.indices[index]))

    def target(self, index: int) -> int:
        return self.source.target(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))


def training_image(source: ImageSource, index: int, channels: int) -> Image.Image | Encoded | np.ndarray:
    """One image for the training transform: still encoded, or as pixels, where the source has a method `raw`.

    `raw(index)` gives the bytes of the image's file, or its pixels as uint8 (H, W, `channels`); None, and a source
    without it, mean that `load` is the way. Raises `ImageError`.
    """
    data = _raw(source, index)
    if data is None:
        return source.load(index)
    return Encoded(data, channels) if isinstance(data, bytes) else data


def evaluation_image(source: ImageSource, index: int, preprocessing: Preprocessing) -> tuple[Image.Image, Box | None]:
    """One image for `preprocessing`, as `Predictor` and the server open it (`open_reduced`). Raises `ImageError`."""
    data = _raw(source, index)
    if not isinstance(data, bytes):
        return source.load(index), None
    return open_reduced(data, preprocessing.in_channels, preprocessing.reduces)


def _raw(source: ImageSource, index: int) -> bytes | np.ndarray | None:
    """What the method `raw` gives, of the source that a view is of."""
    while isinstance(source, Subset):
        index = int(source.indices[index])
        source = source.source
    raw = getattr(source, "raw", None)
    return raw(index) if raw is not None else None


def targets_of(source: ImageSource) -> np.ndarray:
    """The target of each sample, int64 (N,)."""
    return np.fromiter((source.target(i) for i in range(len(source))), dtype=np.int64, count=len(source))


def stratified(source: ImageSource, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Split into (train, val): of each class `fraction`, rounded, but at least one image on either side; a class of one
    trains.

    A function of `seed`, the order of the samples and their targets alone.
    """
    targets = targets_of(source)
    held_out = np.zeros(len(targets), dtype=bool)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        order = np.random.default_rng([seed, int(target)]).permutation(len(members))
        held_out[members[order[:count]]] = True
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out))


def by_keys(source: ImageSource, keys: Sequence[str], what: str) -> Subset:
    """The samples of a recorded split. Raises `UsageError` naming the first key that the data no longer has."""
    position = {source.key(i): i for i in range(len(source))}
    for key in keys:
        if key not in position:
            raise UsageError(
                f"{what}: {key} is in the recorded split but no longer there; restore it or start a new run"
            )
    return Subset(source, [position[key] for key in keys])
