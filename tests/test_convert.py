"""`visformer convert` from the command line, and foreign files wherever a checkpoint is asked for."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import visformer
from tests import upstream
from visformer.checkpoint import read_checkpoint
from visformer.cli import main
from visformer.errors import UsageError

TO = {"mindcv": ".ckpt", "authors": ".pth", "timm": ".safetensors"}


def heads(fixture):
    given = upstream.HEADS[fixture]
    return ["--num_heads", ",".join(map(str, given))] if given else []


def run(*words):
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize("fixture", upstream.MINI)
def test_a_converted_fixture_gives_upstreams_logits(tmp_path, fixture, capsys):
    path = tmp_path / "x.safetensors"
    assert run(upstream.mini_path(fixture), path, *heads(fixture)) == 0
    out = capsys.readouterr().out
    assert "custom" in out and "GELU in the" in out and out.splitlines()[-1].startswith(f"written to {path}")
    expected = upstream.outputs(fixture)
    with torch.no_grad():
        logits = visformer.load(path)(torch.from_numpy(expected["input"]))
    torch.testing.assert_close(logits.numpy(), expected["logits"], atol=5e-5, rtol=0)


def test_the_report_as_json(tmp_path, capsys):
    fixture = "orig_mini_swin_v2"
    assert run(upstream.mini_path(fixture), tmp_path / "x.safetensors", "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert (document["container"], document["layout"], document["model"]) == ("torch", "authors", "custom")
    assert document["taken"]["head.weight"] == "head.weight" and document["architecture"]["qk_scale_power"] == -0.5
    assert {row["name"]: row["reason"] for row in document["left_out"]}["stage2.0.attn.relative_position_index"]
    assert document["params"] == 559_226 and document["num_classes"] == 10


@pytest.mark.parametrize(
    "fixture, to", [("orig_mini_v1", "timm"), ("orig_mini_v1", "mindcv"), ("mindcv_mini_v2", "mindcv")]
)
def test_there_and_back_by_the_command_line(tmp_path, fixture, to, capsys):
    ours, theirs, again = tmp_path / "a.safetensors", tmp_path / f"b{TO[to]}", tmp_path / "c.safetensors"
    assert run(upstream.mini_path(fixture), ours, *heads(fixture)) == 0
    assert run(ours, theirs, "--to", to) == 0
    gelu = read_checkpoint(ours).architecture.gelu
    assert run(theirs, again, *heads(fixture), "--gelu", gelu) == 0
    first, second = read_checkpoint(ours), read_checkpoint(again)
    assert first.architecture == second.architecture
    assert all(torch.equal(second.state_dict[name], tensor) for name, tensor in first.state_dict.items())
    assert ("computes GELU" in capsys.readouterr().out) == (to == "mindcv" and gelu == "erf")


def test_another_head(tmp_path, capsys):
    source, path = upstream.mini_path("orig_mini_v1"), tmp_path / "x.safetensors"
    assert run(source, path, "--num_heads", "2", "--num_classes", "3") == 2
    assert "has 10 classes, not 3; --new_head True" in capsys.readouterr().err and not path.exists()
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n\ncat\n")
    assert run(source, path, "--num_heads", "2", "--class_names", names) == 2
    assert "3 names for a head of 10 classes" in capsys.readouterr().err
    assert run(source, path, "--num_heads", "2", "--class_names", names, "--new_head", "True") == 0
    checkpoint = read_checkpoint(path)
    assert checkpoint.class_names == ["ant", "bee", "cat"] and checkpoint.state_dict["head.weight"].shape == (3, 128)
    assert (
        run(source, path, "--num_heads", "2", "--num_classes", "10", "--image_size", "96", "--overwrite", "True") == 0
    )
    assert read_checkpoint(path).architecture.image_size == (96, 96)


def test_class_names_for_a_head(tmp_path):
    names, first, second = tmp_path / "names.txt", tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    names.write_text("\n".join(f"class {i}" for i in range(10)))
    assert run(upstream.mini_path("orig_mini_v1"), first, "--num_heads", "2", "--class_names", names) == 0
    assert read_checkpoint(first).class_names[9] == "class 9"
    names.write_text("\n".join(f"kind {i}" for i in range(10)))
    assert run(first, second, "--class_names", names) == 0
    assert read_checkpoint(second).class_names[9] == "kind 9"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def hostile(tmp_path):
    """Name -> a file that means harm or is broken."""
    good = upstream.mini_path("mindcv_mini_v1").read_bytes()
    zipped = upstream.mini_path("orig_mini_v1").read_bytes()
    field = b"\x0a\x0a\x0a\x01a\x12\x05\x08\x01\x12\x01x"
    files = {
        "truncated.ckpt": good[: len(good) // 2 + 7],
        "lying.ckpt": b"\x0a\xff\xff\xff\xff\x0f" + good[:1000],
        "many.ckpt": b"".join(
            b"\x0a\x1a\x0a\x05%05d\x12\x11\x08\x01\x12\x07Float32\x1a\x04\0\0\0\0" % i for i in range(10_000)
        ),
        "field.ckpt": field,
        "truncated.pth": zipped[: len(zipped) // 2],
        "code.pth": pickle.dumps({"model": Evil()}, protocol=2),
        "lying.safetensors": struct.pack("<Q", 2**60) + b"{}",
        "empty.ckpt": b"",
        "page.pth": b"<!DOCTYPE html><html><body>404</body></html>",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"model": {"x": Evil()}}, tmp_path / "zipped_code.pth")
    (tmp_path / "link.ckpt").symlink_to(upstream.mini_path("mindcv_mini_v1").resolve())
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    return sorted(path.name for path in tmp_path.iterdir())


def test_hostile_files_are_refused_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = hostile(tmp_path)
    assert len(names) == 13
    for name in names:
        assert run(name, "out.safetensors", "--num_heads", "2") == 2, name
        message = capsys.readouterr().err
        assert name in message and message.count("\n") == 1 and "Traceback" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == names  # no output, and no code ran


@pytest.mark.parametrize(
    "words, message",
    [
        (["{src}", "{tmp}"], "DST is a folder"),
        (["{src}", "{tmp}/there.safetensors"], "--overwrite True replaces it"),
        (["{src}", "{tmp}/x.ckpt"], "our checkpoints end in .safetensors"),
        (["{src}", "{tmp}/x.safetensors", "--to", "mindcv"], "must end in .ckpt"),
        (["{src}", "{tmp}/link.safetensors"], "DST is a link"),
        (["{src}"], "DST is missing"),
        ([], "SRC and DST are missing"),
        (["{tmp}/nothing.ckpt", "{tmp}/x.safetensors"], "no such file"),
        (["{src}", "{tmp}/x.safetensors", "--model", "visformer_smal"], "did you mean"),
        (["{src}", "{tmp}/x.safetensors", "--model", "visformer_small.tf"], "'tf'"),
        (["{src}", "{tmp}/x.safetensors", "--class_names", "{tmp}/none.txt"], "none.txt can't be read"),
        (["{src}", "{tmp}/x.safetensors", "--num_heads", "two"], "num_heads"),
    ],
)
def test_wrong_usage(tmp_path, capsys, words, message):
    (tmp_path / "there.safetensors").write_text("precious")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "there.safetensors")
    source = upstream.mini_path("orig_mini_v1")
    assert run(*(word.format(src=source, tmp=tmp_path) for word in words)) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


def test_source_and_destination_are_two_files(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    assert run(upstream.mini_path("orig_mini_v1"), path, "--num_heads", "2") == 0
    before = path.read_bytes()
    assert run(path, path, "--overwrite", "True") == 2 and "the same file" in capsys.readouterr().err
    assert path.read_bytes() == before


# ---- wherever a checkpoint is asked for, a file in any known format serves


@pytest.fixture
def foreign(tmp_path):
    """A small model in the authors' layout whose heads follow from its tables."""
    return upstream.mini_path("orig_mini_swin_v2")


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for label in "abcdefghij":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            image = generator.integers(0, 255, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


def test_predict_and_validate_take_a_foreign_file(foreign, photos, capsys):
    assert main(["predict", str(photos), "--ckpt_path", str(foreign), "--format", "json", "--top_k", "1"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 20 and all(record["predictions"][0]["label"].isdigit() for record in records)
    words = [
        "--ckpt_path",
        str(foreign),
        "--data_dir",
        str(photos),
        "--val_split",
        "all",
        "--num_parallel_workers",
        "0",
    ]
    assert main(["validate", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 20  # ten classes by the order of their folders
    assert main(["validate", *words, "--model", "visformer_tiny"]) == 2
    assert "it is no visformer_tiny" in capsys.readouterr().err


def test_training_goes_on_from_a_foreign_file(tmp_path, photos):
    """GELU's form and the scale of q and k come with the weights, and a resumed run keeps them."""
    torch.manual_seed(0)
    model = visformer.create_model("visformer_tiny", num_classes=10, image_size=64)
    from visformer.checkpoint import Checkpoint
    from visformer.conversion import write_as
    from visformer.data.preprocessing import Preprocessing

    checkpoint = Checkpoint(
        "visformer_tiny", model.config, list("abcdefghij"), Preprocessing((64, 64)), model.state_dict()
    )
    write_as(tmp_path / "tiny.ckpt", checkpoint, "mindcv")
    options = {
        "data_dir": str(photos), "image_resize": 64, "batch_size": 6, "num_parallel_workers": 0,
        "ckpt_save_dir": str(tmp_path / "run"), "pretrained": str(tmp_path / "tiny.ckpt"), "amp_level": "O0",
        "warmup_epochs": 0, "decay_epochs": 2,
    }  # fmt: skip
    visformer.train(epoch_size=1, **options)
    assert visformer.load(tmp_path / "run/last.safetensors").config.gelu == "tanh"
    visformer.train(epoch_size=2, resume="auto", **options)
    assert visformer.load(tmp_path / "run/last.safetensors").config.gelu == "tanh"


def test_create_model_takes_a_foreign_file(foreign, tmp_path):
    with pytest.raises(UsageError, match="holds custom, not visformer_tiny"):
        visformer.create_model("visformer_tiny", pretrained=foreign)
    model = visformer.load(foreign)
    assert model.class_names == [str(i) for i in range(10)] and model.source["project"] == "danczs/Visformer"


def test_convert_is_a_function_too(foreign, tmp_path):
    result = visformer.convert(src=str(foreign), dst=str(tmp_path / "x.safetensors"))
    assert result.dst == tmp_path / "x.safetensors" and result.conversion.layout == "authors"
