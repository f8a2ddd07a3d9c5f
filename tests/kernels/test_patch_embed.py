"""The patch embedding: every kind of tile against the convolution in fp64, with its map of biases, and what it compiles
to."""

import pytest
import torch
from torch.nn.functional import conv2d, pad

from visformer.errors import UsageError
from visformer.kernels import patch_embed as op
from visformer.models.layers import PatchEmbed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An output is rounded once; the interpreter cuts bf16 off instead, an error of a whole unit in the last place.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
}
SHAPES = (  # batch, in, height, width, out, patch_size
    (2, 16, 9, 8, 24, 4),  # one row of pixels over; 24 channels
    (1, 24, 6, 10, 40, 2),
    (3, 3, 17, 20, 16, 16),  # 3 channels, patches mostly of padding
    (1, 5, 3, 3, 7, 2),  # widths that no block divides
    (1, 8, 1, 1, 16, 2),  # less than one patch
    (2, 32, 4, 4, 130, 1),  # a 1x1 convolution, more channels than a block
)


def inputs(shape, dtype, device):
    batch, channels, height, width, out_channels, patch_size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, height, width, channels, generator=generator).permute(0, 3, 1, 2)
    weight = torch.randn(out_channels, channels, patch_size, patch_size, generator=generator)
    weight *= (channels * patch_size**2) ** -0.5
    grid = (-(-height // patch_size), -(-width // patch_size))
    biases = torch.randn(grid[0] * grid[1], out_channels, generator=generator)
    return x.to(device, dtype), weight.to(device, dtype), biases.to(device), grid


def exact(x, weight, biases, grid):
    patch_size = weight.shape[-1]
    x = pad(x.double(), (0, -x.shape[3] % patch_size, 0, -x.shape[2] % patch_size))
    return conv2d(x, weight.double(), stride=patch_size) + biases.double().T.reshape(-1, *grid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_gives_the_convolution(shape, dtype, device):
    x, weight, biases, grid = inputs(shape, dtype, device)
    packed, want = op.pack_weight(weight), exact(x, weight, biases, grid)
    torch.testing.assert_close(
        op.patch_embed_reference(x, packed, biases, shape[-1]).double(), want, rtol=2**-6, atol=2**-6
    )
    tiles = op.tiles(*shape, dtype)
    for tile in tiles if dtype == torch.float32 else tiles[:1]:
        out = op.patch_embed(x, packed, biases, shape[-1], tile)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_one_bias_for_all_positions_or_none(interpret, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    x, weight, biases, grid = inputs((2, 16, 9, 8, 24, 4), torch.float32, device)
    packed, one = op.pack_weight(weight), biases[:1]
    found = op.patch_embed(x, packed, one, 4).double()
    torch.testing.assert_close(found, exact(x, weight, one.expand_as(biases), grid), **TOLERANCE[torch.float32])
    found = op.patch_embed(x, packed, None, 4).double()
    torch.testing.assert_close(found, exact(x, weight, 0 * biases, grid), **TOLERANCE[torch.float32])


def test_the_model_s_own_embedding(device):
    """Convolution bias, BatchNorm and position embedding, folded into the weight and the map of biases."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(24)
    module = PatchEmbed(16, 24, 2, norm).eval().to(device)
    for value in (norm.running_mean, norm.weight, norm.bias, module.proj.bias):
        value.data.normal_()
    norm.running_var.uniform_(0.5, 2)
    position, x = torch.randn(1, 24, 4, 3, device=device), torch.randn(2, 16, 7, 6, device=device)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = (module.proj.bias - norm.running_mean) * scale + norm.bias
    biases = position[0].flatten(1).T + bias
    with torch.no_grad():
        want = module(x) + position
        found = op.patch_embed(x, op.pack_weight(module.proj.weight * scale[:, None, None, None]), biases, 2)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_an_input_in_any_layout(device):
    x, weight, biases, _ = inputs((2, 16, 9, 8, 24, 4), torch.float32, device)
    out = op.patch_embed(x, op.pack_weight(weight), biases, 4)
    assert torch.equal(op.patch_embed(x.contiguous(), op.pack_weight(weight), biases, 4), out)


def test_the_operator_is_well_formed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight, biases, _ = inputs((2, 16, 9, 8, 24, 4), torch.float32, "cpu")
    torch.library.opcheck(torch.ops.visformer.patch_embed, (x, op.pack_weight(weight), biases, 4))
    torch.library.opcheck(torch.ops.visformer.patch_embed, (x, op.pack_weight(weight), None, 4))


def test_no_image_at_all(device):
    out = op.patch_embed(torch.zeros(0, 4, 5, 5, device=device), torch.zeros(16, 16, device=device), None, 2)
    assert out.shape == (0, 16, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8, 8)}, r"\(B, C, H, W\)"),
        ({"weight": torch.zeros(16, 4, 2, 2)}, r"must be \(out, inner\)"),
        ({"weight": torch.zeros(16, 17)}, r"must be \(16, 16\)"),
        ({"weight": torch.zeros(16, 16).half()}, "of torch.float32"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"bias": torch.zeros(15, 16)}, r"must be \(16, 16\)"),
        ({"bias": torch.zeros(16)}, r"bias is \(16,\)"),
        ({"tile": (16, 16)}, "block_rows, block_outputs"),
        ({"tile": (16, 24, 16, 4, 1)}, "powers of two from 16 up"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    given = {"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(16, 16), "bias": None, "patch_size": 2} | change
    with pytest.raises(UsageError, match=message):
        op.patch_embed(**given)


MODELS = (  # in, side, out, patch_size
    (16, 112, 96, 4),
    (32, 112, 192, 4),
    (24, 112, 48, 2),
    (192, 28, 384, 2),
    (384, 14, 768, 2),
    (3, 224, 384, 16),
)


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_for_the_models(batch, dtype):
    for in_channels, side, out_channels, patch_size in MODELS:
        candidates = op.tiles(batch, in_channels, side, side, out_channels, patch_size, dtype)
        assert 3 <= len(candidates) <= 12 and len(set(candidates)) == len(candidates)
        for block_rows, block_outputs, block_inputs, num_warps, num_stages in candidates:
            assert block_rows * block_outputs <= 32 * num_warps * (64 if dtype.itemsize < 4 else 32)
            assert num_stages * block_inputs * (block_rows + block_outputs) * dtype.itemsize <= 227 * 1024
            assert block_rows < 2 * max(batch * (side // patch_size) ** 2, 64) and block_outputs < 2 * out_channels


def test_machine_code(compile_ahead):
    statements = """
from visformer.kernels import patch_embed as op
def run(channels, side, out_channels, patch_size, dtype):
    x = torch.empty(256, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.zeros(out_channels, patch_size**2 * channels, dtype=dtype)
    op.patch_embed(x, weight, torch.zeros((side // patch_size) ** 2, out_channels), patch_size)
run(32, 112, 192, 4, torch.bfloat16)
run(192, 28, 384, 2, torch.float16)
run(3, 224, 384, 16, torch.bfloat16)
run(16, 112, 96, 4, torch.float32)
op.patch_embed(torch.zeros(1, 16, 1, 1), torch.zeros(16, 64), torch.zeros(1, 16), 2)  # numbers that are 1: constants
"""
    compiled = compile_ahead(statements)
    assert [used.kernel for used in compiled] == ["patch_embed_kernel"] * 5
    for used in compiled:
        assert 0 < used.registers <= 255 and used.spilled_bytes == 0, used
        assert used.shared_bytes <= 227 * 1024, used
    assert all(used.widest_access == 16 for used in compiled[:4]), "16 bytes a thread and access"
    assert all(used.wgmma for used in compiled[:3]), "halves are multiplied by Hopper's own instructions"
