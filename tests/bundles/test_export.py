"""`visformer export` as it is typed, and what predict and validate do with a bundle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.bundles.conftest import CLASSES, small_model
from visformer import cli
from visformer.bundles import Bundle
from visformer.bundles.build import Request, build
from visformer.bundles.parity import Parity, judge
from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.data.preprocessing import Preprocessing
from visformer.errors import RunError, UsageError
from visformer.pretrained import load
from visformer.verbs.export import ExportOptions, export
from visformer.verbs.predictor import Predictor


def say(*words) -> int:
    return cli.main([str(word) for word in words])


def test_export_predict_and_validate_from_the_command_line(checkpoint, photos, tmp_path, capfd):
    bundle = tmp_path / "bundle"
    given = ("--data_dir", photos, "--val_split", "all", "--num_parallel_workers", 0)
    assert say("export", "--ckpt_path", checkpoint, "--output", bundle, "--input", "tensor", *given) == 0
    printed = capfd.readouterr().out
    assert "largest logit difference" in printed and "top-1 100.00 %, the checkpoint's 100.00 %, 40 images" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    document = json.loads((bundle / "bundle.json").read_text())
    assert document["parity"]["images"] == "real" and document["parity"]["num_images"] == 40
    assert document["accuracy"]["drop"] == 0.0
    assert document["source"]["checkpoint"] == "best.safetensors" and len(document["source"]["sha256"]) == 64
    assert set(document["versions"]) >= {"python", "torch", "onnx", "onnxruntime", "visformer"}

    assert say("validate", bundle, "--self-test") == 0
    assert "self-test passed" in capfd.readouterr().out
    assert say("validate", bundle, "--self-test", "--json") == 0
    assert json.loads(capfd.readouterr().out)["passed"] is True
    assert say("validate", "--ckpt_path", bundle, "--json", *given) == 0
    assert json.loads(capfd.readouterr().out)["top1"] == 100.0

    records = []
    for source in (checkpoint, bundle):
        assert say("predict", photos, "--ckpt_path", source, "--format", "json") == 0
        records.append(json.loads(capfd.readouterr().out))
    for wanted, got in zip(*records, strict=True):
        assert wanted["predictions"][0]["label"] == got["predictions"][0]["label"]
        assert wanted["predictions"][0]["probability"] == pytest.approx(got["predictions"][0]["probability"], abs=1e-4)

    assert say("validate", "--ckpt_path", bundle, "--val_amp_level", "O2", *given) == 2
    assert say("predict", photos, "--ckpt_path", bundle, "--amp_level", "O2") == 2
    assert capfd.readouterr().err.count("a bundle computes in the precision it was exported in") == 2
    assert say("predict", photos, "--ckpt_path", bundle, "--model", "visformer_small") == 2
    assert "it holds visformer_tiny" in capfd.readouterr().err


def test_a_predictor_takes_a_bundle(bundles, checkpoint, photos):
    paths = sorted(photos.rglob("*.png"))[:3]
    wanted, got = (Predictor(source, device="cpu").predict(paths) for source in (checkpoint, bundles().path))
    assert [r["predictions"][0]["label"] for r in wanted] == [r["predictions"][0]["label"] for r in got]


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_bundle_labels_without_torch(format, bundles, photos, tmp_path):
    """Whose import would take longer."""
    path = str(next(photos.rglob("*.png")))
    words = ["predict", path, "--ckpt_path", str(bundles(format).path), "--format", "json"]
    code = f"import sys; from visformer.cli import main; code = main({words!r}); assert 'torch' not in sys.modules; "
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(code)"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert len(record["predictions"]) == 5 and record["predictions"][0]["label"] == Path(path).parent.name


def test_logits_that_are_not_finite_are_an_error_of_their_image(bundles, photos, monkeypatch):
    bundle = bundles()
    paths = sorted(photos.rglob("*.png"))[:3]
    predictor = Predictor(bundle, device="cpu", top_k=2)
    wanted = predictor.predict(paths)
    engine, run = predictor._classifier._engine, predictor._classifier._engine.run

    def broken(batch):
        logits = run(batch)
        logits[1, 0] = np.inf
        return logits

    monkeypatch.setattr(engine, "run", broken)
    first, second, third = predictor.predict(paths)
    assert (first, third) == (wanted[0], wanted[2]) and "not finite" in second["error"]


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_int8_is_calibrated_measured_and_smaller(format, checkpoint, photos, tmp_path, capfd):
    words = ("export", "--ckpt_path", checkpoint, "--format", format, "--precision", "int8", "--calib_dir", photos)
    words += ("--data_dir", photos, "--val_split", "all", "--calib_images", 20, "--num_parallel_workers", 0)
    assert say(*words, "--output", tmp_path / "refused", "--max_drop", 0, "--dataset", "imagenet") in (0, 1)
    assert say(*words, "--output", tmp_path / "bundle", "--max_drop", 100) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.document["fit_gelu"] == (format == "openvino")
    accuracy = bundle.document["accuracy"]
    assert accuracy["source"]["top1"] == 100.0 and accuracy["bundle"]["top1"] > 60
    assert bundle.document["largest_logit_difference"] > 1e-3, "int8 can't be exact: was it quantised?"
    engine = bundle.engine(threads=1)
    sample = bundle.samples[0]
    assert np.abs(engine.run_image(np.asarray(Image.open(sample.path))) - sample.logits).max() <= bundle.tolerance


def test_an_export_that_loses_too_much_is_refused_and_leaves_nothing(checkpoint, photos, tmp_path, monkeypatch, capfd):
    from visformer.verbs import export as verb

    tops = iter((90.0, 89.4))
    monkeypatch.setattr(
        verb._Labelled, "_top", lambda self, model: {"top1": next(tops), "top5": 100.0, "num_images": 40}
    )
    words = ("--ckpt_path", checkpoint, "--data_dir", photos, "--val_split", "all", "--output", tmp_path / "bundle")
    assert say("export", *words, "--input", "tensor") == 1
    message = capfd.readouterr().err
    assert "loses 0.60 points of top-1 (90.00 % to 89.40 %), more than max_drop 0.5" in message
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_differs_is_refused_and_leaves_what_was_there(model, tmp_path, monkeypatch):
    from visformer.bundles import graphs

    request = Request("onnx", "fp32", "tensor")
    before = build(model, request, tmp_path / "bundle")
    real = graphs.plain

    def wrong(*given, **options):
        changed = real(*given, **options)
        changed.head.bias += 0.5
        return changed

    monkeypatch.setattr(graphs, "plain", wrong)
    with pytest.raises(RunError, match=r"a logit differs by 0\.5"):
        build(model, request, tmp_path / "bundle", overwrite=True)
    assert Bundle.open(tmp_path / "bundle").document == before.document
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("precision", "change", "message"),
    [
        ("fp32", {"batch_difference": 0.011}, "the batch graph may by 0.001"),
        ("fp32", {"image_difference": 0.06}, "the image graph may by 0.05"),
        ("bf16", {"batch_difference": 1.1}, "differs by 1.1"),
        ("bf16", {"batch_agreement": 0.99}, "99.00 % of 1,000 images, below min_agreement 99.5 %"),
        ("fp16", {"image_agreement": 0.99}, "99.00 %"),
        ("int8", {"batch_difference": float("nan")}, "not finite"),
        ("int8", {"image_agreement": 0.98}, "98.00 % of the images, that for batches on 100.00 %"),
    ],
)
def test_what_parity_refuses(precision, change, message):
    good = {"batch_difference": 1e-4, "batch_agreement": 1.0, "image_difference": 1e-4, "image_agreement": 1.0}
    judge(Parity("real", 1000, 10.0, **good), precision)
    with pytest.raises(RunError, match=message):
        judge(Parity("real", 1000, 10.0, **(good | change)), precision)


def test_the_share_that_half_precision_must_agree_on_is_the_users():
    parity = Parity("real", 1000, 10.0, 1e-4, 0.992, 1e-4, 0.992)
    judge(parity, "bf16", 99.2)
    with pytest.raises(RunError, match=r"99\.20 % of 1,000 images, below min_agreement 99\.3 %"):
        judge(parity, "bf16", 99.3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "out"], "ckpt_path: no checkpoint given"),
        (["--ckpt_path", "CKPT"], "output: no folder given"),
        (["--ckpt_path", "CKPT", "--output", "out", "--precision", "bf16"], "take --format openvino"),
        (
            ["--ckpt_path", "CKPT", "--output", "out", "--precision", "int8", "--format", "torch"],
            "take --format openvino",
        ),
        (["--ckpt_path", "CKPT", "--output", "out", "--precision", "int8"], "--calib_dir FOLDER"),
        (["--ckpt_path", "CKPT", "--output", "out", "--dynamic_image_size", "True"], "--input tensor"),
        (["--ckpt_path", "CKPT", "--output", "full"], "no bundle"),
        (["--ckpt_path", "CKPT", "--output", "CKPT"], "is no folder"),
        (["--ckpt_path", "CKPT", "--output", "out", "--calib_images", "0"], "calib_images: 0"),
        (["--ckpt_path", "CKPT", "--output", "out", "--gelu", "fitted"], "goes with --precision int8"),
        (["--ckpt_path", "CKPT", "--output", "out", "--max_drop", "-1"], "max_drop: -1"),
        (["--ckpt_path", "CKPT", "--output", "out", "--min_agreement", "101"], "min_agreement: 101"),
        (
            [
                "--ckpt_path",
                "CKPT",
                "--output",
                "out",
                "--precision",
                "int8",
                "--calib_dir",
                "none",
                "--dataset",
                "digits",
            ],
            "calib_dir: none is no folder",
        ),
    ],
)
def test_what_is_asked_wrongly_is_a_usage_error(words, message, checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert say("export", *(str(checkpoint) if word == "CKPT" else word for word in words)) == 2
    assert message in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_bundle_is_replaced_only_when_that_is_asked(bundles, checkpoint, model, tmp_path):
    request = Request("onnx", "fp32", "tensor")
    build(model, request, tmp_path / "bundle")
    with pytest.raises(UsageError, match="--overwrite True"):
        export(ExportOptions(ckpt_path=str(checkpoint), output=str(tmp_path / "bundle")))
    (tmp_path / "bundle" / "left over").touch()
    build(model, request, tmp_path / "bundle", overwrite=True)
    assert not (tmp_path / "bundle" / "left over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    with pytest.raises(UsageError, match="is a bundle already"):
        export(ExportOptions(ckpt_path=str(tmp_path / "bundle"), output=str(tmp_path / "other")))


def test_a_missing_package_names_the_extra(checkpoint, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    with pytest.raises(UsageError, match=r"pip install 'visformer\[export\]'"):
        export(ExportOptions(ckpt_path=str(checkpoint), output=str(tmp_path / "b"), format="openvino"))


def test_a_missing_compiler_is_told_before_anything_is_done(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="install a C\\+\\+ compiler"):
        export(ExportOptions(ckpt_path=str(checkpoint), output=str(tmp_path / "b"), format="torch"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_torch_package_gives_the_logits(bundles, model, precision):
    bundle = bundles("torch", precision, "tensor")
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        wanted = model(images).numpy()
    tolerance = {"fp32": 1e-4, "bf16": 5e-2}[precision] * np.abs(wanted).max()
    np.testing.assert_allclose(bundle.engine().run(images.numpy()), wanted, atol=tolerance)


@pytest.mark.parametrize("format", ["onnx", "openvino", pytest.param("torch", marks=pytest.mark.slow)])
def test_strides_of_an_axis_of_one_element_do_not_matter(format, tmp_path):
    """A grey batch in channels_last is contiguous too, and NumPy gets its strides."""
    model = small_model(channels=1)
    preprocessing = Preprocessing((64, 64), mean=(0.0,), std=(255.0,), in_channels=1)
    path = tmp_path / "grey.safetensors"
    write_checkpoint(path, Checkpoint("visformer_tiny", model.config, CLASSES, preprocessing, model.state_dict()))
    engine = build(load(path), Request(format, "fp32", "tensor"), tmp_path / "grey").engine(threads=1)
    images = torch.randn(3, 1, 64, 64).to(memory_format=torch.channels_last)
    assert images.is_contiguous() and images.stride() != images.clone(memory_format=torch.contiguous_format).stride()
    with torch.no_grad():
        wanted = model(images).numpy()
    np.testing.assert_allclose(engine.run(images.numpy()), wanted, atol=1e-4 * np.abs(wanted).max())


def test_help_loads_no_engine(tmp_path):
    import subprocess
    import sys

    program = (
        "import sys; from visformer.cli import main; main(['export', '--help']);"
        "bad = {'torch', 'onnx', 'onnxruntime', 'openvino', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "--max_drop" in run.stdout
