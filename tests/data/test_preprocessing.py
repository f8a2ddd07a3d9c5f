"""Preprocessing against torchvision's, and its arithmetic on odd sizes."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from visformer.config import IMAGENET_MEAN, IMAGENET_STD, TrainConfig
from visformer.data import Preprocessing
from visformer.errors import UsageError


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (max(height // 4, 1), max(width // 4, 1), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize("height, width", [(100, 133), (133, 100), (64, 64), (383, 500), (31, 40)])
def test_equals_torchvision(interpolation, height, width):
    image = picture(height, width)
    expected = Compose([Resize(73, InterpolationMode(interpolation)), CenterCrop(64), PILToTensor()])(image)
    result = Preprocessing((64, 64), interpolation=interpolation)(image)
    assert result.dtype == torch.uint8
    assert torch.equal(result, expected)


def test_without_antialiasing_differs_but_is_near_on_enlarging():
    image = picture(200, 200)
    with_, without = (Preprocessing((64, 64), antialias=flag)(image).float() for flag in (True, False))
    assert (with_ - without).abs().mean() > 1
    small = picture(40, 40)
    with_, without = (
        Preprocessing((64, 64), interpolation="bilinear", antialias=flag)(small).float() for flag in (True, False)
    )
    assert (with_ - without).abs().max() <= 1


def test_crop_rounding():
    """A height of 383 at size 224: 159 to spare, so 80 rows to torchvision (half to even) and 79 to MindCV."""
    offsets = {
        r: Preprocessing((224, 224), crop_pct=1.0, crop_rounding=r)._offset((383, 224)) for r in ("round", "floor")
    }
    assert offsets == {"round": (80, 0), "floor": (79, 0)}


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(16, 70),
    st.integers(16, 70),
    st.sampled_from([0.5, 0.875, 0.9, 1.0]),
)
def test_any_size_gives_the_model_its_size(height, width, model_height, model_width, crop_pct):
    preprocessing = Preprocessing((model_height, model_width), crop_pct=crop_pct)
    resized = preprocessing.resized(height, width)
    cover = math.floor(model_height / crop_pct), math.floor(model_width / crop_pct)
    assert resized[0] >= cover[0] and resized[1] >= cover[1]
    assert resized[0] == cover[0] or resized[1] == cover[1]
    assert preprocessing(Image.new("RGB", (width, height))).shape == (3, model_height, model_width)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_long_strip_does_not_exhaust_memory(size, antialias):
    assert Preprocessing((224, 224), antialias=antialias)(Image.new("RGB", size)).shape == (3, 224, 224)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(channels):
    preprocessing = Preprocessing.from_config(TrainConfig(image_resize=32, in_channels=channels))
    for mode in ("L", "RGB", "RGBA", "P", "I;16"):
        assert preprocessing(Image.new(mode, (50, 40))).shape == (channels, 32, 32)
    assert len(preprocessing.mean) == len(preprocessing.std) == channels


def test_normalize():
    preprocessing = Preprocessing((32, 32))
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    before = batch.clone()
    result = preprocessing.normalize(batch)
    expected = (batch.double() - torch.tensor(IMAGENET_MEAN).double()[:, None, None]) / torch.tensor(
        IMAGENET_STD
    ).double()[:, None, None]
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(batch, before)
    floats = batch.float()
    preprocessing.normalize(floats)
    assert torch.equal(floats, before.float())


def test_statistics_made_in_inference_mode_serve_a_backward_pass():
    preprocessing = Preprocessing((8, 8), mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    with torch.inference_mode():
        preprocessing.normalize(torch.zeros(1, 3, 8, 8))
    images = torch.zeros(1, 3, 8, 8, requires_grad=True)
    preprocessing.normalize(images).sum().backward()
    assert images.grad is not None


def test_dictionary_goes_through_json():
    preprocessing = Preprocessing((224, 192), 0.9, "bilinear", False, "floor")
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    "change, message",
    [
        ({"crop_pc": 1}, "unknown key 'crop_pc'; did you mean crop_pct"),
        ({"mean": None}, "mean"),
        ({"image_size": [224]}, "image_size"),
        ({"image_size": 224}, "image_size"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"crop_pct": "x"}, "crop_pct"),
        ({"interpolation": "cubic"}, "must be one of nearest, bilinear"),
        ({"antialias": False, "interpolation": "lanczos"}, "needs antialias"),
        ({"antialias": "no"}, "antialias"),
        ({"crop_rounding": "up"}, "crop_rounding"),
        ({"in_channels": 2}, "in_channels"),
        ({"std": [0.0, 1.0, 1.0]}, "std"),
        ({"mean": [1.0]}, "3 numbers"),
    ],
)
def test_wrong_dictionary(change, message):
    with pytest.raises(UsageError, match=message):
        Preprocessing.from_dict(Preprocessing((32, 32)).to_dict() | change)


def test_missing_key():
    values = Preprocessing((32, 32)).to_dict()
    del values["std"]
    with pytest.raises(UsageError, match="'std' is missing"):
        Preprocessing.from_dict(values)


def test_from_config():
    config = TrainConfig(image_resize=(64, 96), interpolation="random", crop_pct=0.9)
    preprocessing = Preprocessing.from_config(config)
    assert (
        preprocessing.image_size == (64, 96)
        and preprocessing.interpolation == "bilinear"
        and preprocessing.crop_pct == 0.9
    )
    with pytest.raises(UsageError, match="mean: 2 values"):
        Preprocessing.from_config(TrainConfig(mean=(1.0, 2.0)))
