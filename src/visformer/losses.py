"""The training loss: cross entropy or binary cross entropy, on class numbers or on mixed targets.

Label smoothing is done here, once, for hard and soft targets alike: target * (1 - s) + s / classes, as in MindCV.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from timm.loss.jsd import JsdCrossEntropy
from torch import Tensor

from visformer.config import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(config: TrainConfig) -> Loss:
    """The function (logits (B, C) float, targets (B,) long or (B, C) float) -> scalar that `config` asks for."""
    smoothing, reduction = config.label_smoothing, config.reduction
    if config.aug_splits:
        divergence = JsdCrossEntropy(num_splits=config.aug_splits, smoothing=smoothing)
        return lambda logits, targets: divergence(logits.float(), targets)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing, reduction=reduction)

    def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[-1]
        soft = F.one_hot(targets, classes).float() if targets.dim() == 1 else targets
        soft = soft * (1 - smoothing) + smoothing / classes
        return F.binary_cross_entropy_with_logits(logits.float(), soft, reduction=reduction)

    return {"CE": cross_entropy, "BCE": binary_cross_entropy}[config.loss]
