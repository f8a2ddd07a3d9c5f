"""What a policy or the colour jitter would do to an image, drawn by a worker and done by the device.

timm's and torchvision's policies draw and do in one. Here their operations write down what was drawn instead of doing
it, so that a sample gets the very operations, magnitudes and filters that its seed gives it in `transforms.py`.

An operation that looks up each level on its own (posterize, solarize, invert, brightness) is written down as its table
of 256 levels, which the functions of `image_ops` fill in; one that moves pixels as the six numbers of
`image_ops.affine`.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from visformer.data import image_ops
from visformer.data.policies import Policy

if TYPE_CHECKING:
    from visformer.data.transforms import ColorJitter, TrainTransform

_RAMP = np.arange(256, dtype=np.uint8)[None, :, None]  # every level once, as an image (1, 256, 1)
_TABLES: dict[str, Callable[..., np.ndarray]] = {
    "Invert": image_ops.invert,
    "Posterize": image_ops.posterize,
    "Solarize": image_ops.solarize,
    "SolarizeAdd": image_ops.solarize_add,
    "Brightness": image_ops.brightness,
}
_FACTORS = {"Contrast": "contrast", "Color": "color", "Sharpness": "sharpness", "GaussianBlur": "blur"}
_SEEN = {"AutoContrast": "auto_contrast", "Equalize": "equalize"}  # they look at the image for all they need
_JITTERS: dict[Any, str] = {
    image_ops.brightness: "Brightness",
    image_ops.contrast: "Contrast",
    image_ops.color: "Color",
}


class Step(NamedTuple):
    """One operation: `levels` with a table of 256 bytes, `affine` with six numbers and a filter, another of
    `device_ops` with one number or none."""

    kind: str
    values: tuple[float, ...] | bytes = ()
    filter: str = ""


Steps = tuple[Step, ...]


class Look(NamedTuple):
    """What makes a copy of an image: the steps of one branch or, for AugMix, of several.

    Those are mixed by `weights`, and the mix has `share` of the result; `blended` lays one branch after another over
    the image instead, each with its weight.
    """

    branches: tuple[Steps, ...] = ((),)
    weights: tuple[float, ...] = ()
    share: float = 1.0
    blended: bool = False


def look_drawer(transform: TrainTransform) -> Callable[[], Look]:
    """A function that draws what `transform` would do to the next image after `transform.draw_placing`.

    The operations of its policy are replaced: from then on the transform itself can only place images.
    """
    if transform.policy is not None:
        return _policy_drawer(transform.policy, transform.size)
    if transform.jitter is not None:
        return functools.partial(_jittered, transform.jitter)
    return Look


def _policy_drawer(policy: Policy, size: tuple[int, int]) -> Callable[[], Look]:
    chosen = policy.chosen
    if policy.torch:
        return functools.partial(_trivial, chosen, size)
    mixing = hasattr(chosen, "alpha")
    for operation in chosen.ops if hasattr(chosen, "ops") else [op for steps in chosen.policy for op in steps]:
        name = operation.name.removesuffix("Increasing").removesuffix("Original")
        operation.aug_fn = functools.partial(_recorded, name, size)
    return functools.partial(_mixed if mixing else _chained, chosen)


def _chained(policy: Any) -> Look:
    return Look((policy(()),))


def _mixed(policy: Any) -> Look:
    """AugMix's draws, in the order of `timm.data.auto_augment.AugMixAugment`."""
    weights: np.ndarray = np.random.dirichlet([policy.alpha] * policy.width).astype(np.float32)
    share = np.float32(np.random.beta(policy.alpha, policy.alpha))
    if policy.blended:
        weights = policy._calc_blended_weights(weights, share)
    branches = []
    for _ in weights:
        depth = policy.depth if policy.depth > 0 else np.random.randint(1, 4)
        steps: Steps = ()
        for operation in np.random.choice(policy.ops, depth, replace=True):
            steps = operation(steps)
        branches.append(steps)
    return Look(tuple(branches), tuple(map(float, weights)), float(share), policy.blended)


def _recorded(name: str, size: tuple[int, int], before: Steps, *levels: Any, fillcolor: Any, resample: Any) -> Steps:
    """Stands for an operation in timm's policies: what was done before, and this step; see `image_ops.for_timm`."""
    if name == "Desaturate":
        return (*before, step("Color", min(1.0, max(0.0, 1.0 - levels[0]))))
    if name == "GaussianBlurRand":
        return (*before, step("GaussianBlur", random.uniform(0.1, 2.0 * levels[0])))
    if name in _TABLES or name in _FACTORS or name in _SEEN:
        return (*before, step(name, *levels))
    resampling = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    return (*before, move(name, levels[0], size, resampling))


def step(name: str, *levels: Any) -> Step:
    """An operation on colours or sharpness, by timm's name for it."""
    if name in _TABLES:
        return Step("levels", _TABLES[name](_RAMP, *levels).tobytes())
    if name in _SEEN:
        return Step(_SEEN[name])
    return Step(_FACTORS[name], (float(levels[0]),))


def move(name: str, by: float, size: tuple[int, int], resampling: Image.Resampling) -> Step:
    """An operation on positions, by timm's name for it, for images of `size` (height, width)."""
    height, width = size
    if name == "Rotate":  # `image_ops.rotate`, rounded as Pillow does, so that a right angle is one
        cos, sin = (round(f(math.radians(by)), 15) for f in (math.cos, math.sin))
        x, y = width / 2, height / 2
        matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    else:
        matrix = image_ops._MOVES[name](by, width, height)
    return Step("affine", tuple(map(float, matrix)), resampling.name.lower())


def _jittered(jitter: ColorJitter) -> Look:
    return Look((tuple(step(_JITTERS[kind], factor) for kind, factor in jitter.draw()),))


def _trivial(policy: Any, size: tuple[int, int]) -> Look:
    """TrivialAugment's draws, in the order of `torchvision.transforms.TrivialAugmentWide`."""
    space = policy._augmentation_space(policy.num_magnitude_bins)
    name = list(space)[int(torch.randint(len(space), (1,)))]
    magnitudes, signed = space[name]
    by = float(magnitudes[torch.randint(len(magnitudes), (1,))]) if magnitudes.ndim else 0.0
    if signed and torch.randint(2, (1,)):
        by = -by
    if name == "Identity":
        return Look()
    if name in _SEEN:
        return Look(((step(name),),))
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return Look(((step(name, 1.0 + by),),))
    if name == "Posterize":
        return Look(((step(name, int(by)),),))
    if name == "Solarize":
        return Look(((step(name, by),),))
    # torchvision moves the picture by whole pixels, and to the other side than timm.
    by = -int(by) if name.startswith("Translate") else by
    resampling = Image.Resampling[policy.interpolation.name]
    return Look(((move(name, by, size, resampling),),))
