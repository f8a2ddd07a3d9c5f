"""Our preprocessing with MindCV's settings, and torchvision's usual one, against MindCV's own results.

    python tests/upstream_full/compare_preprocessing.py FOLDER [--json FILE]

FOLDER holds JPEGs and the mindcv.npz that `write_preprocessing.py results FOLDER` wrote. Each figure is a difference of
normalised values (a level of 255 is about 0.017), as mean / largest over an image. Exit code 1 above a mean of 0.02.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from visformer.data import Preprocessing
from visformer.data.decode import open_image

LIMIT = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rows = []
    with np.load(options.folder / "mindcv.npz") as results:
        for key, pixels in results.items():
            name, interpolation = key.split("/")
            image = open_image(options.folder / f"{name}.jpg")
            rows.append({"image": name, "interpolation": interpolation, **differences(image, interpolation, pixels)})
            print("{image:24} {interpolation:9} ours {ours[0]:.4f} / {ours[1]:.3f}   ".format(**rows[-1]), end="")
            print("torchvision {torchvision[0]:.4f} / {torchvision[1]:.3f}".format(**rows[-1]))
    for who in ("ours", "torchvision"):
        means = [row[who][0] for row in rows]
        print(f"{who}: mean {np.mean(means):.4f}, worst image {max(means):.4f}, of {len(means)}; the limit is {LIMIT}")
    if options.json:
        options.json.write_text(json.dumps({"limit": LIMIT, "rows": rows}, indent=1) + "\n")
    return 1 if max(row["ours"][0] for row in rows) > LIMIT else 0


def differences(image: Image.Image, interpolation: str, expected: np.ndarray) -> dict[str, tuple[float, float]]:
    """(mean, largest) absolute difference of normalised values for either pipeline; `expected` is HWC uint8."""
    ours = Preprocessing((224, 224), 0.875, interpolation, antialias=False, crop_rounding="floor")
    mode = transforms.InterpolationMode(interpolation)
    usual = transforms.Compose([transforms.Resize(256, mode), transforms.CenterCrop(224), transforms.PILToTensor()])
    pipelines: dict[str, Callable[[Image.Image], Any]] = {"ours": ours, "torchvision": usual}
    wanted = ours.normalize(torch.from_numpy(expected.transpose(2, 0, 1))[None])
    found = {}
    for name, pipeline in pipelines.items():
        error = (ours.normalize(pipeline(image)[None]) - wanted).abs()
        found[name] = float(error.mean()), float(error.max())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
