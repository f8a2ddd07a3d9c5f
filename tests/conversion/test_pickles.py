"""torch's files: layouts, wrappers' prefixes, averaged weights, and pickles that hold more than data."""

import argparse
import pickle
import warnings
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conversion.safety import DESTRUCTION, MINI, PROPERTY, attempt, refused, saved, taken
from tests.conversion.test_mindspore import NAMES, same, tensors_of
from visformer.conversion.pickles import read_pth, write_pth
from visformer.errors import RunError, UsageError

UNWRAPPED = NAMES.filter(lambda name: not {"module", "_orig_mod"} & set(name.split(".")))
"""Names that no wrapper has put its prefix before: those the reader takes away."""


def reference(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True, map_location="cpu")


@pytest.mark.parametrize("path", sorted(MINI.glob("orig_*.pth")), ids=lambda path: path.stem)
def test_what_the_authors_wrote_is_what_torch_reads(path):
    expected = reference(path)
    found = read_pth(path)
    expected_tensors = expected.get("model", expected)
    assert list(found.tensors) == list(expected_tensors)
    assert all(same(found.tensors[name], tensor) for name, tensor in expected_tensors.items())
    if "model" in expected:
        assert found.facts["args"] == vars(expected["args"]) and found.facts["epoch"] == 299
        assert [name for name, _ in found.ignored] == ["optimizer", "lr_scheduler", "scaler"]


@PROPERTY
@given(
    st.dictionaries(UNWRAPPED, tensors_of(), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_state_dict_is_what_torch_reads(tmp_path, tensors, zipped):
    (tmp_path / "a.pth").write_bytes(saved({"state_dict": tensors}, _use_new_zipfile_serialization=zipped))
    found = read_pth(tmp_path / "a.pth").tensors
    expected = reference(tmp_path / "a.pth")["state_dict"] if zipped else tensors  # torch fails at older uint16 files
    assert list(found) == list(expected)
    assert all(same(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_views_parameters_and_protocols(tmp_path, zipped):
    base = torch.arange(24.0)
    document = {
        "t": base.reshape(4, 6).t()[1:5:2],
        "tail": base[20:],
        "last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last) + 1,
        "p": torch.nn.Parameter(torch.ones(3)),
        "s": torch.tensor(2.5),
        "e": torch.zeros(0, 3),
        "b": torch.tensor([True, False]),
    }
    for protocol in (2, 4, 5) if zipped else (2,):  # the older layout is protocol 2 by its first bytes
        data = saved(document, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        found = taken(tmp_path / "a.pth", data).tensors
        assert list(found) == list(document)
        assert all(same(found[name], value.detach()) for name, value in document.items())
        assert not found["p"].requires_grad and found["last"].is_contiguous(memory_format=torch.channels_last)
        found["tail"].fill_(0)
        assert (tmp_path / "a.pth").read_bytes() == data, "what is written to a tensor stays in this process"


W, V = torch.ones(2), torch.zeros(2)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"a": W}, ["a"]),
        ({"module.a": W, "module.b": W}, ["a", "b"]),
        ({"module.a": W, "b": W}, ["module.a", "b"]),
        ({"_orig_mod.a": W}, ["a"]),
        ({"module._orig_mod.a": W, "module._orig_mod.b.c": W}, ["a", "b.c"]),
        ({"_orig_mod.module.a": W}, ["a"]),
        ({"stage._orig_mod.a": W, "head": W}, ["stage.a", "head"]),
        ({"model": {"state_dict": {"module.a": W}}}, ["a"]),
        ({"net": {"a": W}, "epoch": 1}, ["a"]),
        ({"model_ema": {"a": W}}, ["a"]),
        ({"a": W, "_extra": {"x": 1}}, ["a"]),
        ({"model": {"a": W, "steps": 3, 5: W}}, ["a"]),
    ],
)
def test_wrappers_and_prefixes(tmp_path, document, names):
    assert list(taken(tmp_path / "a.pth", saved(document)).tensors) == names


def test_a_name_with_and_without_its_prefix_is_refused(tmp_path):
    refused(tmp_path / "a.pth", saved({"x._orig_mod.a": W, "x.a": V}), "x._orig_mod.a", "prefix")


def test_averaged_weights_are_taken_unless_asked_otherwise(tmp_path):
    for raw, ema in [("model", "model_ema"), ("state_dict", "state_dict_ema")]:
        for prefix in ("", "module."):
            averaged = {f"{prefix}a": W, "n_averaged": torch.tensor(4)}
            (tmp_path / "a.pth").write_bytes(saved({raw: {"module.a": V}, ema: averaged, "metric": 0.5}))
            found = read_pth(tmp_path / "a.pth")
            assert found.tensors["a"].tolist() == [1, 1] and found.facts == {"metric": 0.5}
            assert dict(found.ignored)[raw].startswith("the raw weights")
            assert dict(found.ignored)[f"{ema}.n_averaged"] == "a counter of the averaging"
            found = read_pth(tmp_path / "a.pth", ema=False)
            assert found.tensors["a"].tolist() == [0, 0]
            assert dict(found.ignored)[ema].startswith("averaged weights")


@pytest.mark.parametrize("averaged", [{"a": W}, {"a": W, "b": torch.ones(3)}])
def test_incomplete_averages_are_not_taken(tmp_path, averaged):
    found = taken(tmp_path / "a.pth", saved({"model": {"a": V, "b": V}, "model_ema": averaged}))
    assert found.tensors["a"].tolist() == [0, 0]
    assert "lack b" in dict(found.ignored)["model_ema"]


def test_facts_are_plain_values(tmp_path):
    endless: list = []
    endless.append(endless)
    shared = [1] * 10
    for _ in range(30):
        shared = [shared] * 10
    arguments = argparse.Namespace(
        lr=0.1, size=(3, 224), kind=torch.float16, none=None, nested=argparse.Namespace(a=[1])
    )
    document = {
        "state_dict": {"a": W},
        "args": arguments,
        "arch": "visformer_tiny",
        "metric": 78.5,
        "version": 2,
        "milestones": Counter({30: 1}),
        "where": torch.device("cuda:1"),
        "size": torch.Size([1, 2]),
        "choices": {"x"},
        "tensor": W,
        "endless": endless,
        "shared": shared,
        "long": "x" * 10_000,
        "amp_scaler": {"scale": 2.0},
    }
    found = taken(tmp_path / "a.pth", saved(document))
    expected = {"lr": 0.1, "size": [3, 224], "kind": "torch.float16", "none": None, "nested": {"a": [1]}}
    assert found.facts == {
        "args": expected,
        "arch": "visformer_tiny",
        "metric": 78.5,
        "version": 2,
        "milestones": {30: 1},
        "where": "cuda:1",
        "size": [1, 2],
        "choices": ["x"],
    }
    assert [name for name, _ in found.ignored] == ["tensor", "endless", "shared", "long", "amp_scaler"]


def test_strange_tensors_that_torch_writes_are_refused(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for value, word in [
        (torch.eye(3).to_sparse(), "sparse"),
        (quantised, "quantised"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(1).expand(1000), "overlap"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
    ]:
        refused(tmp_path / "a.pth", saved({"w": value}), word)


def test_tensors_that_share_values_cannot_multiply(tmp_path):
    big = torch.zeros(1 << 16)
    refused(tmp_path / "a.pth", saved({f"w{index}": big for index in range(50)}), "share")
    assert len(taken(tmp_path / "b.pth", saved({"w": big, "tied": big})).tensors) == 2


def test_ten_thousand_tensors_are_refused(tmp_path):
    refused(tmp_path / "a.pth", saved({f"w{index}": W for index in range(10_000)}), "4096", within_s=10)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, zipped):
    whole = saved({"w": W, "v": V.bool()}, _use_new_zipfile_serialization=zipped)
    for length in range(len(whole)):
        assert isinstance(attempt(tmp_path / "cut.pth", whole[:length]), str)
    assert list(taken(tmp_path / "cut.pth", whole).tensors) == ["w", "v"]


@DESTRUCTION
@given(st.data(), st.booleans())
def test_flipped_bytes_give_a_result_or_one_line(tmp_path, data, zipped):
    document = {"model": OrderedDict(a=W, b=V.half()), "args": argparse.Namespace(x=1), "epoch": 3}
    file = bytearray(saved(document, _use_new_zipfile_serialization=zipped))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    attempt(tmp_path / "flipped.pth", bytes(file))


@PROPERTY
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=20,
    ),
    st.sampled_from([2, 3, 4, 5]),
)
def test_plain_values_come_out_as_they_went_in(tmp_path, value, protocol):
    found = attempt(tmp_path / "a.pth", saved({"model": {"w": W}, "value": value}, pickle_protocol=protocol))
    assert isinstance(found, str) or found.facts["value"] == value


@PROPERTY
@given(st.dictionaries(UNWRAPPED, tensors_of(), min_size=1, max_size=5))
def test_what_is_written_loads_in_torch_and_here(tmp_path, tensors):
    write_pth(tmp_path / "a.pth", {"state_dict": tensors, "epoch": 3, "args": {"lr": 0.1}})
    document = torch.load(tmp_path / "a.pth", weights_only=True, mmap=True)
    assert document["epoch"] == 3 and list(document["state_dict"]) == list(tensors)
    assert all(same(document["state_dict"][name], tensor) for name, tensor in tensors.items())
    found = read_pth(tmp_path / "a.pth")
    assert found.facts == {"epoch": 3, "args": {"lr": 0.1}}


def test_a_slice_is_written_without_the_rest(tmp_path):
    write_pth(tmp_path / "a.pth", {"w": torch.zeros(1 << 20)[:4], "p": torch.nn.Parameter(torch.ones(2, 3).t())})
    assert (tmp_path / "a.pth").stat().st_size < 8192
    back = torch.load(tmp_path / "a.pth", weights_only=True)
    assert back["p"].is_contiguous() and type(back["p"]) is torch.Tensor and back["w"].shape == (4,)


def test_a_disk_that_refuses_leaves_what_stood_there(tmp_path, monkeypatch):
    write_pth(tmp_path / "a.pth", {"w": W})
    before = (tmp_path / "a.pth").read_bytes()

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"a\.pth"):
        write_pth(tmp_path / "a.pth", {"w": V})
    assert (tmp_path / "a.pth").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_plain_pickle_is_not_taken_for_torchs(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(UsageError, match=r"torch\.save"):
        read_pth(tmp_path / "a.pth")
