"""The teacher of a distillation: a checkpoint of any known form, or a model of timm's.

It sees the very images that the student learns from, mixed and erased as they are, brought to its own size and
statistics, and gives logits in the order of the student's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from visformer import console
from visformer.config import TrainConfig
from visformer.conversion.foreign import read_foreign
from visformer.data import Preprocessing, class_mapping
from visformer.data.preprocessing import for_channels
from visformer.errors import RunError, UsageError
from visformer.losses import build_distillation
from visformer.pretrained import load_checkpoint

_TIMM = "timm:"


class Teacher:
    """`__call__(loss, logits, images)`: the loss of the labels and of the teacher, for a batch of the student's.

    `model` gives logits for images of `expects`; `columns` are those of the student's classes, in their order.
    """

    def __init__(
        self,
        model: nn.Module,
        expects: Preprocessing,
        columns: Sequence[int],
        config: TrainConfig,
        device: torch.device,
    ):
        self.model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
        self.columns = torch.tensor(columns, device=device)
        self.size = expects.image_size
        self.channels = expects.in_channels
        self.combine: Callable[[Tensor, Tensor, Tensor], Tensor] = build_distillation(config)
        student = Preprocessing.from_config(config)
        if student.in_channels not in (1, expects.in_channels):
            raise UsageError(
                f"teacher: {config.teacher} takes images of {expects.in_channels} channels, and in_channels is "
                f"{student.in_channels}; use a teacher of {student.in_channels} channels"
            )
        # From the student's normalised values to the teacher's: x * scale + shift, each (1, C, 1, 1) or (1, 1, 1, 1).
        mean, std = _statistics(student, device)
        its_mean, its_std = _statistics(expects, device)
        self.scale, self.shift = std / its_std, (mean - its_mean) / its_std

    def __call__(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        return self.combine(loss, logits, self.logits(images))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, K) for the student's normalised images (B, C, H, W)."""
        images = (images * self.scale + self.shift).expand(-1, self.channels, -1, -1)
        if images.shape[2:] != self.size:
            images = interpolate(images, size=self.size, mode="bilinear", antialias=True)
        return self.model(images.contiguous(memory_format=torch.channels_last))[:, self.columns]


def load_teacher(config: TrainConfig, class_names: Sequence[str], device: torch.device) -> Teacher | None:
    """The teacher that `config` names for a student of `class_names`; None when it names none.

    Raises `UsageError` for a teacher that cannot be read, lacks a class, or takes other channels.
    """
    if not config.teacher:
        return None
    if config.teacher.startswith(_TIMM):
        model, expects = _timm_teacher(config.teacher.removeprefix(_TIMM), config.teacher_ckpt_path)
        columns = list(range(len(class_names)))
        if model.num_classes != len(columns):
            raise UsageError(
                f"teacher: {config.teacher} tells {model.num_classes} classes apart, and the data has {len(columns)}; "
                "use weights trained on these classes, with --teacher_ckpt_path"
            )
    else:
        checkpoint = load_checkpoint(config.teacher)
        model, expects = checkpoint.build(), checkpoint.preprocessing
        try:
            columns = class_mapping(class_names, checkpoint.class_names)
        except UsageError as error:
            raise UsageError(f"teacher: {config.teacher}: {error}") from None
    console.note(
        f"learning from {config.teacher} as well: {config.distillation_alpha:.0%} of the loss is its "
        + ("first class" if config.distillation_type == "hard" else "probabilities")
    )
    return Teacher(model, expects, columns, config, device)


def _statistics(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on the 0-255 scale, (1, C, 1, 1)."""
    mean, std = (
        torch.tensor(values, device=device)[None, :, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    return mean, std


def _timm_teacher(name: str, path: str) -> tuple[Any, Preprocessing]:
    import timm
    from timm.data.config import resolve_data_config

    if name.split(".")[0] not in timm.list_models():
        near = timm.list_models(f"*{name.split('.')[0]}*")[:4]
        raise UsageError(f"teacher: timm has no model {name!r}{'; it has ' + ', '.join(near) if near else ''}")
    try:
        model: Any = _with_weights(name, path) if path else timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no weights are published, or the download failed
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"teacher: the weights of timm's {name} cannot be had: {reason}") from error
    data = resolve_data_config({}, model=model)
    _, height, width = data["input_size"]
    channels = model.get_parameter(f"{_first(model.pretrained_cfg['first_conv'])}.weight").shape[1]
    expects = Preprocessing(
        image_size=(height, width),
        mean=for_channels([255 * value for value in data["mean"]], channels, "mean"),
        std=for_channels([255 * value for value in data["std"]], channels, "std"),
        in_channels=channels,
    )
    return model, expects


def _with_weights(name: str, path: str) -> Any:
    """timm's model with the weights of a file; its head is as wide as theirs, its stem takes as many channels."""
    import timm

    if not Path(path).is_file():
        raise UsageError(f"teacher_ckpt_path: {path}: no such file")
    tensors = {key.removeprefix("module."): tensor for key, tensor in read_foreign(path).tensors.items()}
    with torch.device("meta"):
        plan: Any = timm.create_model(name)
    changes = {}
    for argument, layer in (
        ("num_classes", plan.pretrained_cfg["classifier"]),
        ("in_chans", plan.pretrained_cfg["first_conv"]),
    ):
        layer = _first(layer)
        weight = tensors.get(f"{layer}.weight")
        if weight is None:
            raise UsageError(f"teacher_ckpt_path: {path}: not weights of timm's {name}, it lacks {layer}.weight")
        changes[argument] = weight.shape[0 if argument == "num_classes" else 1]
    model = timm.create_model(name, **changes)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageError(
            f"teacher_ckpt_path: {path}: not weights of timm's {name}: {lines[min(1, len(lines) - 1)][:160]}"
        ) from error
    return model


def _first(names: Any) -> str:
    """A layer's name, where timm may list several."""
    return names[0] if isinstance(names, (tuple, list)) else names
