"""The same samples through both decoding paths, as a picture: docs/images/decode_device.jpg.

    python benchmarks/augmentation_picture.py [--output FILE] [--device cuda]

Each block is a policy. Its first row is what `--decode workers` gives, the second what `--decode device` gives for the
same seed, epoch and samples, the third sixteen times their difference on grey. The pictures are drawn on the spot and
saved as JPEGs; crop, resizing and jitter or policy are those of training, before anything is normalised or mixed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from visformer.config import TrainConfig
from visformer.data import FolderSource, make_train_loader

COLUMNS, SIDE, GAP, TITLE = 8, 112, 4, 24  # pixels
POLICIES = ("none", "autoaug", "randaug-m9-n2-mstd0.5-inc1", "augmix-m5-w3")
STRENGTH = 16


def landscape(seed: int) -> Image.Image:
    """Hills, trees, a house and a text under a sky: smooth areas, edges and fine texture, 500 x 375 pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:375, :500].astype(np.float32)
    top, bottom = rng.integers(60, 200, 3), rng.integers(150, 255, 3)
    pixels = top + (bottom - top) * (y / 375)[:, :, None]
    for level in range(3):
        heights = 170 + 60 * level + 25 * np.sin(x[0] / rng.uniform(30, 90) + rng.uniform(0, 6))
        hill = y >= heights[None]
        texture = rng.normal(0, 9, y.shape) * (level + 1) / 3
        pixels[hill] = (rng.integers(20, 170, 3) + texture[hill][:, None]).clip(0, 255)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        left, low, size = rng.integers(0, 500), rng.integers(220, 360), rng.integers(10, 34)
        draw.rectangle((left - 2, low, left + 2, low + size), fill=(70, 45, 25))
        draw.ellipse(
            (left - size // 2, low - size, left + size // 2, low), fill=tuple(map(int, rng.integers(30, 200, 3)))
        )
    left, low = int(rng.integers(60, 300)), int(rng.integers(180, 240))
    draw.rectangle((left, low, left + 110, low + 80), fill=tuple(map(int, rng.integers(90, 250, 3))), outline="black")
    draw.polygon([(left - 10, low), (left + 55, low - 45), (left + 120, low)], fill=(150, 40, 30), outline="black")
    draw.rectangle((left + 20, low + 20, left + 45, low + 45), fill=(250, 240, 160), outline="black")
    draw.text((left + 52, low + 18), f"No. {seed + 1}", fill="black", font=ImageFont.load_default(22))
    return image


def batch(folder: str, policy: str, decode: Any, device: torch.device) -> np.ndarray:
    """uint8 (COLUMNS, H, W, C)."""
    config = TrainConfig(
        image_resize=SIDE,
        batch_size=COLUMNS,
        num_parallel_workers=0,
        auto_augment=policy,
        interpolation="bicubic",
        scale=(0.25, 1.0),
        shuffle=False,
        decode=decode,
    )
    loader = make_train_loader(FolderSource(folder), config, device=device)
    return next(iter(loader)).images.permute(0, 2, 3, 1).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(Path(__file__).parents[1] / "docs" / "images" / "decode_device.jpg"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    step, block = SIDE + GAP, TITLE + 3 * (SIDE + GAP)
    sheet = Image.new("RGB", (COLUMNS * step + GAP, len(POLICIES) * block), "white")
    draw = ImageDraw.Draw(sheet)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "all").mkdir()
        for number in range(COLUMNS):
            landscape(number).save(Path(folder) / "all" / f"{number}.jpg", quality=90)
        for index, policy in enumerate(POLICIES):
            workers, device = (
                batch(folder, policy, decode, torch.device(arguments.device)) for decode in ("workers", "device")
            )
            apart = device.astype(int) - workers
            title = f"{policy}: decode workers, decode device, and {STRENGTH} x their difference"
            title += f" (mean {np.abs(apart).mean():.2f} of 255 levels)"
            draw.text((GAP, index * block + 2), title, fill="black", font=ImageFont.load_default(15))
            enlarged = (128 + STRENGTH * apart).clip(0, 255).astype(np.uint8)
            for row, images in enumerate((workers, device, enlarged)):
                for column, image in enumerate(images):
                    place = (GAP + column * step, index * block + TITLE + row * step)
                    sheet.paste(Image.fromarray(image), place)
    sheet.save(arguments.output, quality=80)


if __name__ == "__main__":
    main()
