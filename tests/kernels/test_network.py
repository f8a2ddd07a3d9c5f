"""Whole networks of our kernels give the logits of the models they were made from."""

import pytest
import torch

import visformer
from tests.fusion.models import MINIATURES, build, images, off_by


@pytest.mark.parametrize("name", MINIATURES)
def test_a_network_of_kernels(name, device):
    model = build(name)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    fused = visformer.fuse(model, device=device, choose="kernels", cuda_graphs=False)
    assert off_by(fused(x).cpu(), expected) < 1e-5


def test_from_bytes(device):
    model = build("spatial, then attention")
    pixels = torch.randint(0, 256, (2, *model.config.image_size, 3), dtype=torch.uint8)
    library, kernels = (
        visformer.fuse(model, device=device, choose=choose, cuda_graphs=False) for choose in ("library", "kernels")
    )
    expected = library(pixels.permute(0, 3, 1, 2).to(device))
    assert off_by(kernels(pixels.permute(0, 3, 1, 2).to(device)).cpu(), expected.cpu()) < 1e-5
