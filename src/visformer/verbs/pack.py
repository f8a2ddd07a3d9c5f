"""`visformer pack DATA OUT`: a dataset in a few large files, to be trained on again and again.

    visformer pack photos packed                       the files themselves, in WebDataset's shards
    visformer pack photos packed --format uint8        pixels, the short side reduced to 256: nothing left to decode
    visformer train --data_dir packed

A packed set has the source's classes, keys and order, so that a run on it makes the same split and sees the same
samples in the same batches. OUT is written beside its place and renamed once it is whole; what it consists of is in
data/packed_index.py.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visformer import console
from visformer.config import option
from visformer.errors import RunError, UsageError

if TYPE_CHECKING:
    from visformer.data.datasets import Data
    from visformer.data.packed_writer import Packed
    from visformer.data.sources import ImageSource

NOTE_S = 60.0  # between lines where no terminal shows a bar
SHOWN = 10  # images that could not be read, in the text report; --json has them all


@dataclass
class PackOptions:
    """Options of `visformer pack`; see each field's help."""

    data: str = option(
        "",
        "what to pack: as --data_dir of train, a folder with train/ and val/ of class folders, class folders alone, a "
        "packed set, or where the files of --dataset are",
        group="Files",
        positional=True,
    )
    out: str = option("", "folder to write, which must not be there", positional=True)
    overwrite: bool = option(False, "replace OUT if it is a packed set")
    dataset: str = option("imagenet", "as for train: imagenet (class folders), cifar10, hfds/NAME, wds/NAME, ...")
    train_split: str = option("train", "name of the training split or folder")
    val_split: str = option("val", "name of the validation split or folder")
    dataset_download: bool = option(
        False, "fetch the dataset if it is not there (cifar10, cifar100, mnist, fashion_mnist)"
    )
    format: Literal["webdataset", "uint8"] = option(
        "webdataset",
        "webdataset: the files as they are, in tar shards; uint8: pixels of the chosen size",
        group="Format",
    )
    size: int = option(256, "uint8: what a longer short side is reduced to, in pixels; a smaller image stays as it is")
    in_channels: int = option(3, "uint8: channels that are kept: 1 grey, 3 RGB, 4 RGB with alpha")
    shard_mb: float = option(128.0, "megabytes of a shard, at most, unless one image has more")
    workers: int = option(8, "threads that read and decode; at most the cores there are", group="Speed")
    json: bool = option(False, "print the report as one JSON document on stdout", group="Output")

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 8192:
            raise UsageError(f"size: {self.size} is out of range; it must be from 1 to 8192")
        if self.in_channels not in (1, 3, 4):
            raise UsageError(f"in_channels: {self.in_channels} is not known; it must be 1 (grey), 3 (RGB) or 4 (RGBA)")
        if not 0 < self.shard_mb <= 8000:
            raise UsageError(f"shard_mb: {self.shard_mb:g} is out of range; it must be above 0 and at most 8000")
        if self.workers < 1:
            raise UsageError(f"workers: {self.workers} is out of range; it must be at least 1")


@dataclass
class PackResult:
    """What was packed: of each split its images, shards and bytes; `skipped` are (name, reason)."""

    out: str
    format: str
    size: int | None
    class_names: list[str]
    splits: dict[str, dict[str, int]]
    skipped: list[tuple[str, str]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"skipped": [{"name": name, "reason": reason} for name, reason in self.skipped]}


def run(options: PackOptions) -> int:
    """Pack, print the report, and return the exit code."""
    result = pack(options)
    if options.json:
        console.print_json(result.to_dict())
        return 0
    for name, split in result.splits.items():
        shards = "1 shard" if split["shards"] == 1 else f"{split['shards']:,} shards"
        print(f"{name:<6} {split['images']:>10,} images in {shards}, {split['bytes'] / 1e6:,.1f} MB")
    for name, reason in result.skipped[:SHOWN]:
        print(f"left out {name}: {reason}")
    if len(result.skipped) > SHOWN:
        print(f"left out {len(result.skipped) - SHOWN:,} more, which --json lists")
    print(
        f"{result.out}: {len(result.class_names):,} classes, packed in {console.duration(result.seconds)}; train with "
        f"visformer train --data_dir {result.out}"
    )
    return 0


def pack(options: PackOptions) -> PackResult:
    """Write the packed set OUT. Raises `UsageError` for data or a place that can't be used, and `RunError` when a class
    loses all its images or the disk refuses; then nothing is left of OUT."""
    from visformer.config import TrainConfig
    from visformer.data.datasets import open_data
    from visformer.data.loader import available_cores
    from visformer.data.packed_index import MARKER, Manifest, marker_text

    for name in ("data", "out"):
        if not getattr(options, name):
            raise UsageError(f"{name}: missing; write visformer pack DATA OUT")
    began = time.perf_counter()
    out = Path(options.out)
    _check_place(out, options.overwrite, MARKER)
    channels = options.in_channels if options.format == "uint8" else 3
    data = open_data(
        TrainConfig(
            dataset=options.dataset,
            data_dir=options.data,
            train_split=options.train_split,
            val_split=options.val_split,
            dataset_download=options.dataset_download,
            in_channels=channels,
            image_resize=32,  # no model looks at them here
            val_while_train=False,
        )
    )
    _check_outside(out, data)
    side = options.size if options.format == "uint8" else None
    with _folder_beside(out) as folder:
        packed = _write(data, folder, options, min(options.workers, available_cores()))
        source = {"dataset": options.dataset, "data_dir": options.data}
        splits = {name: written.split for name, written in packed.items()}
        manifest = Manifest(options.format, side, channels, data.class_names, splits, source)
        if options.format == "webdataset":
            _describe_for_others(folder, data.class_names, packed)
        (folder / MARKER).write_text(marker_text(manifest), encoding="utf-8")
    return PackResult(
        str(out),
        options.format,
        side,
        data.class_names,
        {
            name: {"images": written.split.images, "shards": len(written.split.shards), "bytes": written.size}
            for name, written in packed.items()
        },
        [image for written in packed.values() for image in written.skipped],
        time.perf_counter() - began,
    )


def _write(data: Data, folder: Path, options: PackOptions, workers: int) -> dict[str, Packed]:
    """The splits in `folder`."""
    from visformer.data.packed_writer import AsPixels, as_file, write_split

    ready = AsPixels(options.size) if options.format == "uint8" else as_file
    packed = {}
    sources = {"train": data.train, "val": data.val}
    with console.progress() as bar:
        for name, source in sources.items():
            if source is None:
                continue
            progress = _Progress(bar, name, len(source))
            packed[name] = write_split(
                source,
                name,
                folder,
                ready,
                shard_bytes=int(options.shard_mb * 1e6),
                workers=workers,
                shuffled=name == "train",
                folder=_folder_of(source, options.data),
                advance=progress.advance,
            )
    lost = [data.class_names[i] for i in (packed["train"].counts == 0).nonzero()[0]]
    if lost:
        why = "; ".join(f"{name}: {reason}" for name, reason in packed["train"].skipped[:3])
        raise RunError(
            f"{options.data}: no image of class {lost[0]!r} can be read ({why}); replace them or remove the class"
        )
    return packed


class _Progress:
    """A bar on a terminal; elsewhere a line when a split begins, and one a minute."""

    def __init__(self, bar: Any, name: str, total: int) -> None:
        self.bar, self.name, self.total = bar, name, total
        self.task = bar.add_task(name, total=total, status="images")
        self.done, self.told = 0, time.monotonic()
        if not console.is_terminal():
            console.note(f"{name}: {total:,} images")

    def advance(self) -> None:
        """Count one image."""
        self.bar.advance(self.task)
        self.done += 1
        if not console.is_terminal() and time.monotonic() - self.told > NOTE_S:
            self.told = time.monotonic()
            console.note(f"{self.name}: {self.done:,} of {self.total:,} images")


def _folder_of(source: ImageSource, data: str) -> str:
    """What the folder of the split is called below the data's root; empty where it is the root, or no folder."""
    from visformer.data.folders import FolderSource

    if isinstance(source, FolderSource):
        return source.root.name if source.root != Path(data) else ""
    return str(getattr(source, "folder", "")) if isinstance(getattr(source, "folder", ""), str) else ""


def _describe_for_others(folder: Path, class_names: list[str], packed: dict[str, Packed]) -> None:
    """`_info.json` and `classes.txt`, by which timm and `--dataset wds/NAME` find splits and classes."""
    splits = {
        name: {
            "name": name,
            "filenames": [shard.name for shard in written.split.shards],
            "shard_lengths": written.lengths,
            "num_samples": written.split.images,
        }
        for name, written in packed.items()
    }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}, indent=1) + "\n", encoding="utf-8")
    text = "".join(f"{name}\n" for name in class_names)
    if [line.strip() for line in text.splitlines()] == class_names:  # else a name can't be written in a line
        (folder / "classes.txt").write_bytes(text.encode("utf-8", "surrogateescape"))


def _check_place(out: Path, overwrite: bool, marker: str) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if not os.path.lexists(out):
        return
    if not (out / marker).is_file():
        raise UsageError(f"out: {out} is there and is no packed set; name another folder")
    if not overwrite:
        raise UsageError(f"out: {out} is there already; replace it with --overwrite True, or name another folder")


def _check_outside(out: Path, data: Data) -> None:
    """A packed set among the class folders would be one of the classes."""
    from visformer.data.folders import FolderSource

    for source in (data.train, data.val):
        if isinstance(source, FolderSource) and out.resolve().is_relative_to(source.root.resolve()):
            raise UsageError(f"out: {out} lies in {source.root}, which is packed; name a folder elsewhere")


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` at the end; removed if the writing fails. Raises `RunError`."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".writing-{out.name}-", dir=out.parent))
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}; choose another folder") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _put_in_place(folder, out)
    except OSError as error:
        raise RunError(
            f"cannot write {out}: {error.strerror or error}; what was there before is untouched. Free some space or "
            "choose another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; what stands there goes once that is done."""
    before = Path(f"{folder}-before")
    replaces = out.exists()
    if replaces:
        os.replace(out, before)
    try:
        os.replace(folder, out)
    except OSError:
        if replaces:
            os.replace(before, out)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
