"""Policies by MindCV's and timm's names: what is understood, what is refused, and that each runs."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from visformer.data import build_policy, image_ops, policies
from visformer.data.policies import parse_policy
from visformer.errors import UsageError

MEAN = (123.675, 116.28, 103.53)
GOOD = [
    "autoaug", "autoaug-mstd0.5", "autoaugr", "3a", "3a-mstd0.5", "original", "originalr-mstd1", "v0", "v0r",
    "randaug", "randaug-m7-mstd0.5", "rand-m9-mstd0.5-inc1",
    "randaug-m10-n2-w0-mstd0.5-mmax10-inc0", "rand-m15-n2-w0-inc1",
    "rand-n3-p1-tweights", "rand-m9-t3a", "rand-m10-n4-p1-inc1", "rand-mstdinf",
    "augmix", "augmix-m5-w4-d2", "augmix-d-1-b1-a0.5", "augmix-mstd0.5", "trivialaugwide",
]  # fmt: skip


def build(text, channels=3, interpolation="bilinear"):
    return build_policy(text, image_size=(32, 32), mean=MEAN[:channels], interpolation=interpolation, channels=channels)


def noise(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, channels), dtype=np.uint8)


@pytest.mark.parametrize("text", GOOD)
@pytest.mark.parametrize("channels", [1, 3])
def test_runs_and_keeps_the_shape(text, channels):
    policy = build(text, channels=channels)
    assert policy is not None
    image, seen = noise(channels), set()
    before = image.copy()
    for seed in range(25):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        result = policy.apply(image)
        assert (result.dtype, result.shape) == (image.dtype, image.shape)
        seen.add(result.tobytes())
    assert len(seen) > 2
    assert np.array_equal(image, before)


@pytest.mark.parametrize("text", ["autoaug", "rand-m9-mstd0.5-inc1", "3a", "trivialaugwide"])
def test_can_be_sent_to_a_worker(text):
    policy = build(text)
    copy = pickle.loads(pickle.dumps(policy))
    results = []
    for one in (policy, copy):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        results.append(one.apply(noise()).tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("text", ["autoaug", "randaug-m9-n2-mstd0.5-inc1", "rand-m9-n1-p1", "3a-mstd0.5"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_drawn_and_done_is_timms(text, channels):
    """timm's own policy on a Pillow image, from the same seeds: equal but for interpolation."""
    ours = build(text, channels=channels, interpolation="bicubic")
    theirs = timms(text, channels)
    image = photograph(channels)
    different = []
    for seed in range(60):
        results = []
        for policy in (ours.apply, lambda pixels: image_ops.from_pillow(theirs(image_ops.to_pillow(pixels)))):
            random.seed(seed)
            np.random.seed(seed)
            results.append(policy(image).astype(int))
            results.append(random.random())
        assert results[1] == results[3]  # as many numbers were drawn
        different.append(np.abs(results[0] - results[2]).mean())
    assert np.mean(different) < 0.5 and np.median(different) < 0.02


def photograph(channels: int) -> np.ndarray:
    """Smooth structure at several scales, (64, 64, C)."""
    rng = np.random.default_rng(0)
    total = np.full((64, 64), 120.0)
    for scale in range(1, 6):
        layer = rng.normal(0, 60 / 2**scale, (2**scale, 2**scale)).astype(np.float32)
        total += np.asarray(Image.fromarray(layer).resize((64, 64), Image.Resampling.BICUBIC))
    return np.stack([np.clip(total + 15 * c, 0, 255) for c in range(channels)], axis=2).astype(np.uint8)


def timms(text: str, channels: int):
    mean = (124, 116, 104)
    hparams = {
        "translate_const": int(32 * 0.45),
        "img_mean": mean if channels == 3 else mean[0],
        "interpolation": Image.Resampling.BICUBIC,
    }
    name = text.replace("autoaug", "original").replace("randaug", "rand")
    make = auto_augment.rand_augment_transform if name.startswith("rand") else auto_augment.auto_augment_transform
    policy = make(name, hparams)
    for op in policy.ops if name.startswith("rand") else [op for steps in policy.policy for op in steps]:
        if op.name.startswith("Posterize"):
            op.aug_fn = policies.pillow_posterize  # timm's own asks Pillow for 0 bits, which it refuses
    return policy


@pytest.mark.parametrize("text", GOOD)
def test_draws_only_from_the_generators_that_it_names(text):
    policy = build(text)
    assert policy is not None
    image = noise()
    results = []
    for stir in (0, 1):
        seeds = iter((stir, stir))
        np.random.seed(5 if policy.numpy else next(seeds))
        torch.manual_seed(5 if policy.torch else next(seeds))
        random.seed(5)
        results.append([policy.apply(image).tobytes() for _ in range(15)])
    assert results[0] == results[1]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "random"])
@pytest.mark.parametrize("text", ["rand-m9-n3-p1", "autoaug", "augmix", "trivialaugwide"])
def test_every_interpolation(text, interpolation):
    policy = build(text, interpolation=interpolation)
    assert policy is not None
    for _ in range(20):
        policy.apply(noise())


@pytest.mark.parametrize("text", [None, "", "none"])
def test_off(text):
    assert build(text) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("randaugment", "'randaugment' is no policy"),
        ("rand-m9-mtsd0.5", "part 'mtsd0.5' is not understood"),
        ("rand-mx", "part 'mx'"),
        ("rand-m9.5", "part 'm9.5'"),
        ("rand-m9-m8", "'m' is there twice"),
        ("rand-tmine", "part 'tmine'"),
        ("rand-w1", "part 'w1'"),
        ("rand-w0-tweights", "exclude each other"),
        ("autoaug-m9", "part 'm9'"),
        ("augmix-w0", "part 'w0'"),
        ("trivialaugwide-m3", "is no policy"),
        ("rand-", "part ''"),
    ],
)
def test_refused_with_the_valid_forms(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(text)
    assert str(caught.value).startswith(f"auto_augment: {text!r}") and "trivialaugwide" in str(caught.value)


def test_alpha_is_refused():
    with pytest.raises(UsageError, match="in_channels 4"):
        build_policy("autoaug", image_size=(32, 32), mean=(*MEAN, 127.5), channels=4)


def test_mindcvs_weights():
    policy = build("randaug-m10-n2-w0-inc1")
    names = [op.name for op in policy.chosen.ops]  # type: ignore
    weights = dict(zip(names, policy.chosen.choice_weights, strict=True))  # type: ignore
    assert weights["Rotate"] == pytest.approx(0.3 / 1.0, abs=0.01) and "ColorIncreasing" in weights
    assert "Invert" not in weights and sum(weights.values()) == pytest.approx(1)


def test_parts():
    assert parse_policy("randaug-m9-mstd0.5-mmax12-inc1") == (
        "rand", "rand", {"m": "9", "mstd": "0.5", "mmax": "12", "inc": "1"},
    )  # fmt: skip
    assert parse_policy("augmix-d-1-m3")[2] == {"d": "-1", "m": "3"}
