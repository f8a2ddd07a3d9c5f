"""Operations on arrays against Pillow's: the same colours, and positions within what interpolation differs by."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment

from visformer.data import image_ops

BICUBIC, BILINEAR, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST
FILL = {1: (7,), 3: (124, 116, 104)}


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Structure of about eight pixels, as a photograph at the model's size has."""
    coarse = noise(height // 8 + 2, width // 8 + 2, 3, seed)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), BICUBIC))
    return np.ascontiguousarray(pixels[:, :, :channels])


def pillow(operation, pixels: np.ndarray, *levels, **settings) -> np.ndarray:
    return image_ops.from_pillow(operation(image_ops.to_pillow(pixels), *levels, **settings))


factors = st.floats(0, 2).map(lambda value: round(value, 3))
COLOUR = {
    "invert": (image_ops.invert, auto_augment.invert, None),
    "posterize": (image_ops.posterize, auto_augment.posterize, st.integers(1, 8)),
    "solarize": (image_ops.solarize, auto_augment.solarize, st.integers(0, 256)),
    "solarize_add": (image_ops.solarize_add, auto_augment.solarize_add, st.integers(0, 110)),
    "brightness": (image_ops.brightness, auto_augment.brightness, factors),
    "contrast": (image_ops.contrast, auto_augment.contrast, factors),
    "color": (image_ops.color, auto_augment.color, factors),
    "sharpness": (image_ops.sharpness, auto_augment.sharpness, factors),
    "equalize": (image_ops.equalize, auto_augment.equalize, None),
    "auto_contrast": (image_ops.auto_contrast, auto_augment.auto_contrast, None),
}


@pytest.mark.parametrize("name", COLOUR)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_colours_are_pillows_to_the_level(name, data):
    ours, theirs, level = COLOUR[name]
    levels = () if level is None else (data.draw(level),)
    channels = data.draw(st.sampled_from([1, 3]))
    height, width, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)), data.draw(st.integers(0, 99))
    kinds = [noise(height, width, channels, seed), noise(height, width, channels, seed) // 8 + 60]
    for pixels in [*kinds, np.full((height, width, channels), seed, np.uint8)]:
        before = pixels.copy()
        result = ours(pixels, *levels)
        expected = pillow(theirs, pixels, *levels)
        assert result.dtype == np.uint8 and result.shape == pixels.shape
        assert np.abs(result.astype(int) - expected).max() <= (1 if name in ("brightness", "contrast") else 0)
        assert np.array_equal(pixels, before)


def test_no_bits_are_black():
    assert not image_ops.posterize(noise(4, 4, 3), 0).any()


MOVES = {
    "ShearX": (auto_augment.shear_x, 0.25), "ShearY": (auto_augment.shear_y, -0.17),
    "TranslateX": (auto_augment.translate_x_abs, 9.3), "TranslateY": (auto_augment.translate_y_abs, -13.7),
    "TranslateXRel": (auto_augment.translate_x_rel, -0.21), "TranslateYRel": (auto_augment.translate_y_rel, 0.13),
    "Rotate": (auto_augment.rotate, 23.0),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resampling, mean, most", [(BILINEAR, 0.1, 2), (BICUBIC, 0.7, 12), (NEAREST, 0.3, 255)])
def test_positions_are_pillows(name, channels, resampling, mean, most):
    theirs, by = MOVES[name]
    pixels = smooth(96, 128, channels)
    settings = {"fillcolor": FILL[channels] if channels == 3 else 7, "resample": resampling}
    result = image_ops._moved(name, pixels, by, **settings)
    expected = pillow(theirs, pixels, by, **settings)
    filled = (expected == FILL[channels]).all(axis=2)
    assert 0.02 < filled.mean() < 0.6 and ((result == FILL[channels]).all(axis=2) != filled).mean() < 0.01
    difference = np.abs(result.astype(int) - expected)[~filled & ~(result == FILL[channels]).all(axis=2)]
    assert difference.mean() < mean and difference.max() <= most


def test_a_move_by_nothing_changes_nothing():
    pixels = noise(17, 23, 3)
    for resampling in (BILINEAR, BICUBIC, NEAREST):
        assert np.array_equal(image_ops.affine(pixels, (1, 0, 0, 0, 1, 0), FILL[3], resampling), pixels)
        assert np.array_equal(image_ops.rotate(pixels, 0.0, FILL[3], resampling), pixels)


def test_moved_out_of_sight():
    for resampling in (BILINEAR, BICUBIC):
        moved = image_ops.affine(noise(16, 16, 3), (1, 0, 40, 0, 1, 0), FILL[3], resampling)
        assert (moved == FILL[3]).all()


def test_whole_pixels_move_whole():
    pixels = noise(16, 24, 3)
    moved = image_ops.affine(pixels, (1, 0, 5, 0, 1, -3), FILL[3], BICUBIC)
    assert np.array_equal(moved[3:, :-5], pixels[:-3, 5:])
    assert (moved[:3] == FILL[3]).all() and (moved[:, -5:] == FILL[3]).all()


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)), st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([1, 3, 4]), st.sampled_from([BILINEAR, BICUBIC, NEAREST, Image.Resampling.LANCZOS]),
)  # fmt: skip
def test_resizing_is_pillows(source, target, channels, resampling):
    pixels = smooth(*source, 3)
    pixels = np.dstack((pixels, pixels))[:, :, :channels].copy()
    result = image_ops.resize(pixels, target, resampling)
    expected = pillow(lambda image: image.resize((target[1], target[0]), resampling), pixels)
    assert result.shape == (*target, channels) and result.flags.c_contiguous
    assert np.abs(result.astype(int) - expected).max() <= 3
    assert np.abs(result.astype(int) - expected).mean() < 0.3


def test_flips():
    pixels = noise(5, 7, 3)
    assert np.array_equal(image_ops.flip(pixels, 1), pixels[:, ::-1])
    assert np.array_equal(image_ops.flip(pixels, 0), pixels[::-1])


@pytest.mark.parametrize("resample", [BICUBIC, (BILINEAR, BICUBIC)])
@pytest.mark.parametrize("name", sorted(auto_augment.NAME_TO_OP))
def test_every_operation_of_timms_runs_on_arrays(name, resample):
    operation = auto_augment.AugmentOp(name, 1.0, 5, {"img_mean": FILL[3], "interpolation": resample} | CONSTANT)
    image_ops.for_timm(operation)
    result = operation(smooth(32, 48, 3))
    assert result.shape == (32, 48, 3) and result.dtype == np.uint8


CONSTANT = {"translate_const": 9}
