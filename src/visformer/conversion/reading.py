"""Any published checkpoint as one of ours: recognise it, take each tensor by its rule, account for the rest.

Nothing is guessed in silence: what shapes cannot tell is said in the notes with the reason, and a tensor that is
missing, left over or of another shape is an error that names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visformer.checkpoint import Checkpoint, read_checkpoint
from visformer.conversion.foreign import Foreign, read_foreign
from visformer.conversion.layouts import LAYOUTS, MINDCV, Layout
from visformer.conversion.recognise import CUSTOM, Choices, recognise_layout, recognise_model
from visformer.data import imagenet
from visformer.data.preprocessing import Preprocessing, for_channels
from visformer.errors import UsageError, nearest
from visformer.models import Architecture, Visformer

COUNTER = ".num_batches_tracked"  # of a batch norm; no number depends on it, and MindCV keeps none
CONTAINERS = {"mindspore": "MindSpore checkpoint", "torch": "PyTorch file", "safetensors": "safetensors file"}

# How each project evaluates its own models. MindCV resizes without antialiasing and rounds the crop's offset down.
PREPROCESSING: dict[str, dict[str, Any]] = {
    "mindcv": {"crop_pct": 0.875, "antialias": False, "crop_rounding": "floor"},
    "authors": {"crop_pct": 0.875},
    "timm": {"crop_pct": 0.9},
    "visformer": {"crop_pct": 0.875},
}


@dataclass
class Conversion:
    """A checkpoint of ours and how it came about.

    `taken` pairs our names with the file's, `filled` are ours that the file need not have, `left_out` are the file's
    that we need not, each with the reason; `notes` say what was decided and why.
    """

    checkpoint: Checkpoint
    container: str
    layout: str
    taken: dict[str, str] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_any(
    path: str | Path,
    *,
    model: str | None = None,
    source: str | None = None,
    gelu: Any = None,
    qk_scale_power: float | None = None,
    num_heads: tuple[int, ...] | None = None,
    class_names: Sequence[str] | None = None,
    ema: bool = True,
) -> Checkpoint:
    """A checkpoint of any known format: ours, MindCV's `.ckpt`, the authors' and timm's `.pth`, timm's `.safetensors`.

    See `convert_file` for the arguments and the errors. The tensors are in memory of their own, where those of
    `convert_file` are views of the file.
    """
    choices = Choices(model, gelu, qk_scale_power, num_heads)
    checkpoint = convert_file(path, choices, source=source, class_names=class_names, ema=ema).checkpoint
    return replace(checkpoint, state_dict=in_memory(checkpoint.state_dict))


def in_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no longer depend on the file: views may begin at any byte, and change when the file does."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def convert_file(
    path: str | Path,
    choices: Choices | None = None,
    *,
    source: str | None = None,
    class_names: Sequence[str] | None = None,
    ema: bool = True,
) -> Conversion:
    """Read a checkpoint of any known format.

    Args:
        path: the file; its format is told from its content.
        choices: what the file does not tell, or is to be taken otherwise.
        source: mindcv, authors or timm: whose GELU and preprocessing hold; None: that of the tensors' names.
        class_names: names of the classes; None: ImageNet's for 1,000 classes, else "0", "1", ...
        ema: take the exponential moving average of the weights, if the file has one.

    Raises `UsageError` naming the file and what is wrong with it.
    """
    choices = choices or Choices()
    path = Path(path)
    foreign = read_foreign(path, ema=ema)
    if foreign.container == "safetensors" and "format_version" in foreign.facts.get("metadata", {}):
        return _ours(path, choices)
    try:
        return _convert(path, foreign, choices, source, class_names, ema)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _ours(path: Path, choices: Choices) -> Conversion:
    """A checkpoint that this package wrote; it says everything itself."""
    checkpoint = read_checkpoint(path)
    if choices.model not in (None, checkpoint.model_name):
        raise UsageError(f"{path}: it holds {checkpoint.model_name}, not {choices.model}")
    if (choices.gelu, choices.qk_scale_power, choices.num_heads) != (None, None, None):
        raise UsageError(f"{path}: it says itself what its GELU, scale and heads are; leave these options out")
    names = {name: name for name in checkpoint.state_dict}
    return Conversion(checkpoint, "safetensors", "visformer", names)


def _convert(
    path: Path,
    foreign: Foreign,
    choices: Choices,
    source: str | None,
    class_names: Sequence[str] | None,
    ema: bool,
) -> Conversion:
    layout = recognise_layout(foreign.tensors)
    convention = LAYOUTS[source] if source else layout
    left_out = list(foreign.ignored)
    tensors = _average(foreign.tensors, ema, left_out) if layout is MINDCV else foreign.tensors
    recognised = recognise_model(tensors, convention, foreign.facts, choices)
    architecture = recognised.architecture
    conversion = Conversion(
        Checkpoint(
            model_name=recognised.name,
            architecture=architecture,
            class_names=_class_names(class_names, architecture.num_classes),
            preprocessing=preprocessing(architecture, convention.name),
            state_dict={},
            training=_summary(foreign.facts),
            source={"project": layout.project, "file": path.name, "sha256": _sha256(path)},
        ),
        foreign.container,
        layout.name,
        left_out=left_out,
        notes=recognised.notes,
    )
    _take(tensors, layout, conversion)
    return conversion


def preprocessing(architecture: Architecture, source: str) -> Preprocessing:
    """How the project `source` prepares images for its own evaluation, for this network's input."""
    plain = Preprocessing(architecture.image_size)
    channels = architecture.in_channels
    return replace(
        plain,
        mean=for_channels(plain.mean, channels, "mean"),
        std=for_channels(plain.std, channels, "std"),
        in_channels=channels,
        **PREPROCESSING[source],
    )


def _average(tensors: dict[str, Tensor], ema: bool, left_out: list[tuple[str, str]]) -> dict[str, Tensor]:
    """MindCV keeps the moving average of each parameter X as `ema.X` beside it, and none of the statistics."""
    averages = {name.removeprefix("ema."): name for name in tensors if name.startswith("ema.")}
    averages = {name: average for name, average in averages.items() if name in tensors}
    if not averages:
        return tensors
    spare = list(averages) if ema else list(averages.values())
    why = "its moving average is taken" if ema else "the weights themselves are taken"
    left_out += [(name, why) for name in spare]
    chosen = {name: tensor for name, tensor in tensors.items() if name not in set(averages) | set(averages.values())}
    return chosen | {name: tensors[average if ema else name] for name, average in averages.items()}


def _take(tensors: dict[str, Tensor], layout: Layout, conversion: Conversion) -> None:
    """Fill the checkpoint's state dict by the rules, and account for every tensor of the file."""
    checkpoint = conversion.checkpoint
    with torch.device("meta"):
        wanted = Visformer(checkpoint.architecture).state_dict()
    missing, misshapen, casts = [], [], set()
    for ours, name in layout.names(checkpoint.architecture, wanted).items():
        tensor, shape = tensors.get(name.theirs), tuple(wanted[ours].shape)
        if tensor is not None and ours.endswith(COUNTER):
            tensor = tensor.reshape(shape) if tensor.numel() == 1 else tensor  # MindSpore has no tensor of no axes
        if tensor is None and ours.endswith(COUNTER):
            checkpoint.state_dict[ours] = torch.zeros(shape, dtype=torch.int64)
            conversion.filled.append(ours)
        elif tensor is None:
            missing.append(name.theirs)
        elif tuple(tensor.shape) != shape + (1,) * name.trailing_axes:
            misshapen.append(
                f"{name.theirs} is {_sides(tensor.shape)}, not {_sides(shape + (1,) * name.trailing_axes)}"
            )
        else:
            if tensor.dtype != wanted[ours].dtype:
                casts.add(str(tensor.dtype).removeprefix("torch."))
            checkpoint.state_dict[ours] = tensor.reshape(shape).to(wanted[ours].dtype)
            conversion.taken[ours] = name.theirs
    unknown = _leave_out(tensors, layout, conversion, set(missing))
    _complain(checkpoint.model_name, missing, misshapen, unknown)
    if casts:
        conversion.notes.append(f"tensors of {', '.join(sorted(casts))} became float32 or int64")


def _leave_out(tensors: dict[str, Tensor], layout: Layout, conversion: Conversion, missing: set[str]) -> list[str]:
    """Name what the model does not take, with the reason; returns the names for which there is none."""
    taken, unknown = set(conversion.taken.values()), []
    for name in tensors:
        if name in taken:
            continue
        prefix, _, rest = name.partition(".")
        reason = layout.reason_to_leave_out(name)
        if reason is None and rest in taken and prefix.isidentifier():
            reason = f"{prefix} of the optimizer"
        if reason is None:
            unknown.append(name + nearest(name, missing))
        else:
            conversion.left_out.append((name, reason))
    return unknown


def _complain(model: str, missing: list[str], misshapen: list[str], unknown: list[str]) -> None:
    """Raise `UsageError` if the file and the model do not match."""
    problems = []
    for what, names in (("missing", missing), ("of another shape", misshapen), ("that no rule takes", unknown)):
        if names:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            problems.append(f"{len(names):,} {what}: {', '.join(names[:5])}{more}")
    if problems:
        of = "a Visformer" if model == CUSTOM else model
        raise UsageError(f"its tensors are not those of {of}; {'; '.join(problems)}")


def _class_names(given: Sequence[str] | None, num_classes: int) -> list[str]:
    if given is not None:
        if len(given) != num_classes:
            raise UsageError(f"class_names: {len(given)} names for a head of {num_classes} classes")
        if len(set(given)) != len(given):
            raise UsageError("class_names: a name stands there twice; each class needs a name of its own")
        return list(given)
    if num_classes == imagenet.NUM_CLASSES:
        return imagenet.class_names()
    return [str(index) for index in range(num_classes)]


def _summary(facts: dict[str, Any]) -> dict[str, Any]:
    """What the file says of its training, as plain values."""
    kept = {key: facts[key] for key in ("epoch", "metric", "arch") if isinstance(facts.get(key), (int, float, str))}
    return kept | ({"arguments": facts["args"]} if isinstance(facts.get("args"), dict) else {})


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single value"
