"""The models against the three upstream implementations: tensors, counts, numbers."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests import upstream
from visformer.conversion.layouts import TIMM
from visformer.models import Visformer, create_model, list_models

COUNTS = {  # trainable parameters; with BatchNorm's running statistics, where upstream gives it; GMACs at 224x224
    "visformer_tiny": (10_321_368, 10_334_072, 1.268),
    "visformer_tiny_v2": (9_371_056, 9_383_392, 1.28),
    "visformer_small": (40_219_592, 40_245_000, 4.879),
    "visformer_small_v2": (23_492_168, 23_518_344, 4.27),
    "swin_visformer_tiny_v2": (9_403_384, 9_415_720, 1.284),
    "swin_visformer_small": (40_530_200, 40_555_800, 4.899),
    "swin_visformer_small_v2": (23_581_928, 23_608_104, 4.266),
    "swin_visformer_medium_v2": (44_536_120, 44_571_512, 8.452),
    "net1": (22_008_424, None, 4.574),
    "net2": (23_865_032, None, 4.768),
    "net3": (39_498_440, None, 4.788),
    "net4": (39_498_440, None, 4.788),
    "net5": (39_240_392, None, 4.759),
    "net6": (38_976_968, None, 4.759),
    "net7": (44_976_584, None, 4.829),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = create_model(name)
    params = sum(p.numel() for p in model.parameters())
    statistics = sum(b.numel() for b in model.buffers() if b.dim())
    expected, with_statistics, _ = COUNTS[name]
    assert params == expected and with_statistics in (None, params + statistics)


@pytest.mark.parametrize("name", COUNTS)
def test_gmacs(name):
    with torch.device("meta"):
        model = create_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(COUNTS[name][2], rel=0.01)


@pytest.mark.parametrize("fixture", upstream.MINI)
def test_fixture_gives_upstream_numbers(fixture):
    model, expected = upstream.mini_model(fixture), upstream.outputs(fixture)
    images = torch.from_numpy(expected["input"])
    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        logits = model(images)
    torch.testing.assert_close(logits.numpy(), expected["logits"], atol=5e-5, rtol=0)
    torch.testing.assert_close(features.numpy(), expected["forward_features"], atol=5e-5, rtol=0)
    first = 2 if fixture == "orig_mini_net1" else 4 - len(maps)
    compared = 0
    for number, stage in enumerate(maps, start=first):
        if f"stage{number}" in expected:
            torch.testing.assert_close(stage.numpy(), expected[f"stage{number}"], atol=1e-4, rtol=0)
            compared += 1
    assert compared >= min(2, len(maps))


@pytest.mark.parametrize(
    "fixture, wrong", [("mindcv_mini_v1", {"gelu": "erf"}), ("mindcv_mini_v2", {"qk_scale_power": -0.25})]
)
def test_wrong_form_is_seen(fixture, wrong):
    """The tolerance is tight enough to tell the tanh form from erf, and V1's scale from V2's."""
    model, expected = upstream.mini_model(fixture, **wrong), upstream.outputs(fixture)
    with torch.no_grad():
        error = (model(torch.from_numpy(expected["input"])) - torch.from_numpy(expected["logits"])).abs().max()
    assert error > 5e-5


@pytest.mark.parametrize("fixture", ["mindcv_mini_v1", "mindcv_mini_v2"])
def test_erf_form_gives_the_other_logits(fixture):
    model, expected = upstream.mini_model(fixture, gelu="erf"), upstream.outputs(fixture)
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["input"]))
    torch.testing.assert_close(logits.numpy(), expected["logits_erf"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("fixture", [name for name in upstream.MINI if name.startswith("orig")])
def test_float64_agrees_with_the_authors(fixture):
    model, expected = upstream.mini_model(fixture).double(), upstream.outputs(fixture)
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["input"]).double())
    torch.testing.assert_close(logits.numpy(), expected["logits_f64"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["visformer_tiny", "visformer_small"])
def test_same_logits_as_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7, img_size=96).eval().double()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = create_model(name, num_classes=7, image_size=96).eval().double()
    tensors = theirs.state_dict()
    names = TIMM.names(ours.config, ours.state_dict())
    ours.load_state_dict({key: tensors[name.theirs] for key, name in names.items()})
    assert len(names) == len(tensors)
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-9, rtol=1e-9)


def test_initial_values_are_upstreams():
    torch.manual_seed(0)
    model = create_model("visformer_tiny_v2")
    for name, value in model.named_parameters():
        if ".pos_embed." in name or name == "head.weight":
            assert value.std().item() == pytest.approx(0.02, rel=0.05) and value.abs().max() < 0.12
        elif value.dim() == 4:
            fan_out = value.shape[0] * value.shape[2] * value.shape[3]
            assert value.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06), name
        elif name.endswith("norm.weight") or name == "stem.1.weight":
            assert torch.all(value == 1)
        else:
            assert torch.all(value == 0), name


def test_list_models_are_all_checked_here():
    assert set(list_models()) == set(COUNTS)
    assert isinstance(upstream.mini_model("orig_mini_v1"), Visformer)
