"""Packed sets: what goes in comes out, in the source's order, and what is damaged is told."""

import json
import pickle
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from visformer.config import TrainConfig
from visformer.data import FolderSource, ImageError, ShardSource, make_train_loader, open_data, open_evaluation
from visformer.data.arrays import ArraySource
from visformer.data.packed import open_packed
from visformer.data.packed_index import MARKER, Manifest, marker_text
from visformer.data.packed_writer import AsPixels, as_file, write_split
from visformer.data.shards import index_shard
from visformer.data.sources import training_image
from visformer.data.transforms import draw_crop
from visformer.errors import UsageError
from visformer.verbs.bench_data_images import write_jpegs
from visformer.verbs.pack import PackOptions, pack


def write_photos(root: Path, classes: dict[str, int], size: tuple[int, int] = (60, 45)) -> Path:
    """Folders of small JPEGs, smooth as photographs are, and one PNG in each."""
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            coarse = np.random.default_rng([number, i]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            image.save(root / name / (f"{i}.jpg" if i else "0.png"))
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "photos", {"rose": 7, "ash": 12, "lily": 3})


def packed(data, out, **options):
    pack(PackOptions(str(data), str(out), workers=2, **options))
    return out


def batches(data_dir, **options):
    config = TrainConfig(
        data_dir=str(data_dir), image_resize=32, batch_size=4, num_parallel_workers=0, auto_augment="autoaug", **options
    )
    data = open_data(config)
    loader = make_train_loader(data.train, config)
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += list(loader)
    return data, found


@pytest.mark.parametrize("folders", [("",), ("train",), ("train", "val")])
def test_files_train_bit_for_bit_as_the_folder_does(tmp_path, folders):
    for folder in folders:
        write_photos(tmp_path / "photos" / folder, {"rose": 7, "ash": 12, "lily": 3})
    out = packed(tmp_path / "photos", tmp_path / "packed", shard_mb=0.004)
    (theirs, expected), (ours, found) = batches(tmp_path / "photos"), batches(out)
    assert len(list(out.glob("train-*.tar"))) > 3
    assert ours.class_names == theirs.class_names
    assert (ours.split is None) == (theirs.split is None) == (len(folders) == 2)
    if ours.split is not None:
        assert {**ours.split, "data_dir": ""} == {**theirs.split, "data_dir": ""}
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected, strict=True):
        assert a.indices == b.indices and a.targets.equal(b.targets) and a.images.equal(b.images)
    for i in range(len(theirs.val)):
        assert ours.val.key(i) == theirs.val.key(i) and ours.val.target(i) == theirs.val.target(i)
        assert np.array_equal(np.asarray(ours.val.load(i)), np.asarray(theirs.val.load(i)))


def test_each_file_is_kept_byte_for_byte_and_named_by_its_key(photos, tmp_path):
    source = open_packed(str(packed(photos, tmp_path / "packed"))).open("train", 3)
    folder = FolderSource(photos)
    for i in range(len(folder)):
        assert source.raw(i) == Path(folder.name(i)).read_bytes()
        assert source.key(i) == folder.key(i) and source.target(i) == folder.target(i)
    assert source.name(0) == f"{tmp_path}/packed[ash/0.png]"


def test_shards_are_webdatasets(photos, tmp_path):
    out = packed(photos, tmp_path / "packed", shard_mb=0.004)
    folder, by_wds = FolderSource(photos), TrainConfig(dataset="wds/any", data_dir=str(out))
    data = open_data(by_wds)
    source = data.train.source
    assert isinstance(source, ShardSource) and source.class_names == folder.class_names and len(source) == 22
    for i in range(22):
        original = int(Path(source.key(i)).stem)
        assert source.raw(i) == folder.raw(original) and source.target(i) == folder.target(original)
    shards = sorted(out.glob("*.tar"))
    assert all(shard.stat().st_size < 4000 + 10_000 for shard in shards)
    first = [target for _, _, _, target in (row for shard in shards[:3] for row in index_shard(shard))]
    assert len(set(first)) > 1  # classes lie mixed


def test_timms_reader_reads_the_shards(photos, tmp_path):
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    out = packed(photos, tmp_path / "packed", shard_mb=0.004)
    dataset = create_dataset("wds/any", root=str(out), split="train", is_training=False, batch_size=2)
    folder = FolderSource(photos)
    found = sorted((np.asarray(image.convert("RGB")).tobytes(), target) for image, target in dataset)
    images = [(np.asarray(folder.load(i)).tobytes(), folder.target(i)) for i in range(len(folder))]
    assert found == sorted(images)


def test_pixels_are_those_of_the_image_reduced(photos, tmp_path):
    out = packed(photos, tmp_path / "packed", format="uint8", size=24, shard_mb=0.01)
    source, folder = open_packed(str(out)).open("train", 3), FolderSource(photos)
    for i in range(len(folder)):
        reduced = np.asarray(folder.load(i).resize((32, 24), Image.Resampling.BICUBIC))
        assert np.array_equal(source.raw(i), reduced) and np.array_equal(np.asarray(source.load(i)), reduced)
        assert isinstance(training_image(source, i, 3), np.ndarray)
    shards = sorted(out.glob("train-*.bin"))
    assert len(shards) > 4 and all(shard.stat().st_size <= 10_000 for shard in shards)
    larger = open_packed(str(packed(photos, tmp_path / "whole", format="uint8", size=64))).open("train", 3)
    assert larger.raw(0).shape == (45, 60, 3)  # never enlarged


def test_pixels_give_the_same_samples_in_the_same_order(photos, tmp_path):
    out = packed(photos, tmp_path / "packed", format="uint8", size=40)
    (_, expected), (_, found) = batches(photos), batches(out)
    assert [b.indices for b in found] == [b.indices for b in expected]
    assert all(
        a.targets.equal(b.targets) and a.images.shape == b.images.shape for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("size, mean", [(256, 2.8), (320, 1.75)])
def test_resizing_twice_costs_what_the_docs_say(tmp_path, size, mean):
    write_jpegs(tmp_path / "photos", 6)
    folder = FolderSource(tmp_path / "photos")
    out = packed(tmp_path / "photos", tmp_path / "packed", format="uint8", size=size)
    source = open_packed(str(out)).open("train", 3)
    differences = []
    for i in range(6):
        whole, reduced = folder.load(i), source.load(i)
        for crop in range(8):
            random.seed(100 * i + crop)
            box = draw_crop(whole.width, whole.height, (0.08, 1.0), (3 / 4, 4 / 3))
            seen = []
            for image in (whole, reduced):
                x, y = image.width / whole.width, image.height / whole.height
                left, top, width, height = box
                edges = left * x, top * y, (left + width) * x, (top + height) * y
                seen.append(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box=edges), dtype=float))
            differences.append(np.abs(seen[0] - seen[1]).mean())
    assert abs(np.mean(differences) - mean) < 0.35


@pytest.mark.parametrize("kept, wanted", [(1, 3), (3, 1), (3, 4), (1, 1), (4, 4)])
def test_other_channels_than_were_kept(photos, tmp_path, kept, wanted):
    out = packed(photos, tmp_path / "packed", format="uint8", size=24, in_channels=kept)
    source = open_packed(str(out)).open("train", wanted)
    assert len(source.load(0).getbands()) == wanted
    assert (source.raw(0) is None) == (kept != wanted)
    _, [first, *_] = batches(out, in_channels=wanted) if wanted < 4 else (None, [None])
    assert first is None or first.images.shape[1] == wanted


def test_arrays_are_kept_as_png(tmp_path):
    out = packed("./", tmp_path / "packed", dataset="digits")
    digits = open_data(TrainConfig(dataset="digits"))
    data = open_data(TrainConfig(data_dir=str(out)))
    assert data.class_names == digits.class_names and data.split is None
    for ours, theirs in ((data.train, digits.train), (data.val, digits.val)):
        assert len(ours) == len(theirs)
        for i in (0, 5, len(theirs) - 1):
            assert np.array_equal(np.asarray(ours.load(i)), np.asarray(theirs.load(i)))
            assert ours.target(i) == theirs.target(i) and ours.key(i) == theirs.key(i)


def test_packing_twice_gives_equal_files_and_packing_a_packed_set_works(photos, tmp_path):
    first, second = packed(photos, tmp_path / "a"), packed(photos, tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["_info.json", "classes.txt", MARKER, "train-000000.tar", "train.index.safetensors"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    again = packed(first, tmp_path / "c")
    for name in set(names) - {MARKER}:
        assert (again / name).read_bytes() == (first / name).read_bytes()
    pixels = [packed(data, tmp_path / f"u{i}", format="uint8", size=24) for i, data in enumerate((photos, first))]
    assert (pixels[0] / "train-000000.bin").read_bytes() == (pixels[1] / "train-000000.bin").read_bytes()


def test_a_split_of_a_packed_set_is_evaluated_as_that_of_the_folder(tmp_path):
    write_photos(tmp_path / "photos" / "training", {"rose": 3, "ash": 4, "lily": 3})
    write_photos(tmp_path / "photos" / "valid", {"rose": 2, "lily": 2})
    out = packed(tmp_path / "photos", tmp_path / "packed")
    for split in ("val", "valid", "train", "training"):
        ours, theirs = (open_evaluation("imagenet", str(data), split) for data in (out, tmp_path / "photos"))
        assert ours.class_names == theirs.class_names and len(ours) == len(theirs)
        assert [ours.key(i) for i in range(len(ours))] == [theirs.key(i) for i in range(len(theirs))]
        assert [ours.target(i) for i in range(len(ours))] == [theirs.target(i) for i in range(len(theirs))]
    with pytest.raises(UsageError, match="no split 'test'; it has train, val"):
        open_evaluation("imagenet", str(out), "test")
    with pytest.raises(UsageError, match="packed without 'other', which --val_split names"):
        open_data(TrainConfig(data_dir=str(out), val_split="other"))


def test_the_record_of_a_split_serves_the_folder_and_the_packed_set(tmp_path):
    write_photos(tmp_path / "photos" / "train", {"rose": 5, "ash": 6})
    out = packed(tmp_path / "photos", tmp_path / "packed")
    split = open_data(TrainConfig(data_dir=str(out))).split
    for data in (out, tmp_path / "photos"):
        held_out = open_evaluation("imagenet", str(data), "val", record=split)
        assert [held_out.key(i) for i in range(len(held_out))] == split["val"]
    assert len(open_evaluation("imagenet", str(out), "all")) == 11


@settings(max_examples=25, deadline=None)
@given(
    images=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3), st.text(min_size=1, max_size=8)),
        min_size=1,
        max_size=12,
    ),
    kind=st.sampled_from(["webdataset", "uint8"]),
    size=st.integers(1, 40),
    shard=st.integers(1, 5000),
    seed=st.integers(0, 99),
)
def test_whatever_goes_in_comes_out(tmp_path_factory, images, kind, size, shard, seed):
    source = _Listed(images, seed)
    out = tmp_path_factory.mktemp("packed")
    ready = as_file if kind == "webdataset" else AsPixels(size)
    written = write_split(source, "train", out, ready, shard_bytes=shard, workers=2, shuffled=bool(seed % 2))
    side = None if kind == "webdataset" else size
    manifest = Manifest(kind, side, 3, source.class_names, {"train": written.split}, {})
    (out / MARKER).write_text(marker_text(manifest))
    found = pickle.loads(pickle.dumps(open_packed(str(out)).open("train", 3)))
    assert len(found) == len(images) and written.skipped == []
    for i, (height, width, target, key) in enumerate(images):
        assert (found.target(i), found.key(i)) == (target, key.encode("utf-8", "surrogateescape").decode())
        pixels = np.asarray(found.load(i))
        if kind == "webdataset" or min(height, width) <= size:
            assert np.array_equal(pixels, np.asarray(source.load(i)))
        else:
            assert min(pixels.shape[:2]) == size


class _Listed:
    def __init__(self, images, seed):
        self.images, self.seed = images, seed
        self.class_names = ["a", "b", "c", "d"]

    def __len__(self):
        return len(self.images)

    def load(self, index):
        height, width, _, _ = self.images[index]
        return Image.fromarray(
            np.random.default_rng([self.seed, index]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        )

    def target(self, index):
        return self.images[index][2]

    def name(self, index):
        return f"listed[{index}]"

    def key(self, index):
        return self.images[index][3]


# ---- what is damaged


@pytest.fixture
def damaged(photos, tmp_path):
    return packed(photos, tmp_path / "packed", format="uint8", size=16, shard_mb=0.01)


def _edit(out: Path, **changes):
    """Change `packed.json`."""
    marker = json.loads((out / MARKER).read_text())
    (out / MARKER).write_text(json.dumps(marker | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "packed in version 2 of the format, and this visformer reads version 1; update visformer"),
        ({"version": None}, "packed in version None"),
        ({"title": "other"}, "not the marker of a packed set"),
        ({"format": "pickle"}, "damaged .wrong: format 'pickle'"),
        ({"channels": 2}, "damaged .wrong: channels 2"),
        ({"class_names": []}, "damaged .wrong: class_names"),
        ({"class_names": [1]}, "damaged .wrong: class_names"),
        ({"splits": {}}, "damaged .wrong: splits"),
        ({"splits": {"train": {}}}, "damaged .it lacks 'shards'"),
        ({"splits": []}, "damaged .wrong"),
        ({"image_size": -1}, "damaged .wrong: image_size -1"),
    ],
)
def test_a_wrong_marker_is_told(damaged, changes, message):
    _edit(damaged, **changes)
    with pytest.raises(UsageError, match=message):
        open_packed(str(damaged))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_marker_that_is_none_is_told(damaged, text):
    (damaged / MARKER).write_bytes(text)
    with pytest.raises(UsageError, match="not the marker of a packed set"):
        open_packed(str(damaged))


@pytest.mark.parametrize("name", ["../evil.bin", "/etc/passwd", ".hidden", "a/b", "", 7])
def test_a_shard_elsewhere_is_refused(damaged, name):
    marker = json.loads((damaged / MARKER).read_text())
    marker["splits"]["train"]["shards"][0]["name"] = name
    _edit(damaged, splits=marker["splits"])
    with pytest.raises(UsageError, match=r"damaged .wrong: file name"):
        open_packed(str(damaged))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("shard", -1, "shard"), ("shard", 99, "shard"), ("offset", -5, "offset"), ("offset", 1 << 62, "offset"),
        ("size", 0, "size"), ("size", 1 << 62, "size"), ("height", 0, "height"), ("height", 1 << 62, "height"),
        ("width", 5, "height or width"), ("target", 3, "target"), ("target", -1, "target"), ("key_end", -1, "key_end"),
        ("key_end", 1 << 40, "key_end"),
    ],
)  # fmt: skip
def test_numbers_of_an_index_are_checked(damaged, column, value, message):
    path = damaged / "train.index.safetensors"
    columns = {name: array.copy() for name, array in load_file(path).items()}
    columns[column][2] = value
    save_file(columns, path)
    marker = json.loads((damaged / MARKER).read_text())
    data = path.read_bytes()
    marker["splits"]["train"]["index"] |= {"size": len(data), "crc32": zlib.crc32(data)}
    _edit(damaged, splits=marker["splits"])
    with pytest.raises(UsageError, match=f"train.index.safetensors: damaged .wrong: {message}"):
        open_packed(str(damaged)).open("train", 3)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_index_is_told_and_nothing_else(tmp_path_factory, place, byte, cut):
    out = tmp_path_factory.mktemp("packed")
    source = ArraySource(np.zeros((5, 4, 4), np.uint8), [0, 1, 0, 1, 0], ["a", "b"], "zeros")
    written = write_split(source, "train", out, AsPixels(4), shard_bytes=100, workers=1, shuffled=True)
    manifest = Manifest("uint8", 4, 3, ["a", "b"], {"train": written.split}, {})
    (out / MARKER).write_text(marker_text(manifest))
    path = out / "train.index.safetensors"
    data = bytearray(path.read_bytes())
    place %= len(data)
    if cut:
        data = data[:place]
    elif data[place] != byte:
        data[place] = byte
    else:
        return
    path.write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        open_packed(str(out)).open("train", 3)


def test_a_shard_cut_short_or_gone_is_told_when_the_set_is_opened(damaged):
    shard = sorted(damaged.glob("*.bin"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"train-000001.bin: 9,\d+ bytes, and packed.json says 9,\d+; copy it again"):
        open_data(TrainConfig(data_dir=str(damaged)))
    shard.unlink()
    with pytest.raises(UsageError, match=r"train-000001.bin: can't be read"):
        open_data(TrainConfig(data_dir=str(damaged)))


def test_a_shard_that_goes_while_it_is_read_is_an_image_that_cant_be_read(damaged):
    source = open_data(TrainConfig(data_dir=str(damaged))).train
    for shard in damaged.glob("*.bin"):
        shard.write_bytes(b"short")
    with pytest.raises(ImageError, match="has 5 bytes"):
        source.load(0)
    for shard in damaged.glob("*.bin"):
        shard.unlink()
    with pytest.raises(ImageError, match="is gone"):
        source.load(0)


def test_a_model_that_sees_more_pixels_than_were_kept_is_warned_of(damaged, capsys):
    open_data(TrainConfig(data_dir=str(damaged), image_resize=32))
    assert "packed at 16 pixels a side, and the model takes 32" in capsys.readouterr().err
