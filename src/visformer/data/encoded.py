"""A file of an image whose pixels are decoded once it is known which of them are wanted: the training loader's way."""

from __future__ import annotations

import io
import threading

import numpy as np
import simplejpeg
from PIL import Image

from visformer.data.decode import MAX_PIXELS, ImageError, open_image, too_large
from visformer.data.orientation import is_sideways, turn, turning

HEADROOM = 1.5  # pixels that a reduced decode leaves to the final resize, per pixel of its result and side
_PADDING = 1024  # bytes of zero that a whole JPEG may end with
_ROWS_BELOW = 2  # that libjpeg looks at to interpolate the colours of a row


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
            if is_sideways(self._upright):
                self.width, self.height = self.height, self.width

    def common(self) -> tuple[int, int, Image.Transpose | None] | None:
        """(width, height) as stored, and what brings the picture upright, of a JPEG that any decoder reads alike: 8
        bits, grey or YCbCr, Huffman coded in a single scan, not cut short. None for everything else."""
        if self._image is not None or self._space == "RGB":
            return None
        frame = _single_scan(self.data)
        if not frame or self.data[frame + 4] != 8:
            return None
        sides = (self.height, self.width) if is_sideways(self._upright) else (self.width, self.height)
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
                min_height=width if is_sideways(self._upright) else height,
                min_width=height if is_sideways(self._upright) else width,
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
        raise ImageError(too_large(width, height))
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
            return turning(image)
    except Exception:  # what is wrong with the file, decoding says
        return None


def _turned(pixels: np.ndarray, method: Image.Transpose) -> np.ndarray:
    """(H, W, C) as Pillow's `transpose` would have it, a view."""
    swapped, upside_down, mirrored = turn(method)
    if swapped:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
