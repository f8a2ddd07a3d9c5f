"""What a training run begins with: the model that the options name, and the classes of its head."""

from __future__ import annotations

from typing import Any

from visformer.checkpoint import Checkpoint
from visformer.config import TrainConfig
from visformer.data import Data
from visformer.errors import UsageError
from visformer.models import Visformer, change, variant


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
