"""The 1,000 classes of ImageNet-1k, in the order of every published checkpoint: that of the sorted folder names.

A class is named by its WordNet id, as its folder is (`n02099601`), so that a checkpoint can be measured on the folders
as they are; `describe` gives the words that people use. The names come from timm's own table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from visformer.errors import RunError

NUM_CLASSES = 1000


def class_names() -> list[str]:
    """WordNet ids of the classes, in order."""
    return _lines("imagenet_synsets.txt")[:NUM_CLASSES]


def describe(names: Sequence[str]) -> dict[str, str]:
    """Words for those of `names` that are classes of ImageNet: {"n02099601": "golden retriever"}.

    None where timm, which has them, is not installed, as on a server that runs bundles alone.
    """
    if not any(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names) or find_spec("timm") is None:
        return {}
    known = set(class_names())
    words = dict(line.split("\t", 1) for line in _lines("imagenet_synset_to_lemma.txt"))
    return {name: words[name] for name in names if name in known}


@cache
def _lines(name: str) -> list[str]:
    """A table of timm's, read as a file: importing timm.data takes a second or two."""
    spec = find_spec("timm")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise RunError("timm is not installed, which has the names of ImageNet's classes; pip install timm")
    return (Path(folders[0]) / "data" / "_info" / name).read_text(encoding="utf-8").splitlines()
