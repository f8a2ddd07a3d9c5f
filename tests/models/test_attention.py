"""Windows and relative position bias, against a reference that looks at every pair of positions by itself."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visformer.models import Visformer, architecture, create_model
from visformer.models.attention import Attention, RelativePositionBias, WindowAttention, Windows


def make(window, shifted, heads=2, head_dim=3, channels=5):
    torch.manual_seed(window)
    module = WindowAttention(channels, heads, head_dim, window, shifted, -0.25, 0.0, 0.0).double().eval()
    torch.nn.init.normal_(module.position_bias.table)
    return module


def reference(module, x, heads=2, head_dim=3):
    """Attention pair by pair: who is in whose window is told from the places themselves."""
    height, width = x.shape[-2:]
    window, shift = module.window, module.window // 2 if module.shifted else 0

    def cell(place, side):
        """The window along one axis, and whether it is cut off from the axis' other end."""
        size, step = min(window, side), shift if side > window else 0
        padded = side + -side % size
        rolled = (place - step) % padded
        return rolled // size, place < step  # places that came round keep to themselves

    qkv = module.qkv(x)[0].reshape(3, heads, head_dim, height, width)
    q, k, v = qkv.unbind(0)
    places = list(itertools.product(range(height), range(width)))
    out = torch.zeros(heads, head_dim, height, width, dtype=x.dtype)
    for y, x_ in places:
        here = cell(y, height), cell(x_, width)
        mine = [(a, b) for a, b in places if (cell(a, height), cell(b, width)) == here]
        for head in range(heads):
            bias = torch.stack(
                [
                    module.position_bias.table[(y - a + window - 1) * (2 * window - 1) + x_ - b + window - 1, head]
                    for a, b in mine
                ]
            )
            keys = torch.stack([k[head, :, a, b] for a, b in mine])
            weights = (keys @ q[head, :, y, x_] * head_dim**-0.5 + bias).softmax(0)
            out[head, :, y, x_] = weights @ torch.stack([v[head, :, a, b] for a, b in mine])
    return module.proj(out.reshape(1, heads * head_dim, height, width))


@given(height=st.integers(1, 9), width=st.integers(1, 9), window=st.integers(1, 5), shifted=st.booleans())
@settings(max_examples=40, deadline=None)
def test_windows_equal_the_pairwise_reference(height, width, window, shifted):
    module, x = make(window, shifted), torch.randn(1, 5, height, width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), reference(module, x), atol=1e-10, rtol=1e-10)


@given(height=st.integers(1, 20), width=st.integers(1, 20), window=st.integers(1, 8), shifted=st.booleans())
@settings(max_examples=60, deadline=None)
def test_joining_undoes_splitting(height, width, window, shifted):
    windows = Windows.over((height, width), window, shifted)
    qkv = torch.randn(2, 3 * 4 * 2, height, width)
    q, _, v = windows.split(qkv, num_heads=4)
    torch.testing.assert_close(windows.join(q, 4), qkv[:, :8], rtol=0, atol=0)
    torch.testing.assert_close(windows.join(v, 4), qkv[:, 16:], rtol=0, atol=0)


def test_one_window_without_bias_is_plain_attention():
    plain = Attention(8, 2, 4, -0.5, 0.0, 0.0)
    windowed = WindowAttention(8, 2, 4, 6, True, -0.5, 0.0, 0.0)
    windowed.load_state_dict(plain.state_dict() | {"position_bias.table": torch.zeros(121, 2)})
    x = torch.randn(3, 8, 6, 5)
    torch.testing.assert_close(windowed(x), plain(x), atol=1e-6, rtol=1e-5)


def test_bias_by_relative_position():
    bias = RelativePositionBias(window=3, num_heads=1)
    with torch.no_grad():
        bias.table.copy_(torch.arange(25.0)[:, None])
        table = bias((2, 3))[0]  # a smaller window uses the middle of the table
    for (a, b), (c, d) in itertools.product(itertools.product(range(2), range(3)), repeat=2):
        assert table[a * 3 + b, c * 3 + d] == (a - c + 2) * 5 + (b - d + 2)


@pytest.mark.parametrize("size", [(32, 32), (224, 96), (100, 250), (448, 300)])
def test_windowed_models_run_at_any_size(size):
    config = architecture("swin_visformer_tiny_v2", num_classes=3, image_size=size)
    model = Visformer(config).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 3) and logits.isfinite().all()


def test_windowed_models_train_with_padding_and_shift():
    model = create_model("swin_visformer_tiny_v2", num_classes=3, image_size=160, dynamic_image_size=True)
    model.stages[2].blocks[0].attn.branch.window = 4  # several windows, of which the last are padded
    model.stages[2].blocks[0].attn.branch.position_bias = RelativePositionBias(4, 6)
    model(torch.randn(2, 3, 160, 128)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_windowed_model_compiles_and_exports():
    config = architecture("swin_visformer_tiny_v2", num_classes=3, image_size=(288, 256))
    shallow = (replace(stage, depth=min(stage.depth, 2)) for stage in config.stages)  # still with a shifted window
    model = Visformer(replace(config, stages=tuple(shallow))).eval()
    images = torch.randn(2, 3, 288, 256)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected, atol=1e-4, rtol=1e-4)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
        torch.testing.assert_close(program.module()(images[:1]), expected[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["net1", "net3", "net6", "net7"])
def test_ablation_nets_take_another_size(name):
    model = create_model(name, num_classes=2, image_size=64).eval()
    model.set_image_size((96, 70))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 70)).shape == (1, 2)
    assert model.config.image_size == (96, 70)
    channels = [info["num_chs"] for info in model.feature_info]
    reductions = [info["reduction"] for info in model.feature_info]
    assert (channels, reductions) == (([384], [16]) if name == "net1" else ([192, 384, 768], [8, 16, 32]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windowed_attention_in_half_precision(dtype):
    module, x = make(4, True).float(), torch.randn(2, 5, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        half = module(x)
    assert half.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(half.float(), module(x), atol=0.05, rtol=0.05)
