"""WebDataset shards, and what timm and torchvision open."""

import io
import json
import struct
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from visformer.config import TrainConfig
from visformer.data import ImageError, TimmSource, open_data, open_evaluation
from visformer.data.shards import shards_of
from visformer.errors import UsageError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(root) -> None:
    for shard in range(2):
        members = {}
        for i in range(3):
            number = shard * 3 + i
            members |= {
                f"s{number:03}.png": png(number),
                f"s{number:03}.cls": str(number % 2).encode(),
                f"s{number:03}.json": b"{}",
            }
        write_tar(root / f"set-train-{shard:04}.tar", members)
    write_tar(root / "set-validation-0000.tar", {"v0.cls": b"1", "v0.png": png(100)})


def test_shards(tmp_path):
    write_shards(tmp_path)
    data = open_data(TrainConfig(dataset="wds/any", data_dir=str(tmp_path)))
    assert (len(data.train), len(data.val), data.class_names) == (6, 1, ["0", "1"])
    assert [data.train.target(i) for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert data.train.load(4).getpixel((0, 0)) == (4, 4, 4)
    assert data.train.key(4) == "set-train-0001.tar/s004.png"
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert open_evaluation("wds/any", str(tmp_path), "set-train-{0000..0001}.tar|6").class_names == ["cat", "dog"]


def test_shards_of_an_info_file(tmp_path):
    write_shards(tmp_path)
    info = {
        "splits": {
            "train": {"name": "train", "filenames": ["set-train-0001.tar"], "shard_lengths": [3], "num_samples": 3}
        }
    }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    data = open_data(TrainConfig(dataset="wds/any", data_dir=str(tmp_path)))
    assert len(data.train) + len(data.val) == 3 and data.split is not None
    evaluation = open_evaluation("wds/any", str(tmp_path), record=data.split)
    assert [evaluation.key(i) for i in range(len(evaluation))] == data.split["val"]
    with pytest.raises(UsageError, match="no split 'test'"):
        open_evaluation("wds/any", str(tmp_path), "test")


def test_brace_patterns(tmp_path):
    assert shards_of(tmp_path, "a{08..11}-{0..1}.tar") == [f"a{i:02}-{j}.tar" for i in range(8, 12) for j in range(2)]


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.png": png(0)}, "a.png has no class"),
        ({"a.png": png(0), "a.cls": b"cat"}, "must hold the number"),
        ({}, "no image"),
    ],
)
def test_wrong_shards(tmp_path, members, message):
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(UsageError, match=message):
        open_evaluation("wds/x", str(tmp_path), "train")


def test_damaged_shard(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UsageError, match=r"train-0\.tar: not a shard"):
        open_evaluation("wds/x", str(tmp_path), "train")
    with pytest.raises(UsageError, match="is not a folder"):
        open_evaluation("wds/x", str(tmp_path / "none"), "train")


def test_tar_of_class_folders(tmp_path):
    members = {f"{name}/{i}.png": png(i) for name in ("a", "b") for i in range(4)} | {"b/broken.png": b"no image"}
    write_tar(tmp_path / "set.tar", members)
    data = open_data(TrainConfig(data_dir=str(tmp_path / "set.tar")))
    assert data.class_names == ["a", "b"] and len(data.train) + len(data.val) == 9 and data.split is not None
    source = open_evaluation("imagenet", str(tmp_path / "set.tar"), "train")
    reasons = []
    for i in range(len(source)):
        try:
            assert source.load(i).size == (6, 5)
        except ImageError as error:
            reasons.append(error.reason)
    assert reasons == ["not an image in a format that can be read"]


def write_torch_mnist(root) -> None:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 4), ("t10k", 2)):
        images, labels = np.full((count, 28, 28), 9, np.uint8), np.arange(count, dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            bytes((0, 0, 8, 3)) + struct.pack(">3I", *images.shape) + images.tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            bytes((0, 0, 8, 1)) + struct.pack(">I", count) + labels.tobytes()
        )


def test_torchvision_by_timms_name(tmp_path):
    write_torch_mnist(tmp_path)
    data = open_data(TrainConfig(dataset="torch/fashion_mnist", data_dir=str(tmp_path)))
    assert (len(data.train), len(data.val)) == (4, 2)
    assert data.class_names[9] == "Ankle boot" and data.train.target(3) == 3
    assert data.train.load(0).mode == "RGB" and data.train.load(0).getpixel((5, 5)) == (9, 9, 9)


def test_torchvision_image_folder(tmp_path):
    for split, names in (("train", "abc"), ("val", "bc")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(png(1))
    data = open_data(TrainConfig(dataset="torch/image_folder", data_dir=str(tmp_path)))
    assert data.class_names == ["a", "b", "c"] and [data.val.target(i) for i in range(2)] == [1, 2]
    assert data.val.class_names == data.class_names and data.val.load(1).size == (6, 5)


@pytest.mark.parametrize(
    "dataset, message",
    [
        ("torch/nothing", "Unknown torchvision dataset nothing"),
        ("torch/cifar10", "has neither cifar-10-batches-py"),
        ("torch/flowers102", "can't be opened"),
        ("hfids/x", "is a stream"),
        ("tfds/x", "is a stream"),
    ],
)
def test_what_can_not_be_opened(tmp_path, dataset, message):
    with pytest.raises(UsageError, match=message) as caught:
        open_data(TrainConfig(dataset=dataset, data_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


class Reader:
    """What timm's reader of Hugging Face datasets looks like from outside."""

    class_to_idx = {"dog": 1, "cat": 0}  # noqa: RUF012

    def __init__(self, files):
        self.files = files

    def __getitem__(self, index):
        return io.BytesIO(self.files[index]), index % 2

    def iter_targets(self):
        return (i % 2 for i in range(len(self.files)))


def test_a_reader_of_bytes():
    source = TimmSource(SimpleNamespace(reader=Reader([png(1), png(2), b"broken"])), "hfds/pets", channels=1)
    assert source.class_names == ["cat", "dog"] and len(source) == 3 and source.target(1) == 1
    assert source.load(1).mode == "L" and source.name(1) == "hfds/pets[1]"
    with pytest.raises(ImageError, match="not an image"):
        source.load(2)
