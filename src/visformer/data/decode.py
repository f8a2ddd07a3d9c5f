"""One way to turn image bytes into pixels, for training, validation, prediction and serving alike.

`open_image` reads whatever people keep in their folders: EXIF-rotated photographs, 16-bit greyscale, palettes, CMYK,
alpha, and files that are no image at all. Transparency is laid on white; depth is scaled, not clipped. What can't be
read raises `ImageError` with a reason of one line, so that a loader can skip the file and name it.

Only formats with a signature and a decoder of their own are tried: Pillow would hand a file that begins like PostScript
to Ghostscript, and guesses at formats without a signature.

`encoded.py` has the training loader's way.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from visformer.data.orientation import is_sideways, turn, turning, upright
from visformer.errors import VisformerError

MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded: 300 MB as RGB
EVAL_HEADROOM = 2.5  # pixels that a reduced decode leaves to the resize, per pixel of its result and side
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


class ImageError(VisformerError):
    """An image that can't be read. `reason` is one line without the name; `name` is the file, or empty."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = reason
        self.name = name

    def __reduce__(self):
        return ImageError, (self.reason, self.name)  # a worker process sends it to its parent


Resized = Callable[[int, int], tuple[int, int]]
Box = tuple[float, float, float, float]  # left, top, right, bottom, as Pillow's `resize` takes it


def open_image(source: str | Path | bytes | BinaryIO, channels: int = 3) -> Image.Image:
    """Read an image, upright, in mode L (`channels` 1), RGB (3) or RGBA (4), 8 bits a channel.

    `source` is a path, the bytes of a file, or an open binary file. Of an animation, the first frame. With 1 or 3
    channels transparent pixels show white; with 4 an opaque image gets alpha 255. Raises `ImageError`.
    """
    return open_reduced(source, channels, None)[0]


def open_reduced(
    source: str | Path | bytes | BinaryIO, channels: int, resized: Resized | None
) -> tuple[Image.Image, Box | None]:
    """As `open_image`, for an image that will be resized: `resized` gives for its (height, width), upright, the size.

    A JPEG is decoded at a half, a quarter or an eighth, for much less than the whole, where `EVAL_HEADROOM` times the
    size that it will have is left. Then the box of the result that is the picture comes with it: sides that are no
    multiple of eight end within a pixel. Raises `ImageError`.
    """
    name = str(source) if isinstance(source, (str, Path)) else ""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(too_large(image.width, image.height), name)
            stored, reduction = image.size, 1 if resized is None else _reduction(image, resized)
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            image.load()
            box = _picture(image, stored, reduction) if reduction > 1 else None
            return to_mode(upright(image), channels), box
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders answer hostile bytes with errors of every type
        raise ImageError(_reason(error), name) from error


def stored_size(data: bytes) -> tuple[int, int]:
    """Width and height, pixels, that an image file's header says; nothing is decoded. Raises what Pillow raises."""
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        return image.size


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height, pixels, of an image file when it is upright. Raises what Pillow raises.

    To find the orientation Pillow may decode the image (PNG), so a file that is not trusted is measured first.
    """
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        width, height = image.size
        return (height, width) if is_sideways(turning(image)) else (width, height)


def read_file(path: str | Path) -> bytes:
    """The bytes of an image's file. Raises `ImageError`."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise ImageError(_reason(error), str(path)) from error


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


def _reduction(image: Image.Image, resized: Resized) -> int:
    """By how much a file that is open may shrink in decoding."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    sideways = is_sideways(turning(image))
    height, width = (image.width, image.height) if sideways else (image.height, image.width)
    rows, columns = (EVAL_HEADROOM * side for side in resized(height, width))
    return next((by for by in (8, 4, 2) if height >= by * rows and width >= by * columns), 1)


def _picture(image: Image.Image, stored: tuple[int, int], reduction: int) -> Box:
    """Where the picture of the `stored` width and height lies in `image`, decoded at a fraction, once it is upright."""
    spare_x, spare_y = (side - whole / reduction for side, whole in zip(image.size, stored, strict=True))
    swapped, upside_down, mirrored = turn(turning(image))
    width, height = image.size
    if swapped:
        spare_x, spare_y, width, height = spare_y, spare_x, height, width
    left, top = spare_x * mirrored, spare_y * upside_down
    return left, top, left + width - spare_x, top + height - spare_y


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


def too_large(width: int, height: int) -> str:
    """The reason for which an image of so many pixels is refused."""
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
