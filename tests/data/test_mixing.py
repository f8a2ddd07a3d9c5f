"""Erasing, mixup and cutmix: exact areas, exact targets, and nothing that depends on anything but the seed."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visformer.config import TrainConfig
from visformer.data import DeviceTransform, Preprocessing
from visformer.data.mixing import RandomErasing, cutmix_box, mix_reversed

SIZE = 32


def batch(size: int = 6, classes: int = 4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    return images, torch.arange(size) % classes


def transform(**options) -> DeviceTransform:
    return DeviceTransform(TrainConfig(image_resize=SIZE, **options), 4)


def test_plain():
    images, targets = batch()
    result, same = transform()(images, targets, seed=0)
    assert torch.equal(result, Preprocessing.from_config(TrainConfig(image_resize=SIZE)).normalize(images))
    assert same is targets and result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}, {"re_prob": 0.5, "re_value": "random"}]
)
def test_a_function_of_the_seed(options):
    images, targets = batch()
    first = transform(**options)
    torch.manual_seed(1)
    random.seed(1)
    state = torch.get_rng_state(), random.getstate()
    results = [first(images, targets, seed=seed) for seed in range(10)]
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    for seed in reversed(range(10)):
        again = transform(**options)(images, targets, seed=seed)
        assert torch.equal(again[0], results[seed][0]) and torch.equal(again[1], results[seed][1])
    assert len({result.numpy().tobytes() for result, _ in results}) > 5


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_targets_agree(kind, size):
    """The share of an image in the mixture is its share in the target; the partner is the batch reversed."""
    images, targets = batch(size)
    plain = transform()(images, targets, seed=0)[0]
    rows = torch.nn.functional.one_hot(targets, 4).float()
    for seed in range(20):
        mixed, soft = transform(**{kind: 1.0})(images, targets, seed=seed)
        assert mixed.is_contiguous(memory_format=torch.channels_last) and soft.dtype == torch.float32
        torch.testing.assert_close(soft.sum(1), torch.ones(size))
        if kind == "cutmix":
            own = (mixed == plain).all(1)
            partner = (mixed == plain.flip(0)).all(1)
            assert (own | partner).all()
            share = own[0].float().mean() if size > 1 else torch.tensor(1.0)
            # Where two images agree by chance the count is a pixel off.
            torch.testing.assert_close(soft[0], rows[0] * share + rows[-1] * (1 - share), atol=2 / SIZE**2, rtol=0)
        else:
            share = soft[0, targets[0]] if targets[0] != targets[-1] else None
            if share is not None:
                torch.testing.assert_close(mixed, plain * share + plain.flip(0) * (1 - share), atol=1e-5, rtol=1e-5)


def test_probability_of_mixing():
    images, targets = batch()
    both = transform(mixup=0.8, cutmix=1.0, cutmix_prob=0.5)
    plain = transform()(images, targets, seed=0)[0]
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for seed in range(400):
        mixed, soft = both(images, targets, seed=seed)
        assert soft.shape == (6, 4)
        own, partner = (mixed == plain).all(1), (mixed == plain.flip(0)).all(1)
        kinds["none" if own.all() else "cutmix" if (own | partner).all() else "mixup"] += 1
    assert 170 < kinds["none"] < 250 and 60 < kinds["cutmix"] < 140 and 60 < kinds["mixup"] < 140


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.floats(0, 1), st.integers(0, 1000))
def test_cutmix_box_lies_in_the_image(height, width, share, seed):
    top, bottom, left, right = cutmix_box(height, width, share, random.Random(seed))
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    assert (bottom - top) * (right - left) <= (1 - share) * height * width + 1e-6


def test_cutmix_of_a_large_box_is_the_area_around_the_centre():
    boxes = [cutmix_box(100, 100, 0.75, random.Random(seed)) for seed in range(200)]
    whole = [box for box in boxes if (box[1] - box[0], box[3] - box[2]) == (50, 50)]
    assert 20 < len(whole) < 100  # the others are cut off at the border


@pytest.mark.parametrize("value, expected", [(0, (0.0, 0.0, 0.0)), (255, (2.2489, 2.4286, 2.64))])
def test_erased_boxes(value, expected):
    images, targets = batch(32)
    plain = transform()(images, targets, seed=0)[0]
    erased = transform(re_prob=1.0, re_value=value, re_scale=(0.1, 0.2), re_ratio=(0.5, 2.0))(images, targets, seed=3)[
        0
    ]
    changed = (erased != plain).any(1)  # (B, H, W)
    for mask, image in zip(changed, erased, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        np.testing.assert_allclose(box.amin((1, 2)), expected, atol=1e-4)
        np.testing.assert_allclose(box.amax((1, 2)), expected, atol=1e-4)
        assert 0.08 < box[0].numel() / SIZE**2 < 0.23


def test_erasing_with_noise():
    images, targets = batch(16)
    random_fill = transform(re_prob=1.0, re_value="random")(images, targets, seed=0)[0]
    colour_fill = transform(re_prob=1.0, re_value="channel")(images, targets, seed=0)[0]
    plain = transform()(images, targets, seed=0)[0]
    for fill, few in ((random_fill, False), (colour_fill, True)):
        changed = (fill != plain).all(1)
        values = [len(fill[i, 0][changed[i]].unique()) for i in range(16)]
        assert all((count == 1) == few for count in values)


def test_erasing_probability_and_attempts():
    images, targets = batch(200)
    plain = transform()(images, targets, seed=0)[0]
    erased = transform(re_prob=0.25)(images, targets, seed=1)[0]
    assert 30 < (erased != plain).flatten(1).any(1).sum() < 75
    never = transform(re_prob=1.0, re_scale=(1.5, 2.0))(images, targets, seed=1)[0]
    assert torch.equal(never, plain)


def test_the_clean_split_is_not_erased():
    images, targets = batch(6)
    config = {"aug_splits": 3, "auto_augment": "augmix"}
    plain = transform(**config)(images, targets[:2], seed=0)[0]
    erased = transform(re_prob=1.0, **config)(images, targets[:2], seed=0)[0]
    assert torch.equal(erased[:2], plain[:2])
    assert (erased[2:] != plain[2:]).flatten(1).any(1).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_erased_box_is_smaller_than_the_image(height, width, seed):
    config = TrainConfig(image_resize=32, re_prob=1.0)
    box = RandomErasing(config, Preprocessing.from_config(config)).box(height, width, random.Random(seed))
    if box is not None:
        top, bottom, left, right = box
        assert (
            0 <= top < bottom <= height
            and 0 <= left < right <= width
            and bottom - top < height
            and right - left < width
        )


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalising_is_the_preprocessings_to_the_bit(channels, memory_format):
    config = TrainConfig(image_resize=(32, 48), in_channels=channels)
    images = torch.randint(0, 256, (3, channels, 32, 48), dtype=torch.uint8).contiguous(memory_format=memory_format)
    result, _ = DeviceTransform(config, 5)(images, torch.arange(3), seed=0)
    assert torch.equal(result, Preprocessing.from_config(config).normalize(images))
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
def test_mixing_with_the_reversed_batch(count):
    images = torch.randn(count, 3, 4, 5)
    expected = torch.lerp(images.flip(0), images, 0.3)
    mix_reversed(images, 0.3)
    assert torch.allclose(images, expected, atol=1e-6)


def test_a_batch_that_is_held_keeps_its_pixels_and_one_that_is_dropped_lends_its_memory():
    prepare = DeviceTransform(TrainConfig(image_resize=32), 5)
    batches = [torch.full((2, 3, 32, 32), level, dtype=torch.uint8) for level in range(8)]
    held = [prepare(images, torch.arange(2), seed=0)[0][1:, :, 4:] for images in batches]  # views
    expected = Preprocessing((32, 32))
    for view, images in zip(held, batches, strict=True):
        assert torch.equal(view, expected.normalize(images)[1:, :, 4:])
    assert len({view.data_ptr() for view in held}) == 8
    places = {prepare(images, torch.arange(2), seed=0)[0].data_ptr() for images in batches}
    assert len(places) <= 2
    weight = torch.ones(3, 1, 1, requires_grad=True)
    first = (prepare(batches[1], torch.arange(2), seed=0)[0] * weight).sum()  # autograd keeps the images
    prepare(batches[7], torch.arange(2), seed=0)
    first.backward()
    assert torch.allclose(weight.grad[:, 0, 0], expected.normalize(batches[1]).sum((0, 2, 3)), rtol=1e-5)
