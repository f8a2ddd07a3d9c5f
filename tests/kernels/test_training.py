"""A model whose grouped convolutions are our kernels trains as the model of PyTorch's operators does."""

import copy

import pytest
import torch

from tests.fusion.models import build, images, off_by
from visformer.fusion.training import GroupedConvolution, accelerate, spatial_mlps, ways_to_train


@pytest.mark.parametrize("name", ["spatial, then attention", "no positions, norm after embedding, dense"])
def test_gradients_and_a_step(name, device, tmp_path, monkeypatch):
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path))
    model = build(name).to(device, memory_format=torch.channels_last).train()
    reference, x = copy.deepcopy(model), images(model).to(device)
    ways = ways_to_train(model, len(x), choose="kernels")
    assert ways and all(way.startswith("kernel ") for way in ways.values())
    accelerate(model, ways)
    assert all(isinstance(mlp.conv2, GroupedConvolution) for mlp in spatial_mlps(model).values())
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, reference)]
    outputs = []
    for m, optimizer in zip((model, reference), optimizers, strict=True):
        y = m(x)
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    assert off_by(*outputs) < 1e-5
    largest = max(p.grad.abs().max() for p in reference.parameters())
    for (key, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-4 * largest, key
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-3 * 1e-4 * float(largest) + 1e-6), key
    state = reference.state_dict()
    assert all(torch.allclose(value, state[key], atol=1e-5) for key, value in model.state_dict().items())


def test_its_own_tile_is_taken_for_another_batch(device, tmp_path, monkeypatch):
    """The last batch of an epoch is smaller, and validation has its own size."""
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path))
    model = build("spatial, then attention").to(device, memory_format=torch.channels_last)
    reference, x = copy.deepcopy(model), images(model, count=3).to(device)
    accelerate(model, ways_to_train(model, 2, choose="kernels"))
    with torch.no_grad():
        assert off_by(model(x), reference(x)) < 1e-5
