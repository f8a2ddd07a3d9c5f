"""The batched operations against those on single images: the same levels, or one apart where a sum's order differs."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from visformer.data import device_ops, image_ops
from visformer.data.device_policies import move, step
from visformer.data.device_resize import gaussian_radii, resize_crops, resize_weights
from visformer.data.preprocessing import PIL_RESAMPLING

FILL = (124, 116, 104)


def scene(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth picture with an edge, a flat patch and a little noise, uint8 (H, W, C)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [128 + 90 * np.sin(x / (5 + seed + c) + c) * np.cos(y / (7 + c)) for c in range(channels)]
    pixels = np.stack(planes, 2) + rng.normal(0, 6, (height, width, channels))
    pixels[: height // 3, : width // 4] = 30 + 60 * seed % 200
    return pixels.clip(0, 255).astype(np.uint8)


def batch(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def images_of(result: torch.Tensor) -> list[np.ndarray]:
    return list(result.permute(0, 2, 3, 1).numpy())


def test_tables_of_levels_are_the_operations_themselves():
    images = [scene(20, 24, seed=seed) for seed in range(7)]
    wanted = [
        ("Invert", image_ops.invert, ()), ("Posterize", image_ops.posterize, (3,)),
        ("Posterize", image_ops.posterize, (0,)), ("Solarize", image_ops.solarize, (77,)),
        ("SolarizeAdd", image_ops.solarize_add, (60,)), ("Brightness", image_ops.brightness, (1.37,)),
        ("Brightness", image_ops.brightness, (0.1,)),
    ]  # fmt: skip
    tables = np.stack([np.frombuffer(step(name, *values).values, np.uint8) for name, _, values in wanted])
    result = images_of(device_ops.levels(batch(*images), torch.from_numpy(tables)))
    for image, shown, (name, operation, values) in zip(images, result, wanted, strict=True):
        assert np.array_equal(shown, operation(image, *values)), name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["contrast", "color", "sharpness"])
def test_blends_are_those_of_single_images(name, channels):
    factors = [0.0, 0.1, 0.55, 1.0, 1.44, 1.9]
    images = [scene(31, 23, channels, seed) for seed in range(len(factors))]
    result = images_of(getattr(device_ops, name)(batch(*images), torch.tensor(factors)))
    for image, shown, factor in zip(images, result, factors, strict=True):
        assert np.array_equal(shown, getattr(image_ops, name)(image, factor)), factor


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["auto_contrast", "equalize"])
def test_what_looks_at_the_image_is_that_of_single_images(name, channels):
    images = [scene(31, 23, channels, seed) // (seed + 1) + 3 * seed for seed in range(5)]
    images += [np.full((31, 23, channels), 9, np.uint8), np.random.default_rng(0).integers(0, 2, (31, 23, channels))]
    images = [image.astype(np.uint8) for image in images]
    for image, shown in zip(images, images_of(getattr(device_ops, name)(batch(*images))), strict=True):
        assert np.array_equal(shown, getattr(image_ops, name)(image))


@pytest.mark.parametrize("filter", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("height, width", [(32, 32), (33, 47)])
def test_moves_are_those_of_single_images(filter, height, width):
    random.seed(0)
    moves = [("Rotate", 0.0), ("Rotate", -29.3), ("ShearX", 0.27), ("ShearY", -0.3), ("TranslateX", 7.0)]
    moves += [("TranslateY", -11.0), ("TranslateXRel", 0.405), ("TranslateYRel", -0.2), ("Rotate", 135.0)]
    images = [scene(height, width, seed=seed) for seed in range(len(moves))]
    resampling = PIL_RESAMPLING[filter]
    matrices = [move(name, by, (height, width), resampling).values for name, by in moves]
    shown = device_ops.affine(
        batch(*images), torch.tensor(matrices, dtype=torch.float64), torch.tensor(FILL, dtype=torch.uint8), filter
    )
    for image, result, (name, by) in zip(images, images_of(shown), moves, strict=True):
        expected = image_ops._moved(name, image, by, fillcolor=FILL, resample=resampling)
        differing = (np.abs(result.astype(int) - expected) > 1).any(2).mean()
        assert differing < (0.03 if filter == "nearest" else 0.001), (name, by)


def test_a_right_angle_keeps_every_pixel():
    image = scene(32, 32)
    matrix = move("Rotate", 90.0, (32, 32), PIL_RESAMPLING["bilinear"]).values
    fill = torch.tensor(FILL, dtype=torch.uint8)
    turned = device_ops.affine(batch(image), torch.tensor([matrix], dtype=torch.float64), fill, "bilinear")
    assert np.abs(images_of(turned)[0].astype(int) - np.rot90(image)).max() <= 1


def test_blur_is_pillows():
    deviations = [0.1, 0.4, 0.9, 1.3, 2.0, 5.5]
    images = [scene(40, 33, seed=seed) for seed in range(len(deviations))]
    for image, shown, deviation in zip(
        images, images_of(device_ops.blur(batch(*images), deviations)), deviations, strict=True
    ):
        expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(deviation)))
        assert np.abs(shown.astype(int) - expected).max() <= 1, deviation
        assert (shown != expected).mean() < 0.1, deviation


def test_box_radii_have_the_deviation_that_was_asked_for():
    for deviation, radius in zip((0.5, 1.0, 2.0), gaussian_radii((0.5, 1.0, 2.0)), strict=True):
        whole, part = int(radius), radius - int(radius)
        variance = (sum(2 * i * i for i in range(1, whole + 1)) + 2 * part * (whole + 1) ** 2) / (2 * radius + 1)
        assert 3 * variance == pytest.approx(deviation**2)


# ---- resizing

SIZES = [(1, 1), (5, 300), (200, 7), (31, 33), (32, 48), (64, 96), (113, 97), (32, 47), (375, 500)]


@pytest.mark.parametrize("filter", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_pillows_at_awkward_sizes(filter, channels):
    images = [scene(height, width, channels, seed) for seed, (height, width) in enumerate(SIZES)]
    crops = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    resized = images_of(resize_crops(crops, (32, 48), [filter] * len(crops)))
    for image, shown in zip(images, resized, strict=True):
        pillow = image_ops.from_pillow(image_ops.to_pillow(image).resize((48, 32), PIL_RESAMPLING[filter]))
        assert np.abs(shown.astype(int) - pillow).max() <= 1, image.shape
        workers = image_ops.resize(image, (32, 48), PIL_RESAMPLING[filter])
        # Pillow resizes a tall strip's rows first, and so rounds other numbers than we and torch do.
        strip = image.shape[0] > 20 * image.shape[1] and filter == "lanczos"
        assert (shown != workers).mean() < (0.3 if strip else 0.005), image.shape


def test_each_crop_has_its_own_filter_and_its_neighbours_do_not_matter(monkeypatch):
    filters = ["bicubic", "nearest", "bilinear", "bicubic", "lanczos", "bilinear", "nearest", "bicubic", "bilinear"]
    crops = [torch.from_numpy(scene(*size, seed=seed)).permute(2, 0, 1) for seed, size in enumerate(SIZES)]
    together = resize_crops(crops, (24, 24), filters)
    monkeypatch.setattr("visformer.data.device_resize.AT_ONCE", 1)
    alone = resize_crops(crops, (24, 24), filters)
    assert (together.int() - alone.int()).abs().max() <= 1
    assert (together != alone).float().mean() < 0.001


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=4),
    st.integers(1, 70),
    st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)
def test_weights_sum_to_one_stay_inside_and_are_symmetric(sides, out, filter):
    weights = resize_weights(torch.tensor(sides), out, max(sides), filter)
    assert weights.shape == (len(sides), out, max(sides))
    assert torch.allclose(weights.sum(2), torch.ones(len(sides), out), atol=1e-5)
    for side, own in zip(sides, weights, strict=True):
        assert not own[:, side:].any()
        if filter != "nearest":
            assert torch.allclose(own[:, :side], own[:, :side].flip(0, 1), atol=1e-4)
        if side == out:
            assert torch.allclose(own[:, :side], torch.eye(side), atol=1e-5)
