"""`mlp`: the kernel's numbers against double precision, where it has tiles and where not, and its machine code."""

import pytest
import torch

from visformer.errors import UsageError
from visformer.kernels import mlp as module
from visformer.kernels.mlp import mlp, mlp_reference, tiles
from visformer.models.layers import Mlp

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def operands(shape, dtype, device):
    """x, weight1, bias1, weight2, bias2 and residual for (B, C, H, W, hidden), maps in channels_last memory."""
    batch, channels, height, width, hidden = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    x, residual = (
        normal(batch, channels, height, width).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    weights = normal(hidden, channels) / channels**0.5, normal(hidden), normal(channels, hidden) / hidden**0.5
    return x, *weights, normal(channels), residual


def check(actual, given, activation="gelu"):
    dtype = given[0].dtype
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    wanted = mlp_reference(*(None if t is None else t.double() for t in given), activation)
    torch.testing.assert_close(actual.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 96, 7, 5, 384), (1, 192, 9, 8, 128), (1, 384, 3, 3, 128), (3, 16, 1, 1, 64)])
def test_the_kernel_agrees_with_double_precision(shape, dtype, device):
    given = operands(shape, dtype, device)
    check(mlp(*given), given)


@pytest.mark.parametrize("activation", module.ACTIVATIONS)
def test_each_activation(activation, device):
    given = operands((2, 48, 4, 3, 128), torch.float16, device)
    check(mlp(*given, activation), given, activation)


def test_every_tile_gives_the_same(device):
    given = operands((1, 96, 15, 9, 192), torch.float16, device)
    candidates = tiles(135, 96, 192, torch.float16)
    assert len(candidates) >= 4
    for tile in candidates:
        check(mlp(*given, tile=tile), given)


def test_without_a_residual_and_with_x_for_one(device):
    x, *weights, _ = operands((1, 32, 4, 3, 64), torch.float16, device)
    check(mlp(x, *weights), (x, *weights, None))
    check(mlp(x.contiguous(), *weights, x), (x, *weights, x))


@pytest.mark.parametrize("gelu, activation", [("erf", "gelu"), ("tanh", "gelu_tanh")])
def test_it_is_the_models_own(gelu, activation, device):
    x = operands((2, 32, 4, 3, 128), torch.float16, device)[0]
    block = Mlp(32, 128, gelu, drop_rate=0.0).to(device)
    weights = block.conv1.weight.flatten(1).half(), block.conv3.weight.flatten(1).half()
    zeros = torch.zeros(128, device=device), torch.zeros(32, device=device)
    with torch.no_grad():
        actual = mlp(x, weights[0], zeros[0], weights[1], zeros[1], x, activation)
        wanted = x.float() + block(x.float())
    torch.testing.assert_close(actual.float(), wanted, rtol=5e-3, atol=5e-3)


def test_elsewhere_the_reference_is_computed_at_any_width(monkeypatch):
    given = operands((1, 20, 4, 3, 30), torch.bfloat16, "cpu")
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    torch.testing.assert_close(mlp(*given), mlp_reference(*given))
    check(mlp(*given), given)


def test_the_operator_is_registered_in_full(device):
    given = operands((2, 32, 4, 6, 64), torch.float16, device)
    torch.library.opcheck(torch.ops.visformer.mlp.default, (*given, "gelu"))


def test_what_does_not_fit_is_told(device):
    given = operands((1, 32, 4, 3, 64), torch.float16, device)
    with pytest.raises(UsageError, match=r"mlp: weight2 is \(32, 60\) of torch.float16; it must be \(32, 64\)"):
        mlp(*given[:3], given[3][:, :60], *given[4:])
    with pytest.raises(UsageError, match="no activation 'none'; there are: gelu, gelu_tanh, relu"):
        mlp(*given, "none")
    wide = operands((1, 768, 1, 1, 64), torch.float16, device)
    with pytest.raises(UsageError, match=r"no tile fits 768 channels, 64 hidden, of torch\.float16; use two `linear`"):
        mlp(*wide)


@pytest.mark.parametrize("channels", [48, 96, 128, 192, 256, 384])
def test_tiles_fit_the_device(channels):
    candidates = tiles(12544, channels, 4 * channels, torch.bfloat16)
    assert 1 <= len(candidates) <= 12 and len(set(candidates)) == len(candidates)
    for block_rows, block_hidden, chunk, num_warps, num_stages in candidates:
        assert channels % chunk == 0 and 1 <= channels // chunk <= 4 and chunk >= 16
        assert 2 * channels * (block_rows + 2 * num_stages * block_hidden) <= 227 * 1024
        assert block_rows * (channels + block_hidden) / (32 * num_warps) <= 128  # registers of both accumulators


def test_there_is_no_tile_where_two_products_are_better():
    assert tiles(12544, 768, 3072, torch.bfloat16) == []  # more than the registers hold
    assert tiles(12544, 192, 768, torch.float32) == []  # products in fp32 take far longer than the hidden map
    assert tiles(12544, 120, 480, torch.bfloat16) == []  # 120 is not made of four powers of two
    assert tiles(12544, 192, 200, torch.bfloat16) == []  # a hidden width that steps do not divide


COMPILED = """
from visformer.kernels.mlp import mlp

for rows, channels in ((50176, 192), (12544, 384)):
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.empty(rows, 1, 1, channels, dtype=dtype).permute(0, 3, 1, 2)
        weight = torch.empty(4 * channels, channels, dtype=dtype)
        bias = torch.empty(4 * channels)
        mlp(x, weight, bias, weight.T.contiguous(), bias[:channels], x, "gelu")
"""


def test_the_first_tiles_compile_for_hopper(compile_ahead):
    kernels = compile_ahead(COMPILED)
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel.wgmma and kernel.spilled_bytes == 0 and 0 < kernel.registers <= 255, kernel
        assert kernel.shared_bytes <= 227 * 1024 and kernel.widest_access == 16, kernel
    assert kernels[0].registers * 32 * kernels[0].num_warps * 3 <= 65536, "three programs on a multiprocessor"
