"""Looks on a batch: the steps that workers drew, done for all images together.

Images go through their steps in rounds: the first step of each image, then the second, and so on. In a round those with
the same operation are taken out, go through it in one piece, each with its own magnitude, and are put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visformer.data import device_ops
from visformer.data.device_policies import Look, Step, Steps


class Augmenter:
    """uint8 (N, C, H, W) and N looks -> uint8 (N, C, H, W). `fill` are the levels of what is moved into the picture.

    An alpha channel, the fourth, stays as it is.
    """

    def __init__(self, fill: Sequence[int], device: torch.device) -> None:
        self.fill = torch.tensor(fill[:3], dtype=torch.uint8).to(device)

    def __call__(self, images: Tensor, looks: Sequence[Look]) -> Tensor:
        colours = self._looking(images[:, :3], looks)
        return colours if images.shape[1] < 4 else torch.cat((colours, images[:, 3:]), 1)

    def _looking(self, images: Tensor, looks: Sequence[Look]) -> Tensor:
        branches = [
            self._stepped(images, [look.branches[branch] for look in looks]) for branch in range(len(looks[0].branches))
        ]
        first = looks[0]  # a policy gives all images the same number of branches
        if not first.weights:
            return branches[0]
        weights = _numbers([look.weights for look in looks], images)
        if first.blended:
            return device_ops.overlaid(images, branches, weights)
        return device_ops.mixed(images, branches, weights, _numbers([look.share for look in looks], images))

    def _stepped(self, images: Tensor, steps: Sequence[Steps]) -> Tensor:
        images = images.clone()
        for turn in range(max(map(len, steps))):
            groups: dict[tuple[str, str], list[int]] = {}
            for place, own in enumerate(steps):
                if turn < len(own):
                    groups.setdefault((own[turn].kind, own[turn].filter), []).append(place)
            for (kind, filter), places in groups.items():
                own = [steps[place][turn] for place in places]
                if len(places) == len(images):
                    images = self._done(kind, filter, images, own)
                else:
                    index = torch.tensor(places).to(images.device, non_blocking=True)
                    images[index] = self._done(kind, filter, images[index], own)
        return images

    def _done(self, kind: str, filter: str, images: Tensor, steps: Sequence[Step]) -> Tensor:
        values: list[Any] = [step.values for step in steps]
        if kind == "levels":
            tables = torch.from_numpy(np.frombuffer(bytearray().join(values), np.uint8).reshape(-1, 256))
            return device_ops.levels(images, tables.to(images.device, non_blocking=True))
        if kind == "affine":
            matrices = torch.tensor(values, dtype=torch.float64).to(images.device, non_blocking=True)
            return device_ops.affine(images, matrices, self.fill, filter)
        if kind == "blur":
            return device_ops.blur(images, [deviation for (deviation,) in values])
        operation = getattr(device_ops, kind)
        return operation(images, _numbers([factor for (factor,) in values], images)) if values[0] else operation(images)


def _numbers(values: list[Any], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to(images.device, non_blocking=True)
