"""What a training run begins with: the model that the options name, and the classes of its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from visformer import console
from visformer.checkpoint import Checkpoint, match_head, read_checkpoint
from visformer.config import TrainConfig
from visformer.data import Data
from visformer.data.sources import targets_of
from visformer.distributed import describe
from visformer.errors import UsageError
from visformer.losses import balanced_weights
from visformer.models import Visformer, change, variant
from visformer.pretrained import load_checkpoint, published_weights
from visformer.run_folder import RunFolder


def first_checkpoint(config: TrainConfig, folder: RunFolder, state: dict[str, Any] | None) -> Checkpoint | None:
    """What the model's architecture is taken from: the run that is resumed, or the weights to fine-tune."""
    if state is not None:
        last = Path(config.ckpt_path) if config.resume_opt and not folder.last.exists() else folder.last
        return read_checkpoint(last) if last.exists() else None
    source = _source(config)
    return load_checkpoint(source) if source else None


def _source(config: TrainConfig) -> str:
    """Where the weights to fine-tune are; empty: training begins from none."""
    source = config.ckpt_path or config.pretrained
    return published_weights(config.model) if source is True else str(source or "")


def start_from(model: Visformer, checkpoint: Checkpoint, config: TrainConfig, class_names: list[str]) -> None:
    """Give `model` the weights of `checkpoint`, and say which classes of its head they know."""
    source = _source(config)
    try:
        kept, new = match_head(model, checkpoint, class_names)
    except UsageError as error:
        raise UsageError(f"{source}: {error}; name the model it holds with --model") from error
    console.note(
        f"fine-tuning from {source} ({checkpoint.model_name}): head rows kept for {count(kept)}, new for {count(new)}"
    )


def class_weights(data: Data, config: TrainConfig, class_names: list[str]) -> torch.Tensor | None:
    """The weight of each class in the training loss, (K,), or None; says which weigh the least and the most."""
    if config.class_weights == "none":
        return None
    counts = torch.bincount(torch.from_numpy(targets_of(data.train)), minlength=len(class_names))
    weights = balanced_weights(counts)
    ends = [int(end) for end in (weights.argmin(), weights.argmax())]
    least, most = (f"{class_names[i]} ({counts[i]:,} images) {weights[i]:.2f}" for i in ends)
    console.note(f"class weights: from {least} to {most}")
    return weights


def announce(
    model: Visformer, config: TrainConfig, data: Data, device: torch.device, batches: int, *, validates: bool
) -> None:
    """Say what is trained, where, and on how much."""
    held_out = f", {len(data.val):,} to validate on" if data.val is not None and validates else ""
    precision = config.amp_level if config.amp_level == "O0" else f"{config.amp_level} {config.amp_dtype}"
    console.note(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{model.num_classes} classes, {config.image_size[0]}x{config.image_size[1]} pixels, "
        f"on {describe(device)}, {precision}"
    )
    whole = len(data.train)
    images = f"{whole:,}" if (config.num_samples or whole) >= whole else f"{config.num_samples:,} of {whole:,}"
    epochs = "1 epoch" if config.epoch_size == 1 else f"{config.epoch_size} epochs"
    console.note(
        f"{images} images to train on{held_out}; {epochs} of {batches:,} batches of "
        f"{config.batch_size}; writing to {config.ckpt_save_dir}"
    )


def build_model(config: TrainConfig, num_classes: int, checkpoint: Checkpoint | None) -> Visformer:
    """The model that the options name; one that begins with weights has their form of GELU and scale of q and k."""
    same = checkpoint is not None and checkpoint.model_name == config.model
    base = checkpoint.architecture if checkpoint is not None and same else variant(config.model).architecture
    architecture = change(
        base,
        num_classes=num_classes,
        image_size=config.image_size,
        in_channels=config.in_channels,
        drop_rate=config.drop_rate,
        drop_path_rate=config.drop_path_rate,
        attn_drop_rate=config.attn_drop_rate,
        gelu=config.gelu,
    )
    return Visformer(architecture)


def name_classes(data: Data, config: TrainConfig, state: dict[str, Any] | None) -> list[str]:
    """The classes of the head: those of the data, and as many unused ones as `num_classes` asks for."""
    names, wanted = list(data.class_names), config.num_classes
    if state is not None and state["class_names"][: len(names)] != names:
        raise UsageError("the classes of the data are not those of the run to resume; use the same data_dir")
    if wanted is not None and wanted < len(names):
        raise UsageError(f"num_classes: {wanted} is too few; the data has {len(names)} classes")
    return names + [f"unused_{i}" for i in range(len(names), wanted or 0)]


def count(names: list[str]) -> str:
    """How many classes, with the first few names."""
    if not names:
        return "no class"
    return f"{len(names)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
