"""JPEGs of many kinds, and what MindCV's own evaluation pipeline makes of them.

    python write_preprocessing.py images FOLDER PHOTO      # the six JPEGs of tests/fixtures/preprocessing
    python write_preprocessing.py sizes FOLDER PHOTO ...   # seventy, of every shape, for a wider look; not committed
    ENV/bin/python write_preprocessing.py results FOLDER   # MindCV's result for each JPEG there: FOLDER/mindcv.npz

PHOTO is any photograph; the fixtures were made from matplotlib's sample_data/grace_hopper.jpg, which is in the public
domain. ENV is the environment that write_mindcv.py describes; the other two need NumPy and Pillow only.

The archive holds `NAME/INTERPOLATION`: uint8 (224, 224, 3), after Decode, Resize and CenterCrop, for image_resize 224
and crop_pct 0.875. That MindCV's whole pipeline gives just these values, normalised, is checked on the way.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)
STD = np.array([58.395, 57.12, 57.375], dtype=np.float32)
DECODING = ("cmyk", "small")  # fixtures that are there for their decoding: one interpolation, to keep the file small


def main(command: str, folder: Path, photos: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if command == "images":
        write_images(folder, Image.open(photos[0]).convert("RGB"))
    elif command == "sizes":
        write_sizes(folder, [Image.open(photo).convert("RGB") for photo in photos])
    else:
        write_results(folder)


def write_images(folder: Path, photo: Image.Image) -> None:
    """One JPEG each: odd crop offsets, portrait, grey, CMYK, smaller than the model's input, progressive."""
    fit = Image.Resampling.LANCZOS
    scene = synthetic(640, 427)
    scene.save(folder / "landscape.jpg", quality=70)  # 640 -> 383 pixels wide: 159 to spare, an odd number
    synthetic(500, 383, seed=1).save(folder / "height_383.jpg", quality=80, subsampling=1)
    photo.resize((301, 455), fit).save(folder / "portrait.jpg", quality=82)
    photo.resize((340, 400), fit).convert("L").save(folder / "grey.jpg", quality=80)
    scene.resize((300, 201), fit).convert("CMYK").save(folder / "cmyk.jpg", quality=80)
    photo.crop((60, 40, 460, 340)).resize((160, 107), fit).save(folder / "small.jpg", quality=80, progressive=True)


def write_sizes(folder: Path, photos: list[Image.Image]) -> None:
    """Seventy JPEGs of 1 to 1000 pixels a side, with every sampling of colour, baseline and progressive."""
    random = np.random.default_rng(5)
    sizes = [tuple(int(side) for side in random.integers(20, 700, 2)) for _ in range(60)]
    sizes += [(30, 700), (700, 30), (1, 1), (2, 300), (255, 257), (257, 255), (224, 224), (256, 256), (511, 513)]
    for number, (width, height) in enumerate([*sizes, (300, 1000)]):
        photos[number % len(photos)].resize((width, height), Image.Resampling.LANCZOS).save(
            folder / f"{number:02d}_{width}x{height}.jpg",
            quality=int(random.integers(40, 96)),
            subsampling=int(random.integers(0, 3)),
            progressive=bool(random.integers(0, 2)),
        )


def synthetic(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with the spectrum of photographs (amplitude falling as 1 / frequency) and a few hard edges."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    layers = []
    for _ in range(3):
        phase = random.uniform(0, 2 * np.pi, frequency.shape)
        layer = np.fft.irfft2(np.exp(1j * phase) / frequency**1.3, (height, width))
        layers.append(layer / layer.std())
    grey = layers[0][:, :, None]
    pixels = 120 + 45 * grey + 12 * np.stack(layers, axis=-1)
    row, column = np.mgrid[0:height, 0:width]
    pixels[(row // 9 + column // 13) % 11 == 0] += 50.0
    pixels[np.hypot(row - height / 2, column - width / 3) < height / 6] = [200.0, 60.0, 30.0]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_results(folder: Path) -> None:
    """FOLDER/mindcv.npz, with the interpolation of MindCV's recipes and with its default."""
    import mindcv
    from mindspore.dataset import NumpySlicesDataset

    arrays = {}
    for path in sorted(folder.glob("*.jpg")):
        data = np.fromfile(path, np.uint8)
        for interpolation in ("bicubic",) if path.stem in DECODING else ("bicubic", "bilinear"):
            pipeline = mindcv.create_transforms(
                "imagenet", image_resize=224, is_training=False, crop_pct=0.875, interpolation=interpolation
            )
            pixels = data
            for step in pipeline[:3]:  # Decode, Resize, CenterCrop
                pixels = step(pixels)
            dataset = NumpySlicesDataset({"image": [data]}, shuffle=False).map(pipeline, input_columns="image")
            whole = next(dataset.create_dict_iterator(num_epochs=1, output_numpy=True))["image"]
            difference = np.abs((pixels - MEAN) / STD - whole.transpose(1, 2, 0)).max()
            assert difference < 1e-5, f"{path}: steps and pipeline differ by {difference}"
            arrays[f"{path.stem}/{interpolation}"] = pixels
    np.savez_compressed(folder / "mindcv.npz", **arrays)
    print(f"{folder / 'mindcv.npz'}: {len(arrays)} results")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    needed = {"images": 3, "sizes": 3, "results": 2}
    if not arguments or len(arguments) < needed.get(arguments[0], 99):
        sys.exit("usage: write_preprocessing.py images|sizes FOLDER PHOTO... | results FOLDER")
    main(arguments[0], Path(arguments[1]), [Path(argument) for argument in arguments[2:]])
