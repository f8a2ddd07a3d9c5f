"""Class folders: ROOT/CLASS/**/image.jpg, the layout of ImageNet.

A file's class is the folder directly below the root; deeper folders only group files. Hidden files and files whose
suffix is no image's are passed over. Paths are kept as one block of bytes: a list of a million strings would be copied
into every worker.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visformer.data.decode import IMAGE_SUFFIXES, ImageError, open_image, read_file
from visformer.errors import UsageError, nearest


class FolderSource:
    """The images of a folder of class folders.

    `class_names` fixes the classes and their order, for data that goes with a model or another split: a folder that is
    not among them is a `UsageError`, one that is missing has no samples. Without it the classes are the folders, sorted
    by name; a folder without an image is a class all the same (see `check_classes`) unless `skip_empty`. Raises
    `UsageError` when the root is missing or has no class folders with images.
    """

    def __init__(
        self, root: str | Path, channels: int = 3, class_names: Sequence[str] | None = None, skip_empty: bool = False
    ) -> None:
        self.root = Path(root)
        self.channels = channels
        found = {folder: image_files(self.root / folder, below=self.root) for folder in class_folders(self.root)}
        if not found:
            raise UsageError(f"{self.root}: no class folders; expected {self.root}/CLASS/IMAGE.jpg")
        if class_names is not None or skip_empty:
            found = {folder: files for folder, files in found.items() if files}
        self.class_names = list(found if class_names is None else class_names)
        index_of = {name: index for index, name in enumerate(self.class_names)}
        paths: list[bytes] = []
        targets: list[int] = []
        for folder, files in found.items():
            if folder not in index_of:
                raise UsageError(
                    f"{self.root / folder}: unknown class {folder!r}{nearest(folder, self.class_names)}; "
                    f"it is not among the {len(self.class_names)} classes; remove or rename the folder"
                )
            paths += files
            targets += [index_of[folder]] * len(files)
        if not paths:
            raise UsageError(f"{self.root}: no image in any of its class folders; expected {self.root}/CLASS/IMAGE.jpg")
        self._blob = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        self._targets = np.array(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._targets)

    def load(self, index: int) -> Image.Image:
        return open_image(self.name(index), self.channels)

    def raw(self, index: int) -> bytes:
        """The bytes of the image's file. Raises `ImageError`."""
        return read_file(self.name(index))

    def target(self, index: int) -> int:
        return int(self._targets[index])

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.key(index))

    def key(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._blob[start : self._ends[index]])


def class_folders(root: Path) -> list[str]:
    """Names of the visible folders directly below `root`, sorted. Raises `UsageError` when `root` is no folder."""
    if not root.exists():
        raise UsageError(f"data_dir: {root} does not exist; give the folder that holds the images")
    if not root.is_dir():
        raise UsageError(f"data_dir: {root} is a file; give a folder of class folders")
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except PermissionError:
        raise UsageError(f"data_dir: {root} can't be read (no permission)") from None


def image_files(folder: Path, below: Path) -> list[bytes]:
    """Paths of the image files under `folder`, relative to `below`, sorted."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(parent, below)
        found += [
            os.path.join(relative, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return [os.fsencode(path) for path in sorted(found)]


def check_classes(source: FolderSource) -> None:
    """Raise `UsageError` naming a class folder without an image, or with none that decodes.

    Reads the images of each class up to its first good one.
    """
    counts = np.bincount(source._targets, minlength=len(source.class_names))
    starts = np.concatenate([[0], np.cumsum(counts)])
    for target, name in enumerate(source.class_names):
        folder = source.root / name
        if counts[target] == 0:
            suffixes = "it has no file with an image's suffix"
            raise UsageError(f"{folder}: no image in this class folder ({suffixes}); add images or remove the folder")
        reason = ""
        for index in range(starts[target], starts[target + 1]):
            try:
                source.load(int(index))
                break
            except ImageError as error:
                reason = reason or f"{os.path.basename(source.name(int(index)))}: {error.reason}"
        else:
            raise UsageError(
                f"{folder}: none of the {counts[target]} images of this class can be read (the first: {reason}); "
                "replace them or remove the folder"
            )
