"""The stem: exact at every border for raw pixels and for normalised ones, and what it compiles to."""

import pytest
import torch
from torch.nn.functional import conv2d, relu

from visformer.errors import UsageError
from visformer.kernels import stem as op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An output is rounded once; the interpreter cuts bf16 off instead, an error of a whole unit in the last place.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
}
MEAN, STD = (123.675, 116.28, 103.53, 90.0), (58.395, 57.12, 57.375, 60.0)
SHAPES = (  # batch, in, height, width, out
    (2, 3, 9, 8, 16),  # words, an odd height
    (1, 3, 5, 4, 32),  # a window that lies outside on both sides
    (1, 3, 7, 13, 24),  # rows of 39 bytes, no words; 24 channels
    (1, 1, 1, 1, 16),  # one pixel
    (2, 4, 6, 11, 8),  # four channels, an odd width in words
)


def inputs(shape, dtype, device):
    """Pixels, weight and bias of the plain model, and the pixels normalised."""
    batch, channels, height, width, out_channels = shape
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, height, width, channels), generator=generator, dtype=torch.uint8)
    weight = (torch.randn(out_channels, channels, 7, 7, generator=generator) * 0.1).to(device, dtype)
    bias = torch.randn(out_channels, generator=generator).to(device)
    pixels = pixels.permute(0, 3, 1, 2).to(device)
    mean, std = (torch.tensor(v[:channels], dtype=torch.float64, device=device)[:, None, None] for v in (MEAN, STD))
    return pixels, weight, bias, (pixels.double() - mean) / std


def exact(x, weight, bias):
    return relu(conv2d(x.double(), weight.double(), bias.double(), stride=2, padding=3))


def kinds(tiles):
    """One tile of each kind of strip and block."""
    return list({tile[1:4]: tile for tile in reversed(tiles)}.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_with_the_normalisation_folded_in(shape, dtype, device):
    """Held against the plain stem on normalised pixels, with what rounding the folded weight changes left out."""
    channels = shape[1]
    pixels, weight, bias, normalised = inputs(shape, dtype, device)
    folded, table = op.fold_normalisation(weight, bias, MEAN[:channels], STD[:channels])
    std = torch.tensor(STD[:channels], dtype=torch.float64, device=device)[:, None, None]
    want = exact(normalised, folded.double() * std, bias)
    torch.testing.assert_close(op.stem_reference(pixels, folded, table).double(), want, **TOLERANCE[dtype])
    tiles = kinds(op.tiles(*shape, torch.uint8, dtype))
    assert any(tile[3] for tile in tiles) == (shape[1] * shape[3] % 4 == 0 and shape[3] > 2)
    for tile in tiles if dtype == torch.float32 else tiles[-1:]:
        out = op.stem(pixels, folded, table, tile)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.double(), want, **TOLERANCE[dtype])
        assert torch.equal(op.stem(pixels, op.pack_weight(folded, tile), table, tile), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalised_input(shape, dtype, device):
    _, weight, bias, normalised = inputs(shape, dtype, device)
    x = normalised.to(dtype)
    tiles = kinds(op.tiles(*shape, dtype, dtype))
    assert not any(tile[3] for tile in tiles)
    for tile in tiles if dtype == torch.float32 else tiles[-1:]:
        torch.testing.assert_close(op.stem(x, weight, bias, tile).double(), exact(x, weight, bias), **TOLERANCE[dtype])


def test_a_grey_image_is_zero_after_normalisation_up_to_its_edge(device):
    """Pixels of exactly the mean: what is left is the bias, at the border too, where zeros surround the image."""
    pixels = torch.full((1, 3, 12, 12), 128, dtype=torch.uint8, device=device)
    weight, bias = torch.randn(16, 3, 7, 7, device=device), torch.linspace(0.5, 1.5, 16, device=device)
    folded, table = op.fold_normalisation(weight, bias, (128.0,) * 3, (50.0,) * 3)
    out = op.stem(pixels, folded, table)
    torch.testing.assert_close(out, bias[:, None, None].expand(1, 16, 6, 6), rtol=1e-4, atol=1e-4)


def test_the_weight_is_packed_without_loss():
    weight = torch.randn(16, 3, 7, 7)
    for tile in op.tiles(1, 3, 32, 32, 16, torch.uint8, torch.float32):
        packed = op.pack_weight(weight, tile)
        assert torch.equal(op._unpack_weight(packed, 3, op.StemTile(*tile)), weight)
        span, words = tile[2:4]
        assert packed.shape[0] == (4 if words else 1) and packed.count_nonzero() == span * weight.numel()


def test_an_input_in_any_layout(device):
    pixels, weight, bias, _ = inputs((2, 3, 9, 8, 16), torch.float32, device)
    folded, table = op.fold_normalisation(weight, bias, MEAN[:3], STD[:3])
    out = op.stem(pixels, folded, table)
    assert torch.equal(op.stem(pixels.contiguous(), folded, table), out)
    assert torch.equal(op.stem(pixels.flip(0), folded, table).flip(0), out)


def test_the_operator_is_well_formed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    pixels, weight, bias, normalised = inputs((2, 3, 9, 8, 16), torch.float32, "cpu")
    folded, table = op.fold_normalisation(weight, bias, MEAN[:3], STD[:3])
    tile = op.tiles(2, 3, 9, 8, 16, torch.uint8, torch.float32)[0]
    torch.library.opcheck(torch.ops.visformer.stem, (pixels, folded, table))
    torch.library.opcheck(torch.ops.visformer.stem, (pixels, op.pack_weight(folded, tile), table, tile))
    torch.library.opcheck(torch.ops.visformer.stem, (normalised.float(), weight, bias))


def test_no_image_at_all(device):
    out = op.stem(torch.zeros(0, 3, 9, 8, device=device), torch.zeros(16, 3, 7, 7, device=device), torch.zeros(16))
    assert out.shape == (0, 16, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, r"\(B, C, H, W\)"),
        ({"x": torch.zeros(1, 3, 8, 8).half()}, "uint8 or torch.float32"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, r"bias is \(16,\).*must be \(256, 16\)"),
        ({"weight": torch.zeros(16, 3, 5, 5)}, r"must be \(16, 3, 7, 7\)"),
        ({"tile": (16, 16, 2)}, "block_strips, block_inputs, span"),
        ({"tile": (16, 24, 2, 0, 4, 1)}, "powers of two from 16 up"),
        ({"tile": (16, 16, 1, 1, 4, 1)}, "when span is even"),
        ({"tile": (16, 16, 2, 1, 4, 1)}, "reads words; x, .* must be uint8"),
        ({"weight": torch.zeros(1, 10, 32), "tile": (16, 16, 2, 0, 4, 1)}, "packed for tile"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    given = {"x": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(16, 3, 7, 7), "bias": torch.zeros(16)} | change
    with pytest.raises(UsageError, match=message):
        op.stem(**given)


def test_one_mean_for_each_channel():
    with pytest.raises(UsageError, match="2 means and 3 deviations for 3 channels"):
        op.fold_normalisation(torch.zeros(16, 3, 7, 7), torch.zeros(16), (1.0, 2.0), STD[:3])


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_channels", [16, 24, 32])
def test_candidates_for_the_models(batch, dtype, out_channels):
    for x_dtype in (torch.uint8, dtype):
        candidates = op.tiles(batch, 3, 224, 224, out_channels, x_dtype, dtype)
        assert 3 <= len(candidates) <= 12 and len(set(candidates)) == len(candidates)
        assert candidates[0][3] == (x_dtype == torch.uint8)
        for block_strips, block_inputs, span, words, num_warps, _ in candidates:
            assert block_strips * span <= batch * 112 * 112
            assert words in (0, 1) and block_inputs >= 16
            assert block_strips * span * out_channels <= 32 * num_warps * 64


def test_machine_code(compile_ahead):
    statements = """
from visformer.kernels import stem as op
def run(channels, x_dtype, dtype):
    x = torch.empty(256, 224, 224, 3, dtype=x_dtype).permute(0, 3, 1, 2)
    weight, table = torch.zeros(channels, 3, 7, 7, dtype=dtype), torch.zeros(256, channels)
    op.stem(x, weight, table if x_dtype == torch.uint8 else table[0])
run(32, torch.uint8, torch.bfloat16)
run(16, torch.uint8, torch.float16)
run(32, torch.bfloat16, torch.bfloat16)
run(16, torch.uint8, torch.float32)
run(16, torch.float32, torch.float32)
# Triton makes constants of numbers that are 1
op.stem(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(16, 1, 7, 7), torch.zeros(256, 16))
op.stem(torch.zeros(1, 4, 1, 3, dtype=torch.uint8), torch.zeros(16, 4, 7, 7), torch.zeros(256, 16))
"""
    compiled = compile_ahead(statements)
    words, numbers = "stem_words_kernel", "stem_kernel"
    assert [used.kernel for used in compiled] == [words, words, numbers, words, numbers, numbers, words]
    for used in compiled:
        assert 0 < used.registers <= 255 and used.spilled_bytes == 0, used
        assert used.shared_bytes <= 227 * 1024, used
    assert all(used.wgmma for used in compiled[:3]), "halves are multiplied by Hopper's own instructions"
