"""The training loss: cross entropy or binary cross entropy, on class numbers or on mixed targets, and a teacher's part.

Label smoothing is done here, once, for hard and soft targets alike: target * (1 - s) + s / classes, as in MindCV.
Distillation is that of DeiT (Touvron et al., arXiv:2012.12877): hard, a second cross entropy with the teacher's first
class, or soft, the divergence from the teacher's probabilities (Hinton et al., arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer.config import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]

# Letters in shapes: B images, K classes.


def build_loss(config: TrainConfig, class_weights: Tensor | None = None) -> Loss:
    """The function (logits (B, K) float, targets (B,) long or (B, K) float) -> scalar that `config` asks for.

    With `class_weights` (K,), the loss of an image counts as much as its class, or as the classes that it was mixed of.
    The mean is over images, not over weights, so that it does not depend on which images share a batch.
    """
    smoothing, reduction = config.label_smoothing, config.reduction
    if config.aug_splits:
        from timm.loss.jsd import JsdCrossEntropy

        divergence = JsdCrossEntropy(num_splits=config.aug_splits, smoothing=smoothing)
        return lambda logits, targets: divergence(logits.float(), targets)
    loss = partial({"CE": _cross_entropy, "BCE": _binary_cross_entropy}[config.loss], smoothing)
    if class_weights is None:
        return partial(loss, reduction)

    def weighted(logits: Tensor, targets: Tensor) -> Tensor:
        each = loss("none", logits, targets)  # (B,), or (B, K) with BCE
        weights = class_weights[targets] if targets.dim() == 1 else targets @ class_weights  # (B,)
        each = each * (weights if each.dim() == 1 else weights[:, None])
        return each.mean() if reduction == "mean" else each.sum()

    return weighted


def _cross_entropy(smoothing: float, reduction: str, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing, reduction=reduction)


def _binary_cross_entropy(smoothing: float, reduction: str, logits: Tensor, targets: Tensor) -> Tensor:
    classes = logits.shape[-1]
    soft = F.one_hot(targets, classes).float() if targets.dim() == 1 else targets
    soft = soft * (1 - smoothing) + smoothing / classes
    return F.binary_cross_entropy_with_logits(logits.float(), soft, reduction=reduction)


def balanced_weights(counts: Tensor) -> Tensor:
    """Weights (K,) with which every class that has images counts the same, and their mean over the images is 1.

    `counts` (K,): images of each class; a class without any gets 1.
    """
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1))
    return torch.where(present, weights, torch.ones_like(weights))


def build_distillation(config: TrainConfig) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function (loss of the labels, student's logits (B, K), teacher's logits (B, K)) -> the whole loss."""
    alpha, tau, reduction = config.distillation_alpha, config.distillation_tau, config.reduction

    def hard(student: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(student, teacher.argmax(dim=1), reduction=reduction)

    def soft(student: Tensor, teacher: Tensor) -> Tensor:
        learnt, told = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
        per = {"mean": "batchmean", "sum": "sum"}[reduction]
        # tau squared keeps the gradient's size when the temperature changes
        return F.kl_div(learnt, told, reduction=per, log_target=True) * tau**2

    distance = {"hard": hard, "soft": soft}[config.distillation_type]

    def distilled(loss: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return (1 - alpha) * loss + alpha * distance(student.float(), teacher.float())

    return distilled
