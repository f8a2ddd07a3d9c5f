"""Bundles: what lies in them, what they refuse, and that they run without torch."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from visformer.bundles import Bundle, is_bundle
from visformer.bundles.checkpoint_engine import CheckpointEngine
from visformer.bundles.parity import source_logits
from visformer.bundles.samples import generated
from visformer.bundles.self_test import self_test
from visformer.errors import UsageError

ROOT = Path(__file__).parents[2]
KINDS = [("onnx", "image"), ("onnx", "tensor"), ("openvino", "image"), ("openvino", "tensor")]


@pytest.mark.parametrize(("format", "input"), KINDS)
def test_a_bundle_gives_the_logits_of_its_source(bundles, model, format, input):
    bundle = bundles(format, "fp32", input)
    engine = bundle.engine(threads=1)
    arrays = [generated(size, 3, seed=9) for size in ((375, 500), (70, 41), (33, 800))]
    pictures = [Image.fromarray(array) for array in arrays]
    wanted = source_logits(model, pictures)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(engine.run(bundle.preprocessing(pictures)), wanted, atol=1e-4 * scale)
    np.testing.assert_allclose(engine.run(bundle.preprocessing(pictures[:1])), wanted[:1], atol=1e-4 * scale)
    of_images = np.stack([engine.run_image(array) for array in arrays])
    np.testing.assert_allclose(of_images, wanted, atol=(1e-4 if format == "onnx" else 5e-3) * scale)
    assert bundle.document["largest_logit_difference"] < 5e-3 * bundle.document["parity"]["largest_logit"]


def test_engines_that_have_gone_leave_signals_alone(bundles):
    program = """
        import os, signal, sys
        from visformer.bundles import Bundle

        signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
        first, second = (Bundle.open(path).engine(threads=1) for path in sys.argv[1:])
        del first
        del second
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    paths = [str(bundles("openvino", "fp32", input).path) for input in ("image", "tensor")]
    command = [sys.executable, "-c", textwrap.dedent(program), *paths]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "heard\n"


def test_a_checkpoint_has_the_same_interface(model):
    engine = CheckpointEngine(model, device="cpu", threads=1)
    image = generated((75, 50), 3, seed=9)
    wanted = source_logits(model, [Image.fromarray(image)])
    np.testing.assert_allclose(engine.run_image(image), wanted[0], atol=1e-5)
    np.testing.assert_allclose(engine.run(engine.preprocessing([Image.fromarray(image)])), wanted, atol=1e-5)


@pytest.mark.parametrize(("format", "precision"), [("openvino", "bf16"), ("openvino", "fp16"), ("onnx", "fp16")])
def test_half_precision_is_near(bundles, model, format, precision):
    bundle = bundles(format, precision, "image")
    arrays = [generated((75 + i, 60), 3, seed=i) for i in range(12)]
    pictures = [Image.fromarray(array) for array in arrays]
    wanted = source_logits(model, pictures)
    engine = bundle.engine(threads=1)
    tolerance = {"bf16": 5e-2, "fp16": 5e-3}[precision] * np.abs(wanted).max()
    np.testing.assert_allclose(engine.run(bundle.preprocessing(pictures)), wanted, atol=tolerance)
    np.testing.assert_allclose(np.stack([engine.run_image(array) for array in arrays]), wanted, atol=tolerance)
    whole = bundles(format, "fp32", "image").document["files"]
    assert sum(entry["bytes"] for entry in bundle.document["files"].values()) < 0.9 * sum(
        entry["bytes"] for entry in whole.values()
    )


@pytest.mark.parametrize(("format", "input"), KINDS)
def test_a_bundle_runs_without_torch(bundles, format, input):
    bundle = bundles(format, "fp32", input)
    program = f"""
        import sys
        for name in ("torch", "torchvision", "timm", "onnx", "onnxscript", "nncf"):
            sys.modules[name] = None
        import numpy as np
        from PIL import Image
        from visformer.bundles import Bundle
        bundle = Bundle.open({str(bundle.path)!r})
        engine = bundle.engine(threads=1)
        for sample in bundle.samples:
            picture = Image.open(sample.path)
            assert np.abs(engine.run_image(np.asarray(picture)) - sample.logits).max() <= bundle.tolerance
            assert np.abs(engine.run(bundle.preprocessing([picture]))[0] - sample.logits).max() <= bundle.tolerance
        print(len(bundle.samples), bundle.labels[0])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "3 bird\n"


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_the_check_in_the_documentation_runs(bundles, format, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    engine = {"onnx": "onnxruntime", "openvino": "openvino"}[format]
    program = next(code for code in programs if f"import {engine}" in code)
    assert "visformer" not in program and "torch" not in program
    assert len(program.splitlines()) <= 12
    (tmp_path / "bundle").symlink_to(bundles(format).path)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ok") == 3


def test_onnx_files_carry_metadata_and_pass_the_checker(bundles, model):
    bundle = bundles("onnx")
    for name in ("model.onnx", "batch.onnx"):
        onnx.checker.check_model(str(bundle.path / name), full_check=True)
        graph = onnx.load(bundle.path / name)
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        assert json.loads(metadata["labels"]) == model.class_names
        assert json.loads(metadata["preprocessing"]) == model.preprocessing.to_dict()
        assert graph.producer_name == "visformer"
    assert (bundle.path / "weights.bin").stat().st_size > 10 * (bundle.path / "batch.onnx").stat().st_size / 4
    tensor = bundles("onnx", "fp32", "tensor")
    assert sorted(path.name for path in tensor.path.iterdir()) == ["bundle.json", "model.onnx", "samples"]


def test_the_self_test_finds_what_was_changed(bundles, tmp_path):
    good = bundles("onnx", "fp32", "tensor")
    assert self_test(good).passed
    copy = tmp_path / "copy"
    shutil.copytree(good.path, copy)
    image = np.array(Image.open(copy / "samples" / "1.png"))
    size = (copy / "samples" / "1.png").stat().st_size
    Image.fromarray(255 - image).save(copy / "samples" / "1.png")
    padding = size - (copy / "samples" / "1.png").stat().st_size
    with open(copy / "samples" / "1.png", "ab") as file:
        file.write(bytes(max(0, padding)))
    document = json.loads((copy / "bundle.json").read_text())
    document["files"]["samples/1.png"]["bytes"] = (copy / "samples" / "1.png").stat().st_size
    (copy / "bundle.json").write_text(json.dumps(document))
    result = self_test(Bundle.open(copy))
    assert not result.passed
    assert result.changed_files == ["samples/1.png"]
    assert [sample["passed"] for sample in result.samples] == [False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "zip"}, "format is not"),
        ({"format_version": 2}, "format_version: 2"),
        ({"format_version": True}, "format_version"),
        ({"engine": "abacus"}, "abacus"),
        ({"labels": []}, "labels"),
        ({"labels": ["a"]}, "samples"),
        ({"preprocessing": {}}, "preprocessing"),
        ({"engine_options": {"CACHE_DIR": "/tmp"}}, "CACHE_DIR"),
        ({"files": {"../secret": {"bytes": 1, "sha256": ""}}}, "secret"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "passwd"),
        ({"files": {"no.bin": {"bytes": 1, "sha256": ""}}}, "no.bin is missing"),
        ({"model_file": "other.onnx"}, "other.onnx"),
        ({"model_file": 3}, "model_file"),
        ({"tolerance": "much"}, "tolerance"),
        ({"samples": [{"file": "samples/1.png", "logits": ["x"] * 5}]}, "logits"),
        ({"samples": [{"file": "../1.png", "logits": [0.0] * 5}]}, "1.png"),
        ({"parity": None}, "parity"),
    ],
)
def test_a_document_that_is_wrong_is_an_error_that_names_the_field(bundles, tmp_path, change, message):
    source = bundles("onnx", "fp32", "tensor").path
    shutil.copytree(source, tmp_path / "bundle", symlinks=True)
    document = json.loads((source / "bundle.json").read_text()) | change
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=message):
        Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000, '{"format": 3}'])
def test_what_is_no_document_is_an_error(tmp_path, text):
    (tmp_path / "bundle.json").write_text(text)
    assert is_bundle(tmp_path)
    with pytest.raises(UsageError, match=r"bundle\.json"):
        Bundle.open(tmp_path)


def test_a_model_file_cut_short_is_an_error(bundles, tmp_path):
    shutil.copytree(bundles("onnx", "fp32", "tensor").path, tmp_path / "bundle")
    with open(tmp_path / "bundle" / "model.onnx", "rb+") as file:
        file.truncate(1000)
    with pytest.raises(UsageError, match=r"model\.onnx has 1,000 bytes"):
        Bundle.open(tmp_path / "bundle")


def test_what_does_not_fit_the_model_is_an_error(bundles):
    engine = bundles("onnx", "fp32", "tensor").engine(threads=1)
    for batch in (np.zeros((1, 3, 32, 32), np.float32), np.zeros((3, 64, 64), np.float32), np.zeros((1, 3, 64, 64))):
        with pytest.raises(UsageError, match="batch"):
            engine.run(batch)
    for image in (np.zeros((5, 5), np.uint8), np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5, 3), np.float32)):
        with pytest.raises(UsageError, match="image"):
            engine.run_image(image)
    with pytest.raises(UsageError, match="threads"):
        bundles("onnx", "fp32", "tensor").engine(threads=0)
