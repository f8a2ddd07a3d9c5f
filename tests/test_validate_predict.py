"""From a checkpoint file and folders of images to figures and labels, through the verbs and the command line.

The model is random: what is checked is that its own logits, computed here one image at a time, come out of every path.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visformer
from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.cli import main
from visformer.data.decode import open_image
from visformer.data.preprocessing import Preprocessing
from visformer.errors import RunError, UsageError
from visformer.models import Architecture, StageConfig, Visformer
from visformer.verbs.predict import PredictOptions, predict
from visformer.verbs.validate import ValidateOptions, validate

CLASSES = ["zebra", "ant", "mole", "wasp"]  # the model's order; that of the folders is alphabetical
ARCHITECTURE = Architecture(
    stem_width=8,
    stages=(
        StageConfig(width=16, depth=0, patch_size=2),
        StageConfig(width=32, depth=1, patch_size=2, spatial_mlp=True),
        StageConfig(width=64, depth=1, patch_size=2, num_heads=2, attention=True),
    ),
    num_classes=len(CLASSES),
    image_size=(32, 32),
)
PREPROCESSING = Preprocessing(image_size=(32, 32))


@pytest.fixture(scope="module")
def model() -> Visformer:
    torch.manual_seed(0)
    model = Visformer(ARCHITECTURE).eval()
    torch.nn.init.normal_(model.get_classifier().weight)  # type: ignore[arg-type]
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    content = Checkpoint(
        model_name="visformer_tiny",
        architecture=ARCHITECTURE,
        class_names=CLASSES,
        preprocessing=PREPROCESSING,
        training={},
        source={},
        state_dict=model.state_dict(),
    )
    write_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """data/val/CLASS with three of the four classes, 13 good images and a broken one."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("ant", 6), ("mole", 4), ("zebra", 3)):
        folder = root / "val" / name
        folder.mkdir(parents=True)
        for i in range(count):
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((50, 40)).save(folder / f"{name}{i}.png")
    (root / "val" / "ant" / "broken.jpg").write_text("no image")
    return root


def logits_of(model: Visformer, path: Path) -> torch.Tensor:
    with torch.no_grad():
        return model(PREPROCESSING.normalize(PREPROCESSING(open_image(path))[None]))[0]


def measure(checkpoint: Path, data_dir: Path, **options):
    options = {"device_target": "cpu", "num_parallel_workers": 0, "batch_size": 4, **options}
    return validate(ValidateOptions(ckpt_path=str(checkpoint), data_dir=str(data_dir), **options))


def label(checkpoint: Path, *inputs: str | Path, **options) -> list[dict]:
    names = [str(entry) for entry in inputs]
    return predict(PredictOptions(inputs=names, ckpt_path=str(checkpoint), device_target="cpu", **options))


def test_validate_gives_the_figures_of_the_logits(model, checkpoint, photos):
    files = sorted(photos.glob("val/*/*.png"))
    logits = torch.stack([logits_of(model, file) for file in files])
    targets = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    report = measure(checkpoint, photos)
    assert report.metrics.num_images == 13
    assert report.top1 == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert report.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)
    assert [CLASSES[c.index] for c in report.metrics.per_class] == ["zebra", "ant", "mole"]
    assert [(Path(name).name, bool(reason)) for name, reason in report.skipped] == [("broken.jpg", True)]


def test_validate_writes_its_files(checkpoint, photos, tmp_path):
    report = measure(checkpoint, photos, output=str(tmp_path / "report"))
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written == report.to_dict() and written["num_skipped"] == 1
    with (tmp_path / "report" / "per_class.csv").open(newline="") as file:
        assert {row["class"]: int(row["support"]) for row in csv.DictReader(file)} == {"zebra": 3, "ant": 6, "mole": 4}
    with (tmp_path / "report" / "confusion.csv").open(newline="") as file:
        assert sum(int(row["count"]) for row in csv.DictReader(file)) == 13
    with Image.open(tmp_path / "report" / "confusion.png") as image:
        image.load()


def test_validate_on_the_command_line(checkpoint, photos, capsys):
    words = ["validate", "--ckpt_path", str(checkpoint), "--data_dir", str(photos), "--num_parallel_workers", "0"]
    assert main([*words, "--device_target", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_images"] == 13 and document["classes_in_set"] == 3
    assert main([*words, "--device_target", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"{document['top1']:.2f} %" in text and "broken.jpg" in text


def test_an_unknown_class_and_wrong_options_are_usage_errors(checkpoint, photos, tmp_path):
    (tmp_path / "antt").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "antt" / "a.png")
    with pytest.raises(UsageError, match=r"antt.*ant"):
        measure(checkpoint, tmp_path)
    with pytest.raises(UsageError, match="ckpt_path"):
        validate(ValidateOptions())
    with pytest.raises(UsageError, match="visformer_tiny"):
        measure(checkpoint, photos, model="visformer_small")
    with pytest.raises(UsageError, match="output"):
        measure(checkpoint, photos, output=str(checkpoint))


def test_a_set_without_a_readable_image_fails(checkpoint, tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.png").write_text("no image")
    with pytest.raises(RunError, match="no image"):
        measure(checkpoint, tmp_path)


@pytest.fixture
def split_run(checkpoint, photos, tmp_path) -> tuple[Path, Path]:
    """A run folder whose training split data/val itself on the spot: its checkpoint, and the data."""
    run, data = tmp_path / "run", photos / "val"
    run.mkdir()
    (run / "best.safetensors").write_bytes(checkpoint.read_bytes())
    held_out = ["ant/ant0.png", "mole/mole1.png", "zebra/zebra2.png"]
    rest = [str(file.relative_to(data)) for file in sorted(data.glob("*/*.png"))]
    rest = [key for key in rest if key not in held_out]
    record = {"data_dir": str(data), "folder": "", "seed": 42, "val_fraction": 0.2, "train": rest, "val": held_out}
    (run / "split.json").write_text(json.dumps(record))
    return run / "best.safetensors", data


def test_the_recorded_held_out_part_is_measured(split_run, capsys):
    checkpoint, data = split_run
    assert measure(checkpoint, data).metrics.num_images == 3
    assert "split.json" in capsys.readouterr().err
    assert measure(checkpoint, os.path.relpath(data)).metrics.num_images == 3
    assert measure(checkpoint, data, val_split="train").metrics.num_images == 10
    assert measure(checkpoint, data, val_split="all").metrics.num_images == 13


def test_data_that_moved_is_recognised(split_run, tmp_path, capsys):
    checkpoint, data = split_run
    moved = tmp_path / "moved"
    moved.symlink_to(data)  # the same place under another name is the same data
    assert measure(checkpoint, moved).metrics.num_images == 3
    record = checkpoint.parent / "split.json"
    record.write_text(record.read_text().replace(str(data), "/elsewhere"))
    capsys.readouterr()
    assert measure(checkpoint, data).metrics.num_images == 13
    assert "--split_file" in capsys.readouterr().err
    assert measure(checkpoint, data, split_file=str(record)).metrics.num_images == 3


def test_a_split_file_that_is_none_is_a_usage_error(split_run, tmp_path, photos):
    checkpoint, data = split_run
    (tmp_path / "other.json").write_text('{"a": 1}')
    for name, message in (("missing.json", "can't be read"), ("other.json", "no record of a split")):
        with pytest.raises(UsageError, match=message):
            measure(checkpoint, data, split_file=str(tmp_path / name))
    with pytest.raises(UsageError, match="leave --split_file out"):
        measure(checkpoint, photos, split_file=str(checkpoint.parent / "split.json"))


def test_predict_gives_the_softmax_of_the_logits(model, checkpoint, photos):
    files = sorted(photos.glob("val/*/*.png"))
    records = label(checkpoint, photos / "val" / "ant", photos / "val" / "mole", photos / "val" / "zebra", batch_size=5)
    assert [record["path"] for record in records if "error" not in record] == [str(file) for file in files]
    assert [Path(record["path"]).name for record in records if "error" in record] == ["broken.jpg"]
    record = next(record for record in records if record["path"] == str(files[3]))
    expected = logits_of(model, files[3]).softmax(0)
    assert [p["index"] for p in record["predictions"]] == expected.argsort(descending=True).tolist()
    assert [p["label"] for p in record["predictions"]] == [CLASSES[p["index"]] for p in record["predictions"]]
    assert record["predictions"][0]["probability"] == pytest.approx(expected.max().item(), rel=1e-4)


def test_the_python_names(checkpoint, photos):
    files = sorted(photos.glob("val/zebra/*.png"))
    records = visformer.predict(inputs=[str(file) for file in files], ckpt_path=str(checkpoint), device_target="cpu")
    again = visformer.Predictor(checkpoint, device="cpu").predict(files)
    assert [r["predictions"][0]["index"] for r in again] == [r["predictions"][0]["index"] for r in records]


@pytest.mark.parametrize("suffix", ["json", "csv", "txt"])
def test_predict_on_the_command_line(checkpoint, photos, tmp_path, capsys, suffix):
    output = tmp_path / f"labels.{suffix}"
    words = ["predict", str(photos / "val"), str(tmp_path / "none.jpg"), "--ckpt_path", str(checkpoint), "--top_k", "2"]
    words += ["--device_target", "cpu"]
    assert main([*words, "--format", {"txt": "text"}.get(suffix, suffix)]) == 0
    printed = capsys.readouterr().out
    assert main([*words, "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert output.read_text() == printed
    if suffix == "json":
        records = json.loads(printed)
        assert len(records) == 15 and sum("error" in record for record in records) == 2
        assert all(len(record.get("predictions", "ab")) == 2 for record in records)
    elif suffix == "csv":
        assert len(list(csv.reader(printed.splitlines()))) == 1 + 2 * 13 + 2
    else:
        assert len(printed.splitlines()) == 15


def test_predict_exit_codes(checkpoint, photos, tmp_path, capsys, monkeypatch):
    words = ["--ckpt_path", str(checkpoint), "--device_target", "cpu"]
    assert main(["predict", str(tmp_path / "none.jpg"), *words]) == 1
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / "empty"), *words]) == 2
    assert main(["predict", *words]) == 2
    assert main(["predict", str(photos / "val"), "--ckpt_path", str(tmp_path / "none.safetensors")]) == 2
    assert main(["predict", str(photos / "val")]) == 2
    assert main(["predict", str(photos / "val"), *words, "--output", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with (photos / "list.txt").open("w+b") as file:
        file.write(os.fsencode(f"{photos}/val/ant/ant0.png\n{photos}/val/zebra\n"))
        file.seek(0)
        monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": file}))
        assert main(["predict", "-", *words, "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4


def test_a_failed_run_leaves_the_old_output(checkpoint, photos, tmp_path, monkeypatch):
    output = tmp_path / "labels.json"
    output.write_text("precious")

    def fail(*_):
        raise RunError("the disk is full")

    monkeypatch.setattr("visformer.verbs.predictor.Predictor._label", fail)
    assert main(["predict", str(photos / "val"), "--ckpt_path", str(checkpoint), "--output", str(output)]) == 1
    assert output.read_text() == "precious" and [file.name for file in tmp_path.iterdir()] == ["labels.json"]
