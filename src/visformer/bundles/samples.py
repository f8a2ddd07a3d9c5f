"""Images made from a seed: the three that lie in a bundle, and those that an export is compared on without real data.

Noise at several scales under shapes with hard edges has the statistics that a resize and a network react to, carries
nobody's picture, and is the same everywhere. Sides are odd, long and small on purpose.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SAMPLE_SIZES = ((375, 500), (641, 427), (97, 61))  # (height, width) of the images in a bundle
PARITY_SIZES = (
    *SAMPLE_SIZES,
    *((480, 640), (224, 224), (256, 341), (33, 1201), (900, 47), (50, 50), (768, 1024), (300, 199), (1, 1)),
)
_SCALES = ((64, 0.5), (16, 0.25), (4, 0.15), (1, 0.1))  # pixels of a cell of noise, share of the whole


def generated(size: tuple[int, int], channels: int, seed: int) -> np.ndarray:
    """uint8 (height, width, channels), values in [0, 255]"""
    height, width = size
    random = np.random.default_rng([seed, height, width])
    levels = np.zeros((height, width, 3))
    for cell, share in _SCALES:
        cells = random.integers(0, 256, (-(-height // cell), -(-width // cell), 3), dtype=np.uint8)
        levels += share * np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))
    picture = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        (left, right), (top, bottom) = np.sort(random.integers(0, width, 2)), np.sort(random.integers(0, height, 2))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((int(left), int(top), int(right), int(bottom)), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
    return as_channels(picture, channels)


def as_channels(picture: Image.Image, channels: int) -> np.ndarray:
    """A PIL image as uint8 (height, width, channels), of 1, 3 or 4 channels."""
    array = np.array(picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return array if array.ndim == 3 else array[:, :, None]
