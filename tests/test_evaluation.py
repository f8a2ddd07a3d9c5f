"""One pass over a labelled set with a model whose logits are its input: exact for any batches."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import pytest
import torch

from visformer.errors import RunError
from visformer.verbs.evaluation import evaluate

CPU = torch.device("cpu")


@dataclass
class FakeBatch:
    images: torch.Tensor
    targets: torch.Tensor
    failures: list[tuple[str, str]] = field(default_factory=list)


def batches(predicted: list[int], targets: list[int], batch_size: int, num_classes: int) -> list[FakeBatch]:
    """Images (B, num_classes, 1, 1) that are one-hot at the class they shall be taken for."""
    images = torch.nn.functional.one_hot(torch.tensor(predicted), num_classes)[:, :, None, None].to(torch.uint8)
    pairs = zip(images.split(batch_size), torch.tensor(targets).split(batch_size), strict=True)
    return [FakeBatch(*pair) for pair in pairs]


def run(loader, mapping, num_classes, **options):
    return evaluate(
        lambda x: x.flatten(1), loader, CPU, mapping, num_classes=num_classes, normalize=lambda x: x.float(), **options
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_classes_go_through_the_mapping(batch_size):
    # The data has classes (0, 1), which are the model's (3, 1).
    loader = batches([3, 3, 1, 0, 3], [0, 0, 1, 1, 1], batch_size, num_classes=4)
    metrics = run(loader, [3, 1], 4).metrics
    assert (metrics.num_images, metrics.top1) == (5, 60.0)
    assert [(c.index, c.support, c.correct) for c in metrics.per_class] == [(1, 3, 1), (3, 2, 2)]


def test_broken_images_are_listed_and_not_counted():
    loader = batches([0, 1], [0, 1], 1, num_classes=2)
    loader[0].failures = [("a.jpg", "cut short")]
    loader.append(FakeBatch(torch.zeros(0, 2, 1, 1), torch.zeros(0, dtype=torch.int64), [("b.jpg", "no image")]))
    measured = run(loader, [0, 1], 2)
    assert measured.skipped == [("a.jpg", "cut short"), ("b.jpg", "no image")]
    assert (measured.metrics.num_images, measured.metrics.top1) == (2, 100.0)
    assert measured.images_per_s > 0


def test_a_set_with_no_readable_image_is_an_error():
    empty = FakeBatch(torch.zeros(0, 2, 1, 1), torch.zeros(0, dtype=torch.int64), [("b.jpg", "no image")])
    with pytest.raises(RunError, match="no image"):
        run([empty], [0, 1], 2)


def test_the_precision_is_opened_for_each_batch_and_progress_needs_no_terminal():
    opened = []

    @contextlib.contextmanager
    def precision():
        opened.append(True)
        yield

    run(batches([0, 1, 1], [0, 1, 1], 2, 2), [0, 1], 2, precision=precision, title="validate")
    assert len(opened) == 2


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(AssertionError):
        evaluate(torch.nn.Flatten(), [], CPU, [0], num_classes=1, normalize=torch.Tensor.float)
