"""Photographs of a camera's size to the model's input: how long it takes, and what is lost by decoding a fraction.

    python benchmarks/large_photographs.py --output large-photographs.json

Three ways for each size, in turns on one core: torchvision's as validation scripts have it (Pillow decodes all,
`Resize(256)`, `CenterCrop(224)`), ours with everything decoded, and ours as `predict`, `validate` and `serve` have it,
which decode a JPEG at a half, a quarter or an eighth where 2.5 times what the model needs is left. The photographs are
scikit-learn's two samples, enlarged, with grain of their own size, as JPEGs of quality 90.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms

from visformer import console
from visformer.atomic import atomic_text
from visformer.data import Preprocessing, open_image
from visformer.data.decode import open_reduced

SIZES = ((640, 480), (1280, 960), (2048, 1536), (3001, 2001), (4032, 3024), (8064, 6048))
PREPROCESSING = Preprocessing((224, 224))


def main() -> None:
    """Time each size, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each way")
    parser.add_argument("--output", type=Path, default=Path("large-photographs.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(size, options.repeats) for size in SIZES]
    document = {"what": "large_photographs", "repeats": options.repeats, "rows": rows}
    atomic_text(options.output, json.dumps(document, indent=2) + "\n")
    digits = {"torchvision_ms": 1, "whole_ms": 1, "reduced_ms": 1, "ratio": 2, "mean_levels": 2, "most_levels": 0}
    shown = [
        [f"{row['width']}x{row['height']}", *(f"{row[key]:.{decimals}f}" for key, decimals in digits.items())]
        for row in rows
    ]
    heads = ["pixels", "torchvision, ms", "whole, ms", "as used, ms", "x torchvision", "mean levels", "most"]
    console.table("a JPEG to 224x224", heads, shown)


def measured(size: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Medians of milliseconds for an image, the ratio of each turn to torchvision's, and the difference in levels."""
    photographs = [photograph(number, *size) for number in range(2)]
    ways = {"torchvision": theirs(), "whole": whole, "reduced": reduced}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            for data in photographs:
                way(data)
            taken[name].append((time.perf_counter() - began) / len(photographs))
    apart = torch.stack([(whole(data).int() - reduced(data).int()).abs() for data in photographs])
    ratios = [a / b for a, b in zip(taken["torchvision"], taken["reduced"], strict=True)]
    return {
        "width": size[0],
        "height": size[1],
        **{f"{name}_ms": 1000 * statistics.median(seconds) for name, seconds in taken.items()},
        "ratio": statistics.median(ratios),
        "mean_levels": float(apart.float().mean()),
        "most_levels": int(apart.max()),
    }


def theirs() -> Callable[[bytes], torch.Tensor]:
    """As torchvision's reference for classification evaluates."""
    steps = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )
    return lambda data: steps(Image.open(io.BytesIO(data)).convert("RGB"))


def whole(data: bytes) -> torch.Tensor:
    """Everything is decoded."""
    return PREPROCESSING(open_image(data))


def reduced(data: bytes) -> torch.Tensor:
    """As the verbs do it."""
    return PREPROCESSING(*open_reduced(data, 3, PREPROCESSING.reduces))


def photograph(number: int, width: int, height: int) -> bytes:
    """A JPEG."""
    picture = Image.fromarray(load_sample_images().images[number]).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 1)).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
