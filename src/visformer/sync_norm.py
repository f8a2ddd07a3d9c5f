"""Batch norm over the batches of all processes, so that a small batch on each gives the statistics of the whole.

On CUDA and other accelerators torch's own module does it; it does not run on the CPU, where ours does. Ours takes mean
and variance in two passes, as torch's plain batch norm does, so that one process and several give equal numbers up to
rounding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visformer.processes import several


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of all processes' maps together.

    Every process must bring maps of the same shape. In evaluation it is `nn.BatchNorm2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        if not (self.training and several()):
            return super().forward(input)
        x = input.float()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _Total.apply(x.sum((0, 2, 3))) / count
        centered = x - mean[:, None, None]
        variance = _Total.apply(centered.square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = (self.weight * torch.rsqrt(variance + self.eps))[:, None, None]
        return (centered * scale + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics; `variance` is the unbiased one."""
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)  # pyright: ignore[reportOptionalMemberAccess]
        self.running_var.lerp_(variance, self.momentum)  # pyright: ignore[reportOptionalMemberAccess]


class _Total(torch.autograd.Function):
    """The sum over the processes; the gradient of each share is the sum of what all think of the total."""

    @staticmethod
    def forward(ctx, share: Tensor) -> Tensor:
        total = share.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def synchronize(model: nn.Module, device: torch.device) -> None:
    """Put synchronised batch norms in the place of `model`'s; names and weights stay."""
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # the model itself is none, so it is changed in place
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                own = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
                own.load_state_dict(child.state_dict())
                setattr(module, name, own.train(child.training))
