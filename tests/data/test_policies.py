"""Policies by MindCV's and timm's names: what is understood, what is refused, and that each runs."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from visformer.data import build_policy
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


def noise(mode: str) -> Image.Image:
    shape = (32, 32) if mode == "L" else (32, 32, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("text", GOOD)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_runs_and_keeps_mode_and_size(text, mode):
    policy = build(text, channels=1 if mode == "L" else 3)
    assert policy is not None
    image, seen = noise(mode), set()
    for seed in range(25):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        result = policy.apply(image)
        assert (result.mode, result.size) == (image.mode, image.size)
        seen.add(result.tobytes())
    assert len(seen) > 2


@pytest.mark.parametrize("text", GOOD)
def test_draws_only_from_the_generators_that_it_names(text):
    policy = build(text)
    assert policy is not None
    image = noise("RGB")
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
        policy.apply(noise("RGB"))


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
    names = [op.name for op in policy.apply.ops]  # type: ignore
    weights = dict(zip(names, policy.apply.choice_weights, strict=True))  # type: ignore
    assert weights["Rotate"] == pytest.approx(0.3 / 1.0, abs=0.01) and "ColorIncreasing" in weights
    assert "Invert" not in weights and sum(weights.values()) == pytest.approx(1)


def test_parts():
    assert parse_policy("randaug-m9-mstd0.5-mmax12-inc1") == (
        "rand", "rand", {"m": "9", "mstd": "0.5", "mmax": "12", "inc": "1"},
    )  # fmt: skip
    assert parse_policy("augmix-d-1-m3")[2] == {"d": "-1", "m": "3"}
