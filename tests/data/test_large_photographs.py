"""Photographs much larger than the model's input are decoded at a fraction of their size: nearly the same pixels."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from visformer.bundles.pixels import ImagePreprocessing
from visformer.data import Preprocessing, make_eval_loader, open_image
from visformer.data.decode import EVAL_HEADROOM, open_reduced
from visformer.data.folders import FolderSource
from visformer.data.preprocessing import PIL_RESAMPLING
from visformer.serving.decoding import decoded
from visformer.verbs.predictor import Predictor

PLAIN = Preprocessing((224, 224))
ROTATED = 6  # EXIF's orientation: stored a quarter turn to the left


def photograph(width: int, height: int, number: int = 0, orientation: int = 1, mode: str = "RGB", **options) -> bytes:
    """A JPEG with grain of its own size, as a camera's has."""
    picture = Image.fromarray(load_sample_images().images[number]).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 1))
    picture = Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, exif=exif, **options)
    return file.getvalue()


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """In levels of 0 to 255."""
    return (a.int() - b.int()).abs().float()


@pytest.mark.parametrize(
    ("width", "height", "by"), [(4032, 3024, 4), (2000, 1500, 2), (1281, 1281, 2), (1279, 1900, 1)]
)
@pytest.mark.parametrize("number", [0, 1])
def test_it_makes_no_difference_that_matters(width, height, by, number):
    data = photograph(width, height, number)
    (reduced, box), whole = open_reduced(data, 3, PLAIN.reduces), open_image(data)
    assert reduced.size == (-(-width // by), -(-height // by)) and whole.size == (width, height)
    assert box == (None if by == 1 else (0, 0, width / by, height / by))
    apart = difference(PLAIN(reduced, box), PLAIN(whole))
    assert apart.mean() < 0.6 and apart.max() <= 8 and (by > 1 or not apart.any())


def test_a_rotated_one_is_measured_upright():
    """Its long side is the short one of what is stored."""
    wide = Preprocessing((64, 256), crop_pct=1.0)
    upright, stored = photograph(2000, 700), photograph(700, 2000, orientation=ROTATED)
    assert [open_reduced(data, 3, wide.reduces)[0].size for data in (upright, stored)] == [(1000, 350)] * 2
    assert open_reduced(photograph(700, 2000), 3, wide.reduces)[0].size == (700, 2000)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_picture_ends_within_a_pixel_wherever_it_is_turned(orientation):
    """Sides that are no multiple of eight: what the decoder fills up with lies behind the last row and column as
    stored."""
    data = photograph(1501, 1205, orientation=orientation)
    preprocessing = Preprocessing((64, 64))
    image, box = open_reduced(data, 3, preprocessing.reduces)
    whole = open_image(data)
    assert (box[2] - box[0], box[3] - box[1]) == (whole.width / 4, whole.height / 4)
    apart = difference(preprocessing(image, box), preprocessing(whole))
    shifted = difference(preprocessing(image), preprocessing(whole))  # as if it filled the last pixel
    assert apart.mean() < 0.4 and shifted.mean() > 1.5 * apart.mean()
    others = ImagePreprocessing.from_dict(preprocessing.to_dict())
    np.testing.assert_array_equal(others.pixels(image, box), preprocessing(image, box).permute(1, 2, 0).numpy())


def test_grey_and_alpha_are_as_without():
    for channels in (1, 4):
        preprocessing = Preprocessing((64, 64), in_channels=channels, mean=(127.5,) * channels, std=(58.0,) * channels)
        for mode in ("RGB", "L", "CMYK"):
            data = photograph(1200, 900, mode=mode)
            (reduced, box), whole = open_reduced(data, channels, preprocessing.reduces), open_image(data, channels)
            assert reduced.mode == whole.mode and reduced.size == (300, 225)
            assert difference(preprocessing(reduced, box), preprocessing(whole)).mean() < 1.5


@pytest.mark.parametrize("options", [{"antialias": False, "interpolation": "bilinear"}, {"interpolation": "nearest"}])
def test_where_a_pixel_is_taken_from_few_everything_is_decoded(options):
    preprocessing = Preprocessing((64, 64), **options)
    assert preprocessing.reduces is None and ImagePreprocessing.from_dict(preprocessing.to_dict()).reduces is None


def test_what_is_no_jpeg_is_decoded_whole():
    picture = Image.open(io.BytesIO(photograph(1600, 1200)))
    for format in ("PNG", "WEBP"):
        file = io.BytesIO()
        picture.save(file, format)
        assert open_reduced(file.getvalue(), 3, Preprocessing((64, 64)).reduces)[0].size == (1600, 1200)


def test_damage_is_an_error_as_without():
    data = photograph(1600, 1200)
    with pytest.raises(Exception, match="cut short") as whole:
        open_image(data[: len(data) // 2])
    with pytest.raises(type(whole.value), match="cut short"):
        open_reduced(data[: len(data) // 2], 3, Preprocessing((64, 64)).reduces)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 900), st.integers(1, 900), st.integers(8, 64), st.integers(8, 64),
    st.sampled_from([name for name in PIL_RESAMPLING if name != "nearest"]), st.sampled_from([0.5, 0.875, 1.0]),
)  # fmt: skip
def test_enough_is_left_at_any_size(width, height, rows, columns, interpolation, crop_pct):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 90)).save(file, "JPEG")
    preprocessing = Preprocessing((rows, columns), crop_pct, interpolation)
    image, box = open_reduced(file.getvalue(), 3, preprocessing.reduces)
    needed = preprocessing.resized(height, width)
    assert image.size == (width, height) or (
        image.height >= EVAL_HEADROOM * needed[0] and image.width >= EVAL_HEADROOM * needed[1]
    )
    pixels = preprocessing(image, box)
    assert pixels.shape == (3, rows, columns)
    assert difference(pixels, preprocessing(open_image(file.getvalue()))).max() <= 2
    others = ImagePreprocessing.from_dict(preprocessing.to_dict())
    np.testing.assert_array_equal(others.pixels(image, box), pixels.permute(1, 2, 0).numpy())


class Plain(torch.nn.Module):
    """As much of a model as prediction asks for until it computes."""

    class_names = ("cat",)

    def __init__(self, preprocessing: Preprocessing):
        super().__init__()
        self.preprocessing = preprocessing


def test_every_verb_sees_the_same_pixels(tmp_path):
    """Validation, prediction and the server."""
    data = photograph(1500, 1100)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "large.jpg").write_bytes(data)
    preprocessing = Preprocessing((96, 96))
    wanted = preprocessing(*open_reduced(data, 3, preprocessing.reduces))
    assert difference(wanted, preprocessing(open_image(data))).any(), "nothing was reduced"
    (batch,) = make_eval_loader(FolderSource(tmp_path), preprocessing, batch_size=1, num_workers=0)
    assert torch.equal(batch.images[0], wanted)
    predictor = Predictor(Plain(preprocessing), device="cpu")
    _, pixels = predictor._prepare((0, str(tmp_path / "cat" / "large.jpg")))
    np.testing.assert_array_equal(pixels, wanted.permute(1, 2, 0).numpy())
    served = decoded(data, ImagePreprocessing.from_dict(preprocessing.to_dict()), 10**8)
    np.testing.assert_allclose(served, preprocessing.normalize(wanted[None])[0].numpy(), atol=1e-6)
