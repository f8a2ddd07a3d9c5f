"""MindSpore checkpoints: real files, what we write, and what must be refused.

The files in fixtures/ckpt were written by MindSpore 2.10: `dtypes` holds one tensor of each type beside appended values
and a text, `crc` ends in a CRC, `training` is a whole training step with AdamW's moments, `encrypted` is AES-GCM.
"""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import upstream
from tests.conversion.safety import DESTRUCTION, FIXTURES, MINI, PROPERTY, attempt, refused, taken
from visformer.conversion.containers import MAX_TENSORS, Foreign, aligned
from visformer.conversion.mindspore import DTYPES, read_ckpt, read_mindspore, write_ckpt
from visformer.errors import UsageError

CKPT = FIXTURES / "ckpt"


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, content):
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def value(tag, dims, kind, content, more=b""):
    """One `Value`, written after checkpoint.proto and apart from the code under test."""
    tensor = b"".join(field(1, dim) for dim in dims) + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, tag if isinstance(tag, bytes) else tag.encode()) + field(2, tensor) + more)


@pytest.mark.parametrize("name", ["mindcv_mini_v1", "mindcv_mini_v2"])
def test_what_mindcv_wrote_is_read_exactly_and_written_back_byte_for_byte(name, tmp_path):
    source = MINI / f"{name}.ckpt"
    expected = upstream.read_mindspore(source.read_bytes())
    tensors = read_ckpt(source)
    assert list(tensors) == list(expected)
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[key])
    write_ckpt(tmp_path / "copy.ckpt", tensors)
    assert (tmp_path / "copy.ckpt").read_bytes() == source.read_bytes()


def test_every_type_that_mindspore_writes():
    found = read_mindspore(CKPT / "dtypes.ckpt")
    kinds = {name: dtype for name, dtype in DTYPES.items() if name != "BFloat16"}
    for name, dtype in kinds.items():
        assert found.tensors[f"a.{name.lower()}"].dtype == dtype
    assert found.tensors["a.bf16"].dtype == torch.bfloat16 and found.tensors["a.bf16"].shape == (4, 2)
    assert found.tensors["a.bool"].tolist() == [True, False, True]
    rows = np.random.default_rng(0)  # as the fixture was made
    for name in ("float16", "float32", "float64"):
        expected = rows.standard_normal((2, 3)).astype(name)
        assert np.array_equal(found.tensors[f"a.{name}"].numpy(), expected)
    for name in ("int8", "int16", "int32", "int64"):
        expected = (rows.standard_normal((2, 5)) * 50).astype(name)
        assert np.array_equal(found.tensors[f"a.{name}"].numpy(), expected)
    assert found.tensors["scalar"].shape == () and found.tensors["scalar"].item() == 3.5
    assert found.tensors["one"].shape == (1,) and found.tensors["one"].item() == 7
    assert found.tensors["epoch_num"].item() == 7 and found.tensors["loss"].item() == 0.5
    assert found.facts == {"texts": {"note": "hé llo"}}


def test_a_training_step_holds_moments_beside_the_weights():
    tensors = read_ckpt(CKPT / "training.ckpt")
    assert tensors["0.weight"].shape == (4, 3, 3, 3) == tensors["adam_m.0.weight"].shape
    assert tensors["step_num"].item() == 12
    assert tensors["1.gamma"].tolist() == [1, 1, 1, 1]


def test_the_crc_is_held_against_the_content(tmp_path):
    data = (CKPT / "crc.ckpt").read_bytes()
    plain = read_ckpt(CKPT / "dtypes.ckpt")
    for name, tensor in read_ckpt(CKPT / "crc.ckpt").items():
        assert torch.equal(tensor, plain[name])
    assert int.from_bytes(data[-10:], "big") == zlib.crc32(data[:-17])
    at = data.index(b"Float32") + 20
    refused(tmp_path / "flipped.ckpt", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "CRC", "fetch it again")


def test_content_that_ends_like_a_crc_is_content(tmp_path):
    """Found by the fuzzer: what a parameter holds can look like the end of a file with a CRC."""
    like = torch.frombuffer(bytearray(b"abc" + b"crc_num" + bytes(10)), dtype=torch.uint8)
    write_ckpt(tmp_path / "a.ckpt", {"w": torch.ones(1), "like": like})
    assert torch.equal(read_ckpt(tmp_path / "a.ckpt")["like"], like)


def test_an_encrypted_file_is_named_as_one():
    refused(CKPT / "encrypted.ckpt", None, "encrypted", "dec_key")


def test_packed_sizes_unknown_fields_and_scalars_of_older_versions(tmp_path):
    packed = field(1, varint(2) + varint(3)) + field(2, b"Float32") + field(3, bytes(24))
    unknown = field(9, 5) + varint(10 << 3 | 5) + bytes(4) + varint(11 << 3 | 1) + bytes(8) + field(12, b"?")
    file = field(1, unknown + field(1, b"packed") + field(2, packed + unknown)) + unknown
    file += value("old", [0], "Float32", b"\0\0\x80\x3f") + value("none", [0, 3], "Int8", b"")
    tensors = taken(tmp_path / "a.ckpt", file).tensors
    assert tensors["packed"].shape == (2, 3)
    assert tensors["old"].shape == () and tensors["old"].item() == 1
    assert tensors["none"].shape == (0, 3) and tensors["none"].dtype == torch.int8


def test_map_parameters_are_left_alone(tmp_path):
    file = value("w", [1], "Int8", b"\1") + field(1, field(1, b"table") + field(3, b"anything"))
    assert taken(tmp_path / "a.ckpt", file).ignored == [("table", "a map parameter")]


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)
SHAPES = st.lists(st.integers(1, 4), max_size=4)


@st.composite
def tensors_of(draw):
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(SHAPES)
    count = math.prod(shape) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=count, max_size=count)))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@PROPERTY
@given(st.dictionaries(NAMES, tensors_of(), min_size=1, max_size=5), st.sampled_from([8, 16, 1 << 29]))
def test_what_is_written_is_read_back(tmp_path, tensors, piece_bytes):
    write_ckpt(tmp_path / "a.ckpt", tensors, piece_bytes=piece_bytes)
    back = read_ckpt(tmp_path / "a.ckpt")
    assert list(back) == list(tensors)
    assert all(same(back[name], tensor) for name, tensor in tensors.items())


def test_transposed_and_large_parameters(tmp_path):
    tensors = {"t": torch.arange(24.0).reshape(4, 6).t()[::2], "big": torch.arange(100, dtype=torch.int64)}
    write_ckpt(tmp_path / "a.ckpt", tensors, piece_bytes=96)
    data = (tmp_path / "a.ckpt").read_bytes()
    assert data.count(b"\x0a\x03big") == math.ceil(800 / 96), "one Value for each piece, under one tag"
    assert data.count(b"\x08\x64\x12\x05Int64") == 9, "each with the shape of the whole"
    back = read_ckpt(tmp_path / "a.ckpt")
    assert torch.equal(back["t"], tensors["t"]) and torch.equal(back["big"], tensors["big"])


def test_what_the_format_cannot_hold_is_not_written(tmp_path):
    for tensors, word in [
        ({"c": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"e": torch.zeros(0)}, "no values"),
        ({"s": torch.eye(2).to_sparse()}, "sparse"),
        ({"line\nbreak": torch.zeros(1)}, "name"),
    ]:
        with pytest.raises(UsageError, match=word):
            write_ckpt(tmp_path / "a.ckpt", tensors)
        assert not list(tmp_path.iterdir()), "nothing is begun"


def test_views_share_the_map_and_never_write_to_the_file(tmp_path):
    write_ckpt(tmp_path / "a.ckpt", {"x": torch.zeros(3), "yy": torch.ones(3)})
    before = (tmp_path / "a.ckpt").read_bytes()
    tensors = read_ckpt(tmp_path / "a.ckpt")
    tensors["x"].fill_(5)
    tensors["yy"].add_(1)
    assert (tmp_path / "a.ckpt").read_bytes() == before
    assert tensors["x"].tolist() == [5, 5, 5] and tensors["yy"].tolist() == [2, 2, 2]
    assert tensors["x"].untyped_storage().nbytes() == 12


def test_alignment_copies_only_what_begins_at_an_odd_place():
    tensors = read_ckpt(MINI / "mindcv_mini_v1.ckpt")
    odd = [tensor for tensor in tensors.values() if tensor.data_ptr() % 4]
    assert odd, "tags of any length stand before the contents"
    for tensor in tensors.values():
        straight = aligned(tensor)
        assert straight.data_ptr() % 4 == 0 and torch.equal(straight, tensor)
        assert (straight is tensor) == (tensor.data_ptr() % 4 == 0)
    scalar = torch.frombuffer(bytearray(5), dtype=torch.float32, offset=1).reshape(())
    assert aligned(scalar).shape == ()


def test_a_file_cut_off_anywhere_is_refused_or_a_shorter_file(tmp_path):
    pieces = [value("a", [2], "Float32", bytes(8)), value("b", [], "Int8", b"\1"), value("c", [2, 2], "Bool", bytes(4))]
    whole = b"".join(pieces)
    ends = {len(b"".join(pieces[:count])): count for count in (1, 2, 3)}
    for length in range(len(whole) + 1):
        found = attempt(tmp_path / "cut.ckpt", whole[:length])
        if length in ends:
            assert isinstance(found, Foreign) and list(found.tensors) == list("abc")[: ends[length]]
        else:
            assert isinstance(found, str)


@DESTRUCTION
@given(st.data())
def test_flipped_bytes_give_a_result_or_one_line(tmp_path, data):
    file = bytearray((CKPT / data.draw(st.sampled_from(["dtypes.ckpt", "training.ckpt", "crc.ckpt"]))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    attempt(tmp_path / "flipped.ckpt", bytes(file))


@DESTRUCTION
@given(st.binary(max_size=200))
def test_any_bytes_after_the_first_give_a_result_or_one_line(tmp_path, tail):
    attempt(tmp_path / "any.ckpt", b"\x0a" + tail)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (field(1, b"")[:1] + varint(1 << 62), "past its end"),
        (field(1, field(1, b"a") + b"\x12" + varint(1 << 63)), "past its end"),
        (field(1, field(1, b"a") + field(2, field(2, b"Int8") + b"\x1a" + varint(9) + b"x")), "past its end"),
        (value("a", [1 << 40, 1 << 40], "Float32", bytes(4)), "shape"),
        (value("a", [1 << 31], "Float32", bytes(4)), "has 4 bytes"),
        (value("a", [(1 << 64) - 2, (1 << 64) - 2], "Float32", bytes(16)), "shape"),
        (value("a", [0, 1 << 62], "Float32", b""), "shape"),
        (value("a", [1] * 9, "Int8", b"x"), "dimensions"),
        (field(1, field(1, b"a") + field(2, field(1, bytes(1000)) + field(2, b"Int8") + field(3, b""))), "dimensions"),
        (value("a", [1], "Complex64", bytes(8)), "Complex64"),
        (value("a", [1], "Int4", bytes(1)), "Int4"),
        (value("a", [2], "Bool", b"\0\7"), "booleans"),
        (value(b"\xff", [1], "Int8", b"x"), "UTF-8"),
        (value("", [1], "Int8", b"x"), "name"),
        (value("a\nb", [1], "Int8", b"x"), "name"),
        (value("a" * 600, [1], "Int8", b"x"), "name"),
        (value("a" * 5000, [1], "Int8", b"x"), "length"),
        (value("a", [1], "Int8", b"x", more=field(1, b"b")), "twice"),
        (value("a", [1], "Int8", b"x") + value("b", [1], "Int8", b"x") + value("a", [1], "Int8", b"x"), "twice"),
        (value("a", [1], "Int8", b"x") * 2, "has 2 bytes"),
        (value("a", [2], "Int8", b"x") + value("a", [2], "UInt8", b"x"), "disagree"),
        (field(1, field(1, b"a")), "without"),
        (value("a", [1], "Int8", b"x") + field(1, 5), "number where"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "does not end"),
        (b"\x0a" + b"\xff" * 9 + b"\x7f", "does not end"),
        (b"\x0a\x01\x0b", "wire type"),
        (b"\x0a\x02\x00\x00", "impossible"),
        (field(1, field(1, b"a") + field(2, field(2, b"Int8") * 2 + field(3, b"x"))), "repeated"),
        (field(1, field(1, b"a") + field(2, b"\x0d" + bytes(4) + field(2, b"Int8") + field(3, b""))), "wrong kind"),
        (value("t", [0], "str", b"h\0\0"), "text"),
        (value("t", [0], "str", bytes(1 << 17)), "text"),
        (value("t", [0], "str", b"h\0\0\0"), "no tensor"),
    ],
)
def test_lies_are_refused(tmp_path, data, word):
    refused(tmp_path / "a.ckpt", data, word)


def test_ten_thousand_tensors_and_a_million_fields_are_refused_soon(tmp_path):
    many = b"".join(value(f"t{index}", [1], "Int8", b"x") for index in range(10_000))
    refused(tmp_path / "a.ckpt", many, str(MAX_TENSORS))
    refused(tmp_path / "b.ckpt", value("a", [1], "Int8", b"x") + field(9, 1) * 3_000_000, "fields")
