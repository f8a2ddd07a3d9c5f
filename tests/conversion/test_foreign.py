"""Telling files apart by their content, and saying of others what they look like and the way out."""

import gzip
import io
import json
import os
import socket
import struct
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from tests.conversion.safety import DESTRUCTION, MINI, PROPERTY, attempt, private_growth, refused, saved, taken
from tests.conversion.test_mindspore import NAMES, same, tensors_of, value
from visformer.conversion.foreign import MAX_HEADER_BYTES, MAX_TENSORS, read_foreign
from visformer.conversion.mindspore import write_ckpt
from visformer.conversion.pickles import write_pth
from visformer.errors import UsageError

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2]), "c": torch.tensor(0.5).bfloat16()}


def safetensors(header: bytes | dict, content: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + content


def row(shape, start, stop, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}


def test_content_tells_not_the_suffix(tmp_path):
    write_ckpt(tmp_path / "a.pth", TENSORS)
    write_pth(tmp_path / "b.ckpt", TENSORS)
    (tmp_path / "c.bin").write_bytes(save(TENSORS, metadata={"format": "pt", "by": "timm"}))
    (tmp_path / "d").write_bytes(saved(TENSORS, _use_new_zipfile_serialization=False))
    (tmp_path / "e").symlink_to("c.bin")
    kinds = {"a.pth": "mindspore", "b.ckpt": "torch", "c.bin": "safetensors", "d": "torch", "e": "safetensors"}
    for name, kind in kinds.items():
        found = read_foreign(str(tmp_path / name))
        assert found.container == kind
        assert found.tensors.keys() == TENSORS.keys()
        assert all(same(found.tensors[key], tensor) for key, tensor in TENSORS.items())
        assert found.facts == ({"metadata": {"format": "pt", "by": "timm"}} if kind == "safetensors" else {})


@pytest.mark.parametrize("path", sorted([*MINI.glob("*.ckpt"), *MINI.glob("*.pth")]), ids=lambda path: path.name)
def test_every_fixture_is_read(path):
    found = read_foreign(path)
    assert found.container == ("mindspore" if path.suffix == ".ckpt" else "torch")
    assert len(found.tensors) > 20 and all(tensor.numel() for tensor in found.tensors.values())


def test_a_tag_may_look_like_the_header_of_safetensors(tmp_path):
    file = value("abcd{f", [1], "Int8", b"x")
    assert file[8:9] == b"{" and file[:1] == b"\x0a"
    assert list(taken(tmp_path / "a", file).tensors) == ["abcd{f"]


def test_averages_are_chosen_through_the_same_door(tmp_path):
    (tmp_path / "a").write_bytes(saved({"model": {"w": torch.zeros(1)}, "model_ema": {"w": torch.ones(1)}}))
    assert read_foreign(tmp_path / "a").tensors["w"].item() == 1
    assert read_foreign(tmp_path / "a", ema=False).tensors["w"].item() == 0


@PROPERTY
@given(st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), tensors_of(), min_size=1, max_size=5))
def test_safetensors_come_out_as_they_went_in(tmp_path, tensors):
    found = taken(tmp_path / "a", save(tensors)).tensors
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (safetensors(b"{}")[:8] + b"{", ["claims 2 bytes"]),
        (struct.pack("<Q", 1 << 62) + b"{}", ["claims", "cut off"]),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{" + b" " * (MAX_HEADER_BYTES + 8), ["limit"]),
        (safetensors(b"{" + b"[" * 100_000), [".safetensors"]),
        (safetensors(b'{"a":1}'), [".safetensors"]),
        (safetensors({}), ["no tensors"]),
        (safetensors({"__metadata__": {"a": "b"}}), ["no tensors"]),
        (safetensors({"w": row([4], 0, 4)}, bytes(4)), [".safetensors"]),
        (safetensors({"w": row([1], 0, 4)}, bytes(3)), [".safetensors"]),
        (safetensors({"w": row([1], 0, 4)}, bytes(5)), [".safetensors"]),
        (safetensors({"w": row([1 << 62, 1 << 62], 0, 4)}, bytes(4)), [".safetensors"]),
        (safetensors({"w": row([1 << 60, 0], 0, 0)}), ["shape"]),
        (safetensors({"w": row([1] * 9, 0, 4)}, bytes(4)), ["dimensions"]),
        (safetensors({"w": row([1], 0, 4, "F99")}, bytes(4)), [".safetensors"]),
        (safetensors({"w\n": row([1], 0, 4)}, bytes(4)), ["name"]),
        (safetensors({"v": row([1], 0, 4), "w": row([1], 0, 4)}, bytes(4)), [".safetensors"]),
        (safetensors({f"w{i}": row([1], i, i + 1, "U8") for i in range(10_000)}, bytes(10_000)), [str(MAX_TENSORS)]),
    ],
)
def test_safetensors_that_lie_are_refused(tmp_path, data, words):
    refused(tmp_path / "a", data, *words)


def test_safetensors_cut_off_anywhere_are_refused(tmp_path):
    whole = save(TENSORS)
    for length in range(len(whole)):
        assert isinstance(attempt(tmp_path / "a", whole[:length]), str)


@DESTRUCTION
@given(st.data())
def test_flipped_bytes_of_safetensors_give_a_result_or_one_line(tmp_path, data):
    file = bytearray(save(TENSORS, metadata={"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    attempt(tmp_path / "a", bytes(file))


@DESTRUCTION
@given(st.binary(max_size=300))
def test_any_bytes_give_one_line(tmp_path, data):
    assert isinstance(attempt(tmp_path / "a", data), str)


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("pickle"))
    return out.getvalue()


def array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(2))
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["empty"]),
        (b"\n", ["not a whole MindSpore"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ["git-lfs pointer", "git lfs pull"]),
        (b"<!DOCTYPE html><html>", ["web page", "direct URL"]),
        (b"  \r\n<html>", ["web page"]),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', ["web page"]),
        (gzip.compress(b"x", mtime=0), ["gzip", "unpack"]),
        (tar(), ["tar archive", "unpack"]),
        (b"BZh91AY&SY", ["bzip2"]),
        (b"\xfd7zXZ\0", ["xz"]),
        (b"7z\xbc\xaf\x27\x1c", ["7z"]),
        (b"Rar!\x1a\x07", ["RAR"]),
        (b"\x89HDF\r\n\x1a\n", ["HDF5"]),
        (b"GGUF\3\0\0\0", ["GGUF"]),
        (array(), ["NumPy"]),
        (b"\x89PNG\r\n", ["image"]),
        (b"\xff\xd8\xff\xe0", ["image"]),
        (b'{"model_name": "visformer_tiny"}', ["JSON"]),
        (b"\x08\x07\x12\x07pytorch", ["ONNX"]),
        (b"\x80\x04\x95\x00", ["pickle"]),
        (bytes(4096), ["zeros"]),
        (b"epoch 1 loss 2.3", ["text"]),
        (b"\xde\xad\xbe\xef" * 10, ["unknown kind", ".ckpt"]),
        (b"PK\x05\x06" + bytes(18), ["zip"]),
        (b"PK\x03\x04" + bytes(100), ["zip", "cut off"]),
    ],
)
def test_other_files_are_named_with_the_way_out(tmp_path, data, words):
    refused(tmp_path / "a.ckpt", data, *words)


def test_only_regular_files_are_opened(tmp_path):
    refused(tmp_path, None, "folder")
    refused(tmp_path / "none.pth", None, "no such file")
    (tmp_path / "dangling").symlink_to("none.pth")
    refused(tmp_path / "dangling", None, "no such file")
    (tmp_path / "round").symlink_to("round")
    refused(tmp_path / "round", None, "cannot be read")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", None, "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        refused(tmp_path / "s", None, "socket")
    refused(tmp_path.joinpath("/dev/zero"), None, "device")
    with pytest.raises(UsageError, match="cannot be read"):
        read_foreign("a\0b")


def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refused(path, None, "cannot be read")


def test_large_files_cost_next_to_no_private_memory(tmp_path):
    tensors = {f"w{index}": torch.ones(1 << 20) for index in range(16)}
    write_ckpt(tmp_path / "a", tensors)
    write_pth(tmp_path / "b", {"model": tensors})
    (tmp_path / "c").write_bytes(save(tensors))
    (tmp_path / "d").write_bytes(saved(tensors, _use_new_zipfile_serialization=False))
    for growth, touched, total in private_growth(*(tmp_path / name for name in "abcd")):
        assert total == 64 << 20 and touched == total / 4 / 1024
        assert growth < 2 << 20
