"""Candidates through torch.compile: one compilation for each signature, whatever the number of layers."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from visformer import fuse
from visformer.fusion import operation
from visformer.models import create_model


def test_more_layers_of_a_kind_than_torch_compiles_of_one_function(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def layer(weight: Tensor):
        def library(x: Tensor) -> Tensor:
            return F.relu(F.linear(x, weight))

        return library

    x = torch.randn(3, 4)
    with torch.inference_mode():
        for width in range(1, 13):  # torch refuses the ninth of one function
            plain = layer(torch.randn(width, 4))
            assert torch.equal(operation.compiled(plain, f"linear to {width}")()(x), plain(x))


@pytest.mark.parametrize("name", ["visformer_tiny", "swin_visformer_tiny_v2"])
def test_layers_of_one_signature_are_compiled_once(name, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    plain = operation.Operation.forward
    layers = []

    def beside_compiled(self, *inputs):
        expected = plain(self, *inputs)
        if type(self).__name__ != "Mlp":  # which is made of other operations
            layers.append(self.signature(*inputs))
            library = next(iter(self.candidates(*inputs).values()))()
            assert torch.equal(operation.compiled(library, layers[-1])()(*inputs), expected)
        return expected

    monkeypatch.setattr(operation.Operation, "forward", beside_compiled)
    fuse(create_model(name, image_size=64).eval(), choose="library")(torch.randn(2, 3, 64, 64))
    assert len(layers) > 2 * len(set(layers)) and counter.frame_count == len(set(layers))
