"""`visformer pack` from the command line: pack, train, validate; and what it says when that can't be."""

import json
import os

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.data.test_packed import write_photos
from visformer.cli import main
from visformer.data import packed_writer

TRAIN = [
    "--model", "visformer_tiny", "--image_resize", "32", "--batch_size", "4", "--epoch_size", "1",
    "--device_target", "cpu", "--num_parallel_workers", "0", "--warmup_epochs", "0", "--auto_augment", "autoaug",
    "--mixup", "0.2",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos", {"rose": 6, "ash": 6})


def pack(*words):
    return main(["pack", "--workers", "2", *map(str, words)])


def validated(capsys, *words):
    capsys.readouterr()
    assert main(["validate", *map(str, words), "--json", "--device_target", "cpu", "--num_parallel_workers", "0"]) == 0
    return json.loads(capsys.readouterr().out)


def test_pack_train_and_validate_as_from_the_folder(photos, tmp_path, capsys):
    out = tmp_path / "packed"
    assert pack(photos, out) == 0
    told = capsys.readouterr()
    assert "train: 12 images\n" in told.err and "train          12 images in 1 shard, 0.0 MB" in told.out
    assert f"{out}: 2 classes, packed in " in told.out and f"train with visformer train --data_dir {out}" in told.out
    for data, run in ((photos, "a"), (out, "b"), (f"file://{out}", "c")):
        os.environ["VISFORMER_CACHE"] = str(tmp_path / "cache")
        try:
            assert main(["train", "--data_dir", str(data), "--ckpt_save_dir", str(tmp_path / run), *TRAIN]) == 0
        finally:
            del os.environ["VISFORMER_CACHE"]
    folder, packed = (load_file(tmp_path / run / "last.safetensors") for run in "ab")
    assert folder.keys() == packed.keys() and all(folder[name].equal(packed[name]) for name in folder)

    theirs = validated(capsys, "--ckpt_path", tmp_path / "a" / "last.safetensors", "--data_dir", photos)
    ours = validated(capsys, "--ckpt_path", tmp_path / "b" / "last.safetensors", "--data_dir", out)
    assert ours["num_images"] == theirs["num_images"] == 2
    assert ours["loss"] == theirs["loss"] and ours["split"].startswith("val (")
    every = ("--ckpt_path", tmp_path / "b" / "last.safetensors", "--data_dir", out, "--val_split", "all")
    assert validated(capsys, *every)["num_images"] == 12


def test_uint8_trains_and_validates(photos, tmp_path, capsys):
    for split in ("train", "val"):
        write_photos(tmp_path / "pets" / split, {"cat": 4, "dog": 4})
    out = tmp_path / "packed"
    assert pack(tmp_path / "pets", out, "--format", "uint8", "--size", "40", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "uint8" and report["size"] == 40 and report["skipped"] == []
    assert report["splits"]["val"] == {"images": 8, "shards": 1, "bytes": 8 * 40 * 53 * 3}
    assert report["class_names"] == ["cat", "dog"] and report["seconds"] > 0
    assert main(["train", "--data_dir", str(out), "--ckpt_save_dir", str(tmp_path / "run"), *TRAIN]) == 0
    measured = validated(capsys, "--ckpt_path", tmp_path / "run" / "last.safetensors", "--data_dir", out)
    assert measured["num_images"] == 8


def test_images_that_cant_be_read_are_left_out_and_named(photos, tmp_path, capsys):
    (photos / "ash" / "2.jpg").write_bytes(b"text")
    whole = (photos / "rose" / "3.jpg").read_bytes()
    (photos / "rose" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    for kind in ("webdataset", "uint8"):
        assert pack(photos, tmp_path / kind, "--format", kind) == 0
        told = capsys.readouterr().out
        assert "10 images in 1 shard" in told
        assert f"left out {photos / 'ash' / '2.jpg'}: not an image in a format that can be read" in told
        assert f"left out {photos / 'rose' / '3.jpg'}: cut short" in told


def test_a_class_that_loses_all_its_images_is_an_error_and_nothing_is_left(photos, tmp_path, capsys, monkeypatch):
    def unreadable(source, index):
        if source.key(index).startswith("rose"):
            raise packed_writer.ImageError("gone")
        return packed_writer.Sample(b"x", ".png")

    monkeypatch.setattr(packed_writer, "as_file", unreadable)
    assert pack(photos, tmp_path / "out" / "packed") == 1
    assert "no image of class 'rose' can be read" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_packing_that_ends_early_leaves_nothing_and_what_was_there(photos, tmp_path, capsys, monkeypatch, error):
    out = tmp_path / "out" / "packed"
    assert pack(photos, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_):
        raise error

    monkeypatch.setattr(packed_writer._Shards, "close", fail)
    assert pack(photos, out, "--overwrite", "True") == (1 if isinstance(error, OSError) else 130)
    if isinstance(error, OSError):
        assert f"cannot write {out}: No space left on device" in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["packed"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_overwriting(photos, tmp_path, capsys):
    out = tmp_path / "packed"
    out.mkdir()
    assert pack(photos, out) == 0  # an empty folder is free
    assert pack(photos, out) == 2
    assert f"out: {out} is there already; replace it with --overwrite True" in capsys.readouterr().err
    assert pack(photos, out, "--overwrite", "True", "--format", "uint8", "--size", "8") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "packed.json", "train-000000.bin", "train.index.safetensors"
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "photos"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{photos}", "{photos}", "--overwrite", "True"], "out: {photos} is there and is no packed set"),
        (["{photos}", "{photos}/packed"], "out: {photos}/packed lies in {photos}, which is packed"),
        (["{photos}"], "out: missing; write visformer pack DATA OUT"),
        ([], "data: missing; write visformer pack DATA OUT"),
        (["nowhere", "out"], "data_dir: nowhere does not exist"),
        (["{photos}", "out", "--size", "0"], "size: 0 is out of range; it must be from 1 to 8192"),
        (["{photos}", "out", "--shard_mb", "0"], "shard_mb: 0 is out of range"),
        (["{photos}", "out", "--in_channels", "2"], "in_channels: 2 is not known"),
        (["{photos}", "out", "--workers", "0"], "workers: 0 is out of range"),
        (["{photos}", "out", "--format", "zip"], "format: "),
        (["{photos}", "out", "--dataset", "cifar9"], "dataset: unknown 'cifar9'; did you mean"),
        (["{photos}", "out", "--val_split", "other"], "{photos}: no folder 'other'"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(words, message, photos, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert pack(*(word.format(photos=photos) for word in words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"visformer: error: {message.format(photos=photos)}" in captured.err
    assert not (tmp_path / "out").exists() and not (photos / "packed").exists()


def test_a_place_that_cant_be_written_is_told(photos, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert pack(photos, tmp_path / "file" / "packed") == 1
    assert f"cannot write {tmp_path}/file/packed: " in capsys.readouterr().err


def test_grey_and_upright(tmp_path, capsys):
    folder = tmp_path / "photos" / "one"
    folder.mkdir(parents=True)
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    out = tmp_path / "packed"
    assert pack(tmp_path / "photos", out, "--format", "uint8", "--size", "10", "--in_channels", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["bytes"] == 10 * 20
    index = json.loads((out / "packed.json").read_text())
    assert index["channels"] == 1 and index["image_size"] == 10
