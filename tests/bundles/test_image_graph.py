"""The preprocessing as a graph, and in numpy, against `Preprocessing` itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from visformer.bundles.image_graph import ImageGraph
from visformer.bundles.pixels import ImagePreprocessing
from visformer.bundles.samples import PARITY_SIZES, generated
from visformer.data.preprocessing import Preprocessing
from visformer.errors import UsageError

SIZES = [*PARITY_SIZES, (3, 2000), (2000, 3), (481, 321), (7, 5)]


def levels(preprocessing: Preprocessing, image: np.ndarray) -> np.ndarray:
    """What the graph gives, brought back to the 0-255 scale."""
    mean, std = (np.reshape(values, (-1, 1, 1)) for values in (preprocessing.mean, preprocessing.std))
    return ImageGraph(preprocessing)(torch.from_numpy(image))[0].numpy() * std + mean


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


@pytest.mark.parametrize("rounding", ["round", "floor"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_graph_gives_pillows_very_levels(interpolation, crop_pct, rounding):
    preprocessing = Preprocessing((96, 72), crop_pct, interpolation, crop_rounding=rounding)
    for size in SIZES:
        image = generated(size, 3, seed=3)
        wanted = preprocessing(picture(image)).numpy()
        np.testing.assert_allclose(levels(preprocessing, image), wanted, atol=1e-3, err_msg=str(size))


@pytest.mark.parametrize(("interpolation", "antialias"), [("lanczos", True), ("bilinear", False), ("bicubic", False)])
def test_the_other_kernels_are_within_one_level_in_few_pixels(interpolation, antialias):
    preprocessing = Preprocessing((96, 72), 0.875, interpolation, antialias, "floor")
    for size in SIZES:
        image = generated(size, 3, seed=3)
        difference = np.abs(levels(preprocessing, image) - preprocessing(picture(image)).numpy())
        assert difference.max() < 1.01, size
        assert (difference > 0.5).mean() < 2e-3, size


def test_nearest_takes_the_same_pixels():
    preprocessing = Preprocessing((96, 72), 0.875, "nearest")
    for size in SIZES:
        image = generated(size, 3, seed=3)
        difference = np.abs(levels(preprocessing, image) - preprocessing(picture(image)).numpy())
        # Where a centre falls between two pixels Pillow's running sum may be a hair to either side: a row or a column.
        assert (difference > 1e-3).mean() < 0.05, size


@pytest.mark.parametrize("of_model", [1, 3])
@pytest.mark.parametrize("of_image", [1, 2, 3, 4])
def test_channels_are_converted_as_open_image_does(of_image, of_model):
    values = (100.0,) * of_model
    preprocessing = Preprocessing((64, 64), mean=values, std=values, in_channels=of_model)
    image = np.random.default_rng(0).integers(0, 256, (90, 70, of_image), dtype=np.uint8)
    np.testing.assert_allclose(levels(preprocessing, image), preprocessing(picture(image)).numpy(), atol=1e-3)


def test_a_model_of_four_channels_has_no_image_graph():
    with pytest.raises(UsageError, match="--input tensor"):
        ImageGraph(Preprocessing((64, 64), mean=(1.0,) * 4, std=(1.0,) * 4, in_channels=4))


@pytest.mark.parametrize("in_channels", [1, 3, 4])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_numpy_preprocessing_is_the_same(interpolation, in_channels):
    values = (100.0, 90.0, 80.0, 70.0)[:in_channels]
    preprocessing = Preprocessing((96, 72), 0.875, interpolation, mean=values, std=values, in_channels=in_channels)
    ours = ImagePreprocessing.from_dict(preprocessing.to_dict())
    for size in SIZES:
        image = picture(generated(size, in_channels, seed=3))
        np.testing.assert_array_equal(ours.pixels(image), preprocessing(image).permute(1, 2, 0).numpy())
        wanted = preprocessing.normalize(preprocessing(image)[None]).numpy()
        np.testing.assert_array_equal(ours([image]), wanted)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_numpy_preprocessing_without_antialiasing_is_within_one_level(interpolation):
    preprocessing = Preprocessing((96, 72), 0.875, interpolation, False, "floor")
    ours = ImagePreprocessing.from_dict(preprocessing.to_dict())
    for size in [(375, 500), (97, 61), (50, 50), (1, 1), (900, 47)]:
        image = picture(generated(size, 3, seed=3))
        difference = np.abs(ours.pixels(image).astype(int) - preprocessing(image).permute(1, 2, 0).numpy())
        assert difference.max() <= 1
        assert (difference > 0).mean() < 2e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", [0, 64]),
        ("image_size", [10**6, 64]),
        ("crop_pct", 0),
        ("crop_pct", True),
        ("interpolation", "fractal"),
        ("antialias", 1),
        ("std", [1.0, 0.0, 1.0]),
        ("mean", [1.0]),
        ("in_channels", 2),
        ("mean", [float("nan")] * 3),
    ],
)
def test_preprocessing_out_of_range_is_an_error_that_names_the_field(name, value):
    values = Preprocessing((64, 64)).to_dict() | {name: value}
    with pytest.raises(UsageError, match=name):
        ImagePreprocessing.from_dict(values)
