"""A checkpoint as an engine: computed by torch, fused for the device (`visformer.fuse`)."""

from __future__ import annotations

import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from visformer import console
from visformer.bundles import tuning
from visformer.bundles.engines import to_picture
from visformer.bundles.pixels import ImagePreprocessing
from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.distributed import HALF, select_device
from visformer.errors import RunError
from visformer.fusion import fuse
from visformer.fusion.fused import WARM_SHAPES, Fused
from visformer.models import Visformer


class CheckpointEngine:
    """A model of ours. `device` and `precision` (fp32, bf16, fp16) are as `validate` has them.

    Every operation is computed in the way that was measured to be the fastest on this machine, PyTorch's where nothing
    was measured yet. On CUDA the network is one graph for each size of batch: batches of up to `batch_size` images are
    filled up to one of few sizes, which `warm` prepares, and for which it has measured what is not known. Elsewhere a
    batch is computed as it is.
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
        self.precision = precision
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        recorded = self.device.type == "cuda"
        self._sizes = sizes(batch_size) if recorded else []
        self._one_at_a_time: AbstractContextManager = threading.Lock() if recorded else nullcontext()
        self._closed = threading.Event()
        self._fused = self._fuse()
        self._tuned: dict[int, Fused] = {}  # by size of batch, while others are still measured

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """Of the model, without torch."""
        return ImagePreprocessing.from_dict(self.model.preprocessing.to_dict())  # type: ignore[union-attr]

    def run(self, batch: np.ndarray) -> np.ndarray:
        """float32 (B, C, H, W), preprocessed -> logits, float32 (B, classes)"""
        count = len(batch)
        filled = filled_up(torch.from_numpy(batch), self._sizes)
        with self._one_at_a_time:
            fused = self._tuned.get(len(filled), self._fused)
            return fused(filled)[:count].cpu().numpy()

    def run_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, channels) of any size, RGB order -> logits, float32 (classes,)"""
        return self.run(self.preprocessing([to_picture(image)]))[0]

    def warm(self) -> None:
        """Prepare for every size of batch, then have measured what is not known yet, which takes minutes, in another
        process; others may call `run` meanwhile."""
        for size in self._sizes:
            self._fused.prepare(self._noise(size))
        if not self._sizes or self._fused.is_measured:
            return
        console.note("measuring the fastest ways to compute on this GPU, once; PyTorch's serve until then")
        try:
            self._tune()
        except RunError as error:
            console.warn(f"the fastest ways to compute were not found ({error}); PyTorch's serve for the rest")

    def close(self) -> None:
        """End what `warm` has begun."""
        self._closed.set()

    def _tune(self) -> None:
        tuned: Fused | None = None
        with tempfile.TemporaryDirectory(prefix="visformer-tuning-") as folder:
            path = Path(folder) / "model.safetensors"
            write_checkpoint(path, _checkpoint(self.model))
            device, goes_on = str(self.device), self._goes_on
            for size in tuning.tune(path, device, self.precision, self._sizes, goes_on=goes_on):
                tuned = tuned or self._fuse()
                tuned.prepare(self._noise(size))
                self._tuned[size] = tuned
        if tuned is not None and len(self._tuned) == len(self._sizes):
            self._fused, self._tuned = tuned, {}

    def _goes_on(self) -> bool:
        """Whether this engine is still used; the thread of `warm` is not to keep a process alive."""
        return threading.main_thread().is_alive() and not self._closed.is_set()

    def _fuse(self) -> Fused:
        return fuse(self.model, dtype=HALF.get(self.precision, torch.float32), choose="remembered")

    def _noise(self, size: int) -> torch.Tensor:
        """A batch; of zeros every place would be alike."""
        preprocessing = self.preprocessing
        shape = (size, preprocessing.in_channels, *preprocessing.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sizes(largest: int) -> list[int]:
    """1, powers of two up to `largest`, and `largest` itself: no more than keep a graph, the least ones left out."""
    powers = [size for size in (2**n for n in range(largest.bit_length())) if 1 < size < largest]
    return sorted({1, *powers[-(WARM_SHAPES - 2) :], largest})


def filled_up(batch: torch.Tensor, to: list[int]) -> torch.Tensor:
    """`batch` (B, C, H, W) with zeros behind it, up to the first of the sizes `to` that is not smaller; a larger one
    stays as it is."""
    size = next((size for size in to if size >= len(batch)), len(batch))
    return batch if size == len(batch) else torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])


def _checkpoint(model: Visformer) -> Checkpoint:
    """`model` for a process that measures with it."""
    known = cast(Any, model)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return Checkpoint(known.model_name, model.config, known.class_names, known.preprocessing, state)
