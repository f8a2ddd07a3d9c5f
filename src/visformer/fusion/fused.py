"""`fuse`: a model as an inference module that is as fast as the device allows.

    fused = visformer.fuse(visformer.load("best.safetensors"), dtype=torch.bfloat16, device="cuda")
    logits = fused(images)                                  # what the model gives, to within rounding
    probabilities, labels = fused.classify(pixels, top_k=5)  # from bytes

Every operation is computed in the way that measured fastest on this device for the shape at hand (`tuner.py`); on CUDA
the whole network is then one graph for each shape of input. Source of the folding: the algebra in `folding.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visformer.config import IMAGENET_MEAN, IMAGENET_STD
from visformer.data.preprocessing import for_channels
from visformer.errors import UsageError
from visformer.fusion.network import Builder
from visformer.fusion.tuner import CAPTURING, CHOICES, Tuner
from visformer.models import Visformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARM_SHAPES = 8  # shapes of input that keep a CUDA graph
_PASSES_BEFORE = 3  # a graph is recorded


def fuse(
    model: Visformer,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    choose: str = "fastest",
    cuda_graphs: bool = True,
) -> Fused:
    """An inference module with the logits of `model` in evaluation mode, which stays as it is.

    Args:
        model: a Visformer; of one from `visformer.load` the preprocessing's mean and std are used for bytes.
        dtype: float32, bfloat16 or float16, of the computation; None: the model's.
        device: None: the model's.
        choose: `fastest` measures the ways to compute each operation when a shape is first seen, and remembers on disk;
            `library` takes PyTorch's, `kernels` ours wherever there is one, both without measuring.
        cuda_graphs: on CUDA, record the network for each shape of input and replay it.

    Logits are within 1e-5 (float32) and about 3e-2 (bfloat16, as the model's own) of float64's, in units of the
    largest. Raises `UsageError`.
    """
    weight = next(model.parameters())
    dtype, device = dtype or weight.dtype, torch.device(device or weight.device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype: {dtype} is not possible; take torch.float32, torch.bfloat16 or torch.float16")
    if choose not in CHOICES:
        raise UsageError(f"choose: {choose!r} is not one of {', '.join(CHOICES)}")
    if not isinstance(model, Visformer):
        raise UsageError(f"model: a Visformer can be fused, not a {type(model).__name__}")
    return Fused(model, torch.empty(0, dtype=dtype, device=device), choose, cuda_graphs)


class Fused(nn.Module):
    """What `fuse` returns. Bound to its dtype and device: to change them, fuse again."""

    def __init__(self, model: Visformer, like: Tensor, choose: str, cuda_graphs: bool):
        super().__init__()
        self.dtype, self.device = like.dtype, like.device
        self.in_channels, self.num_classes = model.config.in_channels, model.config.num_classes
        mean, std = _normalisation(model)
        tuner = Tuner(choose, like.device, like.dtype)
        with torch.no_grad():
            self.steps = nn.Sequential(*Builder(model, tuner, like, mean, std).steps())
        self.requires_grad_(False)
        self._graphs = CudaGraphs(self.steps) if cuda_graphs and like.device.type == "cuda" else None

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W), normalised floats or bytes that are normalised here -> float32 logits
        (B, num_classes).

        Each new shape takes a while the first time. Raises `UsageError` for a wrong number of channels.
        """
        images = self._checked(images)
        logits = self.steps(images) if self._graphs is None else self._graphs(images)
        return logits.float()

    @torch.inference_mode()
    def classify(self, pixels: Tensor, top_k: int = 5) -> tuple[Tensor, Tensor]:
        """Bytes (B, H, W, in_channels), RGB, of the model's size -> probabilities and class numbers, (B, top_k) each,
        the likeliest first."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != self.in_channels:
            raise UsageError(
                f"pixels: {str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)} is not uint8 (B, H, W, "
                f"{self.in_channels})"
            )
        if not 1 <= top_k <= self.num_classes:
            raise UsageError(f"top_k: {top_k} is out of range; the model has {self.num_classes} classes")
        probabilities, labels = self(pixels.permute(0, 3, 1, 2)).softmax(1).topk(top_k)
        return probabilities, labels

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise UsageError(f"images: {tuple(images.shape)} is not (B, {self.in_channels}, H, W)")
        dtype = torch.uint8 if images.dtype == torch.uint8 else self.dtype
        return images.to(self.device, dtype, non_blocking=True, memory_format=torch.channels_last)


class CudaGraphs:
    """The network recorded for each shape of input, the `WARM_SHAPES` used last; they share memory."""

    def __init__(self, steps: nn.Module):
        self.steps = steps
        self.recorded: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor) -> Tensor:
        """As the network itself; the logits are a copy."""
        key = (images.shape, images.dtype)
        if key not in self.recorded:
            self._record(key, images)
        self.recorded.move_to_end(key)
        graph, inputs, logits = self.recorded[key]
        inputs.copy_(images)
        graph.replay()
        return logits.clone()

    def _record(self, key: tuple, images: Tensor) -> None:
        channels_last = images.contiguous(memory_format=torch.channels_last)
        # Other threads may use the device meanwhile: only what this one does must be recordable.
        made = record_graph(self.steps, channels_last, pool=self.pool, capture_error_mode="thread_local")
        self.recorded[key] = made
        if len(self.recorded) > WARM_SHAPES:
            self.recorded.popitem(last=False)


def record_graph(
    network: Callable[[Tensor], Tensor], images: Tensor, **capture: Any
) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """A CUDA graph of the network for such images; the tensor that it reads them from, and the one it writes the logits
    to. `capture` is for `torch.cuda.graph`. The passes before it choose and build what has not been yet."""
    inputs = images.clone(memory_format=torch.preserve_format)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with CAPTURING:
        with torch.cuda.stream(aside):
            for _ in range(_PASSES_BEFORE):
                network(inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, **capture):
            logits = network(inputs)
    return graph, inputs, logits


def _normalisation(model: Visformer) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of bytes for each channel, on the scale 0 to 255."""
    preprocessing = getattr(model, "preprocessing", None)
    if preprocessing is not None:
        return tuple(preprocessing.mean), tuple(preprocessing.std)
    channels = model.config.in_channels
    if channels in (1, 3, 4):
        return for_channels(IMAGENET_MEAN, channels, "mean"), for_channels(IMAGENET_STD, channels, "std")
    return (127.5,) * channels, (127.5,) * channels  # of which nothing is known
