"""What stands in for simplejpeg on a machine that lacks it: it reads headers, and refuses to decode, so that Pillow
decodes every image.

The folder of this file is last on the path of `gpu_suite.py`; where the package itself is there, that is taken. Loading
is slower with it, and nothing that is measured on a GPU depends on it.
"""

import io

import numpy as np
from PIL import Image

__version__ = "none (Pillow)"
_SPACES = {"L": "Gray", "RGB": "YCbCr", "CMYK": "CMYK"}


def decode_jpeg_header(data: bytes, *_args, **_options):
    """(height, width, colour space, chroma subsampling) of a JPEG, the last of them not read; `ValueError` for another
    file."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.height, image.width, _SPACES[image.mode], ""
    except (OSError, KeyError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def decode_jpeg(*_args, **_options):
    """Refuse: the caller turns to Pillow."""
    raise ValueError("simplejpeg is not installed")


def encode_jpeg(pixels: np.ndarray, quality: int = 85, **_options) -> bytes:
    """uint8 (H, W, 3) as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()
