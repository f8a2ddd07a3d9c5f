"""Augmentation policies by name: AutoAugment, RandAugment, AugMix, 3-Augment (timm's) and TrivialAugment
(torchvision's).

MindCV spells the names `autoaug`, `autoaugr`, `randaug-...`, `augmix-...`, `3a`, `trivialaugwide`; timm's spellings
serve too. The parts after the name are timm's, but checked: timm passes over a part that it does not understand, and a
run of days would not have the augmentation that was asked for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from visformer.data import image_ops
from visformer.data.preprocessing import PIL_RESAMPLING
from visformer.errors import UsageError

FORMS = (
    "autoaug[-mstd0.5]",
    "autoaugr[-mstd0.5]",
    "3a[-mstd0.5]",
    "randaug-m9-n2-mstd0.5-mmax10-inc1",
    "augmix-m3-w3-d2-mstd0.5",
    "trivialaugwide",
    "none",
)

_TABLES = {"autoaug": "original", "autoaugr": "originalr", "original": "original", "originalr": "originalr"} | {
    name: name for name in ("3a", "v0", "v0r")
}
_FLOAT, _INT = r"\d+(\.\d+)?", r"\d+"
_PARTS = {
    "auto": {"mstd": _FLOAT},
    "rand": {
        "m": _INT, "n": _INT, "p": _FLOAT, "mstd": rf"(inf|{_FLOAT})", "mmax": _INT, "inc": "[01]",
        "w": "0", "t": "(weights|3a|3aw)",
    },
    "augmix": {"m": _INT, "w": r"[1-9]\d*", "d": rf"-?{_INT}", "a": _FLOAT, "b": "[01]", "mstd": _FLOAT},
}  # fmt: skip

# The weights that `w0` names in MindCV, and named in timm before it dropped them: mostly rotating, shearing and moving.
_WEIGHTS_0 = {
    "Rotate": 0.3, "ShearX": 0.2, "ShearY": 0.2, "TranslateXRel": 0.1, "TranslateYRel": 0.1,
    "Color": 0.025, "Sharpness": 0.025, "AutoContrast": 0.025,
    "Solarize": 0.005, "SolarizeAdd": 0.005, "Contrast": 0.005, "Brightness": 0.005, "Equalize": 0.005,
}  # fmt: skip
_INCREASING = ("Color", "Sharpness", "Solarize", "Contrast", "Brightness")


@dataclass(frozen=True)
class Policy:
    """`apply`: uint8 (H, W, C) -> a new array of that shape. `numpy`, `torch`: does it draw from their generators.

    `chosen` is timm's or torchvision's own policy.
    """

    apply: Callable[[np.ndarray], np.ndarray]
    chosen: Any
    numpy: bool = False
    torch: bool = False


def build_policy(
    text: str | None,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    interpolation: str = "bilinear",
    channels: int = 3,
) -> Policy | None:
    """The policy that `text` names, for images of `image_size` (height, width); None for `none`, an empty text or None.

    Areas moved into the picture take the colour `mean` (0-255 scale). Raises `UsageError` listing the valid forms.
    """
    if not text or text == "none":
        return None
    kind, name, parts = parse_policy(text)
    if channels == 4:
        raise UsageError(f"auto_augment: {text!r} works on grey or RGB images; with in_channels 4 use none")
    fill = fill_of(mean)
    if kind == "trivial":
        return _trivial(interpolation, fill)
    hparams = {"translate_const": int(min(image_size) * 0.45), "img_mean": fill if channels == 3 else fill[0]}
    if interpolation != "random":
        hparams["interpolation"] = PIL_RESAMPLING[_warping(interpolation)]
    return _timm_policy(kind, name, parts, hparams)


def fill_of(mean: tuple[float, ...]) -> tuple[int, ...]:
    """The levels that areas moved into the picture take."""
    return tuple(min(255, round(level)) for level in mean)


def parse_policy(text: str) -> tuple[str, str, dict[str, str]]:
    """(kind, timm's name, its parts) of a policy's text; kind is auto, rand, augmix or trivial. Raises `UsageError`."""
    name, *rest = re.split(r"-(?!\d)", text)  # the minus of d-1 is no separator
    if name in ("trivialaugwide", "trivialaug") and not rest:
        return "trivial", name, {}
    if name in _TABLES:
        kind, name = "auto", _TABLES[name]
    elif name in ("randaug", "rand"):
        kind, name = "rand", "rand"
    elif name == "augmix":
        kind = name
    else:
        raise _wrong(text, f"{name!r} is no policy")
    parts: dict[str, str] = {}
    for part in rest:
        key = next(
            (k for k in sorted(_PARTS[kind], key=len, reverse=True) if re.fullmatch(k + _PARTS[kind][k], part)), None
        )
        if key is None:
            raise _wrong(
                text, f"part {part!r} is not understood; {name} takes {', '.join(_PARTS[kind])}, each with its value"
            )
        if key in parts:
            raise _wrong(text, f"part {key!r} is there twice")
        parts[key] = part[len(key) :]
    if "w" in parts and "t" in parts and kind == "rand":
        raise _wrong(text, "parts 'w' and 't' exclude each other")
    return kind, name, parts


def _wrong(text: str, why: str) -> UsageError:
    return UsageError(f"auto_augment: {text!r}: {why}; valid forms are {', '.join(FORMS)}")


def _warping(interpolation: str) -> str:
    """Pillow rotates and shears with everything but Lanczos."""
    return "bicubic" if interpolation == "lanczos" else interpolation


def _timm_policy(kind: str, name: str, parts: dict[str, str], hparams: dict) -> Policy:
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    weights = None
    if kind == "rand" and parts.pop("w", None) is not None:
        increasing = parts.get("inc") == "1"
        weights = {key + "Increasing" * (increasing and key in _INCREASING): value for key, value in _WEIGHTS_0.items()}
    if parts.get("mstd") == "inf":
        parts["mstd"] = "101"  # timm's spelling: above 100 the magnitude is uniform
    if parts.get("d", "").startswith("-"):
        del parts["d"]  # timm's default, a random depth of 1 to 3, which its own grammar can't spell
    text = "-".join([name, *(key + value for key, value in parts.items())])
    if kind == "rand":
        policy: Any = rand_augment_transform(text, hparams, transforms=weights)
        ops = policy.ops
    elif kind == "augmix":
        policy = augment_and_mix_transform(text, hparams | {"translate_pct": 0.3})
        ops = policy.ops
    else:
        policy = auto_augment_transform(text, hparams)
        ops = [op for steps in policy.policy for op in steps]
    for op in ops:
        if kind == "augmix":  # mixes what its operations give, as Pillow images
            op.aug_fn = pillow_posterize if op.name.startswith("Posterize") else op.aug_fn
        else:
            image_ops.for_timm(op)
    apply = functools.partial(_by_pillow, policy) if kind == "augmix" else policy
    return Policy(apply, policy, numpy=kind != "auto")


def _by_pillow(policy: Callable[[Image.Image], Image.Image], pixels: np.ndarray) -> np.ndarray:
    return image_ops.from_pillow(policy(image_ops.to_pillow(pixels)))


def pillow_posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each level. timm may ask for 0 bits (black), which Pillow 13 refuses."""
    return ImageOps.posterize(image, bits) if bits else image.point([0] * (256 * len(image.getbands())))


def _trivial(interpolation: str, fill: tuple[int, ...]) -> Policy:
    from torchvision.transforms import InterpolationMode, TrivialAugmentWide

    mode = InterpolationMode("bilinear" if interpolation == "random" else _warping(interpolation))
    policy = TrivialAugmentWide(interpolation=mode, fill=list(fill))
    return Policy(functools.partial(_by_pillow, policy), policy, torch=True)
