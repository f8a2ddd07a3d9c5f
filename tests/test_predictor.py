"""Predictor with a model so small that its answers are known: the class is the brightest colour channel."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from visformer.data.preprocessing import Preprocessing
from visformer.errors import UsageError
from visformer.verbs.predictor import Predictor

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Brightest(torch.nn.Module):
    """Logits (B, 3): the means of the channels. Counts the batches it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.class_names = list(COLORS)
        self.preprocessing = Preprocessing(image_size=(32, 32), mean=(127.5,) * 3, std=(127.5,) * 3)
        self.batches: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return 5 * images.mean(dim=(2, 3))


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (48, 40), COLORS[color])


def predictor(**options) -> Predictor:
    return Predictor(Brightest(), device="cpu", **options)


def best(records: list[dict]) -> list[str]:
    return [record["predictions"][0]["label"] if "predictions" in record else record["error"] for record in records]


def test_every_kind_of_image(tmp_path):
    picture("red").save(tmp_path / "red.png")
    encoded = io.BytesIO()
    picture("green").save(encoded, "JPEG")
    array = np.asarray(picture("blue"))
    grey = np.full((40, 40), 9, np.uint8)
    images = [tmp_path / "red.png", str(tmp_path / "red.png"), encoded.getvalue(), picture("green"), array, grey]
    records = predictor().predict(images)
    assert best(records)[:5] == ["red", "red", "green", "green", "blue"]
    assert [record["path"] for record in records[1:]] == [
        str(tmp_path / "red.png"),
        *(f"image[{i}]" for i in range(2, 6)),
    ]
    assert records[5]["predictions"][0]["probability"] == pytest.approx(1 / 3)  # grey: no channel is brighter
    assert [p["label"] for p in records[5]["predictions"]] == list(COLORS)  # and ties come in the order of the classes


def test_one_image_is_a_list_of_one_record():
    for single in (picture("red"), np.asarray(picture("red"))):
        assert best(predictor().predict(single)) == ["red"]
    assert best(predictor().predict(np.stack([np.asarray(picture(c)) for c in COLORS]))) == list(COLORS)


def test_probabilities_are_the_softmax_best_first():
    (record,) = predictor(top_k=2).predict([picture("red")])
    expected = torch.tensor([5.0, -5.0, -5.0]).softmax(0)
    assert [p["probability"] for p in record["predictions"]] == pytest.approx(expected[:2].tolist())
    assert [p["index"] for p in record["predictions"]] == [0, 1]
    assert len(predictor(top_k=100).predict([picture("red")])[0]["predictions"]) == 3


def test_what_cannot_be_read_is_a_record_in_its_place(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    encoded = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(encoded, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(encoded.getvalue()[:700])
    records = predictor(batch_size=2).predict(
        [
            picture("red"),
            tmp_path / "text.jpg",
            tmp_path / "cut.jpg",
            tmp_path / "none.jpg",
            b"",
            tmp_path,
            picture("blue"),
        ]
    )
    assert best(records)[0] == "red" and best(records)[-1] == "blue"
    assert all("predictions" not in record and "\n" not in record["error"] for record in records[1:-1])
    assert "no such file" in records[3]["error"]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_order_is_kept_and_batches_are_full(num_workers, batch_size):
    colors = list(itertools.islice(itertools.cycle(COLORS), 13))
    model = Brightest()
    labeller = Predictor(model, device="cpu", batch_size=batch_size, num_workers=num_workers)
    assert best(labeller.predict(picture(color) for color in colors)) == colors
    sizes = model.batches
    assert sum(sizes) == 13 and sizes[:-1] == [batch_size] * (len(sizes) - 1)


def test_an_endless_stream_is_read_no_further_than_two_batches_ahead():
    taken = 0

    def images():
        nonlocal taken
        while True:
            taken += 1
            yield picture("green")

    stream = predictor(batch_size=4, num_workers=2).stream(images())
    for seen in range(1, 30):
        assert best([next(stream)]) == ["green"]
        assert taken <= seen + 2 * 4 + 2 * 2
    stream.close()  # ends the threads, and the test with them


def test_an_array_that_is_no_image_is_a_usage_error():
    for array in (np.zeros((4, 4), np.float32), np.zeros((4, 4, 7), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(UsageError, match="no image"):
            predictor().predict([array])


def test_logits_that_are_not_finite_are_an_error_of_that_image():
    model = Brightest()
    model.forward = lambda images: torch.where(images[:, 0].amax((1, 2))[:, None] > 0.9, torch.nan, torch.eye(3)[:1])
    records = Predictor(model, device="cpu").predict([picture("red"), picture("green")])
    assert "not finite" in records[0]["error"] and "predictions" in records[1]


def test_options_out_of_range_and_models_without_classes():
    with pytest.raises(UsageError, match="top_k"):
        predictor(top_k=0)
    with pytest.raises(UsageError, match="batch_size"):
        predictor(batch_size=0)
    model = Brightest()
    model.class_names = []
    with pytest.raises(UsageError, match="no classes"):
        Predictor(model, device="cpu")
