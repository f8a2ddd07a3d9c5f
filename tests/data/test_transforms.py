"""The training transform: its output, its seeds, and its agreement with timm and torchvision."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional

from visformer.config import TrainConfig
from visformer.data import mix_seed, train_transform
from visformer.data.encoded import Encoded
from visformer.data.transforms import ColorJitter


def picture(mode: str = "RGB", size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(
        mode
    )


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos", "random"])
def test_shape_and_type(channels, mode, interpolation):
    transform = train_transform(
        TrainConfig(image_resize=(32, 48), in_channels=channels, interpolation=interpolation, vflip=0.5)
    )
    transform.seed(1)
    result = transform(picture(mode))
    assert result.shape == (channels, 32, 48) and result.dtype == torch.uint8


@pytest.mark.parametrize("policy", [None, "none", "autoaug", "rand-m9-mstd0.5", "augmix", "trivialaugwide"])
def test_a_function_of_its_seed(policy):
    transform = train_transform(TrainConfig(image_resize=32, auto_augment=policy, interpolation="random"))
    runs = []
    for stir in (3, 4):
        random.seed(stir)
        np.random.seed(stir)
        torch.manual_seed(stir)
        images = []
        for seed in range(12):
            transform.seed(mix_seed(42, 0, seed))
            images.append(transform(picture()))
        runs.append(torch.stack(images))
    assert torch.equal(runs[0], runs[1])
    assert len({image.numpy().tobytes() for image in runs[0]}) > 8


def test_three_splits_begin_with_the_clean_one():
    options = {"image_resize": 32, "color_jitter": None}
    plain = train_transform(TrainConfig(**options))
    splits = train_transform(TrainConfig(**options, auto_augment="augmix-m9", aug_splits=3))
    for seed in range(5):
        plain.seed(seed)
        clean = plain(picture())
        splits.seed(seed)
        copies = splits(picture())
        assert copies.shape == (3, 3, 32, 32)
        assert torch.equal(copies[0], clean) and not torch.equal(copies[1], copies[2])


def test_crop_is_timms():
    """The draws, the number of them too, and the pixels: of Pillow images exactly, of others but for rounding."""
    transform = train_transform(TrainConfig(image_resize=32, color_jitter=None, hflip=0.0, interpolation="bicubic"))
    timms = RandomResizedCropAndInterpolation(32, (0.08, 1.0), (0.75, 1.333), "bicubic")
    for size in ((50, 40), (30, 200), (200, 30)):
        image = picture(size=(size[0] // 5, size[1] // 5)).resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        for seed in range(20):
            random.seed(seed)
            expected, drawn = np.asarray(timms(image)).astype(int), random.random()
            for form, mean in ((image, 0), (np.asarray(image), 0.25), (Encoded(buffer.getvalue()), 0.25)):
                random.seed(seed)
                result = transform(form).permute(1, 2, 0).numpy()
                assert np.abs(result - expected).mean() <= mean and random.random() == drawn


def test_a_large_jpeg_is_decoded_smaller(monkeypatch):
    """The random numbers, and so the crop, do not depend on it, and the result hardly does."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((1280, 960), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    transform = train_transform(TrainConfig(image_resize=64, color_jitter=None, interpolation="bicubic"))
    used, results = set(), []
    reduction = Encoded.reduction
    for limit in (1, 8):

        def limited(self, *arguments, limit=limit):
            used.add(min(reduction(self, *arguments), limit))
            return min(reduction(self, *arguments), limit)

        monkeypatch.setattr(Encoded, "reduction", limited)
        random.seed(5)
        images = [transform(Encoded(buffer.getvalue())).numpy() for _ in range(20)]
        results.append((np.stack(images).astype(int), random.random()))
    assert used == {1, 2, 4, 8}
    assert results[0][1] == results[1][1]
    assert np.abs(results[0][0] - results[1][0]).mean() < 2


def test_flips():
    config = TrainConfig(image_resize=32, color_jitter=None, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=1.0, vflip=1.0)
    image = picture(size=(32, 32))
    assert np.array_equal(train_transform(config)(image).permute(1, 2, 0), np.asarray(image)[::-1, ::-1])


def test_colour_jitter_is_torchvisions(monkeypatch):
    image = picture()
    factors = iter([0.7, 1.2, 1.3, 0.7, 1.2, 1.3])
    monkeypatch.setattr(random, "sample", lambda kinds, n: list(kinds))
    monkeypatch.setattr(random, "uniform", lambda low, high: next(factors))
    expected = functional.adjust_saturation(
        functional.adjust_contrast(functional.adjust_brightness(image, 0.7), 1.2), 1.3
    )
    assert np.array_equal(ColorJitter(0.4)(np.asarray(image)), np.asarray(expected))
    alpha = np.dstack((np.asarray(image), np.full((40, 50), 9, np.uint8)))
    jittered = ColorJitter(0.4)(alpha)
    assert np.array_equal(jittered[:, :, :3], np.asarray(expected)) and (jittered[:, :, 3] == 9).all()


def test_jitter_gives_way_to_a_policy():
    assert isinstance(train_transform(TrainConfig()).colour, ColorJitter)
    assert not isinstance(train_transform(TrainConfig(auto_augment="3a")).colour, ColorJitter)
    assert train_transform(TrainConfig(color_jitter=0.0)).colour is None


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_and_thin_images(size):
    transform = train_transform(TrainConfig(image_resize=32))
    for seed in range(10):
        transform.seed(seed)
        assert transform(picture(size=size)).shape == (3, 32, 32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4), st.integers(0, 3))
def test_seeds_are_63_bits_and_differ(parts, place):
    seed = mix_seed(*parts)
    assert 0 <= seed < 1 << 63
    changed = list(parts)
    changed[place % len(parts)] += 1
    assert mix_seed(*changed) != seed


def test_seeds_of_neighbours_do_not_meet():
    seeds = {mix_seed(s, e, i, c) for s in range(3) for e in range(10) for i in range(300) for c in range(3)}
    assert len(seeds) == 3 * 10 * 300 * 3
