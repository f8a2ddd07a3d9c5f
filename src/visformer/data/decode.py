"""One way to turn image bytes into pixels, for training, validation, prediction and serving alike.

`open_image` reads whatever people keep in their folders: EXIF-rotated photographs, 16-bit greyscale, palettes, CMYK,
alpha, and files that are no image at all. Transparency is laid on white; depth is scaled, not clipped. What can't be
read raises `ImageError` with a reason of one line, so that a loader can skip the file and name it.

Only formats with a signature and a decoder of their own are tried: Pillow would hand a file that begins like PostScript
to Ghostscript, and guesses at formats without a signature.

`Encoded` is the training loader's way: it knows an image's size from the header, and decodes once the crop is known.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

from visformer.errors import VisformerError

MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded: 300 MB as RGB
HEADROOM = 1.5  # pixels that a reduced decode leaves to the final resize, per pixel of its result and side
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
# Each is a swap of the axes, or none, and then a reversal of rows, columns or both.
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_UPSIDE_DOWN = (
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
)
_PADDING = 1024  # bytes of zero that a whole JPEG may end with
_ROWS_BELOW = 2  # that libjpeg looks at to interpolate the colours of a row
_MIRRORED = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
)


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
        return (height, width) if _turning(image) in _SIDEWAYS else (width, height)


def read_file(path: str | Path) -> bytes:
    """The bytes of an image's file. Raises `ImageError`."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise ImageError(_reason(error), str(path)) from error


class Encoded:
    """An image file in memory: upright `width` and `height` in pixels now, the pixels of a crop when asked for.

    An ordinary JPEG goes straight to libjpeg-turbo, which can decode at half, a quarter or an eighth of its size for
    much less than the whole; whatever else there is, damaged JPEGs among it, goes to `open_image` and comes out as it
    does everywhere. Raises `ImageError`.
    """

    def __init__(self, data: bytes, channels: int = 3) -> None:
        self.channels = channels
        self.data = data
        self._upright: Image.Transpose | None = None
        self._image: Image.Image | None = None
        header = _plain_jpeg(data, channels)
        if header is None:
            self._image = open_image(data, channels)
            self.width, self.height = self._image.size
            return
        self.width, self.height, self._space = header
        if _has_metadata(data):
            self._upright = _orientation(data)
            if self._upright in _SIDEWAYS:
                self.width, self.height = self.height, self.width

    def common(self) -> tuple[int, int, Image.Transpose | None] | None:
        """(width, height) as stored, and what brings the picture upright, of a JPEG that any decoder reads alike: 8
        bits, grey or YCbCr, Huffman coded in a single scan, not cut short. None for everything else."""
        if self._image is not None or self._space == "RGB":
            return None
        frame = _single_scan(self.data)
        if not frame or self.data[frame + 4] != 8:
            return None
        sides = (self.height, self.width) if self._upright in _SIDEWAYS else (self.width, self.height)
        return *sides, self._upright

    def reduction(self, width: int, height: int, at_least: tuple[int, int]) -> int:
        """By how much (1, 2, 4 or 8) a crop of `width` x `height` may shrink in decoding and still hold `HEADROOM`
        times `at_least` (height, width) pixels on either side; 1 where the format can't be decoded at a reduced size.
        """
        if self._image is not None:
            return 1
        rows, columns = (HEADROOM * side for side in at_least)
        return next((by for by in (8, 4, 2) if width >= by * columns and height >= by * rows), 1)

    def crop(self, left: int, top: int, width: int, height: int, reduction: int = 1) -> np.ndarray:
        """The pixels of a crop, uint8 (height, width, C), contiguous, in the caller's hands.

        With a `reduction` (see there), decoded at that fraction of the size; the edges of the crop then fall on the
        nearest pixels of the reduced image.
        """
        if self._image is None:
            pixels = self._decode(reduction, top + height)
            if pixels is not None:
                down, right = min(-(-(top + height) // reduction), pixels.shape[0]), left + width
                right = min(-(-right // reduction), pixels.shape[1])
                return pixels[top // reduction : down, left // reduction : right].copy()
            self._image = open_image(self.data, self.channels)
        pixels = np.array(self._image.crop((left, top, left + width, top + height)))
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _decode(self, reduction: int, rows: int) -> np.ndarray | None:
        """The first `rows` or more, upright, uint8 (H, W, C), valid until the next call; None when the file is not
        quite in order."""
        data, width, height = self.data, self.width, self.height
        shortened = self._upright is None and rows + _ROWS_BELOW * reduction < height and _single_scan(data)
        if shortened:
            height = rows + _ROWS_BELOW * reduction
            data = b"".join((data[: shortened + 5], height.to_bytes(2, "big"), data[shortened + 7 :]))
        height, width = -(-height // reduction), -(-width // reduction)
        try:
            pixels = simplejpeg.decode_jpeg(
                data,
                "GRAY" if self.channels == 1 else "RGB",
                min_height=width if self._upright in _SIDEWAYS else height,
                min_width=height if self._upright in _SIDEWAYS else width,
                min_factor=reduction,
                buffer=_canvas(height * width * (1 if self.channels == 1 else 3)),
                strict=not shortened,  # what follows the last row that is decoded looks like a fault
            )
        except ValueError:
            return None
        return pixels if self._upright is None else _turned(pixels, self._upright)


class _Canvas(threading.local):
    """Memory that each image is decoded into: fresh pages for every one would take as long as decoding it."""

    memory = np.empty(0, np.uint8)


_CANVAS = _Canvas()


def _canvas(size: int) -> np.ndarray:
    if len(_CANVAS.memory) < size:
        _CANVAS.memory = np.empty(size, np.uint8)
    return _CANVAS.memory


def _plain_jpeg(data: bytes, channels: int) -> tuple[int, int, str] | None:
    """(width, height, colour space) as stored of a JPEG whose colours libjpeg-turbo converts just as `open_image`
    would; else None.

    Raises `ImageError` for one that is too large.
    """
    if data[:3] != b"\xff\xd8\xff" or channels == 4:
        return None
    try:
        rows, columns, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    width, height = int(columns), int(rows)
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(width, height))
    same = space == "Gray" if channels == 1 else space in ("Gray", "YCbCr", "RGB")
    return (width, height, space) if same else None


def _has_metadata(data: bytes) -> bool:
    """True for a JPEG with EXIF or XMP data (segments APP1), which may tell an orientation."""
    place = 2
    while data[place : place + 1] == b"\xff" and (kind := data[place + 1 : place + 2]) != b"\xda":
        if kind == b"\xe1":
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _single_scan(data: bytes) -> int:
    """Where the frame header (SOF) of a JPEG is whose rows follow one another in a single scan and which ends as it
    should; 0 for any other.

    With a smaller height written there, libjpeg decodes the upper rows and leaves it at that.
    """
    frame, place = 0, 2
    while data[place : place + 1] == b"\xff":
        kind = data[place + 1]
        if kind in (0xC0, 0xC1):  # baseline and extended sequential, Huffman coded
            frame = place
        elif kind == 0xDA:
            ended = data[-_PADDING:].rstrip(b"\0").endswith(b"\xff\xd9")
            return frame if frame and ended and data[place + 4] == data[frame + 9] else 0
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0


def _orientation(data: bytes) -> Image.Transpose | None:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _turning(image)
    except Exception:  # what is wrong with the file, decoding says
        return None


def turn(method: Image.Transpose) -> tuple[bool, bool, bool]:
    """What Pillow's `transpose` does to rows and columns: are they swapped, then the rows reversed, the columns."""
    return method in _SIDEWAYS, method in _UPSIDE_DOWN, method in _MIRRORED


def _turned(pixels: np.ndarray, method: Image.Transpose) -> np.ndarray:
    """(H, W, C) as Pillow's `transpose` would have it, a view."""
    swapped, upside_down, mirrored = turn(method)
    if swapped:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


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
    method = _turning(image)
    return image if method is None else image.transpose(method)


def _turning(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright; None when nothing need be done."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF data says nothing about the pixels
        return None


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
