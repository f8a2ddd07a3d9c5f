"""The files that `visformer bench --what data` reads: JPEGs of the user's or made on the spot, and the same packed.

The JPEGs that are made have 500 x 375 pixels, quality 90, and the 1/f spectrum of photographs, which gives the size of
ImageNet's files, about 84 kB. Packed they are as `visformer pack --format uint8` has them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visformer.data import FolderSource, ImageSource, Subset, available_cores
from visformer.data.packed import PackedSource, open_packed
from visformer.data.packed_index import MARKER, Manifest, marker_text
from visformer.data.packed_writer import AsPixels, write_split

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SPECTRUM = 1.27  # amplitudes fall with this power of the frequency: files of 84 kB
MARGIN = 8 / 7  # pixels that are kept on a side for each one that the model takes: 256 for 224
SHARD_BYTES = 128_000_000


@contextmanager
def images(options: Any) -> Iterator[ImageSource]:
    """The JPEGs to read: some of the user's, or new ones in a folder that is removed afterwards."""
    if options.data_dir:
        root = Path(options.data_dir)
        found = FolderSource(root / "train" if (root / "train").is_dir() else root)
        count = min(len(found), options.num_images)
        yield Subset(found, np.sort(np.random.default_rng(0).permutation(len(found))[:count]))
        return
    with tempfile.TemporaryDirectory(prefix="visformer-bench-") as folder:
        write_jpegs(Path(folder), options.num_images)
        yield FolderSource(folder)


def write_jpegs(folder: Path, count: int) -> None:
    """Write `count` JPEGs like photographs into class folders below `folder`, the same ones each time."""
    rng = np.random.default_rng(0)
    planes = [_plane(rng) for _ in range(24)]
    for number in range(count):
        # A sum of two planes, moved around, has their spectrum and is another picture each time.
        light, red, blue = (
            (_moved(planes[a], rng) + _moved(planes[b], rng)) / np.sqrt(2)
            for a, b in (rng.choice(len(planes), 2, replace=False) for _ in range(3))
        )
        light = 52 * light + 118
        pixels = np.stack([light + 14 * red + 5 * blue, light - 6 * red + 2 * blue, light - 3 * red - 16 * blue], 2)
        path = folder / f"class{number % 10}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def _plane(rng: np.random.Generator) -> np.ndarray:
    """Noise of mean 0 and deviation 1 whose amplitudes fall as nature's do, float32 (H, W)."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    frequency[0, 0] = 1 / WIDTH
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    plane = np.fft.irfft2(spectrum / frequency**SPECTRUM, s=(HEIGHT, WIDTH))
    return ((plane - plane.mean()) / plane.std()).astype(np.float32)


def _moved(plane: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.roll(plane[:: rng.choice([-1, 1])], rng.integers(WIDTH, size=2), axis=(0, 1))


@contextmanager
def packed_images(source: ImageSource, image_size: int) -> Iterator[PackedSource]:
    """The same images packed as pixels, in a folder that is removed afterwards."""
    size = round(image_size * MARGIN)
    with tempfile.TemporaryDirectory(prefix="visformer-bench-") as name:
        folder = Path(name)
        written = write_split(
            source,
            "train",
            folder,
            AsPixels(size),
            shard_bytes=SHARD_BYTES,
            workers=available_cores(),
            shuffled=True,
        )
        manifest = Manifest("uint8", size, 3, source.class_names, {"train": written.split}, {})
        (folder / MARKER).write_text(marker_text(manifest), encoding="utf-8")
        packed = open_packed(name)
        assert packed is not None
        yield packed.open("train", 3)
