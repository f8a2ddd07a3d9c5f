"""A checkpoint for another number of classes, or for images of another size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from visformer.checkpoint import Checkpoint
from visformer.errors import UsageError
from visformer.models import Visformer, change

HEAD = "head."


def with_new_head(checkpoint: Checkpoint, num_classes: int, class_names: Sequence[str] | None = None) -> Checkpoint:
    """The checkpoint with a fresh head for `num_classes` classes (0: none): weights normal with deviation 0.02 from a
    fixed seed, biases 0. Names default to "0", "1", ..."""
    names = list(class_names) if class_names is not None else [str(index) for index in range(num_classes)]
    if len(names) != num_classes:
        raise UsageError(f"class_names: {len(names)} names for a head of {num_classes} classes")
    tensors = {name: tensor for name, tensor in checkpoint.state_dict.items() if not name.startswith(HEAD)}
    if num_classes:
        weight = torch.empty(num_classes, checkpoint.architecture.num_features)
        torch.nn.init.trunc_normal_(weight, std=0.02, generator=torch.Generator().manual_seed(0))
        tensors |= {f"{HEAD}weight": weight, f"{HEAD}bias": torch.zeros(num_classes)}
    architecture = change(checkpoint.architecture, num_classes=num_classes)
    return replace(checkpoint, architecture=architecture, class_names=names, state_dict=tensors)


def resized(checkpoint: Checkpoint, image_size: int | tuple[int, int]) -> Checkpoint:
    """The checkpoint for another input size in pixels, its position embeddings resampled."""
    architecture = change(checkpoint.architecture, image_size=image_size)
    with torch.device("meta"):
        model = Visformer(architecture)
    return replace(
        checkpoint,
        architecture=architecture,
        preprocessing=replace(checkpoint.preprocessing, image_size=architecture.image_size),
        state_dict=model.resample_state_dict(checkpoint.state_dict),
    )
