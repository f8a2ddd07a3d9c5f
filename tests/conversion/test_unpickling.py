"""Pickles and archives that are not what torch writes: code, lies about sizes, bombs, damage. None is ever run."""

import argparse
import io
import os
import pickletools
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conversion.safety import DESTRUCTION, attempt, refused, saved, taken
from visformer.conversion.unpickling import MAX_PICKLE_BYTES

W = torch.ones(2)


def archive(pickled: bytes, more: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive like torch's around a pickle, with one storage of 16 bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in {"data.pkl": pickled, "data/0": bytes(16), **(more or {})}.items():
            file.writestr(f"a/{name}", content)
    return out.getvalue()


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def tensor(
    numel=4, offset=0, size=(4,), stride=(1,), kind="FloatStorage", key="0", name=b"w", rebuild="_rebuild_tensor_v2"
):
    """The pickle of {name: tensor}, every number of it as asked for."""

    def numbers(values):
        return b"(" + b"".join(b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu")
    storage += numbers([numel])[1:-1] + b"tQ"
    arguments = b"(" + storage + numbers([offset])[1:-1] + numbers(size) + numbers(stride)
    arguments += b"\x89ccollections\nOrderedDict\n)Rt"
    return pickled(b"}" + text(name.decode()) + b"ctorch._utils\n" + rebuild.encode() + b"\n" + arguments + b"Rs")


class Runs:
    """Pickled, it would make a file where it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_named_and_not_run(tmp_path, zipped, protocol):
    mark = tmp_path / "ran"
    for name, document in {
        "posix.system": Runs(os.system, f"touch {mark}"),
        "builtins.eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "builtins.bytearray": bytearray(10),
        "builtins.getattr": Runs(getattr, "a", "b"),
        "numpy.": np.float64(1.5),
        "pathlib": tmp_path,
        "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
    }.items():
        for whole in (document, {"state_dict": {"w": W}, "epoch": document}):
            data = saved(whole, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
            if not zipped and protocol != 2:
                refused(tmp_path / "a.pth", data)  # no longer begins as torch's older files do
            else:
                refused(tmp_path / "a.pth", data, "holds code", name, "never run")
        assert not mark.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"cos\nsystem\n" + text("true") + b"\x85R", ["code (os.system)"]),
        (b"(S'true'\nios\nsystem\n", ["STRING"]),
        (b"(" + text("true") + b"ios\nsystem\n", ["code (os.system)"]),
        (b"\x8c\x02os\x8c\x06system\x93", ["code (os.system)"]),
        (b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x7f\x85R", ["code (builtins.bytearray)"]),
        (b"ctorch\nTensor\n\x8a\x05\0\0\0\0\x7f\x85R", ["code (torch.Tensor)"]),
        (b"ctorch.storage\nUntypedStorage\nK\x05\x85R", ["is called"]),
        (b"cargparse\nNamespace\n}\x92", ["NEWOBJ_EX"]),
        (b"cargparse\nNamespace\nK\x01\x85\x81", ["is made"]),
        (b"cargparse\nNamespace\n", ["one value"]),
        (b"\x82\x01", ["EXT1"]),
        (b"\x8e" + struct.pack("<Q", 1 << 60), ["damaged"]),
        (b"\x8d" + struct.pack("<Q", 1 << 60), ["damaged"]),
        (b"X\xff\xff\xff\xff", ["damaged"]),
        (b"", ["one value"]),
        (b"R", ["damaged"]),
        (b"h\x05", ["not there"]),
        (b"}](]e", ["one value"]),
        (b"t", ["mark"]),
        (b"}(K\x01u", ["key without"]),
        (b"})K\x01s", ["key is neither"]),
        (b"K\x01a", ["damaged"]),
        (b"](" * 100, ["one value"]),
        (b")" + b"\x85" * 390_000, ["tuple"]),
        (b"N0" * 600_000, ["POP"]),
        (b"N" * 1_000_000, ["steps"]),
        (b"ccollections\nOrderedDict\nK\x01\x85R", ["made in an unknown way"]),
        (b"ctorch\nSize\nK\x01\x85R", ["tuple was expected"]),
        (b"ctorch\ndevice\n)R", ["without a name"]),
        (b"ctorch\ndevice\n" + text("x" * 99) + b"\x85R", ["without a name"]),
        (b"ctorch._utils\n_rebuild_parameter\n)R", ["without a tensor"]),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", ["without a storage"]),
        (b"ctorch._utils\n_rebuild_tensor_v3\n)R", ["without a storage"]),
        (b"ctorch\nfloat32\n)R", ["damaged"]),
        (b"(" + text("module") + b"tQ", ["unknown way"]),
        (b"K\x01", ["holds a int"]),
        (b"}", ["no tensors"]),
    ],
)
def test_strange_pickles_are_refused_soon(tmp_path, body, words):
    refused(tmp_path / "a.pth", archive(pickled(body)), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numel": 1 << 60, "size": (1 << 60,)}, ["shape"]),
        ({"numel": 1 << 40, "size": (1 << 40,)}, ["16 bytes"]),
        ({"numel": 5}, ["16 bytes"]),
        ({"numel": -4}, ["storage"]),
        ({"size": (5,)}, ["past its storage"]),
        ({"offset": 1}, ["past its storage"]),
        ({"offset": -1}, ["outside"]),
        ({"stride": (2,)}, ["past its storage"]),
        ({"stride": (-1,)}, ["outside"]),
        ({"size": (-4,)}, ["shape"]),
        ({"size": (4, 4), "stride": (0, 1)}, ["overlap"]),
        ({"size": (1 << 30,), "stride": (0,)}, ["overlap"]),
        ({"size": (2, 3), "stride": (1, 1)}, ["overlap"]),
        ({"size": (0, 1 << 62), "stride": (1, 1)}, ["shape"]),
        ({"size": (1,) * 9, "stride": (1,) * 9}, ["few whole numbers"]),
        ({"size": (2, 2)}, ["sizes are missing"]),
        ({"key": "1"}, ["not in the file"]),
        ({"kind": "DoubleStorage"}, ["16 bytes"]),
        ({"kind": "QInt8Storage"}, ["quantised"]),
        ({"rebuild": "_rebuild_sparse_tensor"}, ["sparse"]),
        ({"rebuild": "_rebuild_qtensor"}, ["quantised"]),
        ({"rebuild": "_rebuild_tensor_v3"}, ["storage"]),
        ({"name": b"\x01"}, ["name"]),
    ],
)
def test_tensors_that_lie_are_refused(tmp_path, changes, words):
    assert taken(tmp_path / "fine.pth", archive(tensor())).tensors["w"].tolist() == [0, 0, 0, 0]
    refused(tmp_path / "a.pth", archive(tensor(**changes)), *words)


def test_what_is_no_archive_of_torch_is_refused(tmp_path):
    fine = archive(tensor())
    refused(tmp_path / "a", archive(tensor(), method=zipfile.ZIP_DEFLATED), "compressed")
    refused(tmp_path / "b", archive(b"x", {"bomb": bytes(10 << 20)}, zipfile.ZIP_DEFLATED), "compressed")
    refused(tmp_path / "c", archive(tensor()).replace(b"data.pkl", b"data.abc"), "data.pkl")
    refused(tmp_path / "d", archive(tensor(), {"constants.pkl": b""}), "TorchScript")
    refused(tmp_path / "e", archive(tensor(), {"byteorder": b"big"}), "little-endian")
    refused(tmp_path / "f", fine[:-1], "cut off")
    refused(tmp_path / "g", fine + b"x", "directory")
    refused(tmp_path / "h", archive(b"\x80\x02" + b"N" * MAX_PICKLE_BYTES + b"."), "data.pkl")
    twice = archive(tensor(), {"data/1": b""}).replace(b"a/data/1", b"a/data/0")
    refused(tmp_path / "i", twice, "twice")


def by_hand(pickled: bytes, **lies: int) -> bytes:
    """An archive of data.pkl and data/0 with every number in zip64 fields, some of them lies."""
    out, directory = b"", b""
    for name, content in [(b"a/data.pkl", pickled), (b"a/data/0", bytes(16))]:
        extra = struct.pack("<HHQQQ", 1, 24, len(content), len(content), len(out) + lies.get("header", 0))
        directory += b"PK\x01\x02" + bytes(16) + b"\xff" * 8
        directory += struct.pack("<HHHHHII", len(name), 4 + len(extra), 0, 0, 0, 0, 0xFFFFFFFF) + name
        directory += struct.pack("<HH", 7, 0) + extra[: lies.get("extra", len(extra))].ljust(len(extra), b"\0")
        out += b"PK\x03\x04" + bytes(22) + struct.pack("<HH", len(name), 0) + name + content
    start, size = len(out), len(directory)
    out += directory + b"PK\x06\x06" + bytes(28)
    out += struct.pack("<QQQ", lies.get("count", 2), size + lies.get("size", 0), start + lies.get("start", 0))
    out += b"PK\x06\x07" + struct.pack("<IQI", 0, start + size + lies.get("locator", 0), 1)
    return out + b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)


def test_zip64_is_read_and_its_lies_are_refused(tmp_path):
    assert taken(tmp_path / "a.pth", by_hand(tensor())).tensors["w"].tolist() == [0] * 4
    for lies, words in [
        ({"count": 3}, ["cut off"]),
        ({"count": 1 << 40}, ["claims"]),
        ({"size": 1}, ["not where it says"]),
        ({"start": 1, "size": -1}, ["cut off"]),
        ({"start": 1 << 62}, ["not where it says"]),
        ({"locator": 1}, ["not where it says"]),
        ({"locator": 1 << 62}, ["not where it says"]),
        ({"header": 1}, ["not where it says"]),
        ({"header": 1 << 62}, ["not where it says"]),
        ({"extra": 4}, ["overlaps|compressed|not where"]),
    ]:
        message = refused(tmp_path / "a.pth", by_hand(tensor(), **lies))
        assert any(part in message for part in words[0].split("|")), (lies, message)
    twisted = by_hand(tensor()).replace(b"\x07\0\0\0\x01\0\x18\0", b"\x07\0\0\0\x02\0\x18\0")
    refused(tmp_path / "b.pth", twisted, "missing")
    refused(tmp_path / "c.pth", by_hand(tensor()).replace(b"a/data/0", b"a/\xff\xff\xff\xff/0"), "UTF-8")


def test_older_files_that_lie_are_refused(tmp_path):
    whole = saved({"w": W, "x": argparse.Namespace(t=torch.ones(3))}, _use_new_zipfile_serialization=False)
    assert list(taken(tmp_path / "a.pth", whole).tensors) == ["w"]
    stream, ends = io.BytesIO(whole), []
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    head, (_, version, _, document, keys) = whole[: ends[0]], ends
    between, storages = whole[version:document], whole[keys:]
    refused(tmp_path / "b.pth", head + b"\x80\x02M\xea\x03." + between + whole[document:], "unknown version")
    refused(tmp_path / "c.pth", whole[:keys] + struct.pack("<Q", 1 << 40) + storages[8:], "cut off")
    refused(tmp_path / "d.pth", whole[:keys] + struct.pack("<Q", 1) + storages[8:])
    refused(tmp_path / "e.pth", whole[:document] + b"\x80\x02](Ne." + storages, "list of storages")
    refused(tmp_path / "f.pth", whole[:document] + b"\x80\x02]." + storages, "not in the file")
    refused(tmp_path / "g.pth", whole[:document] + b"\x80\x02}." + storages, "unknown version")


def test_archives_whose_entries_overlap_are_refused(tmp_path):
    data = bytearray(archive(tensor(), {"data/1": bytes(16)}))
    first, second = (data.rindex(f"a/data/{key}".encode()) - 46 for key in (0, 1))
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    refused(tmp_path / "a.pth", bytes(data), "not where it says")
    data = bytearray(archive(tensor()))
    first = data.rindex(b"a/data/0") - 46
    data[first + 20 : first + 28] = struct.pack("<II", 60, 60)
    refused(tmp_path / "b.pth", bytes(data), "overlaps")


@DESTRUCTION
@given(st.binary(max_size=100))
def test_any_pickle_gives_a_result_or_one_line(tmp_path, body):
    attempt(tmp_path / "any.pth", archive(pickled(body)))
