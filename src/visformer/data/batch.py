"""What a loader gives: the images of one step, what they show, and which could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Batch:
    """`images` uint8 (B, C, H, W), in channels_last memory unless the device decoded them, in which case they are
    there; `targets` int64 (B,) on the CPU; `indices` of the samples in their source.

    `failures` are the (name, reason) of those that could not be read. With aug_splits, images are (3B, C, H, W), the B
    clean ones first.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: list[int]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which copies to the device run beside the computation."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())
