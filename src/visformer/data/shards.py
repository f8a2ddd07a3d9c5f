"""WebDataset shards (`wds/NAME`): tar files of KEY.jpg and KEY.cls pairs, read by index.

Shards are plain tar files on a local disk, so one pass over their headers tells where each image lies, and the set can
then be shuffled globally, split, counted and resumed like any other; nothing is unpacked. Which shards make a split is
written as timm has it: the split's entry in `_info.json` (or `info.json`), or a pattern such as
`train-{0000..0099}.tar`. Class names come from `classes.txt`, one a line, in the same folder; without it a class is
called by its number.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from visformer.data.decode import IMAGE_SUFFIXES, ImageError, open_image
from visformer.errors import UsageError

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardSource:
    """The images of a list of shards. Raises `UsageError` naming the shard and member that break the layout."""

    def __init__(self, folder: str | Path, shards: list[str], channels: int = 3) -> None:
        self.folder = Path(folder)
        self.shards = shards
        self.channels = channels
        places: list[tuple[int, int, int]] = []
        targets: list[int] = []
        keys: list[str] = []
        for number, shard in enumerate(shards):
            for key, offset, size, target in index_shard(self.folder / shard):
                places.append((number, offset, size))
                targets.append(target)
                keys.append(key)
        if not places:
            raise UsageError(
                f"{self.folder}: no image in its {len(shards)} shards; expected KEY.jpg and KEY.cls in each"
            )
        self._places = np.array(places, dtype=np.int64)
        self._targets = np.array(targets, dtype=np.int64)
        self._keys = np.array([os.fsencode(key) for key in keys])
        self.class_names = _class_names(self.folder, int(self._targets.max()) + 1)

    def __len__(self) -> int:
        return len(self._targets)

    def load(self, index: int) -> Image.Image:
        return open_image(self.raw(index), self.channels)

    def raw(self, index: int) -> bytes:
        """The bytes of the image's member. Raises `ImageError`."""
        number, offset, size = self._places[index]
        path = self.folder / self.shards[number]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise ImageError(f"can't be read ({error.strerror})", str(path)) from error

    def target(self, index: int) -> int:
        return int(self._targets[index])

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self.key(index))

    def key(self, index: int) -> str:
        return f"{self.shards[self._places[index][0]]}/{os.fsdecode(self._keys[index])}"


def index_shard(path: Path) -> list[tuple[str, int, int, int]]:
    """(member name, offset in bytes, size in bytes, target) of each image of a shard, in its order."""
    samples: dict[str, dict] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, _, suffix = os.path.basename(member.name).partition(".")
                sample = samples.setdefault(os.path.join(os.path.dirname(member.name), key), {})
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    sample["image"] = (member.name, member.offset_data, member.size)
                elif suffix in ("cls", "cls.txt"):
                    file = tar.extractfile(member)
                    sample["target"] = int(file.read()) if file else -1
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"{path}: not a shard that can be read ({error}); shards are uncompressed tar files") from None
    except ValueError:
        raise UsageError(f"{path}: {member.name} must hold the number of the class") from None
    found = [sample for sample in samples.values() if "image" in sample]
    for sample in found:
        if sample.get("target", -1) < 0:
            raise UsageError(
                f"{path}: {sample['image'][0]} has no class; a member of its name ending in .cls must hold the number"
            )
    return [(*sample["image"], sample["target"]) for sample in found]


def shards_of(folder: str | Path, split: str) -> list[str] | None:
    """File names of the split's shards, or None when the folder describes no such split."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"data_dir: {folder} is not a folder; wds/ reads shards on a local disk")
    if ".tar" in split:
        return _expand(split.split("|")[0])
    for name in ("_info.json", "info.json"):
        path = folder / name
        if path.is_file():
            try:
                splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
                return [str(shard) for shard in splits[split]["filenames"]] if split in splits else None
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path}: not a description of splits ({error!r}); see timm's wds reader") from None
    found = sorted(path.name for path in folder.glob(f"*{split}*.tar"))
    return found or None


def _expand(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for number in numbers for name in _expand(pattern[: match.start()] + number + pattern[match.end() :])]


def _class_names(folder: Path, count: int) -> list[str]:
    path = folder / "classes.txt"
    if not path.is_file():
        return [str(index) for index in range(count)]
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) < count:
        raise UsageError(f"{path}: {len(names)} names for classes numbered up to {count - 1}; write one name a line")
    return names
