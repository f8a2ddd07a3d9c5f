"""JPEGs decoded where they are used: by nvJPEG on CUDA, many at once; by libjpeg-turbo on a CPU.

This is the one place where the device makes a difference. nvJPEG comes with torchvision; on data centre GPUs (A100,
H100 and later) it has units of its own for this, so that decoding takes nothing from training.

nvJPEG writes an image as soon as it is asked to, whatever still waits on the stream: it may be given memory that
kernels in the queue have yet to read (pytorch/vision#9606). So images are decoded under a stream that never has
anything in its queue, and `record_stream` keeps their memory from being given out again before it is read.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from visformer import console
from visformer.data.orientation import turn
from visformer.errors import UsageError

DECODED_AT_ONCE = 64_000_000  # pixels of whole images that a device holds together; 192 MB


class Lane:
    """Where a batch is made ready: a CUDA stream beside the one that trains, and one to decode under.

    On a CPU, where everything is done when it is asked for, it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.decoding = torch.cuda.Stream(device) if device.type == "cuda" else None

    def aside(self) -> AbstractContextManager:
        """In it, work goes to this lane."""
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()

    def mark(self) -> Any:
        """A CUDA event after all that was given to the lane so far; None on a CPU."""
        return self.stream.record_event() if self.stream is not None else None

    def hand_over(self, images: Tensor, ready: Any) -> None:
        """Let the current stream wait for `ready` and use `images`."""
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            images.record_stream(current)

    def decode(self, encoded: Sequence[Tensor], channels: int) -> list[Tensor] | None:
        """JPEGs, uint8 (bytes,) on the CPU -> uint8 (`channels`, height, width) as stored, on the device; None when
        one of them can't be decoded."""
        if self.decoding is None:
            return _by_libjpeg(encoded, channels)
        with torch.cuda.stream(self.decoding):
            self.decoding.synchronize()
            images = _by_nvjpeg(encoded, channels, self.device)
            self.decoding.synchronize()  # the bytes are in memory that is used again
        for image in images or ():
            image.record_stream(self.stream)  # type: ignore[arg-type]
        return images


def check_device(device: torch.device) -> None:
    """Raise `UsageError` for a device that can't decode; warn where it brings nothing."""
    if device.type == "cpu":
        console.warn(
            "decode: device brings nothing on a CPU, where the workers decode as fast or faster; leave it at workers",
            once=True,
        )
        return
    if device.type != "cuda":
        raise UsageError(f"decode: device is for CUDA (nvJPEG), and this is {device.type}; use workers")
    sample = torch.from_numpy(np.frombuffer(bytearray(_sample()), np.uint8))
    try:
        decoded = _nvjpeg([sample], 3, device)
    except (RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"decode: torchvision can't decode on {device} ({reason}); use workers") from error
    assert decoded[0].shape == (3, 16, 16)


def upright(image: Tensor, method: Image.Transpose | None) -> Tensor:
    """(C, H, W) as Pillow's `transpose` would have it."""
    if method is None:
        return image
    swapped, upside_down, mirrored = turn(method)
    if swapped:
        image = image.transpose(1, 2)
    axes = [axis for axis, reversed_ in ((1, upside_down), (2, mirrored)) if reversed_]
    return image.flip(axes) if axes else image


def _sample() -> bytes:
    return simplejpeg.encode_jpeg(np.full((16, 16, 3), 128, np.uint8), quality=90)


def _by_libjpeg(encoded: Sequence[Tensor], channels: int) -> list[Tensor] | None:
    space = "GRAY" if channels == 1 else "RGB"
    try:
        decoded = [simplejpeg.decode_jpeg(data.numpy(), space, strict=True) for data in encoded]
    except ValueError:
        return None
    return [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in decoded]


def _by_nvjpeg(encoded: Sequence[Tensor], channels: int, device: torch.device) -> list[Tensor] | None:
    try:
        return _nvjpeg(encoded, channels, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def _nvjpeg(encoded: Sequence[Tensor], channels: int, device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    _quiet()
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    return decode_jpeg(list(encoded), mode=mode, device=device)  # type: ignore[return-value]


@functools.cache
def _quiet() -> None:
    """torchvision advises its users to move to another package, which is nothing that ours could act on."""
    warnings.filterwarnings("ignore", message=r".*TorchCodec", category=DeprecationWarning)
