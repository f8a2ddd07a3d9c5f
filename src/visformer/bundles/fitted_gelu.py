"""GELU by a hard swish that is fitted to each channel: what int8 can compute in little time.

The engines compute GELU in fp32 between two products in int8, where it takes a good part of the network's time. The
hard swish, hswish(y) = y * clip(y / 6 + 1/2, 0, 1), takes next to none. It is a parabola between two lines, as GELU
nearly is, and a channel needs the approximation only where its own values lie: for the values x that calibration images
bring, a * hswish(s * x + t) + b is made the nearest to gelu(x) in the least squares. s and t then go into the product
before, a and b into the product after it, so that the hard swish is all that is left to compute.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visformer.models.layers import Mlp, SpatialMlp

_VALUES = 1024  # of each channel that a fit is made on, at least as many as there are images
_SCALES = tuple(0.8 * 1.15**power for power in range(12))  # of s; beyond, int8 would see channels of unlike ranges
_SHIFTS = tuple(step / 4 for step in range(-6, 7))  # of t


@torch.no_grad()
def fit_gelu(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Replace every GELU in the MLPs of `model`, in the plain form, by hard swishes fitted on `images`, each
    (1, C, H, W), preprocessed. The model's weights change; what it computes changes by a few percent of each map."""
    mlps = [module for module in model.modules() if isinstance(module, Mlp | SpatialMlp)]
    values = _values_before([act for mlp in mlps for act in _gelus(mlp)], list(images), model)
    for mlp in mlps:
        convs = [mlp.conv1, mlp.conv2, mlp.conv3] if isinstance(mlp, SpatialMlp) else [mlp.conv1, mlp.conv3]
        for act, before, after in zip(_gelus(mlp), convs, convs[1:], strict=False):
            assert isinstance(before, nn.Conv2d) and isinstance(after, nn.Conv2d)
            # What a padded convolution sees beyond the border is 0, and b would not be there.
            fitted = fitted_hardswish(values[act], act.approximate, shifted=after.padding == (0, 0))
            _scale_results(before, *fitted[:2])
            _scale_inputs(after, *fitted[2:])
        for name in ("act1", "act2")[: len(convs) - 1]:
            setattr(mlp, name, nn.Hardswish())


def fitted_hardswish(x: Tensor, approximate: str, *, shifted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (C, N), values before GELU -> s, t, a and b, (C,) each; b is 0 unless `shifted`."""
    wanted = F.gelu(x, approximate=approximate)
    mean = wanted.mean(1, keepdim=True) if shifted else torch.zeros_like(wanted[:, :1])
    least = torch.full_like(wanted[:, 0], torch.inf)
    best = torch.zeros(4, len(x))
    for s in _SCALES:
        for t in _SHIFTS:
            y = F.hardswish(s * x + t)
            middle = y.mean(1, keepdim=True) if shifted else torch.zeros_like(mean)
            y, target = y - middle, wanted - mean
            a = (y * target).sum(1) / (y * y).sum(1).clamp(min=1e-12)
            error = (a[:, None] * y - target).square().mean(1)
            b = mean[:, 0] - a * middle[:, 0]
            found = torch.stack([torch.full_like(a, s), torch.full_like(a, t), a, b])
            best = torch.where(error < least, found, best)
            least = torch.minimum(error, least)
    s, t, a, b = best
    return s, t, a, b


def _gelus(mlp: Mlp | SpatialMlp) -> list[nn.GELU]:
    return [mlp.act1, mlp.act2] if isinstance(mlp, SpatialMlp) else [mlp.act1]


def _values_before(acts: list[nn.GELU], images: list[Tensor], model: nn.Module) -> dict[nn.Module, Tensor]:
    """For each activation what comes to it, (C, N): values at random places of each image."""
    draw = torch.Generator().manual_seed(0)
    each = -(-_VALUES // len(images))
    seen: dict[nn.Module, list[Tensor]] = {act: [] for act in acts}

    def note(act: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        places = inputs[0][0].flatten(1)  # (C, H * W)
        seen[act].append(places[:, torch.randint(places.shape[1], (each,), generator=draw)])

    hooks = [act.register_forward_pre_hook(note) for act in acts]
    for image in images:
        model(image)
    for hook in hooks:
        hook.remove()
    return {act: torch.cat(pieces, dim=1) for act, pieces in seen.items()}


def _scale_results(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Let the convolution give scale * its results + shift, by channel."""
    bias = torch.zeros_like(shift) if conv.bias is None else conv.bias
    conv.bias = nn.Parameter(bias * scale + shift, requires_grad=False)
    conv.weight.mul_(scale[:, None, None, None])


def _scale_inputs(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Let the convolution take x where it took scale * x + shift, by channel. A shift takes one that pads nothing, of
    one group."""
    if shift.any():
        more = conv.weight.sum((2, 3)) @ shift
        conv.bias = nn.Parameter(more if conv.bias is None else conv.bias + more, requires_grad=False)
    results, inputs = conv.weight.shape[:2]
    by_group = scale.view(conv.groups, 1, inputs).expand(-1, results // conv.groups, -1)
    conv.weight.mul_(by_group.reshape(results, inputs, 1, 1))
