"""What stands in for simplejpeg on a machine that lacks it: it refuses every image, so that Pillow decodes them all.

The folder of this file is last on the path of `gpu_suite.py`; where the package itself is there, that is taken. Loading
is slower with it, and nothing that is measured on a GPU depends on it.
"""

import io

import numpy as np
from PIL import Image


def decode_jpeg_header(*_args, **_options):
    """Refuse: the caller turns to Pillow."""
    raise ValueError("simplejpeg is not installed")


def decode_jpeg(*_args, **_options):
    """Refuse: the caller turns to Pillow."""
    raise ValueError("simplejpeg is not installed")


def encode_jpeg(pixels: np.ndarray, quality: int = 85, **_options) -> bytes:
    """uint8 (H, W, 3) as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()
