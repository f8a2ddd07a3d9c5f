"""The pictures are drawn for any number of classes and any records, and written whole."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visformer.figures import _short, confusion_figure, curves_figure, predictions_figure


def confusion(num_classes: int, support: int = 20) -> np.ndarray:
    rng = np.random.default_rng(num_classes)
    counts = np.diag(np.full(num_classes, support))
    rows, columns = rng.integers(num_classes, size=(2, 3 * num_classes))
    np.add.at(counts, (rows, columns), 1)
    return counts


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("num_classes", [1, 2, 10, 100, 1000])
def test_a_confusion_matrix_of_any_size(tmp_path, num_classes):
    path = tmp_path / "confusion.png"
    confusion_figure(confusion(num_classes), [f"class {i}" for i in range(num_classes)], path, "a set")
    width, height = size_of(path)
    assert 400 < width < 3000 and 400 < height < 3000


def test_a_perfect_matrix_of_many_classes(tmp_path):
    confusion_figure(np.diag(np.full(300, 7)), [str(i) for i in range(300)], tmp_path / "confusion.png")
    assert size_of(tmp_path / "confusion.png")[0] > 400


def test_classes_that_the_set_lacks_are_gathered(tmp_path):
    counts = confusion(1000)
    counts[5:] = 0
    confusion_figure(counts, [str(i) for i in range(1000)], tmp_path / "five.png")
    assert size_of(tmp_path / "five.png")[0] < 1200  # five classes, not a thousand


@pytest.mark.filterwarnings("error")
def test_names_that_are_no_formula_and_no_latin(tmp_path):
    names = ["$5 bill", "$a_{b$", "犬", "T_shirt^top", "\\frac"]
    confusion_figure(confusion(5), names, tmp_path / "names.png", "1 $ and 2 $")
    assert size_of(tmp_path / "names.png")


def test_long_names_keep_their_ends():
    names = [f"a very long name of a class, number {i}" for i in (1, 2)]
    assert len({_short(name) for name in names}) == 2
    assert all(len(_short(name)) <= 24 for name in names)


def test_curves_of_long_short_and_broken_runs(tmp_path):
    full = [
        {
            "epoch": e,
            "train_loss": 1 / e,
            "val_loss": 2 / e,
            "top1": 90.0,
            "top5": 99.0,
            "lr": 0.1 / e,
            "images_per_s": 9.0,
        }
        for e in range(1, 41)
    ]
    broken = [{"epoch": 1, "train_loss": float("nan"), "val_loss": None, "lr": 0.0}, {"step": 5, "loss": 1.0}]
    for name, records in {"full": full, "one": full[:1], "resumed": full[:9] + full[5:], "broken": broken}.items():
        curves_figure(records, tmp_path / f"{name}.png", name)
        assert size_of(tmp_path / f"{name}.png")[0] > 400


def test_no_records_make_an_empty_picture(tmp_path):
    curves_figure([], tmp_path / "none.png")
    assert size_of(tmp_path / "none.png")


def test_predictions_with_grey_colour_and_failed_images(tmp_path):
    images = [np.zeros((8, 8), np.uint8), np.zeros((9, 12, 3), np.uint8), Image.new("RGB", (5, 5))]
    records = [
        {"path": "a", "predictions": [{"label": "cat", "index": 0, "probability": 0.9}]},
        {"path": "b", "predictions": [{"label": "dog", "index": 1, "probability": 0.6}]},
        {"path": "c", "error": "cut short"},
    ]
    predictions_figure(images, records, tmp_path / "p.png", true_labels=["cat", "cat", "cat"], columns=2)
    predictions_figure(images[:1], records[:1], tmp_path / "one.png")
    assert size_of(tmp_path / "p.png")[1] > size_of(tmp_path / "one.png")[1]
