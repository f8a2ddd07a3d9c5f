"""Random erasing in batched form against one image at a time."""

import pytest
import torch

from visformer.config import TrainConfig
from visformer.data.mixing import RandomErasing
from visformer.data.preprocessing import Preprocessing

BOXES = {0: (0, 5, 3, 9), 2: (7, 31, 0, 32), 5: (31, 32, 31, 32)}


def erasing(value) -> RandomErasing:
    config = TrainConfig(image_resize=32, re_prob=0.5, re_value=value)
    return RandomErasing(config, Preprocessing.from_config(config))


def images() -> torch.Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("value", [0, 200])
def test_levels_are_the_same(value):
    one, together = images(), images()
    erasing(value).fill_boxes(one, BOXES, torch.Generator())
    erasing(value).fill_together(together, BOXES, torch.Generator())
    assert torch.equal(one, together) and not torch.equal(one, images())


@pytest.mark.parametrize("value", ["random", "channel"])
def test_noise_fills_the_boxes_and_nothing_else(value):
    together, again = images(), images()
    for target in (together, again):
        erasing(value).fill_together(target, BOXES, torch.Generator().manual_seed(4))
    assert torch.equal(together, again)
    changed = (together != images()).all(1)
    expected = torch.zeros_like(changed)
    for index, (top, bottom, left, right) in BOXES.items():
        expected[index, top:bottom, left:right] = True
    assert torch.equal(changed, expected)
    box = together[2, :, 7:31]
    if value == "channel":
        assert box.flatten(1).std(1).max() == 0 and box[:, 0, 0].unique().numel() == 3
    else:
        assert abs(box.mean()) < 0.1 and box.std() == pytest.approx(1, abs=0.1)
