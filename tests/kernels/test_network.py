"""Whole networks of our kernels give the logits of the models they were made from."""

import pytest
import torch

import visformer
from tests.fusion.models import MINIATURES, build, images, off_by
from visformer.fusion.products import Linear, Mlp
from visformer.kernels import linear_fp8_triton


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


@pytest.mark.parametrize("name", MINIATURES)
def test_products_in_eight_bits(name, device, monkeypatch):
    """Every product of the blocks is; the logits are those that a CPU emulates, as far as Triton's interpreter goes,
    which loses a number that rounding takes to the next power of two."""
    model = build(name)
    x = images(model)
    launched, launch = [], linear_fp8_triton.launch_linear_fp8
    monkeypatch.setattr(linear_fp8_triton, "launch_linear_fp8", lambda *given: [launched.append(given), launch(*given)])
    kernels = visformer.fuse(model, device=device, choose="kernels", cuda_graphs=False, fp8=True)
    logits = kernels(x).cpu()
    products = [module for module in kernels.modules() if isinstance(module, Linear)]
    whole = [module for module in kernels.modules() if isinstance(module, Mlp) and module.first.bias is not None]
    assert len(launched) >= len(products) - 2 * len(whole) > 0
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    emulated = visformer.fuse(model, device="cpu", choose="library", fp8=True)(x)
    assert off_by(logits, emulated) < (0.1 if device == "cuda" else 0.4)
