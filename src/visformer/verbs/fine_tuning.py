"""What `visformer train --pretrained X --data_dir IMAGES` does with no other option: a recipe for as many images as
there are, in words that the log repeats.

Two steps, and in both an option that was given stays as it was given. `adopt` takes the model and the preprocessing of
the weights. `choose` takes a row of a table by the number of training images: few images are many epochs with small
steps near the input, a head that learns alone at first, and an end when nothing gets better; many images are few epochs
in which everything learns, with the augmentation of a training from scratch. Where each value comes from is in
docs/training.md. A run that is resumed keeps what it began with.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import yaml

from visformer import console
from visformer.checkpoint import Checkpoint
from visformer.config import TrainConfig
from visformer.options import from_keywords


@dataclass(frozen=True)
class Row:
    """Values for up to `images` training images; `layer_decay` is the rate of a layer over that of the one after it."""

    images: float
    batch_size: int
    epochs: int
    head_epochs: int
    layer_decay: float
    patience: int | None
    mixup: float


TABLE = (
    Row(images=1_000, batch_size=16, epochs=50, head_epochs=5, layer_decay=0.85, patience=15, mixup=0.0),
    Row(images=10_000, batch_size=32, epochs=30, head_epochs=2, layer_decay=0.85, patience=10, mixup=0.0),
    Row(images=100_000, batch_size=64, epochs=20, head_epochs=1, layer_decay=0.88, patience=6, mixup=0.2),
    Row(images=math.inf, batch_size=128, epochs=15, head_epochs=0, layer_decay=0.9, patience=None, mixup=0.2),
)
LEAST_BATCHES = 4  # in an epoch, or the batch is made smaller,
LEAST_BATCH = 8  # but not below this, for BatchNorm's sake
LR = 1e-3  # for a row's batch on one device; it grows with the root of the global batch, as AdamW's steps allow,
MOST_LR = 2e-3  # up to this

_ADOPTED = ("model", "image_resize", "in_channels", "mean", "std", "crop_pct", "interpolation")


def applies(config: TrainConfig) -> bool:
    """True when this run begins with weights, and leaves it to us what was not given: a file says all there is to say,
    unless `fine_tune` is in it or beside it."""
    begins = bool(config.pretrained or config.ckpt_path) and not config.resume_opt
    left_to_us = config.given is not None and (not config.from_file or "fine_tune" in config.given)
    return begins and left_to_us and config.fine_tune == "auto"


def adopt(config: TrainConfig, checkpoint: Checkpoint | None) -> TrainConfig:
    """`config` with the model and the preprocessing of the weights, where it was not given others."""
    if checkpoint is None or not applies(config):
        return config
    theirs = checkpoint.preprocessing
    values = {
        "model": checkpoint.model_name,
        "image_resize": theirs.image_size[0] if len(set(theirs.image_size)) == 1 else theirs.image_size,
        "in_channels": theirs.in_channels,
        "mean": theirs.mean,
        "std": theirs.std,
        "crop_pct": theirs.crop_pct,
        "interpolation": theirs.interpolation,
    }
    return _with(config, values)


def choose(config: TrainConfig, images: int, processes: int, accelerator: bool, state: Any) -> TrainConfig:
    """`config` with the recipe for so many training images, where it was not given other values; says so in the log.

    A run that goes on from `state` takes what it began with. `accelerator`: half precision is worth it.
    """
    if not applies(config):
        return config
    if state is not None:
        before = from_keywords(TrainConfig, yaml.safe_load(state["config"]))
        return _with(config, {name: getattr(before, name) for name in recipe(images, processes, accelerator)})
    row = next(row for row in TABLE if images <= row.images)
    values = recipe(images, processes, accelerator)
    if "freeze" in (config.given or ()):
        values.pop("freeze_epochs")  # what was asked to be frozen stays so, unless the epochs are given too
    if config.val_while_train is False:
        values.pop("early_stop_epochs")
    chosen = _consistent(_with(config, values), config.given or ())
    _tell(chosen, row, images)
    return chosen


def recipe(images: int, processes: int = 1, accelerator: bool = False) -> dict[str, Any]:
    """Option -> value for so many training images, shared by so many processes."""
    row = next(row for row in TABLE if images <= row.images)
    fits = max(images // (LEAST_BATCHES * processes), min(LEAST_BATCH, images // processes), 1)
    batch_size = min(row.batch_size, 1 << (fits.bit_length() - 1))
    lr = min(LR * math.sqrt(batch_size * processes / row.batch_size), MOST_LR)
    steps = row.epochs * max(1, images // (batch_size * processes))
    return {
        "batch_size": batch_size,
        "epoch_size": row.epochs,
        "freeze": "backbone" if row.head_epochs else "none",
        "freeze_epochs": row.head_epochs or None,
        "early_stop_epochs": row.patience,
        "opt": "adamw",
        "eps": 1e-8,
        "weight_decay": 0.05,
        "weight_decay_filter": "norm_and_bias",
        "layer_decay": row.layer_decay,
        "scheduler": "cosine_decay",
        "lr": lr,
        "min_lr": lr / 100,
        "recipe_batch_size": batch_size,
        "recipe_devices": processes,
        "warmup_epochs": row.head_epochs + 1,
        "decay_epochs": row.epochs - row.head_epochs - 1,
        "clip_grad": True,
        "clip_value": 5.0,
        "ema": True,
        "ema_decay": min(0.9998, max(0.9, 1 - 20 / steps)),
        "label_smoothing": 0.1,
        "scale": (0.35, 1.0),
        "re_prob": 0.1,
        "mixup": row.mixup,
        "drop_path_rate": 0.1,
        "amp_level": "O2" if accelerator else "O0",
        "val_amp_level": "O2" if accelerator else "O0",
        "ckpt_save_interval": row.epochs,
    }


def _with(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    return config.change(**{name: value for name, value in values.items() if name not in (config.given or ())})


def _consistent(chosen: TrainConfig, given: Collection[str]) -> TrainConfig:
    """Those of our values changed that follow from values that were given."""
    freeze, head_epochs = chosen.freeze, chosen.freeze_epochs
    if head_epochs and "freeze_epochs" not in given:
        head_epochs = min(head_epochs, chosen.epoch_size // 5) or None
        freeze = freeze if head_epochs or "freeze" in given else "none"
    warmup_epochs = min((head_epochs or 0) + 1, chosen.epoch_size // 2)
    changed = _with(
        chosen,
        {"freeze": freeze, "freeze_epochs": head_epochs, "warmup_epochs": warmup_epochs, "min_lr": chosen.lr / 100},
    )
    return _with(changed, {"decay_epochs": max(chosen.epoch_size - changed.warmup_epochs, 1)})


def _tell(config: TrainConfig, row: Row, images: int) -> None:
    upto = f"up to {row.images:,.0f}" if math.isfinite(row.images) else "the largest sets"
    console.note(
        f"recipe for {images:,} images ({upto}); what you give as an option stays, --fine_tune off: all defaults"
    )
    parts = [f"{config.epoch_size} epochs of batches of {config.batch_size}"]
    if config.freeze != "none":
        frozen = "the head alone learns" if config.freeze == "backbone" else f"all up to {config.freeze} stays as it is"
        parts.append(f"{frozen} for {config.freeze_epochs} epochs, then everything" if config.freeze_epochs else frozen)
    if config.layer_decay:
        parts.append(f"each layer at {config.layer_decay:g} of the rate of the one after it")
    if config.early_stop_epochs:
        parts.append(f"an end after {config.early_stop_epochs} epochs without a better result")
    console.note(f"  {'; '.join(parts)}")
    mixing = f", mixup {config.mixup:g}" if config.mixup else ""
    average = "; the average of the weights is what is kept" if config.ema else ""
    console.note(
        f"  {config.opt} with lr {config.lr:g} and weight decay {config.weight_decay:g}{average}; "
        f"crops of {config.scale[0]:.0%} or more, flips {config.hflip:g}, erasing {config.re_prob:g}{mixing}"
    )
