"""`visformer.create_model`: a model by name, fresh or with the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from visformer.checkpoint import match_head, read_checkpoint
from visformer.errors import UsageError
from visformer.models import Visformer, change, variant
from visformer.models import architecture as named_architecture


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    pretrained: str | Path | None = None,
    dynamic_image_size: bool = False,
    **changes,
) -> Visformer:
    """A model that gives logits (B, num_classes) for normalised images (B, in_channels, H, W), in training mode.

    Args:
        name: one of `list_models()`.
        num_classes: number of logits; 0: the pooled features come out; None: the checkpoint's, else 1000. Another
            number than the checkpoint's starts with a fresh head.
        image_size: side, or (height, width), in pixels, from 32 up; None: the checkpoint's, else 224.
        in_channels: channels of the input; None: the checkpoint's, else 3.
        pretrained: path of a checkpoint whose weights to take.
        dynamic_image_size: take any size at call, with position embeddings resampled to it.
        changes: any other field of `Architecture`: drop_rate, attn_drop_rate, drop_path_rate, gelu, qk_scale_power.

    Raises `UsageError` for an unknown name or option, and for a checkpoint of another model.
    """
    changes |= {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    if pretrained is None:
        return Visformer(named_architecture(name, **changes), dynamic_image_size=dynamic_image_size)
    variant(name)  # an unknown name is told before the file is read
    checkpoint = read_checkpoint(pretrained)
    if checkpoint.model_name != name:
        raise UsageError(f"{pretrained}: it holds {checkpoint.model_name}, not {name}")
    architecture = change(checkpoint.architecture, **changes)
    model = Visformer(architecture, dynamic_image_size=dynamic_image_size)
    same_head = architecture.num_classes == len(checkpoint.class_names)
    match_head(model, checkpoint, checkpoint.class_names if same_head else [])
    return model
