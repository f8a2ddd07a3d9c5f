"""Our preprocessing with MindCV's settings against MindCV's own pipeline, on JPEGs.

`tests/upstream_full/write_preprocessing.py` made the images and, with MindCV on MindSpore, the results. The pictures
are synthetic, or taken from matplotlib's grace_hopper.jpg, which is in the public domain.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms

from visformer.data import Preprocessing
from visformer.data.decode import open_image

FOLDER = Path(__file__).parent.parent / "fixtures" / "preprocessing"
with np.load(FOLDER / "mindcv.npz") as results:
    EXPECTED = dict(results)  # NAME/INTERPOLATION -> uint8 (224, 224, 3)
LEVEL = 1 / 57.12  # the most that one level of 255 can make once normalised


def mindcv(interpolation: str) -> Preprocessing:
    return Preprocessing((224, 224), 0.875, interpolation, antialias=False, crop_rounding="floor")


def from_mindcv(key: str, pipeline) -> torch.Tensor:
    """Absolute differences of normalised values, (3, 224, 224)."""
    name, interpolation = key.split("/")
    normalize = mindcv(interpolation).normalize
    wanted = torch.from_numpy(EXPECTED[key].transpose(2, 0, 1))
    return (normalize(pipeline(open_image(FOLDER / f"{name}.jpg"))[None]) - normalize(wanted[None]))[0].abs()


@pytest.mark.parametrize("key", EXPECTED)
def test_equals_mindcv_within_one_level(key):
    difference = from_mindcv(key, mindcv(key.split("/")[1]))
    assert difference.mean() <= 0.02  # what a converted checkpoint is promised; in truth it is ten times nearer:
    assert difference.mean() <= 0.003
    assert difference.max() <= LEVEL * 1.001


@pytest.mark.parametrize("change", [{"antialias": True}, {"crop_rounding": "round"}, {"interpolation": "bilinear"}])
def test_each_setting_matters(change):
    """The landscape is resized to 383 pixels, an odd number to spare: whatever else than MindCV's settings shows."""
    settings = mindcv("bicubic").to_dict() | change
    assert from_mindcv("landscape/bicubic", Preprocessing.from_dict(settings)).mean() > 0.02


def test_torchvision_usual_pipeline_is_far_off():
    usual = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )
    means = [float(from_mindcv(key, usual).mean()) for key in EXPECTED if key.endswith("bicubic")]
    assert max(means) > 0.1 and sorted(means)[len(means) // 2] > 0.02


def test_every_image_has_its_results():
    assert {key.split("/")[0] for key in EXPECTED} == {path.stem for path in FOLDER.glob("*.jpg")}
