"""Weights from wherever they are: a file in any known format, a URL, a hub, or a published name.

`load_checkpoint`, `load` and `create_model` take the same sources:

    best.safetensors, visformer_small-6c83b6db.ckpt, checkpoint.pth    a file of ours, MindCV's, the authors' or timm's
    https://host/visformer_small-6c83b6db.ckpt                         a URL with the beginning of the file's SHA-256
    hf-hub:owner/name, hf-hub:owner/name@revision                      a repository of the Hugging Face hub
    visformer_small.timm                                               a published weight (visformer.list_pretrained())
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visformer.checkpoint import Checkpoint, match_head
from visformer.conversion import name_and_source, read_any
from visformer.errors import UsageError
from visformer.hub import PUBLISHED, Visformer, fetch
from visformer.models import architecture as named_architecture
from visformer.models import change, variant


def load_checkpoint(source: str | Path, *, model: str | None = None, **choices: Any) -> Checkpoint:
    """The checkpoint at `source`, in our form.

    `model` is the name that it must have, None: any; it may end in .mindcv, .authors or .timm, whose conventions then
    hold for a foreign file.
    `choices` say what a foreign file does not: gelu, qk_scale_power, num_heads, class_names, ema (see
    `visformer.conversion.convert_file`). Raises `UsageError` naming the source and what is wrong with it.
    """
    name, project = name_and_source(model or "")
    fetched = fetch(source)
    return read_any(fetched.path, model=name or fetched.model, source=project or fetched.source, **choices)


def load(source: str | Path, *, model: str | None = None, **choices: Any) -> Visformer:
    """The model of a checkpoint in evaluation mode on the CPU, giving logits.

    Takes what `load_checkpoint` takes. The model carries `config` (its `Architecture`), `model_name`, `class_names`,
    `preprocessing`, `training_summary` and `source`.
    """
    checkpoint = load_checkpoint(source, model=model, **choices)
    try:
        return checkpoint.build(Visformer)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def published_weights(model: str) -> str:
    """The name of a model's published weights: MindCV's, else the authors', else timm's.

    Raises `UsageError` for a model that nobody has published.
    """
    variant(model)
    for source in ("mindcv", "authors", "timm"):
        if f"{model}.{source}" in PUBLISHED:
            return f"{model}.{source}"
    have = ", ".join(sorted({weights.model for weights in PUBLISHED.values()}))
    raise UsageError(f"pretrained: nobody has published weights of {model}; there are some of {have}")


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    pretrained: str | Path | bool | None = None,
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
        pretrained: where the weights to take are, as in `load_checkpoint`; True: the published weights of this model.
        dynamic_image_size: take any size at call, with position embeddings resampled to it.
        changes: any other field of `Architecture`: drop_rate, attn_drop_rate, drop_path_rate, gelu, qk_scale_power.

    Raises `UsageError` for an unknown name or option, and for a checkpoint of another model.
    """
    changes |= {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    if pretrained is None or pretrained is False:
        return Visformer(named_architecture(name, **changes), dynamic_image_size=dynamic_image_size)
    variant(name)  # an unknown name is told before the file is read
    source = published_weights(name) if pretrained is True else pretrained
    checkpoint = load_checkpoint(source)
    if checkpoint.model_name != name:
        raise UsageError(f"{source}: it holds {checkpoint.model_name}, not {name}")
    architecture = change(checkpoint.architecture, **changes)
    model = Visformer(architecture, dynamic_image_size=dynamic_image_size)
    same_head = architecture.num_classes == len(checkpoint.class_names)
    match_head(model, checkpoint, checkpoint.class_names if same_head else [])
    return model
