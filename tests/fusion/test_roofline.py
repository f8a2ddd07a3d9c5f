"""The roofline: what is counted is what torch counts, and what is measured is a rate."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.fusion.models import MINIATURES, build
from visformer.fusion import roofline
from visformer.fusion.fused import fuse
from visformer.fusion.operation import Cost, Operation
from visformer.fusion.roofline import Layer, Peak
from visformer.models import VARIANTS, Visformer, create_model

BF16 = torch.bfloat16
SIZES = ({"image_size": (96, 64)}, {"dynamic_image_size": True})


def counted_by_torch(model: Visformer, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        model(torch.empty(shape))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", VARIANTS)
def test_operations_are_those_that_torch_counts(name):
    with torch.device("meta"):
        model = create_model(name).eval()
    counted = sum(layer.cost.flops for layer in roofline.costs(model, 2, BF16))
    assert counted == pytest.approx(counted_by_torch(model, (2, 3, 224, 224)), rel=0.01)


def test_a_size_that_windows_and_patches_overhang():
    with torch.device("meta"):
        model = create_model("swin_visformer_tiny_v2", image_size=(240, 264)).eval()
    counted = sum(layer.cost.flops for layer in roofline.costs(model, 1, BF16))
    assert counted == pytest.approx(counted_by_torch(model, (1, 3, 240, 264)), rel=0.01)


def test_another_size_than_the_models():
    with torch.device("meta"):
        set_to, free = (create_model("visformer_tiny", **options).eval() for options in SIZES)
    expected = roofline.costs(set_to, 1, BF16)
    assert roofline.costs(free, 1, BF16, (96, 64)) == expected != roofline.costs(free, 1, BF16)


def test_the_bytes_of_a_network_by_hand():
    """A stem of 16, a spatial block of 32 channels on 4x6, an attention block of 48 on 2x3, a head of 7; bf16."""
    model = build("spatial, then attention")
    layers = {layer.name.split()[0]: layer for layer in roofline.costs(model, 3, BF16)}
    stem, embed = 3 * 3 * 32 * 48, 3 * 16 * 16 * 24
    assert layers["stem"].cost == Cost(2 * embed * 3 * 49, 2 * (stem + embed + 16 * 3 * 49 + 16))
    assert layers["attention"].cost.flops == 4 * 3 * 3 * (2 * 3) ** 2 * (48 // 3)
    assert layers["attention"].cost.bytes == 2 * 3 * (144 + 48) * 6
    assert layers["pool_head"].cost == Cost(2 * 3 * 48 * 7, 2 * (3 * 48 * 6 + 48 * 7 + 7 + 3 * 7))
    hidden = model.stages[0].blocks[0].mlp.branch.conv2.weight.shape[0]
    weight = hidden * hidden // 4 * 9
    assert layers["convolution"].cost == Cost(2 * 3 * 24 * weight, 2 * (2 * 3 * hidden * 24 + weight))
    single = {layer.name.split()[0]: layer for layer in roofline.costs(model, 3, torch.float32)}
    assert single["attention"].cost.bytes == 2 * layers["attention"].cost.bytes


@pytest.mark.parametrize("name", MINIATURES)
def test_every_operation_of_a_network_is_counted_once(name, monkeypatch):
    """On the CPU the network calls the operations that are listed, in that order."""
    model, called = build(name), []
    run = Operation.forward

    def remembering(self, *inputs):
        result = run(self, *inputs)  # an MLP's products end before it does
        called.append(self.signature(*inputs))
        return result

    monkeypatch.setattr(Operation, "forward", remembering)
    fuse(model, choose="library")(torch.zeros(2, model.config.in_channels, *model.config.image_size))
    called, listed = [c for c in called if not c.startswith("mlp")], roofline.costs(model, 2, torch.float32)
    others = [layer for layer in listed if layer.cost.flops == 0]
    assert [layer.name for layer in listed if layer.cost.flops] == called
    assert all(layer.cost.bytes > 0 for layer in others)
    assert bool(others) == (name == "layer norm, no stem")  # what is left of its norms


def test_an_mlp_in_one_goes_without_the_hidden_map():
    model = build("spatial, then attention")
    fused = fuse(model, choose="library")
    [whole] = [module for module in fused.steps.modules() if type(module).__name__ == "Mlp"]
    x = torch.zeros(2, 48, 4, 6)
    first, second = whole.first.cost(x), whole.second.cost(torch.zeros(2, 192, 4, 6), x)
    assert whole.cost(x).flops == first.flops + second.flops
    hidden, again = 2 * 192 * 24, 2 * 48 * 24  # written and read; x as the residual
    assert whole.cost(x).bytes == first.bytes + second.bytes - 4 * (2 * hidden + again)


def test_a_bound_is_the_longer_of_both_times_for_each_layer():
    layers = [Layer("products", Cost(1000, 10)), Layer("a copy", Cost(0, 500))]
    assert roofline.bound(layers, Peak(100.0, 50.0)) == 10.0 + 10.0
    assert roofline.bound(layers, Peak(100.0, 500.0)) == 10.0 + 1.0


def test_the_peak_is_a_rate_of_the_machine(monkeypatch):
    monkeypatch.setitem(roofline._SIDES, "cpu", 128)
    monkeypatch.setitem(roofline._COPIED_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(roofline, "_SECONDS", 0.01)
    peak = roofline.measure(torch.device("cpu"), torch.float32)
    assert math.isfinite(peak.flops_per_s) and 1e8 < peak.flops_per_s < 1e14
    assert 1e8 < peak.bytes_per_s < 1e13


def test_the_fastest_of_several_calls_counts(monkeypatch):
    taken = iter([3.0, 1.0, 2.0, 5.0, 4.0])
    calls = []
    monkeypatch.setattr(roofline, "_seconds", lambda work, device: next(taken))
    assert roofline._best(lambda: calls.append(1), torch.device("cpu")) == 1.0
    assert len(calls) == 2  # those that don't count


def test_the_clocks_of_a_gpu_are_what_its_tool_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 41, 120.5 W'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    clocks = roofline.clocks(torch.device("cuda", 0))
    assert clocks["clocks.sm"] == "1980 MHz" and clocks["power.draw"] == "120.5 W"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert roofline.clocks(torch.device("cuda", 0)) == {}
    assert set(roofline.clocks(torch.device("cpu"))) <= {"cpu"}
