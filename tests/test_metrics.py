"""The figures of an evaluation against scikit-learn and plain formulas, at any batch size, and joined from parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from visformer.errors import RunError
from visformer.metrics import Evaluation, Metrics


def random_set(num_classes: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (size,), generator=generator)
    logits = torch.randn(size, num_classes, generator=generator)
    return logits + 1.5 * torch.nn.functional.one_hot(targets, num_classes), targets


def evaluate(logits: torch.Tensor, targets: torch.Tensor, batch_size: int) -> Metrics:
    evaluation = Evaluation(logits.shape[1])
    for start in range(0, len(targets), batch_size):
        evaluation.update(logits[start : start + batch_size], targets[start : start + batch_size])
    return evaluation.compute()


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_agrees_with_scikit_learn(batch_size):
    logits, targets = random_set(10, 333)
    metrics = evaluate(logits, targets, batch_size)
    predicted = logits.argmax(dim=1)
    assert metrics.num_images == 333
    assert metrics.top1 == pytest.approx(100 * (predicted == targets).double().mean().item(), abs=1e-12)
    assert metrics.top5 == pytest.approx(100 * top_k_accuracy_score(targets, logits, k=5), abs=1e-12)
    assert metrics.loss == pytest.approx(torch.nn.functional.cross_entropy(logits.double(), targets).item(), abs=1e-12)
    np.testing.assert_array_equal(metrics.confusion, confusion_matrix(targets, predicted))
    precision, recall, f1, support = precision_recall_fscore_support(targets, predicted)
    assert [c.support for c in metrics.per_class] == support.tolist()
    np.testing.assert_allclose([c.precision for c in metrics.per_class], 100 * precision)
    np.testing.assert_allclose([c.recall for c in metrics.per_class], 100 * recall)
    np.testing.assert_allclose([c.f1 for c in metrics.per_class], 100 * f1)
    assert metrics.macro["f1"] == pytest.approx(100 * f1.mean())


def test_calibration_error_is_the_gap_of_fifteen_equal_bins():
    logits, targets = random_set(4, 500, seed=1)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            gap = confidence[inside].mean() - (predicted == targets)[inside].double().mean()
            expected += inside.double().mean().item() * abs(gap.item())
    assert evaluate(logits, targets, 32).ece == pytest.approx(100 * expected, abs=1e-10)


def test_a_sure_and_right_model_is_perfectly_calibrated():
    targets = torch.arange(6)
    metrics = evaluate(torch.eye(6) * 1000, targets, 4)
    assert (metrics.top1, metrics.ece, metrics.loss, metrics.worst_confused) == (100.0, 0.0, 0.0, [])


def test_macro_figures_are_those_of_the_classes_in_the_set():
    logits = torch.eye(5)[torch.tensor([0, 0, 1, 4])]
    metrics = evaluate(logits, torch.tensor([0, 0, 1, 1]), 4)
    assert [c.index for c in metrics.per_class] == [0, 1]
    assert metrics.macro["recall"] == pytest.approx(75.0)
    assert metrics.confusion.shape == (5, 5)


def test_a_class_never_predicted_has_precision_zero():
    metrics = evaluate(torch.eye(3)[torch.tensor([0, 0])], torch.tensor([0, 2]), 2)
    assert [(c.index, c.precision, c.f1) for c in metrics.per_class] == [
        (0, 50.0, pytest.approx(200 / 3)),
        (2, 0.0, 0.0),
    ]


def test_equal_logits_go_to_the_lower_class():
    metrics = evaluate(torch.zeros(10, 10), torch.arange(10), 3)
    assert (metrics.top1, metrics.top5) == (10.0, 50.0)
    assert metrics.confusion[:, 0].sum() == 10


def test_top5_counts_all_classes_when_there_are_fewer():
    metrics = evaluate(torch.eye(3), torch.tensor([2, 2, 2]), 3)
    assert (metrics.top5_k, metrics.top5) == (3, 100.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_count_as_wrong_and_spoil_nothing_else(bad):
    logits, targets = random_set(6, 40)
    clean = evaluate(logits[1:], targets[1:], 8)
    spoilt = logits.clone()
    spoilt[0, targets[0]] = bad
    metrics = evaluate(spoilt, targets, 8)
    assert (metrics.num_images, metrics.non_finite) == (40, 1)
    assert metrics.loss == pytest.approx(clean.loss) and metrics.ece == pytest.approx(clean.ece)
    assert metrics.top1 == pytest.approx(clean.top1 * 39 / 40)
    assert metrics.confusion.sum() == 39 and sum(c.support for c in metrics.per_class) == 40


def test_parts_join_to_the_whole():
    logits, targets = random_set(7, 101)
    parts = [Evaluation(7) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.update(logits[rank::3], targets[rank::3])
    parts[0].merge(parts[1])
    for mine, theirs in zip(parts[0].state(), parts[2].state(), strict=True):
        mine += theirs
    joined, whole = parts[0].compute(), evaluate(logits, targets, 101)
    np.testing.assert_array_equal(joined.confusion, whole.confusion)
    assert (joined.top1, joined.top5) == (whole.top1, whole.top5)
    assert joined.loss == pytest.approx(whole.loss) and joined.ece == pytest.approx(whole.ece)


def test_worst_pairs_come_by_count_then_share():
    true = torch.tensor([0] * 10 + [1] * 4 + [2] * 4)
    predicted = torch.tensor([0] * 7 + [1] * 3 + [1, 1, 0, 0] + [2, 2, 2, 0])
    metrics = evaluate(torch.eye(3)[predicted], true, 5)
    assert [(p.true, p.predicted, p.count, p.share) for p in metrics.worst_confused] == [
        (0, 1, 3, 30.0),
        (1, 0, 2, 50.0),
        (2, 0, 1, 25.0),
    ]


def test_half_precision_logits_are_taken_as_they_are():
    logits, targets = random_set(10, 64)
    half = logits.bfloat16()
    assert evaluate(half, targets, 16).loss == pytest.approx(evaluate(half.double(), targets, 16).loss, abs=1e-12)


def test_nothing_evaluated_is_an_error():
    with pytest.raises(RunError, match="no image"):
        Evaluation(3).compute()
