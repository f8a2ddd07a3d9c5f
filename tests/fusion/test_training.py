"""An accelerated model trains as the model that it was: the same parameters, the same numbers to within rounding."""

import copy
import json

import pytest
import torch
from torch import nn

import visformer
from tests.fusion.models import MINIATURES, build, images, off_by
from visformer.fusion import training
from visformer.fusion.training import (
    GroupedConvolution,
    MapGelu,
    SinglePrecision,
    accelerate,
    spatial_mlps,
    ways_to_train,
)
from visformer.models import list_models
from visformer.models.attention import ScaledDotProduct

SMALL = "spatial, then attention"
SPATIAL = [SMALL, "windows and tanh", "no positions, norm after embedding, dense"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Choices of this test alone."""
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuning"


def all_in(model, way):
    return dict.fromkeys(spatial_mlps(model), way)


def step(model, x, dtype=None):
    """Output and gradients by name, of a training step without the optimizer's."""
    model.train().zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = model(x)
    y.float().square().sum().backward()
    return {"output": y.detach().float()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_step(model, reference, x, tolerance):
    ours, theirs = step(model, x), step(reference, x)
    assert ours.keys() == theirs.keys()
    largest = max(value.abs().max() for name, value in theirs.items() if name != "output")
    for name, expected in theirs.items():
        scale = expected.abs().max() if name == "output" else largest
        assert (ours[name] - expected).abs().max() <= tolerance * scale, name


def smallest(name):
    """A named model at a small size, in fp64 so that a gradient that is wrong stands out from rounding."""
    options = {} if name in MINIATURES else {"num_classes": 10, "image_size": (64, 64)}
    return build(name, **options).double()


@pytest.mark.parametrize("name", [*MINIATURES, *list_models()])
def test_every_model_keeps_its_state_its_logits_and_its_gradients(name):
    model = smallest(name)
    for module in model.modules():
        if hasattr(module, "drop_path"):
            module.drop_path = nn.Identity()
    reference, x = copy.deepcopy(model), images(model).double()
    parameters = dict(model.named_parameters())
    accelerate(model)
    assert not any(isinstance(module, nn.GELU) for module in model.modules())
    assert any(isinstance(module, MapGelu) for module in model.modules())
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert_same_step(model, reference, x, 1e-9)
    assert off_by(model.eval()(x), reference.eval()(x)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_computed_in_fp32(dtype):
    """Nothing of the result is lost but its last rounding, and under autocast it is not rounded on the way either."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 25, 32, dtype=dtype).requires_grad_() for _ in range(3)]
    attend = ScaledDotProduct(32**-0.5, 0.0)
    expected = attend(*(t.double() for t in exact))
    expected_gradients = torch.autograd.grad(expected.square().sum(), exact)
    with torch.autocast("cpu", dtype):
        y = SinglePrecision(attend)(*exact)
    assert y.dtype == dtype
    assert torch.equal(y, attend(*(t.float() for t in exact)).to(dtype))
    step = torch.finfo(dtype).eps
    assert (y - expected).abs().max() <= step / 2 * expected.abs().max()
    for ours, theirs in zip(torch.autograd.grad(y.double().square().sum(), exact), expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= 2 * step * theirs.abs().max()


def test_to_accelerate_twice_is_to_accelerate_once():
    model = smallest(SMALL)
    accelerate(model)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    assert SinglePrecision in dict(modules).values()
    accelerate(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules


@pytest.mark.parametrize("way", ["contiguous", "merged 2", "merged 4"])
@pytest.mark.parametrize("name", [SMALL])
def test_every_way_gives_the_same_gradients(name, way):
    model = smallest(name)
    reference, x = copy.deepcopy(model), images(model).double()
    accelerate(model, all_in(model, way))
    (mlp,) = spatial_mlps(model).values()
    assert isinstance(mlp.conv2, GroupedConvolution)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert_same_step(model, reference, x, 1e-9)


def test_in_half_precision_a_way_is_as_near_as_the_library():
    model = build(SMALL)
    exact = step(copy.deepcopy(model).double(), images(model).double())
    other = copy.deepcopy(model)
    accelerate(other, all_in(model, "merged 2"))
    library, ours = (step(m, images(model), torch.bfloat16) for m in (model, other))
    for name in ("output", "stages.0.blocks.0.mlp.branch.conv2.weight"):
        assert off_by(ours[name], exact[name]) < max(1.5 * off_by(library[name], exact[name]), 1e-2)


def test_what_takes_place_survives_copies_and_loading():
    """A moving average is a deep copy; a checkpoint is loaded by name."""
    model = build(SMALL)
    plain, x = copy.deepcopy(model), images(model)
    accelerate(model, all_in(model, "merged 2"))
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    with torch.no_grad():
        assert not torch.equal(average.eval()(x), model.eval()(x))
    average.load_state_dict(plain.state_dict())
    assert off_by(average(x), plain.eval()(x)) < 1e-5
    assert off_by(visformer.fuse(model, choose="library")(x), plain(x)) < 1e-5


def test_the_fastest_is_measured_once_and_named_for_every_mlp(cache, monkeypatch):
    model = build("visformer_tiny", num_classes=4, image_size=(32, 32))
    ways = ways_to_train(model, 2)
    assert list(ways) == [f"stages.0.blocks.{i}.mlp.branch" for i in range(7)]
    (file,) = cache.iterdir()
    ((signature, entry),) = json.loads(file.read_text()).items()
    assert signature == "training 2x192x4x4 192x24x3x3 8 groups gelu none"
    assert set(ways.values()) == {entry["choice"]}
    assert {"library", "contiguous", "merged 2"} == set(entry["microseconds"])
    monkeypatch.setattr("visformer.fusion.tuner.time_candidates", lambda *_, **__: pytest.fail("measured again"))
    assert ways_to_train(model, 2) == ways


def test_a_way_with_a_wrong_gradient_is_left_out(capsys, monkeypatch):
    right = training._build

    def wrong(name, conv, gelu):
        way = right(name, conv, gelu)
        return (
            way if name == "library" else lambda x, weight: way(x, weight.detach() + 1.1 * (weight - weight.detach()))
        )

    monkeypatch.setattr(training, "_build", wrong)
    assert set(ways_to_train(build(SMALL), 2).values()) == {"library"}
    assert "merged 2 is left out: it is off by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "way", ["kernel 16,16,16,1,2,1,4,2", "compiled inside", "merged", "merged 3", "merged 2,x", ""]
)
def test_a_way_that_is_not_possible_here_gives_way_to_the_librarys(way, capsys):
    model = build(SMALL)
    accelerate(model, all_in(model, way))
    assert "is not possible here" in capsys.readouterr().err
    assert not any(isinstance(module, GroupedConvolution) for module in model.modules())


def test_without_measuring(cache):
    assert set(ways_to_train(build(SMALL), 2, choose="library").values()) == {"library"}
    assert not cache.exists()
