"""GELU as a hard swish: near where the channel's values lie, and nothing else of the network changes."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.bundles.conftest import settle, small_model
from visformer.bundles.build import Request
from visformer.bundles.fitted_gelu import fit_gelu, fitted_hardswish
from visformer.bundles.graphs import batch_graph
from visformer.bundles.plain import Form, plain
from visformer.models import create_model


def approximated(x, s, t, a, b):
    s, t, a, b = (values[:, None] for values in (s, t, a, b))
    return a * F.hardswish(s * x + t) + b


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@given(middle=st.floats(-2, 2), spread=st.floats(0.1, 1.5))
def test_a_fit_is_nearer_than_the_plain_hard_swish(approximate, middle, spread):
    x = middle + spread * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    wanted = F.gelu(x, approximate=approximate)
    errors = []
    for shifted in (True, False):
        fit = fitted_hardswish(x, approximate, shifted=shifted)
        assert all(torch.isfinite(values).all() for values in fit) and (shifted or not fit[3].any())
        errors.append((approximated(x, *fit) - wanted).square().mean().sqrt().item())
    plainly = (F.hardswish(x) - wanted).square().mean().sqrt().item()
    assert errors[0] <= errors[1] + 1e-6 and errors[1] <= plainly + 1e-6
    assert errors[0] < 0.05


def test_channels_that_never_change_are_no_trouble():
    x = torch.tensor([[-8.0] * 100, [0.0] * 100, [3.0] * 100])
    fit = fitted_hardswish(x, "none", shifted=True)
    torch.testing.assert_close(approximated(x, *fit), F.gelu(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["visformer_tiny_v2", "visformer_small", "swin_visformer_tiny_v2", "net1", "net7"])
def test_factors_and_shifts_go_into_the_products_beside_it(name, monkeypatch):
    """With the exact activation in the hard swish's place the folded network is the network."""
    torch.manual_seed(0)
    model = plain(settle(create_model(name, num_classes=10, image_size=64), 64), Form(wide_groups=True)).double()
    images = torch.randn(3, 1, 3, 64, 64, dtype=torch.float64)
    wanted = model(images[:, 0])

    class Undone(nn.Module):
        def __init__(self, approximate, s, t, a, b):
            super().__init__()
            self.approximate = approximate
            self.s, self.t, self.a, self.b = (values.double().view(1, -1, 1, 1) for values in (s, t, a, b))

        def forward(self, x):
            x = F.gelu((x - self.t) / self.s, approximate=self.approximate)
            return (x - self.b) / self.a

    made = []

    def any_factors(x, approximate, *, shifted):
        draw = torch.Generator().manual_seed(len(made))
        s, t, a, b = (torch.rand(len(x), generator=draw, dtype=torch.float64) + 0.5 for _ in range(4))
        factors = s, t, a, b if shifted else torch.zeros_like(b)
        made.append(Undone(approximate, *factors))
        return factors

    swapped = iter(made)
    monkeypatch.setattr("visformer.bundles.fitted_gelu.fitted_hardswish", any_factors)
    monkeypatch.setattr(nn, "Hardswish", lambda: next(swapped))
    fit_gelu(model, images)
    assert len(made) > 5 and next(swapped, None) is None
    torch.testing.assert_close(model(images[:, 0]), wanted, atol=1e-9, rtol=1e-9)


def test_a_fitted_network_is_near_the_network():
    model = plain(settle(create_model("visformer_tiny_v2", num_classes=10, image_size=64), 64))
    images = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    wanted, fitted, unfitted = model(images), copy.deepcopy(model), copy.deepcopy(model)
    fit_gelu(fitted, images[:6, None])
    for module in unfitted.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.Hardswish())
    assert not [module for module in fitted.modules() if isinstance(module, nn.GELU)]
    off, plainly = ((other(images) - wanted).square().mean().sqrt() / wanted.std() for other in (fitted, unfitted))
    assert off < 0.1 and off < plainly / 3, (off, plainly)


def test_what_is_fitted_unless_something_else_is_asked_for():
    assert Request("openvino", "int8", "tensor").fit_gelu
    assert not Request("onnx", "int8", "tensor").fit_gelu and not Request("openvino", "bf16", "tensor").fit_gelu
    assert Request("onnx", "int8", "tensor", fit_gelu=True).fit_gelu
    assert not Request("openvino", "int8", "tensor", fit_gelu=False).fit_gelu


def test_the_graph_has_the_hard_swish_in_gelus_place():
    images = [np.random.default_rng(seed).normal(size=(1, 3, 64, 64)).astype(np.float32) for seed in range(2)]
    graph = batch_graph(small_model(), dynamic_size=False, gelu_images=images).graph
    operations = [node.op_type for node in graph.node]
    assert operations.count("HardSwish") == 2 * 2 + 2 and "Erf" not in operations and "Gelu" not in operations
