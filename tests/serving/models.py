"""A small real model, as a checkpoint and as a bundle, for servers that run as processes of their own."""

from __future__ import annotations

from pathlib import Path

LABELS = ["bird", "cat", "dog", "frog", "horse"]


def write_small_checkpoint(path: Path, seed: int = 0) -> Path:
    """A Visformer of five classes at 32 pixels, with random weights."""
    import torch

    from visformer.checkpoint import Checkpoint, write_checkpoint
    from visformer.data.preprocessing import Preprocessing
    from visformer.models import Architecture, StageConfig, Visformer

    torch.manual_seed(seed)
    stages = (StageConfig(width=16, depth=1, patch_size=4), StageConfig(width=32, depth=1, patch_size=2))
    shape = Architecture(8, stages, num_classes=len(LABELS), image_size=(32, 32), in_channels=3, groups=2)
    model = Visformer(shape).eval()
    preprocessing = Preprocessing((32, 32), crop_pct=0.9)
    write_checkpoint(path, Checkpoint("visformer_tiny", model.config, LABELS, preprocessing, model.state_dict()))
    return path


def write_small_bundle(checkpoint: Path, folder: Path) -> Path:
    """An ONNX bundle of a checkpoint."""
    from visformer.bundles.build import Request, build
    from visformer.pretrained import load

    build(load(checkpoint), Request("onnx", "fp32", "tensor", checkpoint=str(checkpoint)), folder)
    return folder
