"""`attention`: the kernel's numbers against double precision and the models' own modules, and its machine code."""

import pytest
import torch
import torch.nn.functional as F

from visformer.errors import UsageError
from visformer.kernels import attention as module
from visformer.kernels.attention import attention, attention_reference, pack_bias, tiles
from visformer.models.attention import Attention, WindowAttention, Windows

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
# height, width, heads, head_dim
MAPS = [(7, 7, 2, 16), (14, 14, 1, 48), (5, 9, 3, 32), (3, 11, 1, 128), (8, 8, 2, 64), (1, 1, 1, 16), (4, 5, 1, 20)]
# height, width, window, shift: even, padded, padded and shifted, one axis whole, odd windows
WINDOWED = [
    (8, 8, (4, 4), (2, 2)),
    (8, 8, (4, 4), ()),
    (9, 11, (4, 4), ()),
    (9, 11, (4, 4), (2, 2)),
    (9, 6, (4, 6), (2, 0)),
    (12, 5, (5, 3), (2, 1)),
]


def map_of(batch, height, width, heads, head_dim, dtype, device):
    generator = torch.Generator().manual_seed(height * width + heads + head_dim)
    qkv = 1.5 * torch.randn(batch, 3 * heads * head_dim, height, width, generator=generator)
    return qkv.to(device, dtype).contiguous(memory_format=torch.channels_last)


def bias_of(heads, count, dtype, device):
    return torch.randn(heads, count, count, generator=torch.Generator().manual_seed(count)).to(device, dtype)


def check(qkv, heads, *options, tile=()):
    scale, bias, *windows = (*options, None)[: max(len(options), 2)]
    actual = attention(qkv, heads, scale, bias, *windows, tile=tile)
    assert actual.dtype == qkv.dtype and actual.is_contiguous(memory_format=torch.channels_last)
    wanted = attention_reference(qkv.double(), heads, scale, None if bias is None else bias.double(), *windows)
    tolerance = TOLERANCE[qkv.dtype]
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height, width, heads, head_dim", MAPS)
def test_the_kernel_agrees_with_double_precision(height, width, heads, head_dim, dtype, device):
    check(map_of(2, height, width, heads, head_dim, dtype, device), heads, head_dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_added_to_the_logits(dtype, device):
    qkv = map_of(2, 5, 9, 3, 16, dtype, device)
    bias = bias_of(3, 45, dtype, device)
    check(qkv, 3, 0.25, bias)
    check(qkv, 3, 0.25, bias.float())
    check(qkv, 3, 0.25, bias.mT)  # another layout
    packed = pack_bias(bias)
    assert packed.shape == bias.shape and packed.stride() == (45 * 48, 48, 1)
    torch.testing.assert_close(attention(qkv, 3, 0.25, packed), attention(qkv, 3, 0.25, bias), rtol=0, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("height, width, window, shift", WINDOWED)
def test_windows_are_cut_out_of_the_map(height, width, window, shift, with_bias, device):
    qkv = map_of(2, height, width, 2, 16, torch.float32, device)
    bias = bias_of(2, window[0] * window[1], torch.float32, device) if with_bias else None
    check(qkv, 2, 0.25, bias, window, shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windows_in_half_precision(dtype, device):
    check(map_of(1, 9, 11, 2, 32, dtype, device), 2, 0.2, bias_of(2, 16, dtype, device), (4, 4), (2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_tile_gives_the_same(dtype, device):
    qkv = map_of(1, 9, 13, 1, 32, dtype, device)
    candidates = tiles(117, 32, dtype)
    assert len(candidates) >= 5
    for tile in candidates:
        check(qkv, 1, 0.3, None, tile=tile)


def test_a_block_of_keys_that_a_query_does_not_see_at_all(device):
    qkv = map_of(1, 16, 16, 1, 16, torch.float32, device)
    check(qkv, 1, 1.0, None, (8, 8), (4, 4), tile=(16, 16, 2, 2))  # 16 keys are two rows of a window's eight


def test_large_logits_do_not_overflow(device):
    qkv = map_of(1, 5, 5, 1, 16, torch.float16, device)
    qkv[:, :32] *= 60  # products of up to some 100,000, more than fp16 holds
    check(qkv, 1, 1.0)
    assert attention(qkv, 1).isfinite().all()


def test_the_scale_is_1_unless_given(device):
    qkv = map_of(1, 3, 5, 2, 16, torch.float32, device)
    torch.testing.assert_close(attention(qkv, 2), attention(qkv, 2, 1.0))
    assert (attention(qkv, 2) - attention(qkv, 2, 0.25)).abs().max() > 0.1


@pytest.mark.parametrize("height, width", [(7, 7), (5, 9)])
def test_it_is_the_models_own(height, width, device):
    block = Attention(24, 2, 16, qk_scale_power=-0.25, attn_drop_rate=0.0, drop_rate=0.0).to(device)
    x = torch.randn(2, 24, height, width, device=device)
    with torch.no_grad():
        actual = block.proj(attention(block.qkv(x), 2, block.scale))
        torch.testing.assert_close(actual, block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width, shifted", [(8, 8, True), (9, 11, False), (9, 11, True), (3, 11, True)])
def test_it_is_the_models_own_within_windows(height, width, shifted, device):
    block = WindowAttention(24, 2, 16, 4, shifted, qk_scale_power=-0.5, attn_drop_rate=0.0, drop_rate=0.0).to(device)
    torch.nn.init.normal_(block.position_bias.table)
    x = torch.randn(2, 24, height, width, device=device)
    windows = Windows.over((height, width), 4, shifted)
    with torch.no_grad():
        bias = block.position_bias(windows.size)
        actual = block.proj(attention(block.qkv(x), 2, block.scale, bias, windows.size, windows.shift))
        torch.testing.assert_close(actual, block(x), rtol=1e-4, atol=1e-4)


def test_the_reference_is_torchs_attention():
    qkv = map_of(2, 3, 5, 2, 16, torch.float64, "cpu")
    q, k, v = qkv.flatten(2).unflatten(1, (3, 2, 16)).mT.unbind(1)  # each (B, heads, N, d)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.5).mT.reshape(2, 32, 3, 5)
    torch.testing.assert_close(attention_reference(qkv, 2, 0.5), wanted)


def test_nothing_outside_is_read_or_written(device):
    from visformer.kernels.attention_triton import launch_attention

    qkv = map_of(1, 5, 7, 1, 20, torch.float32, device)
    around = torch.full((105, 60), torch.nan, device=device)
    around[35:70] = qkv.permute(0, 2, 3, 1).reshape(35, 60)
    inner = around[35:70].view(1, 5, 7, 60).permute(0, 3, 1, 2)
    for window, shift in (((5, 7), (0, 0)), ((2, 3), (1, 1))):
        room = torch.full((105, 20), 7.0, device=device)
        out = room[35:70].view(1, 5, 7, 20).permute(0, 3, 1, 2)
        launch_attention(inner, None, out, 1, 0.3, window, shift, (16, 16, 2, 2))
        torch.testing.assert_close(out, attention_reference(qkv, 1, 0.3, None, window, shift), rtol=1e-4, atol=1e-5)
        assert (room[:35] == 7).all() and (room[70:] == 7).all()


def test_other_memory_layouts_are_taken(device):
    qkv = map_of(2, 3, 5, 1, 16, torch.float32, device)
    torch.testing.assert_close(attention(qkv.contiguous(), 1), attention(qkv, 1))


def test_elsewhere_the_reference_is_computed(monkeypatch):
    qkv = map_of(2, 9, 11, 2, 16, torch.bfloat16, "cpu")
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    check(qkv, 2, 0.25, bias_of(2, 16, torch.bfloat16, "cpu"), (4, 4), (2, 2))
    assert attention(qkv[:0], 2).shape == (0, 32, 9, 11)


@pytest.mark.parametrize("window", [(), (2, 3)])
def test_the_operator_is_registered_in_full(window, device):
    qkv = map_of(2, 4, 5, 2, 16, torch.float32, device)
    bias = bias_of(2, 6 if window else 20, torch.float32, device)
    torch.library.opcheck(torch.ops.visformer.attention.default, (qkv, 2, 0.25, bias, window, ()))


def test_what_does_not_fit_is_told(device):
    qkv = map_of(1, 4, 5, 2, 16, torch.float32, device)
    with pytest.raises(UsageError, match="96 channels of qkv do not fit 5 heads; there must be 3 \\* 5 \\* d"):
        attention(qkv, 5)
    with pytest.raises(UsageError, match="d from 1 to 128"):
        attention(map_of(1, 2, 2, 1, 130, torch.float32, device), 1)
    with pytest.raises(UsageError, match=r"bias is \(2, 20, 19\)"):
        attention(qkv, 2, bias=torch.zeros(2, 20, 19))
    with pytest.raises(UsageError, match=r"window \(4,\) is not possible; it is \(rows, columns\)"):
        attention(qkv, 2, window=(4,))
    with pytest.raises(UsageError, match=r"windows of \(5, 5\) shifted by \(0, 0\) do not fit a map of \(4, 5\)"):
        attention(qkv, 2, window=(5, 5))
    with pytest.raises(UsageError, match="the shift is below the window"):
        attention(qkv, 2, window=(2, 2), shift=(2, 0))
    with pytest.raises(UsageError, match=r"tile .* it has 4 numbers"):
        attention(qkv, 2, tile=(16, 16, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("tokens", [1, 16, 49, 196, 1024, 3136])
def test_tiles_fit_the_device_and_the_problem(tokens, head_dim, dtype):
    candidates = tiles(tokens, head_dim, dtype)
    assert 1 <= len(candidates) <= 13 and len(set(candidates)) == len(candidates)
    for queries, keys, num_warps, num_stages in candidates:
        assert max(queries, keys) < max(2 * tokens, 17)
        assert queries * (keys + head_dim) / (32 * num_warps) <= 96  # registers of logits and accumulator
        assert head_dim * (queries + 2 * num_stages * keys) * dtype.itemsize <= 227 * 1024


COMPILED = """
from visformer.kernels.attention import attention, pack_bias

def one(side, heads, head_dim, dtype, window=(), with_bias=False):
    qkv = torch.empty(64, side, side, 3 * heads * head_dim, dtype=dtype).permute(0, 3, 1, 2)
    count = window[0] * window[1] if window else side * side
    bias = pack_bias(torch.empty(heads, count, count, dtype=dtype)) if with_bias else None
    attention(qkv, heads, 1.0, bias, window, (window[0] // 2, window[1] // 2) if window else ())

one(14, 6, 64, torch.bfloat16)
one(7, 6, 128, torch.bfloat16)
one(14, 8, 32, torch.bfloat16, with_bias=True)
one(20, 8, 32, torch.bfloat16, window=(14, 14), with_bias=True)
one(14, 6, 64, torch.float32)
"""


def test_the_first_tiles_compile_for_hopper(compile_ahead):
    *half, full = compile_ahead(COMPILED)
    assert len(half) == 4
    for kernel in half:
        assert kernel.wgmma, "Hopper's own products"
    assert not full.wgmma and not full.mma, "fp32 in full"
    for kernel in (*half, full):
        assert 0 < kernel.registers <= 255 and kernel.spilled_bytes == 0, kernel
        assert kernel.shared_bytes <= 100 * 1024, "at least two programs on a multiprocessor"
        assert kernel.widest_access == 16, kernel


COMPILED_SMALL = """
from visformer.kernels.attention import attention

def one(height, width, heads, head_dim, window, shift, dtype):
    qkv = torch.empty(1, height, width, 3 * heads * head_dim, dtype=dtype).permute(0, 3, 1, 2)
    count = window[0] * window[1] if window else height * width
    attention(qkv, heads, 0.5, torch.empty(heads, count, count), window, shift)

one(1, 1, 1, 16, (), (), torch.float16)
one(9, 11, 1, 20, (1, 4), (0, 1), torch.float32)
one(6, 6, 3, 100, (5, 3), (2, 1), torch.bfloat16)
"""


def test_sizes_of_one_and_odd_heads_compile(compile_ahead):
    """The compiler makes constants of arguments that are 1, which the interpreter does not."""
    assert [kernel.spilled_bytes for kernel in compile_ahead(COMPILED_SMALL)] == [0, 0, 0]
