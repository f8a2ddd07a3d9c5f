"""From the options `dataset` and `data_dir` to labelled images: which data there is, what is held out, what the classes
are called.

`open_data` gives a training run its two halves, splitting on the spot where the data has no validation set;
`open_evaluation` opens one labelled set for `validate`; `class_mapping` fits the classes of any data to those of any
model, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visformer import console
from visformer.data.arrays import NAMED_ARRAYS, named_arrays
from visformer.data.folders import FolderSource, check_classes
from visformer.data.packed import PackedSet, PackedSource, check_room, in_shard_order, open_packed, warn_of_size
from visformer.data.sampler import BLOCK_SHARDS
from visformer.data.shards import ShardSource, shards_of
from visformer.data.sources import ImageSource, by_keys, stratified
from visformer.data.streams import cache_bytes
from visformer.data.timm_sets import TimmSource, open_timm
from visformer.errors import UsageError, nearest

if TYPE_CHECKING:
    from visformer.config import TrainConfig

FOLDER_NAMES = ("imagenet", "folder", "")
_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval")}
_KNOWN = (*FOLDER_NAMES[:2], *NAMED_ARRAYS, "torch/NAME", "hfds/NAME", "wds/NAME")


@dataclass
class Data:
    """What a training run reads. `split` records, by the samples' keys, a split made on the spot; else None."""

    train: ImageSource
    val: ImageSource | None
    class_names: list[str]
    split: dict[str, Any] | None = None


def open_data(config: TrainConfig, record: dict[str, Any] | None = None) -> Data:
    """Open the training and validation images of `config` and check that each class can be trained on.

    Where there is no validation split, `val_fraction` of each class is held out (nothing when `val_while_train` is
    False), or what `record`, an earlier `Data.split`, says. Raises `UsageError` naming the folder, class or dataset at
    fault.
    """
    if config.dataset in NAMED_ARRAYS:
        train, val = (
            named_arrays(config.dataset, config.data_dir, training, config.in_channels, config.dataset_download)
            for training in (True, False)
        )
        return Data(train, val, train.class_names)
    packed = _packed(config.dataset, config.data_dir)
    if packed is not None:
        train, val = _open_packed(packed, config)
    else:
        train, val = _open_folders(config) if _is_folders(config.dataset, config.data_dir) else _open_named(config)
    class_names = train.class_names
    split = None
    if val is None and (record is not None or config.val_while_train is not False):
        train, val, split = _hold_out(train, config, record)
        val = in_shard_order(val) if len(val) else None
    return Data(train, val, class_names, split)


def open_evaluation(
    dataset: str,
    data_dir: str,
    split: str = "val",
    channels: int = 3,
    download: bool = False,
    record: dict[str, Any] | None = None,
) -> ImageSource:
    """Open one labelled set: the folder `split` below `data_dir`, or `data_dir` itself where that holds the class
    folders.

    With `record`, the split that a training run made (`Data.split`), only the images that it lists under `split` are
    taken when `data_dir` has no such folder; hand it in for the data that was split, not for other data. Raises
    `UsageError`.
    """
    training = split in _SPLIT_FOLDERS["train"]
    if dataset in NAMED_ARRAYS:
        return named_arrays(dataset, data_dir, training, channels, download)
    packed = _packed(dataset, data_dir)
    if packed is not None:
        return in_shard_order(_packed_evaluation(packed, split, channels, record))
    if not _is_folders(dataset, data_dir):
        source = _open_timm_split(dataset, data_dir, split, channels, download)
        if source is None and record is not None:
            whole = _open_timm_split(dataset, data_dir, "train", channels, download)
            source = None if whole is None else by_keys(whole, record["train" if training else "val"], data_dir)
        if source is None:
            raise UsageError(f"dataset: {dataset} in {data_dir} has no split {split!r}")
        return source
    root = Path(data_dir)
    folder = _split_folder(root, split)
    if record is not None and (folder is None or training):
        source = FolderSource(root / record.get("folder", ""), channels, skip_empty=True)
        return by_keys(source, record["train" if training else "val"], str(source.root))
    if folder is None:
        present = [name for names in _SPLIT_FOLDERS.values() for name in names if (root / name).is_dir()]
        if present:
            raise UsageError(
                f"{root}: no folder {split!r}; it has {', '.join(present)}; choose one of them as the split"
            )
    return FolderSource(folder or root, channels, skip_empty=True)


def class_mapping(data_names: Sequence[str], model_names: Sequence[str]) -> list[int]:
    """For each class of the data its index among the model's, by name; one that the model lacks is a `UsageError`.

    A model whose classes have numbers for names, as one from another project's checkpoint, takes as many classes of
    the data in their order, which is the order of the folders' names everywhere.
    """
    index_of = {name: index for index, name in enumerate(model_names)}
    numbered = list(model_names) == [str(index) for index in range(len(model_names))]
    if numbered and len(data_names) == len(model_names) and not set(data_names) <= set(model_names):
        return list(range(len(model_names)))
    for name in data_names:
        if name not in index_of:
            raise UsageError(
                f"class {name!r} of the data is not one of the model's {len(index_of)} classes"
                f"{nearest(name, index_of)}; remove or rename it, or use a model trained on it"
            )
    return [index_of[name] for name in data_names]


def _is_folders(dataset: str, data_dir: str) -> bool:
    if dataset in FOLDER_NAMES:
        return not data_dir.endswith(".tar")
    if dataset.partition("/")[0].lower() not in ("torch", "hfds", "hfids", "tfds", "wds"):
        names = (name for name in _KNOWN if name)
        raise UsageError(f"dataset: unknown {dataset!r}{nearest(dataset, _KNOWN)}; known are {', '.join(names)}")
    return False


def _packed(dataset: str, data_dir: str) -> PackedSet | None:
    """The packed set that `data_dir` is; None for any other data."""
    return open_packed(data_dir) if dataset in FOLDER_NAMES else None


def _packed_split(packed: PackedSet, name: str) -> str | None:
    """`train` or `val`, whichever `name` stands for and the set has; a split also goes by the folder it came from."""
    for split, found in packed.manifest.splits.items():
        if name in (split, found.folder or split, *_SPLIT_FOLDERS[split]):
            return split
    return None


def _open_packed(packed: PackedSet, config: TrainConfig) -> tuple[PackedSource, PackedSource | None]:
    train, val = (_packed_split(packed, name) for name in (config.train_split, config.val_split))
    for name, split, which in ((config.train_split, train, "train"), (config.val_split, val, "val")):
        if split is None and name != "val":
            there = ", ".join(packed.manifest.splits)
            raise UsageError(f"{config.data_dir}: packed without {name!r}, which --{which}_split names; it has {there}")
    source = packed.open(train or "train", config.in_channels)
    warn_of_size(source, config.image_size, console.warn)
    check_room(source, BLOCK_SHARDS, cache_bytes())
    return source, None if val is None else packed.open(val, config.in_channels)


def _packed_evaluation(packed: PackedSet, name: str, channels: int, record: dict[str, Any] | None) -> ImageSource:
    """As `open_evaluation` has it for folders: a split, what a record lists, or all there is where nothing is split."""
    split, training = _packed_split(packed, name), name in _SPLIT_FOLDERS["train"]
    if record is not None and (split is None or training):
        source = packed.open("train", channels, skip_empty=True)
        return by_keys(source, record["train" if training else "val"], packed.store.where)
    if split is None and packed.has("val"):
        there = ", ".join(packed.manifest.splits)
        raise UsageError(f"{packed.store.where}: no split {name!r}; it has {there}; choose one of them as the split")
    return packed.open(split or "train", channels, skip_empty=True)


def _split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split below `root`, under its own name or a usual other one."""
    for name in (split, *_SPLIT_FOLDERS.get(split, ())):
        if (root / name).is_dir():
            return root / name
    return None


def _open_folders(config: TrainConfig) -> tuple[FolderSource, FolderSource | None]:
    root = Path(config.data_dir)
    train_folder, val_folder = _split_folder(root, config.train_split), _split_folder(root, config.val_split)
    if train_folder is None and (val_folder is not None or config.train_split != "train"):
        raise UsageError(
            f"{root}: no folder {config.train_split!r} with the training images; it is what --train_split names"
        )
    if val_folder is None and config.val_split != "val":
        raise UsageError(
            f"{root}: no folder {config.val_split!r} with the validation images; it is what --val_split names"
        )
    train = FolderSource(train_folder or root, config.in_channels)
    check_classes(train)
    if val_folder is None:
        return train, None
    return train, FolderSource(val_folder, config.in_channels, train.class_names)


def _open_named(config: TrainConfig) -> tuple[ImageSource, ImageSource | None]:
    opened = [
        _open_timm_split(config.dataset, config.data_dir, split, config.in_channels, config.dataset_download)
        for split in (config.train_split, config.val_split)
    ]
    train, val = opened
    if train is None:
        raise UsageError(f"dataset: {config.dataset} in {config.data_dir} has no split {config.train_split!r}")
    if val is not None and val.class_names != train.class_names:
        class_mapping(val.class_names, train.class_names)  # names the class that training lacks
        val = Relabelled(val, train.class_names)
    return train, val


class Relabelled:
    """A source whose classes are given by their place in another list of names."""

    def __init__(self, source: ImageSource, class_names: Sequence[str]) -> None:
        self.source = source
        self.class_names = list(class_names)
        self._mapping = class_mapping(source.class_names, class_names)
        self.load, self.name, self.key = source.load, source.name, source.key

    def __len__(self) -> int:
        return len(self.source)

    def target(self, index: int) -> int:
        return self._mapping[self.source.target(index)]


def _open_timm_split(
    dataset: str, data_dir: str, split: str, channels: int, download: bool
) -> ShardSource | TimmSource | None:
    """The split of a wds/, torch/, hfds/ or tar dataset; None when it has no such split."""
    if dataset.lower().startswith("wds/"):
        shards = next((found for name in _names_of(split) if (found := shards_of(data_dir, name))), None)
        return None if shards is None else ShardSource(data_dir, shards, channels)
    if dataset in FOLDER_NAMES:
        if not Path(data_dir).is_file():
            raise UsageError(f"data_dir: {data_dir} does not exist; give a tar file or a folder of class folders")
        return open_timm(data_dir, data_dir, split, channels, download) if split == "train" else None
    return open_timm(dataset, data_dir, split, channels, download)


def _names_of(split: str) -> tuple[str, ...]:
    return (split, *(name for name in _SPLIT_FOLDERS.get(split, ()) if name != split))


def _hold_out(train: ImageSource, config: TrainConfig, record: dict[str, Any] | None):
    """(train, val, record of the split): by `record` where there is one, else drawn with the seed."""
    if record is not None:
        parts = by_keys(train, record["train"], config.data_dir), by_keys(train, record["val"], config.data_dir)
        return *parts, record
    part, held_out = stratified(train, config.val_fraction, config.seed)
    folder = train.folder if isinstance(train, PackedSource) else ""
    if isinstance(train, FolderSource) and train.root != Path(config.data_dir):
        folder = train.root.name
    return part, held_out, {
        "data_dir": config.data_dir,
        "folder": folder,
        "seed": config.seed,
        "val_fraction": config.val_fraction,
        "train": [part.key(i) for i in range(len(part))],
        "val": [held_out.key(i) for i in range(len(held_out))],
    }  # fmt: skip
