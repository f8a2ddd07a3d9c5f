"""`visformer bench --what end_to_end` and `visformer train --decode device`: the whole way from files, small."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from visformer.cli import main
from visformer.verbs import bench_feed
from visformer.verbs.bench import BenchOptions

TINY = [
    "bench", "--what", "end_to_end", "--image_size", "32", "--batch_sizes", "4", "--num_images", "8", "--workers", "1",
    "--repeats", "2", "--warmup", "0", "--device_target", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six JPEGs and, in each class, a PNG and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(8):
        path = folder / "ab"[number % 2] / f"{number}{'.png' if number > 5 else '.jpg'}"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((90, 70), Image.Resampling.BICUBIC).save(path)
    return folder


def test_the_document_holds_three_contenders_and_what_they_depend_on(capsys, tmp_path, photos):
    output = tmp_path / "end_to_end.json"
    assert main([*TINY, "--data_dir", str(photos), "--json", "--output", str(output)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert json.loads(output.read_text()) == document
    assert (document["what"], document["workers"], document["compile"]) == ("end_to_end", 1, False)
    assert "0 + 2 passes of 2 steps" in captured.err and "simplejpeg" in document["versions"]
    [result] = document["results"]
    assert (result["model"], result["batch_size"], result["images"]) == ("visformer_tiny", 4, 8)
    names = ["visformer, decode device", "visformer, decode workers", "timm"]
    assert [contender["name"] for contender in result["contenders"]] == names
    for contender in result["contenders"]:
        low, high = contender["images_per_s_quartiles"]
        assert 0 < low <= contender["images_per_s"] <= high and contender["finite"]
    assert result["contenders"][-1]["ratio"] == 1.0


def test_files_come_again_when_a_pass_is_longer(photos):
    options = BenchOptions(what="end_to_end", data_dir=str(photos), num_images=20)
    with bench_feed._files(options) as source:
        assert len(source) == 20 and source.name(0) == source.name(8) == source.name(16) != source.name(1)


def test_a_batch_larger_than_a_pass_is_refused(capsys, photos):
    assert main([*TINY, "--data_dir", str(photos), "--batch_sizes", "9"]) == 2
    assert "9 is more than the 8 images of a pass" in capsys.readouterr().err


def test_all_contenders_train_the_same_way(photos):
    options = BenchOptions(what="end_to_end", image_size=32, auto_augment="none", amp_level="O0")
    device, workers = (bench_feed.feed_config("visformer_tiny", 4, options, decode) for decode in bench_feed.OURS)
    differing = {name for name, value in vars(device).items() if value != getattr(workers, name)}
    assert differing == {"decode"}
    assert (device.mixup, device.cutmix, device.re_prob, device.compile) == (0.8, 1.0, 0.25, False)


def train(photos, folder, *options: str) -> int:
    return main([
        "train", "--data_dir", str(photos), "--ckpt_save_dir", str(folder), "--image_resize", "32", "--batch_size", "2",
        "--epoch_size", "2", "--num_parallel_workers", "1", "--decode", "device", "--device_target", "cpu",
        "--auto_augment", "randaug-m9-n2-mstd0.5-inc1", "--re_prob", "0.3", "--mixup", "0.2", "--warmup_epochs", "0",
        "--val_while_train", "False", "--scheduler", "constant", *options,
    ])  # fmt: skip


def test_training_on_the_device_resumes_exactly(photos, tmp_path, capsys, monkeypatch):
    broken = tmp_path / "photos"
    for path in photos.rglob("*.*"):
        (broken / path.parent.name).mkdir(parents=True, exist_ok=True)
        (broken / path.parent.name / path.name).write_bytes(path.read_bytes())
    (broken / "a" / "zz.jpg").write_bytes((photos / "a" / "0.jpg").read_bytes()[:-200])
    assert train(broken, tmp_path / "whole") == 0
    said = capsys.readouterr().err
    assert "zz.jpg: cut short" in said or "zz.jpg: damaged" in said
    assert train(broken, tmp_path / "parts", "--epoch_size", "1") == 0
    assert train(broken, tmp_path / "parts", "--resume", "auto") == 0
    whole, parts = (load_file(tmp_path / run / "last.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert tensor.isfinite().all() and torch.equal(tensor, parts[name]), name
