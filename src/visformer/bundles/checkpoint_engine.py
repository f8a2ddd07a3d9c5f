"""A checkpoint as an engine: computed by torch, fused for the device (`visformer.fuse`)."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from visformer.bundles.engines import to_picture
from visformer.bundles.pixels import ImagePreprocessing
from visformer.distributed import HALF, select_device
from visformer.fusion import fuse
from visformer.models import Visformer


class CheckpointEngine:
    """A model of ours. `device` and `precision` (fp32, bf16, fp16) are as `validate` has them.

    On CUDA every operation is computed in the way that was the fastest when a batch of its size was first seen (on this
    machine: that is remembered), and the network is one graph for each size: batches of up to `batch_size` images are
    filled up to one of few sizes, which `warm` prepares. Elsewhere a batch is computed as it is, in the library's ways.
    """

    def __init__(
        self,
        model: Visformer,
        *,
        device: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        batch_size: int = 16,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = select_device(device)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        recorded = self.device.type == "cuda"
        self._sizes = sizes(batch_size) if recorded else []
        self._one_at_a_time: AbstractContextManager = threading.Lock() if recorded else nullcontext()
        dtype = HALF.get(precision, torch.float32)
        self._fused = fuse(self.model, dtype=dtype, choose="fastest" if recorded else "library")

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """Of the model, without torch."""
        return ImagePreprocessing.from_dict(self.model.preprocessing.to_dict())  # type: ignore[union-attr]

    def run(self, batch: np.ndarray) -> np.ndarray:
        """float32 (B, C, H, W), preprocessed -> logits, float32 (B, classes)"""
        count = len(batch)
        filled = filled_up(torch.from_numpy(batch), self._sizes)
        with self._one_at_a_time:
            return self._fused(filled)[:count].cpu().numpy()

    def run_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, channels) of any size, RGB order -> logits, float32 (classes,)"""
        return self.run(self.preprocessing([to_picture(image)]))[0]

    def warm(self) -> None:
        """Choose and record for every size of batch, the smallest first; others may call `run` meanwhile."""
        preprocessing = self.preprocessing
        draw = np.random.default_rng(0)  # of zeros every place would be alike, and a wrong kernel right
        for size in self._sizes:
            shape = (size, preprocessing.in_channels, *preprocessing.image_size)
            self.run(draw.standard_normal(shape, dtype=np.float32))


def sizes(largest: int) -> list[int]:
    """Powers of two up to `largest`, and `largest` itself."""
    return [size for size in (2**n for n in range(largest.bit_length())) if size < largest] + [largest]


def filled_up(batch: torch.Tensor, to: list[int]) -> torch.Tensor:
    """`batch` (B, C, H, W) with zeros behind it, up to the first of the sizes `to` that is not smaller; a larger one
    stays as it is."""
    size = next((size for size in to if size >= len(batch)), len(batch))
    return batch if size == len(batch) else torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])
