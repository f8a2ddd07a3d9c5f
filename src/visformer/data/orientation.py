"""How a picture lies in its file: EXIF's orientation, and what brings it upright."""

from __future__ import annotations

from PIL import Image

_TAG = 0x0112
# Its values -> what brings the picture upright; 1 is upright already.
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
_MIRRORED = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
)


def upright(image: Image.Image) -> Image.Image:
    """The picture as its camera saw it."""
    method = turning(image)
    return image if method is None else image.transpose(method)


def turning(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright; None when nothing need be done."""
    try:
        return _UPRIGHT.get(image.getexif().get(_TAG, 1))
    except Exception:  # broken EXIF data says nothing about the pixels
        return None


def is_sideways(method: Image.Transpose | None) -> bool:
    """Whether rows and columns are swapped by it."""
    return method in _SIDEWAYS


def turn(method: Image.Transpose | None) -> tuple[bool, bool, bool]:
    """What Pillow's `transpose` does to rows and columns: are they swapped, then the rows reversed, the columns."""
    return method in _SIDEWAYS, method in _UPSIDE_DOWN, method in _MIRRORED
