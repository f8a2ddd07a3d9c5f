"""`visformer bench --what data`: the document, what is compared with what, and what is said of it."""

import json
import multiprocessing
import os
import time

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation

from visformer.cli import main
from visformer.data import FolderSource
from visformer.verbs import bench_data
from visformer.verbs.bench import BenchOptions
from visformer.verbs.bench_data_images import packed_images, write_jpegs

TINY = [
    "bench", "--what", "data", "--image_size", "32", "--batch_sizes", "4", "--num_images", "9", "--workers", "1",
    "--repeats", "2", "--warmup", "0", "--device_target", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_jpegs(folder, 12)
    return folder


def test_json_is_one_document_with_both_stages_and_the_models_rate(capsys, tmp_path):
    output = tmp_path / "data.json"
    assert main([*TINY, "--models", "visformer_tiny", "--json", "--output", str(output)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert json.loads(output.read_text()) == document
    assert "9 JPEGs, 8" in captured.err and "1 workers" in captured.err
    assert (document["what"], document["against"], document["workers"]) == ("data", ["timm"], 1)
    assert (document["image_size"], document["auto_augment"], document["data_dir"]) == (32, "autoaug", "")
    assert document["versions"]["simplejpeg"] == simplejpeg.__version__ and "timm" in document["versions"]
    [result] = document["results"]
    assert (result["batch_size"], result["images"]) == (4, 8)
    loaded, ready = result["stages"]
    assert (loaded["stage"], ready["stage"]) == ("loaded", "ready")
    assert [c["name"] for c in loaded["contenders"]] == ["visformer", "visformer, packed", "timm", "timm, unmixed"]
    assert [c["name"] for c in ready["contenders"]] == ["visformer", "visformer, packed", "timm"]
    for contender in (*loaded["contenders"], *ready["contenders"]):
        low, high = contender["images_per_s_quartiles"]
        assert 0 < low <= contender["images_per_s"] <= high
        assert contender["finite"]
        assert 7.9 < contender["images_per_s"] * contender["seconds_per_step"] < 40  # 8 images, if all rounds are alike
        assert contender["name"] != "timm" or contender["ratio"] == contender["processor_ratio"] == 1.0
        assert 0 < contender["processor_ms_per_image"] < 4 * 1000 * contender["seconds_per_step"] / 8
    [model] = result["models"]
    assert model["model"] == "visformer_tiny" and model["images_per_s"] > 0
    for limit, contender in zip(("limit", "packed_limit"), ready["contenders"], strict=False):
        slower = contender["images_per_s"] < model["images_per_s"]
        assert model[limit] == ("loader" if slower else "model")


def test_the_tables_say_what_was_measured(capsys, photos):
    assert main([*TINY, "--data_dir", str(photos), "--auto_augment", "randaug-m9-mstd0.5-inc1"]) == 0
    captured = capsys.readouterr()
    assert "loaded: pixels from the workers; batch 4" in captured.out and "1 workers, 32x32" in captured.out
    assert "ready: normalised, erased and mixed on the device" in captured.out and "timm, unmixed" in captured.out
    assert "randaug-m9-mstd0.5-inc1" in captured.out


def test_the_jpegs_are_like_photographs(photos, tmp_path):
    files = sorted(photos.rglob("*.jpg"))
    assert len(files) == 12 and len({path.read_bytes() for path in files}) == 12
    assert 80_000 < np.mean([path.stat().st_size for path in files]) < 88_000
    for path in files[:3]:
        with Image.open(path) as image:
            assert image.size == (500, 375) and image.mode == "RGB"
            pixels = np.asarray(image.convert("L"), dtype=float)
        assert 80 < pixels.mean() < 160 and 30 < pixels.std() < 75
        amplitude = np.abs(np.fft.fft2(pixels - pixels.mean()))
        radius = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)) * 500
        low, high = (amplitude[(radius > r * 0.8) & (radius < r * 1.25)].mean() for r in (10, 80))
        assert 8 < low / high < 20  # amplitudes fall with the frequency, as in nature: 8 to the power of 1.27 is 14
    write_jpegs(tmp_path, 3)
    assert (tmp_path / "class1" / "00001.jpg").read_bytes() == (photos / "class1" / "00001.jpg").read_bytes()


@pytest.mark.parametrize("policy, kind", [("autoaug", AutoAugment), ("randaug-m7-n3", RandAugment)])
def test_timms_loader_has_our_settings_and_files(photos, policy, kind):
    options = BenchOptions(what="data", auto_augment=policy, image_size=64, workers=0)
    config = bench_data.data_config(options, 6)
    source = FolderSource(photos)
    loader = bench_data.timm_loader(source, config, torch.device("cpu"), mixed=True)
    crop, _, augment = loader.dataset.transform.transforms[:3]
    assert isinstance(crop, RandomResizedCropAndInterpolation) and crop.size == (64, 64)
    assert (tuple(crop.scale), tuple(crop.ratio)) == (config.scale, config.ratio)
    assert crop.interpolation.value == config.interpolation == "bicubic"
    assert isinstance(augment, kind)
    if kind is RandAugment:
        assert augment.num_layers == 3 and augment.ops[0].magnitude == 7
    assert loader.random_erasing.probability == config.re_prob
    collate = loader.loader.collate_fn
    assert (collate.mixup_alpha, collate.cutmix_alpha) == (config.mixup, config.cutmix)
    names = [os.path.realpath(name) for name, _ in loader.dataset.reader.samples]
    assert names == [os.path.realpath(source.name(i)) for i in range(12)]
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(6, 3, 64, 64)] * 2
    assert all(images.dtype == torch.float32 for images, _ in batches)
    assert [target for _, target in loader.dataset.reader.samples] == [source.target(i) for i in range(12)]


def test_both_give_the_same_distribution_of_colours(photos):
    """Without augmentation of colour, the pixels' mean and deviation agree."""
    options = BenchOptions(what="data", auto_augment="none", image_size=64, workers=0)
    config = bench_data.data_config(options, 12)
    config.color_jitter, config.mixup, config.cutmix, config.re_prob = None, 0.0, 0.0, 0.0
    source = FolderSource(photos)
    ours, prepare = bench_data.make_train_loader(source, config), bench_data.DeviceTransform(config, 10)
    theirs = bench_data.timm_loader(source, config, torch.device("cpu"), mixed=False)
    mine = torch.cat(
        [bench_data._ready(b, prepare, torch.device("cpu")) for _ in range(8) for b in bench_data._epoch(ours)]
    )
    timms = torch.cat([images for _ in range(8) for images, _ in theirs])
    assert mine.shape == timms.shape == (96, 3, 64, 64)
    assert torch.allclose(mine.mean((0, 2, 3)), timms.mean((0, 2, 3)), atol=0.15)
    assert torch.allclose(mine.std((0, 2, 3)), timms.std((0, 2, 3)), rtol=0.12)


def test_the_time_of_processors_is_that_of_this_process_and_its_workers():
    began = bench_data._processor_s()
    child = multiprocessing.get_context("fork").Process(target=_work, args=(0.4,))
    child.start()
    _work(0.2)
    time.sleep(0.8)
    while (spent := bench_data._processor_s() - began) < 0.55 and child.is_alive():
        time.sleep(0.05)
    child.kill()
    child.join()
    assert 0.5 < spent < 1.0


def _work(seconds: float) -> None:
    while seconds > 0:
        began = time.process_time()
        sum(range(20_000))
        seconds -= time.process_time() - began
    if multiprocessing.parent_process() is not None:
        time.sleep(10)


def test_the_verdict_names_the_limit():
    def result(loader, packed):
        return {"stages": [{}, {"contenders": [{"images_per_s": loader}, {"images_per_s": packed}]}]}

    model = {"model": "visformer_tiny", "images_per_s": 1000.0}
    assert bench_data.verdict(result(300.0, 2500.0), model, 2) == (
        "visformer_tiny trains at 1,000 images/s. 2 workers deliver 300 from JPEGs: the loader is the limit; 7 workers "
        "on as many cores would feed it. Packed, they deliver 2,500: the model is the limit, the loader could feed 2.5 "
        "of it."
    )
    slow = bench_data.verdict(result(1000.0, 900.0), model, 2)
    assert "1,000 from JPEGs: the model is the limit, the loader could feed 1.0 of it" in slow
    assert "deliver 900: the loader is the limit; 3 workers" in slow


def test_the_packed_images_are_the_same_ones_reduced(photos):
    source = FolderSource(photos)
    with packed_images(source, 56) as packed:
        assert [packed.key(i) for i in range(12)] == [source.key(i) for i in range(12)]
        assert [packed.target(i) for i in range(12)] == [source.target(i) for i in range(12)]
        assert packed.raw(0).shape == (64, 85, 3)
        reduced = np.asarray(source.load(0).resize((85, 64), Image.Resampling.BICUBIC))
        assert np.array_equal(packed.raw(0), reduced)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_images", "3"], "batch_sizes: 4 is more than the 3 images"),
        (["--auto_augment", "trivialaugwide"], "auto_augment: timm has no 'trivialaugwide' to measure against"),
        (["--auto_augment", "autoaugment"], "auto_augment: 'autoaugment': 'autoaugment' is no policy"),
        (["--models", "visformer_tyni"], "there is no model 'visformer_tyni'; did you mean visformer_tiny"),
        (["--data_dir", "nowhere"], "data_dir: nowhere does not exist"),
        (["--workers", "-1"], "workers: -1 is out of range"),
        (["--num_images", "0"], "num_images: 0 is out of range"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(words, message, capsys):
    assert main([*TINY, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"visformer: error: {message}" in captured.err


def test_an_image_that_cant_be_read_ends_the_benchmark(capsys, tmp_path):
    write_jpegs(tmp_path, 8)
    (tmp_path / "class3" / "00003.jpg").write_bytes(b"text")
    assert main([*TINY, "--data_dir", str(tmp_path)]) == 1
    assert "00003.jpg" in capsys.readouterr().err
