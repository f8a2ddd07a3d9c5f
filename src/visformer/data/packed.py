"""Packed sets: the images of a dataset in a few large files, as `visformer pack` writes them.

A packed set is known by its `packed.json`, so that `--data_dir` is all there is to say, be it a folder or an address.
Images keep the order, the keys and the targets of where they came from: the same seed gives the same split, and the
same samples in the same batches. What the files are is in packed_index.py, where they may be in streams.py.
"""

from __future__ import annotations

import copy
import mmap
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from visformer.data.decode import ImageError, open_image, to_mode
from visformer.data.packed_index import MARKER, MAX_MARKER_BYTES, Index, Manifest, Split, read_index, read_marker
from visformer.data.sampler import BLOCK_SHARDS, Blocks
from visformer.data.sources import ImageSource, Subset
from visformer.data.streams import Folder, Store, open_store
from visformer.errors import UsageError

OPEN_SHARDS = 128  # that a process keeps open
STREAMED_SHARDS = 2 * BLOCK_SHARDS  # the same of those from a cache, which take room on the disk until they are closed


class PackedSource:
    """One split of a packed set, with `channels` channels.

    `class_names` restricts and orders the classes, as for `FolderSource`; a class of the split that is not among them
    is a `UsageError`. `streamed` says that the shards have to be fetched first.
    """

    def __init__(
        self, store: Store, manifest: Manifest, split: Split, channels: int, *, skip_empty: bool = False
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.split = split
        self.channels = channels
        self.class_names = list(manifest.class_names)
        where = f"{store.where}/{split.index.name}"
        self.index: Index = read_index(store.read(split.index.name, split.index.size), split, manifest, where)
        self._targets = self.index.target
        if skip_empty:
            present = np.unique(self._targets)
            self.class_names = [self.class_names[target] for target in present]
            self._targets = np.searchsorted(present, self._targets)
        self.in_order = not split.shuffled  # of the shards: they are read one after another
        self._open: OrderedDict[int, mmap.mmap] = OrderedDict()

    @property
    def streamed(self) -> bool:
        """True when shards come from elsewhere."""
        return not self.store.local

    @property
    def folder(self) -> str:
        """What the folder was called that the images came from, below the data's root; or empty."""
        return self.split.folder

    def __len__(self) -> int:
        return len(self._targets)

    def load(self, index: int) -> Image.Image:
        if self.manifest.format == "webdataset":
            return open_image(self._bytes(index), self.channels)
        pixels = self._pixels(index)
        return to_mode(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), self.channels)

    def raw(self, index: int) -> bytes | np.ndarray | None:
        """The bytes of the image's file, or a view of its pixels, uint8 (H, W, C), of which only what is looked at is
        read; None for pixels with another number of channels than `channels`."""
        if self.manifest.format == "webdataset":
            return self._bytes(index)
        return self._pixels(index) if self.manifest.channels == self.channels else None

    def target(self, index: int) -> int:
        return int(self._targets[index])

    def name(self, index: int) -> str:
        return f"{self.store.where}[{self.key(index)}]"

    def key(self, index: int) -> str:
        return self.index.key(index)

    def places(self) -> np.ndarray:
        """Where each image lies, int64 (N,), rising with its place in the shards, from the first to the last."""
        return np.lexsort((self.index.offset, self.index.shard)).argsort()

    def _bytes(self, index: int) -> bytes:
        start, size = int(self.index.offset[index]), int(self.index.size[index])
        return self._shard(int(self.index.shard[index]))[start : start + size]

    def _pixels(self, index: int) -> np.ndarray:
        shape = int(self.index.height[index]), int(self.index.width[index]), self.manifest.channels
        shard = self._shard(int(self.index.shard[index]))
        return np.ndarray(shape, np.uint8, shard, int(self.index.offset[index]))

    def _shard(self, number: int) -> mmap.mmap:
        """A shard in memory, read as it is looked at. Raises `ImageError` when the file is not what it was."""
        shard = self._open.pop(number, None)
        if shard is None:
            if self.streamed and self.in_order:
                self.store.fetch_later(self.split.shards[number + 1 : number + 2])
            shard = self._map(number)
        self._open[number] = shard  # the latest is the last
        while len(self._open) > (STREAMED_SHARDS if self.streamed else OPEN_SHARDS):
            self._open.popitem(last=False)
        return shard

    def _map(self, number: int) -> mmap.mmap:
        piece = self.split.shards[number]
        for attempt in (1, 2):  # from a cache it may vanish just before it is opened
            path = self.store.path(piece)
            try:
                with open(path, "rb") as file:
                    shard = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError as error:
                if self.store.local or attempt == 2:
                    raise ImageError(f"can't be read: {path} is gone") from error
            except (OSError, ValueError) as error:
                raise ImageError(f"can't be read: {path}: {error}") from error
            else:
                if len(shard) != piece.size:
                    raise ImageError(f"can't be read: {path} has {len(shard):,} bytes, not {piece.size:,}")
                return shard
        raise AssertionError

    def __getstate__(self) -> dict[str, Any]:
        """Maps of files are this process's own."""
        return self.__dict__ | {"_open": OrderedDict()}


class PackedSet:
    """A packed set, its index not yet read. Raises `UsageError` for one that is damaged."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest = read_marker(store.read(MARKER, MAX_MARKER_BYTES), f"{store.where}/{MARKER}")

    def has(self, split: str) -> bool:
        """True when there is the split `train` or `val`."""
        return split in self.manifest.splits

    def open(self, split: str, channels: int, *, skip_empty: bool = False) -> PackedSource:
        """The images of `train` or `val`; with `skip_empty` only the classes that have some."""
        found = self.manifest.splits[split]
        self._check_sizes(found)
        return PackedSource(self.store, self.manifest, found, channels, skip_empty=skip_empty)

    def _check_sizes(self, split: Split) -> None:
        if not isinstance(self.store, Folder):
            return
        for piece in split.shards:
            path = self.store.path(piece)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UsageError(
                    f"{path}: can't be read ({error.strerror}); copy it again or pack the set again"
                ) from None
            if size != piece.size:
                raise UsageError(
                    f"{path}: {size:,} bytes, and {MARKER} says {piece.size:,}; copy it again or pack the set again"
                )


def open_packed(data_dir: str) -> PackedSet | None:
    """The packed set at a folder or an address; None for a folder that is not one."""
    store = open_store(data_dir)
    return None if store is None else PackedSet(store)


def packed_source(source: ImageSource) -> tuple[PackedSource, np.ndarray] | None:
    """What a source is a view of, and the index there of each of its images; None for other data."""
    indices = np.arange(len(source))
    while isinstance(source, Subset):
        indices = source.indices[indices]
        source = source.source
    return (source, indices) if isinstance(source, PackedSource) else None


def blocks_of(source: ImageSource) -> Blocks | None:
    """The order that suits a source whose shards are fetched: some shards at a time. None for one that can be read
    anywhere."""
    found = packed_source(source)
    if found is None or not found[0].streamed:
        return None
    packed, indices = found
    return Blocks(packed.index.shard[indices], _Fetcher(packed))


class _Fetcher:
    """Gets shards onto this machine: `now` before it returns, or at some time soon."""

    def __init__(self, source: PackedSource) -> None:
        self.source = source

    def __call__(self, shards: Sequence[int], now: bool) -> None:
        pieces = [self.source.split.shards[number] for number in shards]
        self.source.store.fetch_later(pieces)
        if now:
            for piece in pieces:
                self.source.store.path(piece)


def in_shard_order(source: ImageSource) -> ImageSource:
    """The images of a streamed source in the order in which they lie, so that each shard is fetched once; any other
    source as it is."""
    found = packed_source(source)
    if found is None or not found[0].streamed:
        return source
    packed, indices = found
    one_by_one = copy.copy(packed)
    one_by_one.in_order, one_by_one._open = True, OrderedDict()
    return Subset(one_by_one, indices[packed.places()[indices].argsort(kind="stable")])


def warn_of_size(source: ImageSource, image_size: tuple[int, int], warn: Callable[[str], None]) -> None:
    """Say so when a model sees more pixels than were kept."""
    found = packed_source(source)
    side = None if found is None else found[0].manifest.image_size
    if found is not None and side is not None and side < min(image_size):
        warn(
            f"{found[0].store.where}: packed at {side} pixels a side, and the model takes {min(image_size)}; pack it "
            f"again with --size {min(image_size)} or more, or with --format webdataset"
        )


def check_room(source: ImageSource, window: int, most: int) -> None:
    """Raise `UsageError` when a cache of `most` bytes does not hold what is read and what is fetched meanwhile."""
    found = packed_source(source)
    if found is None or not found[0].streamed:
        return
    shards = found[0].split.shards
    needed = 3 * min(window, len(shards)) * max((piece.size for piece in shards), default=0)
    needed = min(needed, sum(piece.size for piece in shards))
    if needed > most:
        raise UsageError(
            f"{found[0].store.where}: {needed / 1e9:.1f} GB of shards are read side by side, more than the "
            f"{most / 1e9:.1f} GB that are kept; set VISFORMER_SHARD_CACHE_GB to {needed / 1e9 + 1:.0f} or more"
        )
