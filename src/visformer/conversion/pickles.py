"""torch's `.pth`: which of the things in it is the model, and writing one.

What projects save around their weights differs:

    bare          {name: tensor, ...}
    the authors   {'model', 'optimizer', 'lr_scheduler', 'epoch', 'scaler', 'args': Namespace[, 'model_ema']}
    timm          {'state_dict', 'optimizer', 'epoch', 'arch', 'args', 'version', 'metric'[, 'state_dict_ema']}

and so do names: a model that was wrapped for several GPUs or for averaging has `module.` before every name, a compiled
one `_orig_mod.` before the names of what was compiled. Averaged weights (EMA), when they are there and complete, are
those that the projects evaluate and publish, so they are taken unless the caller says otherwise.

Nothing in the file is run: see `unpickling`, and `archives` for the containers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visformer.atomic import atomic_write
from visformer.conversion.archives import Archive, open_archive
from visformer.conversion.containers import Foreign, check_count, check_name, naming, shown
from visformer.conversion.unpickling import Namespace, TensorSpec
from visformer.errors import UsageError

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
TRAINING_STATE = {
    "optimizer": "the optimiser's state",
    "optimizer_state_dict": "the optimiser's state",
    "lr_scheduler": "the learning rate's schedule",
    "scheduler": "the learning rate's schedule",
    "scaler": "the loss scaler's state",
    "amp_scaler": "the loss scaler's state",
    "amp": "the loss scaler's state",
    "criterion": "the loss's state",
}
COUNTERS = ("n_averaged",)
"""What torch's `AveragedModel` keeps beside the weights."""

MAX_DEPTH, MAX_VALUES, MAX_TEXT = 8, 10_000, 4096


def read_pth(path: str | Path, *, ema: bool = True) -> Foreign:
    """The weights in a file that `torch.save` wrote, as views of a memory map.

    `ema=False` takes the raw weights where the file holds averaged ones too; what was not taken is in `ignored`. Raises
    `UsageError` naming the file: for code in the pickle, for tensors that are not plain and dense, for a layout without
    weights and for damage.
    """
    with naming(path):
        archive = open_archive(path)
        found = _unwrap(archive.document)
        specs = _choose(found, ema=ema)
        tensors = {name: archive.tensor(name, spec) for name, spec in specs.items()}
        _check_total(archive, tensors)
    return Foreign(tensors, "torch", found.facts, found.ignored)


def write_pth(path: str | Path, document: dict[str, Any]) -> None:
    """Write a dict of tensors, which may have plain values and further dicts in it, with `torch.save`, whole or not.

    Each tensor is written as a plain dense one on the CPU with a storage of its own size. Raises `RunError` when the
    disk refuses.
    """
    plain = _portable(document)

    def write(file) -> None:
        try:
            torch.save(plain, file)
        except RuntimeError as error:  # torch reports a full disk as a failed stream, without an errno
            raise OSError(28, f"writing failed ({str(error).splitlines()[0]})") from error

    atomic_write(path, write)


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    tensor = value.detach().to("cpu").contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


@dataclass
class _Found:
    """A document taken apart: the group of raw weights, that of averaged ones, and the rest."""

    raw: tuple[str, dict[str, TensorSpec]] | None = None
    ema: tuple[str, dict[str, TensorSpec]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    ignored: list[tuple[str, str]] = field(default_factory=list)


def _unwrap(document: Any) -> _Found:
    if not isinstance(document, dict):
        raise UsageError(
            f"it holds a {type(document).__name__}, where a dict of tensors is needed; save model.state_dict()"
        )
    found = _Found()
    raw_key = next((key for key in MODEL_KEYS if _weights(document.get(key)) is not None), None)
    ema_key = next((key for key in EMA_KEYS if _weights(document.get(key)) is not None), None)
    if raw_key is None and ema_key is None:
        found.raw = "state_dict", _clean(document, "", found)
        return found
    for key, value in document.items():
        if key in (raw_key, ema_key):
            continue
        if key in TRAINING_STATE:
            found.ignored.append((key, TRAINING_STATE[key]))
        else:
            _add_fact(found, key, value)
    if raw_key is not None:
        found.raw = raw_key, _clean(_weights(document[raw_key]) or {}, raw_key, found)
    if ema_key is not None:
        found.ema = ema_key, _clean(_weights(document[ema_key]) or {}, ema_key, found)
    return found


def _weights(value: Any) -> dict | None:
    """The dict of tensors that `value` is or, a few dicts further in, holds under one of the usual names."""
    for _ in range(MAX_DEPTH):
        if not isinstance(value, dict):
            return None
        inner = next((value[key] for key in MODEL_KEYS if isinstance(value.get(key), dict)), None)
        if inner is None:
            return value if any(isinstance(item, TensorSpec) for item in value.values()) else None
        value = inner
    return None


def _clean(group: dict, where: str, found: _Found) -> dict[str, TensorSpec]:
    """The tensors of a group by name, without what wrappers put before the names."""
    specs: dict[str, TensorSpec] = {}
    for name, value in group.items():
        if isinstance(value, TensorSpec) and type(name) is str and name not in COUNTERS:
            check_count(len(specs) + 1)
            specs[check_name(name)] = value
        elif isinstance(value, TensorSpec):
            reason = "a counter of the averaging" if name in COUNTERS else "a tensor without a name"
            found.ignored.append((f"{where}.{name}" if where else str(name), reason))
        elif not where:
            _add_fact(found, name, value)
        else:
            found.ignored.append((f"{where}.{shown(str(name)[:200])}", "not a tensor"))
    while specs and all(name.startswith(("module.", "_orig_mod.")) for name in specs):
        specs = _renamed({name: name.split(".", 1)[1] for name in specs}, specs)
    return _renamed({name: ".".join(p for p in name.split(".") if p != "_orig_mod") for name in specs}, specs)


def _renamed(names: dict[str, str], specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    renamed = {check_name(new): specs[old] for old, new in names.items()}
    if len(renamed) < len(specs):
        twice = next(old for old, new in names.items() if old != new and renamed[new] is not specs[old])
        raise UsageError(f"{shown(twice)} is there with and without its wrapper's prefix; keep one of them")
    return renamed


def _add_fact(found: _Found, key: Any, value: Any) -> None:
    """Keep `value` beside the weights if it is plain, and say so if not."""
    name = shown(str(key)[:200])
    try:
        found.facts[name] = _Plain().value(value, 0)
    except _NotPlain as reason:
        found.ignored.append((name, str(reason)))


class _NotPlain(Exception):  # noqa: N818 (it never leaves this file)
    """Why a value is no fact."""


class _Plain:
    """Plain values of a document, copied; how many is bounded, since a short pickle can share parts without end."""

    def __init__(self) -> None:
        self.left = MAX_VALUES

    def value(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            raise _NotPlain("larger than a setting")
        if isinstance(value, Namespace):
            value = value.attributes
        if isinstance(value, dict):
            return {key: self.value(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, depth + 1) for item in value]
        if isinstance(value, torch.dtype):
            return str(value)
        if value is None or type(value) in (bool, int, float) or (type(value) is str and len(value) <= MAX_TEXT):
            return value
        raise _NotPlain("tensors beside the weights" if isinstance(value, TensorSpec) else "not a plain value")


def _choose(found: _Found, *, ema: bool) -> dict[str, TensorSpec]:
    """The group that is asked for, where there is a choice; the other goes to `ignored`."""
    raw, averaged = found.raw, found.ema
    if averaged is None or raw is None:
        only = averaged or raw
        if only is None or not only[1]:
            raise UsageError("it holds no tensors where a model's weights belong; save model.state_dict()")
        return only[1]
    missing = next((name for name, spec in raw[1].items() if not _same_shape(spec, averaged[1].get(name))), None)
    if ema and missing is None:
        found.ignored.append((raw[0], f"the raw weights, since {averaged[0]} holds averaged ones"))
        return averaged[1]
    reason = "averaged weights, where the raw ones were asked for"
    if missing is not None:
        reason = f"averaged weights, which lack {shown(missing)} or have it in another shape"
    found.ignored.append((averaged[0], reason))
    return raw[1]


def _same_shape(spec: TensorSpec, other: TensorSpec | None) -> bool:
    return other is not None and spec.shape == other.shape


def _check_total(archive: Archive, tensors: dict[str, Tensor]) -> None:
    """Raise `UsageError` when so many tensors share their values that copies of them would not fit."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > 2 * len(archive.data):
        raise UsageError(f"its tensors share their values so that they come to {total} bytes; save copies of them")
