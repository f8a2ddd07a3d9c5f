"""`linear` and `linear_fp8`: the kernel's numbers against double precision at awkward shapes, and its machine code."""

import pytest
import torch

from visformer.errors import UsageError
from visformer.kernels import linear as module
from visformer.kernels import linear_fp8 as module_fp8
from visformer.kernels.linear import linear, linear_reference, tiles
from visformer.kernels.linear_fp8 import FLOAT8, linear_fp8, linear_fp8_reference, quantize_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SHAPES = [(2, 96, 7, 5, 40), (1, 64, 1, 1, 192), (3, 27, 3, 3, 10), (1, 48, 9, 1, 1), (2, 16, 8, 16, 16)]


def operands(shape, dtype, device):
    """x, weight, bias and residual for (B, in, H, W, out), the maps in channels_last memory."""
    batch, in_channels, height, width, out_channels = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = (
        (batch, in_channels, height, width),
        (out_channels, in_channels),
        (out_channels,),
        (batch, out_channels, height, width),
    )
    x, weight, bias, residual = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    last = torch.channels_last
    return x.contiguous(memory_format=last), weight / in_channels**0.5, bias, residual.contiguous(memory_format=last)


def expected(*tensors, activation="none"):
    return linear_reference(*(None if t is None else t.double() for t in tensors), activation=activation)


def check(actual, wanted, dtype):
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_agrees_with_double_precision(shape, dtype, device):
    given = operands(shape, dtype, device)
    check(linear(*given, "gelu"), expected(*given, activation="gelu"), dtype)


@pytest.mark.parametrize("activation", module.ACTIVATIONS)
def test_each_activation_comes_before_the_residual(activation, device):
    x, weight, bias, residual = operands((1, 32, 5, 3, 24), torch.float32, device)
    x[0, :, 0, 0] = 40.0 * weight[0].sign()  # large values of both signs: no overflow on the way
    x[0, :, 1, 0] = -40.0 * weight[0].sign()
    check(
        linear(x, weight, bias, residual, activation),
        expected(x, weight, bias, residual, activation=activation),
        torch.float32,
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_is_exact_for_every_number_of_half_precision(dtype, activation, device):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)
    numbers = numbers[numbers.isfinite()]
    x = numbers.view(1, 1, -1, 1)
    actual = linear(x, torch.ones(1, 1, dtype=dtype, device=device), activation=activation, tile=(256, 16, 16, 4, 2))
    wanted = module.activate(numbers.double(), activation)
    kept = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]  # the last bit: the interpreter truncates to bf16
    torch.testing.assert_close(actual.flatten().double(), wanted, rtol=1.01 * kept, atol=6e-8)  # fp16's smallest number


@pytest.mark.parametrize("activation", module.ACTIVATIONS)
def test_what_is_no_number_stays_none(activation, device):
    for dtype in DTYPES:
        x = torch.full((1, 16, 1, 1), torch.nan, dtype=dtype, device=device)
        assert linear(x, torch.ones(1, 16, dtype=dtype, device=device), activation=activation).isnan().all()


def test_bias_and_residual_may_be_absent_and_bias_may_be_wider(device):
    x, weight, bias, residual = operands((2, 40, 3, 3, 24), torch.float16, device)
    check(linear(x, weight), expected(x, weight), torch.float16)
    check(linear(x, weight, None, residual), expected(x, weight, None, residual), torch.float16)
    check(linear(x, weight, bias.float()), expected(x, weight, bias), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_tile_gives_the_same(dtype, device):
    given = operands((2, 64, 9, 8, 72), dtype, device)
    wanted = expected(*given)
    candidates = tiles(144, 64, 72, dtype)
    assert len(candidates) > 4
    for tile in candidates:
        check(linear(*given, tile=tile), wanted, dtype)


def test_other_memory_layouts_are_taken(device):
    x, weight, bias, residual = operands((2, 32, 4, 6, 20), torch.float32, device)
    wanted = expected(x, weight, bias, residual)
    check(linear(x.contiguous(), weight.T.contiguous().T, bias, residual.contiguous()), wanted, torch.float32)
    check(linear(x.mT.contiguous().mT, weight, bias, residual), wanted, torch.float32)


def test_nothing_outside_is_read_or_written(device):
    from visformer.kernels.linear_triton import launch_linear

    x, weight, bias, residual = operands((1, 24, 5, 5, 40), torch.float32, device)
    around = torch.full((75, 24), torch.nan, device=device)
    around[25:50] = x.permute(0, 2, 3, 1).reshape(25, 24)
    inner = around[25:50].view(1, 5, 5, 24).permute(0, 3, 1, 2)
    room = torch.full((75, 40), 7.0, device=device)
    out = room[25:50].view(1, 5, 5, 40).permute(0, 3, 1, 2)
    launch_linear(inner, weight, bias, residual, out, "none", (16, 32, 16, 2, 2))
    check(out, expected(x, weight, bias, residual), torch.float32)
    assert (room[:25] == 7).all() and (room[50:] == 7).all()


def test_elsewhere_the_reference_is_computed(monkeypatch):
    given = operands((2, 32, 4, 6, 20), torch.bfloat16, "cpu")
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    check(linear(*given, "relu"), linear_reference(*given, "relu").double(), torch.bfloat16)
    double = operands((2, 32, 4, 6, 20), torch.float64, "cpu")
    check(linear(*double), linear_reference(*double), torch.float64)
    empty = operands((2, 32, 4, 6, 20), torch.bfloat16, "cpu")[0][:0]
    assert linear(empty, given[1]).shape == (0, 20, 4, 6)


@pytest.mark.parametrize("shape", [(2, 32, 4, 6, 20), (1, 8, 1, 1, 3)])
def test_the_operator_is_registered_in_full(shape, device):
    given = operands(shape, torch.float32, device)
    torch.library.opcheck(torch.ops.visformer.linear.default, (*given, "gelu"))


def test_torch_compile_sees_one_node(device):
    given = operands((2, 32, 4, 6, 20), torch.float32, device)
    compiled = torch.compile(lambda *tensors: linear(*tensors, "gelu") * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), linear(*given, "gelu") * 2)


def test_what_does_not_fit_is_told(device):
    x, weight, bias, residual = operands((2, 32, 4, 6, 20), torch.float32, device)
    with pytest.raises(UsageError, match=r"x is \(32,\) of torch.float32; it must be a floating point map"):
        linear(bias.new_zeros(32), weight)
    with pytest.raises(UsageError, match=r"weight is \(20, 30\) of torch.float32; it must be \(20, 32\)"):
        linear(x, weight[:, :30])
    with pytest.raises(UsageError, match=r"it must be \(20, 32\) of torch.float32"):
        linear(x, weight.half())
    with pytest.raises(UsageError, match=r"bias is \(19,\)"):
        linear(x, weight, bias[:19])
    with pytest.raises(UsageError, match=r"residual is \(1, 20, 4, 6\)"):
        linear(x, weight, bias, residual[:1])
    with pytest.raises(UsageError, match="no activation 'geluu'; there are: none, gelu"):
        linear(x, weight, activation="geluu")
    with pytest.raises(UsageError, match=r"tile \(16, 16\) is not possible; it has 5 numbers"):
        linear(x, weight, tile=(16, 16))


PRODUCTS = [(50176, 384, 1152), (200704, 96, 192), (12544, 3072, 768), (49, 768, 2304), (256, 768, 1000), (1, 3, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, in_channels, out_channels", PRODUCTS)
def test_tiles_fit_the_device_and_the_problem(rows, in_channels, out_channels, dtype):
    candidates = tiles(rows, in_channels, out_channels, dtype)
    assert 1 <= len(candidates) <= 12 and len(set(candidates)) == len(candidates)
    for block_rows, block_out, block_in, num_warps, num_stages in candidates:
        assert num_stages * (block_rows + block_out) * block_in * dtype.itemsize <= 227 * 1024
        assert block_rows * block_out / (32 * num_warps) <= 128  # registers of the accumulator
        assert block_rows < max(2 * rows, 17) and block_out < max(2 * out_channels, 17) and block_in >= 16
        assert block_in <= max(16, 2 * in_channels)


def test_the_first_tile_fills_the_device_when_there_are_rows_enough():
    block_rows, block_out, *_ = tiles(50176, 384, 1152, torch.bfloat16)[0]
    assert block_rows * block_out >= 128 * 128
    block_rows, block_out, *_ = tiles(196, 384, 1152, torch.bfloat16)[0]
    assert -(-196 // block_rows) * -(-1152 // block_out) > 66  # programs, for 132 multiprocessors


COMPILED = """
from visformer.kernels import linear, linear_fp8

def one(rows, in_channels, out_channels, dtype, activation, weight_dtype=None):
    x = torch.empty(rows, 1, 1, in_channels, dtype=dtype).permute(0, 3, 1, 2)
    residual = torch.empty(rows, 1, 1, out_channels, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.empty(out_channels, in_channels, dtype=weight_dtype or dtype)
    bias = torch.empty(out_channels)
    if weight_dtype:
        linear_fp8.linear_fp8(x, weight, bias, bias, residual, activation)
    else:
        linear.linear(x, weight, bias, residual, activation)

for dtype in (torch.bfloat16, torch.float16, torch.float32):
    one(50176, 384, 1152, dtype, "gelu")
one(49, 384, 1152, torch.bfloat16, "gelu_tanh")
one(50176, 384, 1152, torch.bfloat16, "none", torch.float8_e4m3fn)
one(1, 1, 1, torch.float32, "relu")  # the compiler makes constants of arguments that are 1
one(300, 27, 1, torch.float16, "none")
"""


def test_the_first_tiles_compile_for_hopper(compile_ahead):
    bfloat16, float16, float32, few_rows, float8, *small = compile_ahead(COMPILED)
    assert len(small) == 2
    for kernel in (bfloat16, float16, float8):
        assert kernel.wgmma, "Hopper's own products"
    assert few_rows.wgmma or few_rows.mma
    assert not float32.wgmma and not float32.mma, "fp32 in full"
    for kernel in (bfloat16, float16, float32, few_rows, float8, *small):
        assert 0 < kernel.registers <= 255 and kernel.spilled_bytes == 0, kernel
        assert kernel.shared_bytes <= 227 * 1024 and (kernel in small or kernel.widest_access == 16), kernel


def test_fp8_multiplies_what_eight_bits_hold_exactly(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-7, 8, (2, 48, 3, 3), generator=generator).float()
    x[:, 0] = 448.0  # so that the scale of each row is 1
    x[1, :, 2, 2] = 0.0  # and a row of zeros
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    weight, scale = quantize_weight(torch.randn(20, 48, generator=generator).to(device))
    bias, residual = torch.randn(20, device=device), torch.randn(2, 20, 3, 3, device=device)
    for tile in module_fp8.tiles(18, 48, 20, torch.float32):
        actual = linear_fp8(x, weight, scale, bias, residual, "relu", tile)
        wanted = linear_fp8_reference(x, weight, scale, bias, residual, "relu")
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


def test_fp8_scales_rows_by_their_largest_value(device):
    x = torch.zeros(1, 32, 1, 3, device=device)
    x[0, 3] = torch.tensor([[1e-3, 5.0, 3e4]])
    weight, scale = quantize_weight(torch.eye(32, device=device) * 2)
    actual = linear_fp8(x, weight, scale)
    torch.testing.assert_close(actual[0, 3, 0], 2 * x[0, 3, 0], rtol=1e-5, atol=0)
    assert actual[0, :3].abs().max() == 0


def test_fp8_is_near_and_names_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(module_fp8, "runs_triton", lambda x: False)
    x, weight, bias, _ = operands((2, 64, 5, 5, 30), torch.bfloat16, "cpu")
    eight, scale = quantize_weight(weight)
    assert eight.dtype == FLOAT8 and scale.shape == (30,)
    actual, wanted = linear_fp8(x, eight, scale, bias), expected(x, weight, bias)
    assert actual.dtype == torch.bfloat16
    assert 0.001 < (actual - wanted).norm() / wanted.norm() < 0.05  # three bits of mantissa
    torch.library.opcheck(
        torch.ops.visformer.linear_fp8.default,
        (x, eight, scale, bias, None, "gelu"),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # the check of the schema perturbs arguments, which torch cannot in eight bits
    with pytest.raises(UsageError, match=r"weight is .* it must be \(30, 64\) of torch.float8_e4m3fn"):
        linear_fp8(x, weight, scale)
