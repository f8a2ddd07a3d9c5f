"""One way to turn image bytes into pixels, for training, validation, prediction and serving alike.

`open_image` reads whatever people keep in their folders: EXIF-rotated photographs, 16-bit greyscale, palettes, CMYK,
alpha, and files that are no image at all. Transparency is laid on white; depth is scaled, not clipped. What can't be
read raises `ImageError` with a reason of one line, so that a loader can skip the file and name it.

Only formats with a signature and a decoder of their own are tried: Pillow would hand a file that begins like PostScript
to Ghostscript, and guesses at formats without a signature.
"""

from __future__ import annotations

import functools
import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from visformer.errors import VisformerError

MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded: 300 MB as RGB
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Pillow's names for the formats that are read, and the suffixes their files go by.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in _FORMATS.values() for suffix in suffixes)

# EXIF orientation (tag 0x0112) -> what brings the picture upright; 1 is upright already.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(VisformerError):
    """An image that can't be read. `reason` is one line without the name; `name` is the file, or empty."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = reason
        self.name = name

    def __reduce__(self):
        return ImageError, (self.reason, self.name)  # a worker process sends it to its parent


def open_image(source: str | Path | bytes | BinaryIO, channels: int = 3) -> Image.Image:
    """Read an image, upright, in mode L (`channels` 1), RGB (3) or RGBA (4), 8 bits a channel.

    `source` is a path, the bytes of a file, or an open binary file. Of an animation, the first frame. With 1 or 3
    channels transparent pixels show white; with 4 an opaque image gets alpha 255. Raises `ImageError`.
    """
    name = str(source) if isinstance(source, (str, Path)) else ""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(_too_large(image.width, image.height), name)
            image.load()
            return to_mode(_upright(image), channels)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders answer hostile bytes with errors of every type
        raise ImageError(_reason(error), name) from error


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """`image` of any Pillow mode as L, RGB or RGBA with 8 bits a channel; the image itself when it is that already.

    16-bit values are scaled by 255/65535. 32-bit integers and floats have no agreed white: the smallest of 1 (floats
    only), 255 and 65535 that holds the largest value is taken for it, else the largest value itself; below 0 is black.
    """
    mode = MODES[channels]
    transparent = "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    if image.mode == mode and not transparent:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image).convert(mode)
    if not transparent and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert(mode)
    if image.mode == "La":
        image = image.convert("LA")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    if channels == 4:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data says nothing about the pixels
        return image
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16-bit integers, 32-bit integers or floats as mode L."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if image.mode.startswith("I;16") or (image.mode == "I" and getattr(image, "format", None) in ("PNG", "PPM")):
        white = 65535.0
    else:
        largest = float(values.max(initial=0.0))
        levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((level for level in levels if largest <= level), largest)
    return Image.fromarray((values * (255.0 / white)).round().clip(0, 255).astype(np.uint8))


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can read.

    Pillow's warnings are silenced on the way: what is wrong with a file is told as an `ImageError` or not at all.
    """
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed"


def _reason(error: Exception) -> str:
    """One line that says why the bytes are no image to us."""
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not a file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a format that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {MAX_PIXELS:,} pixels allowed"
    if "truncated" in text.lower():
        return f"cut short ({text})"
    return f"damaged ({text or type(error).__name__})"
