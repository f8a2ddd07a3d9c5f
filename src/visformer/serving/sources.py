"""From what the user named to models and versions: a checkpoint, a bundle, `name/1/`, or a folder of such names.

    best.safetensors, runs/photos, bundle, visformer_tiny.mindcv       one model, version 1
    models/birds with models/birds/1, models/birds/2                   one model, two versions
    models with models/birds/1, models/cats/1                          two models
    pets=runs/pets/best.safetensors                                    any of these under another name

A version's folder holds a bundle, or one checkpoint. Only names and dates are read here; what can't be served is told
as a reason, so that one broken version does not hide the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from visformer.bundles.bundle import DOCUMENT, is_bundle
from visformer.errors import UsageError

_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)
_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt")
_BEST = "best.safetensors"
_STAGES_OF_A_RUN = re.compile(r"best|last|epoch_\d+")


@dataclass(frozen=True)
class Source:
    """A version that can be loaded. `mark` changes when its content does."""

    path: str
    bundle: bool
    mark: tuple[int, ...] = ()


@dataclass
class Found:
    """A model by its name. `numbered` is true where folders say the versions; else there is the one, called 1."""

    numbered: bool
    versions: dict[int, Source] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)


def scan(targets: Iterable[str]) -> dict[str, Found]:
    """Model name -> what there is of it. Raises `UsageError` for a target that is no model, or a name that is two."""
    found: dict[str, Found] = {}
    for target in targets:
        for name, model in _of_target(target):
            if name in found:
                raise UsageError(f"{target}: a second model called {name}; name it otherwise, as in other={target}")
            found[name] = model
    return found


def _of_target(target: str) -> list[tuple[str, Found]]:
    named = _NAMED.fullmatch(target)
    name, path = (named[1], Path(named[2])) if named and not Path(target).exists() else ("", Path(target))
    if path.is_dir() and not is_bundle(path) and not (path / _BEST).is_file():
        if versions := _numbered(path):
            return [(name or _clean(path.resolve().name), _found(versions))]
        models = {sub.name: _numbered(sub) for sub in _folders(path)}
        models = {_clean(key): versions for key, versions in models.items() if versions}
        if not models:
            raise UsageError(
                f"{target}: no bundle ({DOCUMENT}), no run's folder ({_BEST}), and no folder of versions 1/, 2/"
            )
        return [(f"{name}.{key}" if name else key, _found(versions)) for key, versions in models.items()]
    return [(name or _name_of(path), Found(False, {1: _source(path, named[2] if named and name else target)}))]


def _source(path: Path, text: str) -> Source:
    """The version at a path; what is no file may still be a URL, a hub's or a published name."""
    if path.is_dir() and not is_bundle(path):
        path = path / _BEST
        text = str(path)
    if is_bundle(path):
        folder = path.parent if path.name == DOCUMENT else path
        return Source(str(folder), True, _mark(folder / DOCUMENT))
    return Source(text, False, _mark(path) if path.is_file() else ())


def _found(versions: dict[int, Path]) -> Found:
    found = Found(True)
    for number, folder in versions.items():
        try:
            found.versions[number] = _source_within(folder)
        except UsageError as error:
            found.problems[number] = str(error)
    return found


def _source_within(folder: Path) -> Source:
    if is_bundle(folder) or (folder / _BEST).is_file():
        return _source(folder, str(folder))
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES]
    if len(files) != 1:
        raise UsageError(f"{folder}: must hold a bundle, or one checkpoint; it has {len(files)}")
    return _source(files[0], str(files[0]))


def _numbered(folder: Path) -> dict[int, Path]:
    return {int(sub.name): sub for sub in _folders(folder) if _VERSION.fullmatch(sub.name)}


def _folders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _mark(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _name_of(path: Path) -> str:
    """`runs/photos/best.safetensors` is `photos`, other files go by their stem, folders by their name."""
    path = path.parent if path.name == DOCUMENT else path
    whole = path.resolve()
    if path.is_file():
        return _clean(whole.parent.name if _STAGES_OF_A_RUN.fullmatch(path.stem) else path.stem)
    return _clean(whole.name)


def _clean(name: str) -> str:
    """A name that can stand in a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"
