"""The grouped 3x3 convolution: every kind of tile against the reference in fp64, gradients, and what it compiles to."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import conv2d

from visformer.errors import UsageError
from visformer.kernels import grouped_conv as op
from visformer.kernels.grouped_conv_tiles import GroupedTile
from visformer.kernels.linear import activate
from visformer.models import VARIANTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An output is rounded once; the interpreter cuts bf16 off instead, an error of a whole unit in the last place.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
}
SHAPES = (  # batch, channels, height, width, groups
    (1, 24, 5, 7, 2),  # groups of 12, patches that reach over both edges
    (2, 64, 1, 1, 4),  # 16, one position
    (3, 48, 3, 2, 2),  # 24
    (1, 64, 2, 9, 2),  # 32
    (1, 96, 4, 3, 2),  # 48
    (1, 10, 4, 4, 2),  # 5, a width that no block divides
    (1, 70, 3, 3, 1),  # dense, more columns than a block
)


def inputs(shape, dtype, device, seed=0):
    batch, channels, height, width, groups = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(channels, channels // groups, 3, 3, generator=generator) * (channels // groups) ** -0.5 / 3
    bias = torch.randn(channels, generator=generator)
    x, weight = (t.to(device, dtype) for t in (x, weight))
    return x.contiguous(memory_format=torch.channels_last), weight, bias.to(device)


def exact(x, weight, bias, groups, activation):
    bias = None if bias is None else bias.double()
    return activate(conv2d(x.double(), weight.double(), bias, padding=1, groups=groups), activation)


def kinds(tiles):
    """One tile of each kind of row and block."""
    return list({tile[1:6]: tile for tile in reversed(tiles)}.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_of_tile_gives_the_convolution(shape, dtype, device):
    x, weight, bias = inputs(shape, dtype, device)
    groups = shape[-1]
    want = exact(x, weight, bias, groups, "gelu")
    tiles = kinds(op.tiles(*shape, dtype))
    for tile in tiles if dtype == torch.float32 else tiles[-1:]:
        out = op.grouped_conv(x, weight, bias, groups, "gelu", tile)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_activations_and_no_bias(activation, with_bias, device):
    shape = (2, 24, 3, 4, 2)
    x, weight, bias = inputs(shape, torch.float32, device)
    bias = bias if with_bias else None
    out = op.grouped_conv(x, weight, bias, 2, activation)
    torch.testing.assert_close(out.double(), exact(x, weight, bias, 2, activation), **TOLERANCE[torch.float32])


def test_rows_next_to_one_another_in_memory_do_not_mix(device):
    """A map of one large value: what lies beside it in memory but not in the image stays zero."""
    x = torch.zeros(2, 16, 4, 5, device=device)
    x[0, :, 1, 4] = 1.0  # at the right edge; the next place in memory is the left edge of the row below
    x[0, :, 3, 2] = 1.0  # at the bottom; the next row in memory is the next image
    weight = torch.ones(16, 16, 3, 3, device=device)
    out = op.grouped_conv(x, weight).cpu()
    assert torch.equal(out, exact(x, weight, None, 1, "none").float().cpu())
    assert out[1].count_nonzero() == 0 and out[0, :, :, 0].count_nonzero() == 0


def test_an_input_in_any_layout(device):
    x, weight, bias = inputs((2, 24, 3, 4, 2), torch.float32, device)
    out = op.grouped_conv(x, weight, bias, 2)
    assert torch.equal(op.grouped_conv(x.contiguous(), weight, bias, 2), out)
    spread = x.new_zeros(2, 24, 3, 8)[..., ::2].copy_(x)
    assert torch.equal(op.grouped_conv(spread, weight, bias, 2), out)


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize(
    "tile", [(16, 16, 16, 1, 1, 1, 4, 1), (16, 64, 16, 2, 2, 1, 4, 1), (16, 64, 16, 1, 2, 2, 4, 1)], ids=str
)
def test_a_packed_weight_is_the_same_weight(tile, interpret, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    x, weight, bias = inputs((1, 24, 3, 5, 2), torch.float32, device)
    packed = op.pack_weight(weight, 2, tile)
    assert torch.equal(op._unpack_weight(packed, 2, GroupedTile(*tile)), weight)
    with torch.no_grad():
        out = op.grouped_conv(x, packed, bias, 2, "gelu", tile)
    assert torch.equal(out, op.grouped_conv(x, weight, bias, 2, "gelu", tile))


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_gradients_of_the_kernels(activation, device):
    shape = (2, 24, 3, 5, 2)
    leaves = [t.requires_grad_() for t in inputs(shape, torch.float32, device)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = op.grouped_conv(*leaves, 2, activation)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found = torch.autograd.grad(out, leaves, grad)
    want = torch.autograd.grad(exact(*wide, 2, activation), wide, grad.double())
    for name, one, other in zip(("x", "weight", "bias"), found, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 3, 5, 2), (3, 32, 4, 4, 1), (1, 96, 3, 2, 2)], ids=str)
def test_every_tile_gives_the_gradient_of_the_weight(shape, dtype, device):
    x, weight, _ = inputs(shape, dtype, device)
    grad = inputs(shape, dtype, device, seed=1)[0]
    want = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1, groups=shape[-1])
    tiles = op.weight_grad_tiles(*shape, dtype)
    for tile in tiles if dtype == torch.float32 else tiles[:1]:
        found = torch.ops.visformer.grouped_conv_weight_grad(grad, x, shape[-1], tile)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)


def test_gradients_in_several_parts(device):
    """Parts whose share is empty, and parts that end in the middle of a block."""
    shape = (3, 16, 5, 7, 1)
    x, weight, _ = inputs(shape, torch.float32, device)
    want = torch.nn.grad.conv2d_weight(x.double(), weight.shape, x.double(), padding=1)
    for parts in (1, 3, 40):
        tile = (16, 64, 16, 1, 1, parts, 4, 1)
        found = torch.ops.visformer.grouped_conv_weight_grad(x, x, 1, tile)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_the_formula_of_the_gradient(activation, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    leaves = [t.double().requires_grad_() for t in inputs((1, 6, 3, 3, 2), torch.float32, "cpu")]
    assert torch.autograd.gradcheck(lambda *a: op.grouped_conv_reference(*a, 2, activation), leaves)
    assert torch.autograd.gradcheck(lambda *a: op.grouped_conv(*a, 2, activation), leaves)


def test_a_second_derivative_is_refused():
    x, weight, bias = (t.requires_grad_() for t in inputs((1, 24, 3, 3, 2), torch.float32, "cpu"))
    (first,) = torch.autograd.grad(op.grouped_conv(x, weight, bias, 2, "gelu").sum(), weight, create_graph=True)
    with pytest.raises(UsageError, match=r"no second derivative.*grouped_conv_reference"):
        first.sum().backward()


def test_autocast_casts_and_gradients_come_back_in_fp32(device):
    x, weight, bias = (t.requires_grad_() for t in inputs((1, 24, 3, 3, 2), torch.float32, device))
    with torch.autocast(device, torch.bfloat16):
        out = op.grouped_conv(x, weight, bias, 2, "gelu")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_operators_are_well_formed(activation, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight, bias = (t.requires_grad_() for t in inputs((2, 8, 3, 4, 2), torch.float32, "cpu"))
    torch.library.opcheck(torch.ops.visformer.grouped_conv, (x, weight, bias, 2, activation))
    plain = [t.detach() for t in (x, x, weight)]
    if activation != "none":
        torch.library.opcheck(torch.ops.visformer.grouped_conv_activation_grad, (*plain, None, 2, activation))
    torch.library.opcheck(torch.ops.visformer.grouped_conv_weight_grad, (x.detach(), x.detach(), 2))


def test_compiled_as_one_graph(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight, bias = (t.requires_grad_() for t in inputs((2, 8, 3, 4, 2), torch.float32, "cpu"))

    def loss(x, weight, bias):
        return op.grouped_conv(x, weight, bias, 2, "gelu").square().sum()

    want = torch.autograd.grad(loss(x, weight, bias), (x, weight, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias)), want)


def test_no_image_at_all(device):
    x, weight, bias = inputs((0, 24, 3, 3, 2), torch.float32, device)
    assert op.grouped_conv(x, weight, bias, 2).shape == (0, 24, 3, 3)


TILE = (16, 16, 16, 1, 1, 1, 4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "24 channels do not make 5 equal groups"),
        ({"groups": 3}, r"weight is \(24, 12, 3, 3\).*must be \(24, 8, 3, 3\)"),
        ({"weight": torch.zeros(24, 12, 3, 3, dtype=torch.float16)}, "must be .* of torch.float32"),
        ({"bias": torch.zeros(23)}, r"bias is \(23,\)"),
        ({"activation": "relu"}, "no activation 'relu'; there are: none, gelu, gelu_tanh"),
        ({"tile": (16, 16)}, "block_patches, block_outputs"),
        ({"tile": (24, *TILE[1:])}, "powers of two from 16 up"),
        ({"tile": (*TILE[:5], 4, 4, 1)}, "bundle .* divides the 2 groups"),
        ({"weight": torch.zeros(2, 108, 12), "tile": (16, 64, 16, 2, 2, 1, 4, 1)}, "packed for tile"),
        ({"x": torch.zeros(24, 3, 3)}, r"\(B, C, H, W\)"),
    ],
)
def test_what_does_not_fit_is_said(change, message, device):
    x, weight, bias = inputs((1, 24, 3, 3, 2), torch.float32, device)
    with pytest.raises(UsageError, match=message):
        op.grouped_conv(**{"x": x, "weight": weight, "bias": bias, "groups": 2} | change)


def test_a_packed_weight_does_not_train():
    x, weight, _ = inputs((1, 24, 3, 3, 2), torch.float32, "cpu")
    with pytest.raises(UsageError, match="packed for inference"):
        op.grouped_conv(x.requires_grad_(), op.pack_weight(weight, 2, TILE), None, 2, "none", TILE)


def test_no_triton_is_needed():
    """On a CPU, where it is not installed."""
    statements = """
import sys
sys.modules["triton"] = None
import torch
from visformer.kernels import grouped_conv, launch, patch_embed, stem
x = torch.ones(1, 4, 5, 5, requires_grad=True)
grouped_conv.grouped_conv(x, torch.ones(4, 2, 3, 3), None, 2, "gelu").sum().backward()
print(x.grad.shape, stem.stem(x, torch.ones(8, 4, 7, 7), torch.ones(8)).shape[1], launch.interpreted())
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", statements], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "torch.Size([1, 4, 5, 5]) 8 False", done.stderr


def spatial_maps():
    """(channels, height, groups) of every grouped convolution of the published models at 224 pixels."""
    found = set()
    for variant in VARIANTS.values():
        architecture = variant.architecture
        for stage, grid in zip(architecture.stages, architecture.grids, strict=True):
            if stage.spatial_mlp and stage.depth and architecture.groups > 1:
                found.add((2 * stage.width, grid[0], architecture.groups))
    return sorted(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 256])
def test_candidates_for_the_models(batch, dtype):
    assert {channels // groups for channels, _, groups in spatial_maps()} == {12, 16, 24, 32, 48}
    for channels, side, groups in spatial_maps():
        shape = (batch, channels, side, side, groups)
        for candidates in (op.tiles(*shape, dtype), op.weight_grad_tiles(*shape, dtype)):
            assert 3 <= len(candidates) <= 12 and len(set(candidates)) == len(candidates)
            for tile in candidates:
                blocks = tile[:3]
                assert all(side >= 16 and side & (side - 1) == 0 for side in blocks)
                operands = blocks[2] * (blocks[0] + blocks[1])
                assert tile[-1] * operands * dtype.itemsize <= 227 * 1024
        patches = batch * side * side
        assert all(tile[0] < 2 * patches for tile in op.tiles(*shape, dtype))


def test_machine_code(compile_ahead):
    statements = """
from visformer.kernels import grouped_conv as op
def run(channels, side, dtype):
    x = torch.empty(256, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.zeros(channels, channels // 8, 3, 3, dtype=dtype)
    op.grouped_conv(x, weight, None, 8, "gelu")
    torch.ops.visformer.grouped_conv_weight_grad(x, x, 8)
    if dtype == torch.bfloat16:
        torch.ops.visformer.grouped_conv_activation_grad(x, x, weight, None, 8, "gelu")
run(384, 28, torch.bfloat16)
run(192, 28, torch.float16)
run(96, 56, torch.float32)
one = torch.zeros(1, 16, 1, 1)  # Triton makes constants of numbers that are 1
op.grouped_conv(one, torch.zeros(16, 16, 3, 3), torch.zeros(16), 1)
torch.ops.visformer.grouped_conv_weight_grad(one, one, 1)
"""
    compiled = compile_ahead(statements)
    assert [c.kernel for c in compiled] == [
        *("grouped_conv_kernel", "weight_grad_kernel", "grouped_conv_kernel"),
        *("grouped_conv_kernel", "weight_grad_kernel") * 3,
    ]
    for used in compiled:
        assert 0 < used.registers <= 255 and used.spilled_bytes == 0, used
        assert used.shared_bytes <= 227 * 1024, used
    assert all(used.wgmma for used in compiled[:5]), "halves are multiplied by Hopper's own instructions"
    assert all(used.widest_access == 16 for used in compiled[:5]), "16 bytes a thread and access"
