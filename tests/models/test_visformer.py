"""What the model promises beyond upstream's numbers: sizes, devices' layouts, compilation, training switches."""

from dataclasses import replace
from shutil import which

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.upstream import mini_architecture, mini_model
from visformer.errors import UsageError
from visformer.models import Architecture, Visformer, create_model
from visformer.models.layers import DropPath, resample

V1, V2 = mini_architecture("orig_mini_v1"), mini_architecture("mindcv_mini_v2")


def build(architecture=V2, *, seed=0, dynamic=False, **changes):
    torch.manual_seed(seed)
    return Visformer(replace(architecture, **changes), dynamic_image_size=dynamic)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(32, 130), width=st.integers(32, 130), architecture=st.sampled_from([V1, V2]))
def test_any_image_size_at_creation(height, width, architecture):
    model = build(architecture, image_size=(height, width)).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    assert [tuple(m.shape[-2:]) for m in maps] == list(model.config.grids)
    assert model(torch.randn(2, 3, height, width)).shape == (2, 10)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(32, 130), width=st.integers(32, 130))
def test_resampling_at_call_equals_setting_the_size(height, width):
    images = torch.randn(1, 3, height, width)
    at_call, once = build(dynamic=True).eval(), build().eval()
    once.set_image_size((height, width))
    assert once.config.image_size == (height, width)
    with torch.no_grad():
        torch.testing.assert_close(at_call(images), once(images), atol=1e-5, rtol=1e-5)


def test_stage_numbers_that_are_not_there():
    model, images = build(V1).eval(), torch.randn(1, 3, 64, 64)
    for indices in ([3], [-4], [0, 7], 4, []):
        with pytest.raises(ValueError, match="does not fit a model of 3 stages"):
            model.forward_intermediates(images, indices=indices)
    last = model.forward_intermediates(images, indices=[-1], intermediates_only=True)
    assert len(last) == 1 and last[0].shape[1] == 128


def test_no_pixel_is_lost_at_odd_sizes():
    images = torch.randn(1, 3, 63, 61, requires_grad=True)
    build(image_size=(63, 61)).eval()(images).sum().backward()
    assert (images.grad.abs().sum((0, 1)) > 0).all()


def test_another_size_without_being_told_is_a_clear_error():
    with pytest.raises(UsageError, match=r"set_image_size|dynamic_image_size"):
        build().eval()(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize("size", [31, (64, 16)])
def test_too_small_an_image_is_an_error(size):
    with pytest.raises(UsageError, match="at least 32"):
        create_model("visformer_tiny", image_size=size)


def test_unknown_model_offers_the_nearest():
    with pytest.raises(UsageError, match="did you mean visformer_tiny_v2"):
        create_model("visformer_tiny_v3")
    with pytest.raises(UsageError, match="drop_rate"):
        create_model("visformer_tiny", dropp_rate=0.1)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_any_in_channels_and_features(channels):
    model = build(in_channels=channels, num_classes=0).eval()
    images = torch.randn(2, channels, 64, 64)
    features = model(images)
    assert features.shape == (2, model.num_features)
    torch.testing.assert_close(features, model.forward_head(model.forward_features(images), pre_logits=True))


def test_reset_classifier_keeps_the_body():
    model = build().double().eval()
    body = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head")}
    model.reset_classifier(5)
    assert model.num_classes == model.config.num_classes == 5
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).shape == (2, 5)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in body.items())


def test_architecture_survives_plain_data():
    for architecture in (V1, V2):
        assert Architecture.from_dict(architecture.to_dict()) == architecture
    with pytest.raises(UsageError, match="did you mean stem_width"):
        Architecture.from_dict(V1.to_dict() | {"stem_widht": 3})
    with pytest.raises(UsageError, match="lacks 'stages'"):
        Architecture.from_dict({"stem_width": 8})


@pytest.mark.parametrize("architecture", [V1, V2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near(architecture, dtype, tolerance):
    model = build(architecture).eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        got = model.to(dtype)(images.to(dtype)).float()
    assert (got - expected).norm() / expected.norm() < tolerance


def test_large_q_and_k_do_not_overflow_in_fp16():
    model = build(V1).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "qkv" in name:
                weight[: 2 * weight.shape[0] // 3].mul_(60)
        assert torch.isfinite(model.half()(torch.randn(2, 3, 64, 64).half())).all()


def test_maps_stay_in_channels_last_without_copies():
    model = build().eval()
    layouts = []
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Conv2d)):
            module.register_forward_hook(
                lambda m, args, out: layouts.append(
                    args[0].is_contiguous(memory_format=torch.channels_last)
                    and out.is_contiguous(memory_format=torch.channels_last)
                )
            )
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    with torch.no_grad(), CountCopies() as copies:
        model(images)
    assert layouts and all(layouts)
    assert copies.seen == ["aten.clone.default"] * len(model.stages)  # each embedding gathers its patches once


class CountCopies(TorchDispatchMode):
    """Records the copying operations that a model dispatches."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("copy", "clone", "contiguous")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", [V1, V2])
def test_gradient_checkpointing_changes_nothing(architecture):
    results = []
    for enabled in (False, True):
        model = build(architecture, drop_rate=0.1, drop_path_rate=0.2, attn_drop_rate=0.1)
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(1)
        images = torch.randn(4, 3, 64, 64)
        model(images).square().sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_dropout_and_stochastic_depth_are_for_training_only():
    model = build(drop_rate=0.3, drop_path_rate=0.3, attn_drop_rate=0.3)
    images = torch.randn(4, 3, 64, 64)
    model.train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(0.25)(torch.ones(20_000, 1, 1, 1))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.02)


def test_stochastic_depth_rises_linearly():
    model = create_model("visformer_tiny", drop_path_rate=0.14)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(0.14) and rates == sorted(rates)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, backend",
    [
        pytest.param(
            V1, "inductor", marks=pytest.mark.skipif(not which("c++"), reason="Inductor needs a C++ compiler")
        ),
        (V2, "aot_eager"),
    ],
)
def test_compiles_without_a_graph_break_at_two_sizes(architecture, backend):
    """Inductor takes a minute for V2's second size, so the tracing alone is tested there."""
    torch.compiler.reset()
    model = build(architecture, dynamic=True).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for side in (64, 96):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)


def test_exports():
    model = build().eval()
    images = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(more), model(more), atol=1e-5, rtol=1e-5)


@given(old=st.tuples(st.integers(1, 30), st.integers(1, 30)), new=st.tuples(st.integers(1, 30), st.integers(1, 30)))
@settings(max_examples=60, deadline=None)
def test_resampling_is_bicubic_with_antialiasing(old, new):
    # Pillow is the reference: torch 2.14's own kernel is wrong wherever the output is one column wide.
    weight = torch.randn(1, 3, *old)
    planes = [Image.fromarray(plane.numpy()).resize(new[::-1], Image.Resampling.BICUBIC) for plane in weight[0]]
    expected = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))[None]
    torch.testing.assert_close(resample(weight, new), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(resample(weight, old), weight)


def test_resampled_state_dict_fits_another_size():
    small = build(image_size=(64, 64))
    large = build(image_size=(96, 80))
    large.load_state_dict(large.resample_state_dict(small.state_dict()))
    assert large.stages[0].pos_embed.weight.shape[-2:] == large.config.grids[0]


def test_timms_layer_decay_reads_the_layers():
    from timm.optim import param_groups_layer_decay

    model = build()
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scales) == len(list(model.parameters()))
    assert scales[id(model.head.weight)] == 1
    assert scales[id(model.stem[0].weight)] == min(scales.values())


def test_learns_a_separable_problem():
    model = build(num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    targets = torch.arange(16) % 2
    images = torch.randn(16, 3, 64, 64) + targets.view(-1, 1, 1, 1)
    for _ in range(12):
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_mini_model_is_deterministic():
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(mini_model("orig_mini_v1")(images), mini_model("orig_mini_v1")(images))
