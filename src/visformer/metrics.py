"""Exact figures of a classifier on a labelled set, gathered on the device without waiting for it.

`Evaluation` adds up a confusion matrix, top-k hits, the loss and the calibration bins as tensors; nothing is copied to
the host before `compute`. Counters are int64 and sums float64, so the figures depend neither on the batch size nor on
how the set was shared among processes: every tensor of `state()` is a sum, and adding up those of several processes
(`torch.distributed.all_reduce`, or `merge`) gives the state of the whole set.

Every rate is a percentage from 0 to 100; the loss is in nats. Ties between logits go to the lower class index.
Calibration error: Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"
(2015), with 15 bins of equal width over the probability of the predicted class, as in Guo et al. (2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from visformer.errors import RunError

CALIBRATION_BINS = 15
WORST_PAIRS = 20


@dataclass(frozen=True)
class ClassFigures:
    """One class that the set contains. `recall`, `precision` (0 when never predicted) and `f1` are percentages."""

    index: int
    support: int  # images of the class
    correct: int
    predicted: int  # images that were given the class, rightly or wrongly
    recall: float
    precision: float
    f1: float


@dataclass(frozen=True)
class ConfusedPair:
    """`count` images of class `true` that were taken for `predicted`; `share` is the percentage of the true class."""

    true: int
    predicted: int
    count: int
    share: float


@dataclass(frozen=True)
class Metrics:
    """The figures of one evaluation; see the module for units.

    `top5` counts the `top5_k` = min(5, classes) best classes. `macro` holds the plain means of recall, precision and f1
    over the classes that the set contains, which are the ones in `per_class`. `confusion` is (C, C) int64, true classes
    in rows. The `non_finite` images whose logits are not finite count as wrong, and are left out of `confusion`, `loss`
    and `ece`.
    """

    num_images: int
    loss: float
    top1: float
    top5: float
    top5_k: int
    ece: float
    macro: dict[str, float]
    per_class: list[ClassFigures]
    worst_confused: list[ConfusedPair]
    confusion: np.ndarray
    non_finite: int

    def scalars(self) -> dict[str, float]:
        """The overall figures by name, as training logs them."""
        macro = {f"macro_{name}": value for name, value in self.macro.items()}
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5, "ece": self.ece, **macro}


class Evaluation:
    """Adds up batches of logits and targets on `device`; `compute` gives the figures.

    Memory is that of the confusion matrix: 8 bytes times the square of the number of classes.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        assert num_classes >= 1
        device = torch.device(device)
        # MPS has no float64: there the figures are added up on the host.
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.num_classes = num_classes
        self.top5_k = min(5, num_classes)
        # The last column takes the images without a prediction.
        self._confusion = self._zeros(num_classes * (num_classes + 1), torch.int64)
        self._top5_hits = self._zeros(1, torch.int64)
        self._loss_sum = self._zeros(1, torch.float64)
        self._bin_correct = self._zeros(CALIBRATION_BINS, torch.int64)
        self._bin_confidence = self._zeros(CALIBRATION_BINS, torch.float64)

    def _zeros(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    @torch.no_grad()
    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch: `logits` (B, C) of floats, `targets` (B,) int64 in [0, C). Never waits for the device."""
        logits, targets = logits.to(self.device), targets.to(self.device)
        finite = logits.isfinite().all(dim=1)
        scores = torch.where(finite[:, None], logits, 0).double()  # (B, C)
        own = scores.gather(1, targets[:, None])
        ahead = torch.arange(self.num_classes, device=self.device) < targets[:, None]
        rank = ((scores > own) | ((scores == own) & ahead)).sum(dim=1)
        predicted = scores.argmax(dim=1)  # the first of equal ones
        log_probabilities = F.log_softmax(scores, dim=1)
        confidence = log_probabilities.amax(dim=1).exp()

        column = torch.where(finite, predicted, self.num_classes)
        self._confusion.index_add_(0, targets * (self.num_classes + 1) + column, torch.ones_like(targets))
        self._top5_hits += (finite & (rank < self.top5_k)).sum()
        losses = -log_probabilities.gather(1, targets[:, None])[:, 0]
        self._loss_sum += torch.where(finite, losses, 0).sum()
        bins = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
        self._bin_correct.index_add_(0, bins, (finite & (rank == 0)).long())
        self._bin_confidence.index_add_(0, bins, torch.where(finite, confidence, 0))

    def state(self) -> list[torch.Tensor]:
        """The tensors that hold everything, on `device`; adding up those of several processes in place joins them."""
        return [self._confusion, self._top5_hits, self._loss_sum, self._bin_correct, self._bin_confidence]

    def merge(self, other: Evaluation) -> None:
        """Add what another evaluation of the same classes has gathered."""
        assert other.num_classes == self.num_classes
        for mine, theirs in zip(self.state(), other.state(), strict=True):
            mine += theirs.to(self.device)

    def compute(self) -> Metrics:
        """The figures of everything added so far; raises `RunError` when that is nothing. Waits for the device."""
        table = self._confusion.reshape(self.num_classes, self.num_classes + 1).cpu().numpy()
        confusion, support = table[:, :-1].copy(), table.sum(axis=1)
        num_images, non_finite = int(support.sum()), int(table[:, -1].sum())
        if num_images == 0:
            raise RunError("no image was evaluated: the set is empty, or none of its images could be read")
        measured = num_images - non_finite
        gaps = (self._bin_confidence - self._bin_correct).abs().sum().item()
        per_class = _class_figures(confusion, support)
        return Metrics(
            num_images=num_images,
            loss=self._loss_sum.item() / measured if measured else float("nan"),
            top1=100 * int(confusion.trace()) / num_images,
            top5=100 * int(self._top5_hits.item()) / num_images,
            top5_k=self.top5_k,
            ece=100 * gaps / measured if measured else float("nan"),
            macro={name: _mean(per_class, name) for name in ("recall", "precision", "f1")},
            per_class=per_class,
            worst_confused=_worst_confused(confusion, support),
            confusion=confusion,
            non_finite=non_finite,
        )


def _class_figures(confusion: np.ndarray, support: np.ndarray) -> list[ClassFigures]:
    """Figures of the classes with images, in the order of the model's classes; shapes (C, C) and (C,)."""
    predicted = confusion.sum(axis=0)
    figures = []
    for index in np.flatnonzero(support).tolist():
        correct, total, given = int(confusion[index, index]), int(support[index]), int(predicted[index])
        figures.append(
            ClassFigures(
                index=index,
                support=total,
                correct=correct,
                predicted=given,
                recall=100 * correct / total,
                precision=100 * correct / given if given else 0.0,
                f1=200 * correct / (total + given),
            )
        )
    return figures


def _mean(per_class: list[ClassFigures], name: str) -> float:
    return sum(getattr(figures, name) for figures in per_class) / len(per_class)


def _worst_confused(confusion: np.ndarray, support: np.ndarray) -> list[ConfusedPair]:
    """The pairs with the most mistakes, at equal counts those with the larger share, then in class order."""
    true, predicted = np.nonzero(confusion)
    off_diagonal = true != predicted
    true, predicted = true[off_diagonal], predicted[off_diagonal]
    counts = confusion[true, predicted]
    shares = 100 * counts / support[true]
    worst = np.lexsort((predicted, true, -shares, -counts))[:WORST_PAIRS]
    return [ConfusedPair(int(true[i]), int(predicted[i]), int(counts[i]), float(shares[i])) for i in worst]
