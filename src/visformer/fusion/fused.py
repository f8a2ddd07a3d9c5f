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
from visformer.distributed import HALF, autocast
from visformer.errors import UsageError
from visformer.fusion.network import Builder
from visformer.fusion.tuner import CAPTURING, CHOICES, Tuner
from visformer.models import Visformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARM_SHAPES = 8  # shapes of input that keep a CUDA graph
_FP8_CAPABILITY = (8, 9)
_PASSES_BEFORE = 3  # a graph is recorded


def fuse(
    model: Visformer,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    choose: str = "fastest",
    cuda_graphs: bool = True,
    fp8: bool = False,
) -> Fused:
    """An inference module with the logits of `model` in evaluation mode, which stays as it is.

    Args:
        model: a Visformer; of one from `visformer.load` the preprocessing's mean and std are used for bytes.
        dtype: float32, bfloat16 or float16, of the computation; None: the model's.
        device: None: the model's.
        choose: `fastest` measures the ways to compute each operation when a shape is first seen, and remembers on disk;
            `remembered` takes what was measured before, by any process on this machine, and PyTorch's for the rest;
            `library` takes PyTorch's, `kernels` ours wherever there is one, all three without measuring.
        cuda_graphs: on CUDA, record the network for each shape of input and replay it.
        fp8: also try the blocks' products with their factors rounded to eight bits (e4m3), where the GPU multiplies
            such (compute capability 8.9); `kernels` takes that for all that stand alone. It is less exact:
            docs/kernels.md has what it costs. On a CPU it is emulated, slowly, to show what it costs a model of yours.

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
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise UsageError(
            f"fp8: {torch.cuda.get_device_name(device)} does not multiply eight-bit floating-point numbers"
        )
    return Fused(model, torch.empty(0, dtype=dtype, device=device), choose, cuda_graphs, fp8)


def for_inference(
    model: nn.Module, device: torch.device, amp_level: str = "O0", amp_dtype: str = "bf16"
) -> Callable[[Tensor], Tensor]:
    """What computes the logits of `model` on `device` for verbs that only infer: on a CPU and on CUDA a Visformer is
    fused, in the ways that are remembered or else PyTorch's; any other is moved there and runs under autocast.

    `amp_level` O0 computes in fp32, O1 to O3 in `amp_dtype` (bf16 or fp16).
    """
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if isinstance(model, Visformer) and device.type in ("cpu", "cuda"):
        return fuse(model, dtype=torch.float32 if amp_level == "O0" else HALF[amp_dtype], choose="remembered")

    def under_autocast(images: Tensor) -> Tensor:
        with autocast(device, amp_level, amp_dtype):
            return model(images)

    return under_autocast


class Fused(nn.Module):
    """What `fuse` returns. Bound to its dtype and device: to change them, fuse again."""

    def __init__(self, model: Visformer, like: Tensor, choose: str, cuda_graphs: bool, fp8: bool):
        super().__init__()
        self.dtype, self.device = like.dtype, like.device
        self.in_channels, self.num_classes = model.config.in_channels, model.config.num_classes
        mean, std = _normalisation(model)
        self._tuner = Tuner(choose, like.device, like.dtype)
        with torch.no_grad():
            self.steps = nn.Sequential(*Builder(model, self._tuner, like, mean, std, fp8).steps())
        self.requires_grad_(False).eval()
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

    @property
    def is_measured(self) -> bool:
        """False when `choose` is `remembered` and something was not, so that PyTorch's way was taken for it."""
        return self._tuner.is_measured

    @torch.inference_mode()
    def prepare(self, images: Tensor) -> None:
        """Choose, build and record for images of this shape, so that their first pass takes no longer than another.

        Other threads may compute other shapes meanwhile.
        """
        images = self._checked(images)
        if self._graphs is None:
            self.steps(images)
        else:
            self._graphs.prepare(images)

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
        key = self.prepare(images)
        self.recorded.move_to_end(key)
        graph, inputs, logits = self.recorded[key]
        inputs.copy_(images)
        graph.replay()
        return logits.clone()

    def prepare(self, images: Tensor) -> tuple:
        """Record the network for such images, unless it is; returns what it is kept by."""
        key = (images.shape, images.dtype)
        if key in self.recorded:
            return key
        channels_last = images.contiguous(memory_format=torch.channels_last)
        self.steps(channels_last)  # what is measured for the first time takes long, and must not hold up other graphs
        # Other threads may use the device meanwhile: only what this one does must be recordable.
        made = record_graph(self.steps, channels_last, pool=self.pool, capture_error_mode="thread_local")
        self.recorded[key] = made
        if len(self.recorded) > WARM_SHAPES:
            self.recorded.popitem(last=False)
        return key


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
