"""Candidates through torch.compile: each layer's is compiled by itself."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer.fusion import operation


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
            assert torch.equal(operation.compiled(plain)()(x), plain(x))
