"""`pool_head`: both its forms against double precision, the folded norm, and the machine code."""

import pytest
import torch
from torch import nn

from visformer.errors import UsageError
from visformer.kernels import pool_head as module
from visformer.kernels.pool_head import pool_head, pool_head_reference, tiles

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def operands(shape, dtype, device):
    """x, weight and bias for (B, C, H, W, classes), the map in channels_last memory."""
    batch, channels, height, width, classes = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = 3 + torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(classes, channels, generator=generator) / channels
    bias = torch.randn(classes, generator=generator)
    x, weight, bias = (t.to(device, dtype) for t in (x, weight, bias))
    return x.contiguous(memory_format=torch.channels_last), weight, bias


def check(actual, given):
    dtype = given[0].dtype
    assert actual.dtype == dtype and actual.is_contiguous()
    wanted = pool_head_reference(*(None if t is None else t.double() for t in given))
    torch.testing.assert_close(actual.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 40, 7, 5, 13), (1, 96, 1, 1, 10), (3, 200, 9, 9, 33), (17, 24, 3, 3, 2)])
def test_every_tile_agrees_with_double_precision(shape, dtype, device):
    given = operands(shape, dtype, device)
    batch, channels, height, width, classes = shape
    candidates = tiles(batch, channels, height * width, classes, dtype)
    assert {bool(tile[2]) for tile in candidates} == {True, False}, "one kernel and two"
    for tile in candidates:
        check(pool_head(*given, tile), given)


def test_the_first_tile_is_taken_and_the_bias_may_be_absent(device):
    x, weight, bias = operands((2, 40, 7, 5, 13), torch.float32, device)
    check(pool_head(x, weight, bias), (x, weight, bias))
    for tile in tiles(2, 40, 35, 13, torch.float32):
        check(pool_head(x, weight, tile=tile), (x, weight, None))
    check(pool_head(x.contiguous(), weight, bias.double()), (x, weight, bias))


def test_averages_do_not_overflow_half_precision(device):
    x, weight, bias = operands((2, 40, 7, 5, 13), torch.float16, device)
    x = (x * 10000).clamp(max=50000)  # a sum of 35 of them is more than fp16 holds
    actual = pool_head(x, weight * 1e-3, bias)
    check(actual, (x, weight * 1e-3, bias))
    assert actual.isfinite().all()


def test_a_batch_norm_before_it_folds_into_weight_and_bias(device):
    x, weight, bias = operands((2, 40, 7, 5, 13), torch.float32, device)
    norm = nn.BatchNorm2d(40).to(device).eval()
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(values, 0.5, 2.0)
    with torch.no_grad():
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        actual = pool_head(x, weight * scale, bias + weight @ shift)
        wanted = pool_head_reference(norm(x), weight, bias)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_elsewhere_the_reference_is_computed(monkeypatch):
    given = operands((2, 40, 7, 5, 13), torch.bfloat16, "cpu")
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    torch.testing.assert_close(pool_head(*given), pool_head_reference(*given), rtol=0, atol=0)
    check(pool_head(*given), given)
    assert pool_head(given[0][:0], *given[1:]).shape == (0, 13)


def test_the_operator_is_registered_in_full(device):
    torch.library.opcheck(torch.ops.visformer.pool_head.default, operands((2, 40, 3, 5, 13), torch.float32, device))


def test_what_does_not_fit_is_told():
    x, weight, bias = operands((2, 40, 7, 5, 13), torch.float32, "cpu")
    with pytest.raises(UsageError, match=r"pool_head: x is \(2, 40\)"):
        pool_head(x[..., 0, 0], weight, bias)
    with pytest.raises(UsageError, match=r"weight is \(13, 39\) of torch.float32; it must be \(13, 40\)"):
        pool_head(x, weight[:, :39], bias)
    with pytest.raises(UsageError, match=r"bias is \(12,\)"):
        pool_head(x, weight, bias[:12])


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_small_batches_have_one_kernel_first_and_large_ones_two(batch):
    candidates = tiles(batch, 768, 49, 1000, torch.bfloat16)
    assert 4 <= len(candidates) <= 12
    assert bool(candidates[0][2]) == (batch <= 16)


COMPILED = """
from visformer.kernels.pool_head import pool_head

for batch, dtype in ((256, torch.bfloat16), (256, torch.float32), (1, torch.float16)):
    x = torch.empty(batch, 7, 7, 768, dtype=dtype).permute(0, 3, 1, 2)
    pool_head(x, torch.empty(1000, 768, dtype=dtype), torch.empty(1000))
for batch in (1, 20):  # the compiler makes constants of arguments that are 1
    pool_head(torch.empty(batch, 1, 1, 1), torch.empty(1, 1))
"""


def test_the_first_tiles_compile_for_hopper(compile_ahead):
    kernels = compile_ahead(COMPILED)
    two = ["pool_kernel", "linear_kernel"]
    assert [kernel.kernel for kernel in kernels] == [*two, *two, "pool_head_kernel", "pool_head_kernel", *two]
    for kernel in kernels[:5]:
        assert 0 < kernel.registers <= 255 and kernel.spilled_bytes == 0 and kernel.widest_access == 16, kernel
    assert kernels[1].mma or kernels[1].wgmma
