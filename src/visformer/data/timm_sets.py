"""Any dataset that timm can open by index: `torch/NAME` (torchvision), `hfds/NAME` (Hugging Face) and tar files.

Images are decoded by `decode.open_image` where timm hands over files, so that they come out as they do everywhere else,
and a broken one is an error with its name: timm itself would put its neighbour in its place. Streams (`hfids/`,
`tfds/`) have no order to shuffle, split or resume by; they are refused with what to use instead.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from visformer.data.decode import ImageError, open_image, to_mode
from visformer.errors import UsageError

_VAL_NAMES = ("val", "validation", "valid", "test")


class TimmSource:
    """A map-style dataset of timm or torchvision. `dataset` has `reader` (timm) or is one of torchvision's."""

    def __init__(self, dataset: Any, title: str, channels: int = 3) -> None:
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)
        if hasattr(self.reader, "cache_tarfiles"):
            self.reader.cache_tarfiles = False  # type: ignore  # a file handle shared by forked workers would share its position
        self.title = title
        self.channels = channels
        self._targets = _targets(self.reader if self.reader is not None else dataset, title)
        self.class_names = _class_names(self.reader if self.reader is not None else dataset, self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def load(self, index: int) -> Image.Image:
        with self._naming(index):
            if self.reader is None:
                return to_mode(self.dataset[index][0], self.channels)
            with self.reader[index][0] as file:
                return open_image(file, self.channels)

    def raw(self, index: int) -> bytes | None:
        """The bytes of the image's file; None where there are only decoded images. Raises `ImageError`."""
        if self.reader is None:
            return None
        with self._naming(index), self.reader[index][0] as file:
            return file.read()

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """What goes wrong with an image as an `ImageError` with its name."""
        try:
            yield
        except ImageError:
            raise
        except (OSError, ValueError, SyntaxError, AssertionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"can't be read ({reason})", self.name(index)) from error

    def target(self, index: int) -> int:
        return int(self._targets[index])

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def key(self, index: int) -> str:
        return str(index)


def open_timm(dataset: str, data_dir: str, split: str, channels: int, download: bool) -> TimmSource | None:
    """Open a split by timm's name, trying the usual other names of a validation split; None when there is no such
    split.

    Raises `UsageError` for a name that timm does not know, a missing package, or data that is not there.
    """
    prefix = dataset.partition("/")[0].lower()
    if prefix in ("hfids", "tfds"):
        raise UsageError(
            f"dataset: {dataset} is a stream, which can't be shuffled, split or resumed exactly; "
            "use hfds/NAME, wds/NAME, torch/NAME, or class folders"
        )
    if prefix == "hfds" and importlib.util.find_spec("datasets") is None:
        raise UsageError(f"dataset: {dataset} needs Hugging Face's datasets; pip install 'visformer[hfds]'")
    if prefix == "torch" and not os.path.isdir(data_dir):
        raise UsageError(f"data_dir: {data_dir} does not exist; give the folder that holds {dataset}")
    for name in _VAL_NAMES if split == "val" and prefix == "hfds" else (split,):
        try:
            return TimmSource(_create(dataset, data_dir, name, download), dataset, channels)
        except UsageError as error:
            if "nknown split" not in str(error):
                raise
    return None


def _create(dataset: str, data_dir: str, split: str, download: bool) -> Any:
    from timm.data.dataset_factory import create_dataset

    options: dict[str, Any] = {"download": True} if download else {}
    try:
        # Tar files go by no name: timm's readers take any name without a prefix for class folders or a tar file.
        name = "" if dataset.endswith(".tar") else dataset
        return create_dataset(name, root=data_dir or None, split=split, input_img_mode="", **options)
    except (AssertionError, ValueError, RuntimeError, OSError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"dataset: {dataset} can't be opened in {data_dir!r}, split {split!r}: {reason}") from error


def _targets(holder: Any, title: str) -> np.ndarray:
    """The target of every sample, without decoding one."""
    for attribute in ("targets", "_labels", "labels"):
        if hasattr(holder, attribute):
            return np.asarray(getattr(holder, attribute), dtype=np.int64)
    for attribute in ("samples", "imgs", "index"):
        if hasattr(holder, attribute):
            return np.array([int(sample[1]) for sample in getattr(holder, attribute)], dtype=np.int64)
    if hasattr(holder, "iter_targets"):
        return np.array([int(target) for target in holder.iter_targets()], dtype=np.int64)
    raise UsageError(
        f"dataset: {title} does not tell its labels without reading every image; use class folders instead"
    )


def _class_names(holder: Any, targets: np.ndarray) -> list[str]:
    mapping = getattr(holder, "class_to_idx", None) or getattr(holder, "class_name_to_idx", None)
    if mapping:
        count = max(mapping.values()) + 1
        names = {index: name for name, index in reversed(list(mapping.items()))}
        return [str(names.get(index, index)) for index in range(count)]
    classes = getattr(holder, "classes", None)
    if classes:
        return [c if isinstance(c, str) else ", ".join(c) for c in classes]
    return [str(index) for index in range(int(targets.max(initial=-1)) + 1)]
