"""A bundle in the place of a checkpoint: what `predict` and `validate` ask of a model, answered by an engine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from visformer.bundles.bundle import Bundle
from visformer.bundles.engines import Engine
from visformer.data.preprocessing import Preprocessing


class BundleModel(nn.Module):
    """float32 (B, C, H, W), preprocessed, on any device -> logits (B, classes) there; the engine computes on the CPU.

    It carries `model_name`, `class_names` and `preprocessing`, as `visformer.load` gives them.
    """

    def __init__(self, bundle: Bundle, engine: Engine):
        super().__init__()
        self.bundle, self.engine = bundle, engine
        self.model_name: str = bundle.model_name  # type: ignore[assignment]
        self.class_names: list[str] = bundle.labels  # type: ignore[assignment]
        self.preprocessing: Preprocessing = Preprocessing.from_dict(bundle.document["preprocessing"])  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        """float32 (B, C, H, W) -> float32 logits (B, classes)"""
        logits = self.engine.run(images.contiguous().cpu().numpy())
        return torch.from_numpy(logits).to(images.device)


def bundle_model(path: str | Path, name: str = "") -> BundleModel:
    """Open a bundle and load its engine. With a `name`, raise `UsageError` if it holds another model."""
    bundle = Bundle.open(path, name)
    return BundleModel(bundle, bundle.engine()).eval()
