"""The datasets that fit in memory, from files written here in each of their layouts."""

import gzip
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from visformer.config import TrainConfig
from visformer.data import ArraySource, open_data, open_evaluation
from visformer.data.arrays import digits
from visformer.errors import UsageError

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, prefix: str, count: int, compress: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        data = idx(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(data) if compress else data)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("layout", ["", "raw", "MNIST/raw", "FashionMNIST/raw", "train|test"])
def test_mnist_layouts(tmp_path, layout, compress):
    dataset = "fashion_mnist" if "Fashion" in layout else "mnist"
    train, test = layout.split("|") if "|" in layout else (layout, layout)
    write_mnist(tmp_path / train, "train", 20, compress)
    write_mnist(tmp_path / test, "t10k", 10, compress)
    data = open_data(TrainConfig(dataset=dataset, data_dir=str(tmp_path)))
    assert (len(data.train), len(data.val), data.split) == (20, 10, None)
    assert data.class_names[9] == ("Ankle boot" if dataset == "fashion_mnist" else "9")
    assert data.train.load(1).mode == "RGB" and data.train.load(1).getpixel((1, 0)) == (17, 17, 17)
    assert data.train.target(13) == 3 and data.train.name(13) == f"{dataset}[13]"
    assert len(open_evaluation(dataset, str(tmp_path), "train")) == 20


def test_mnist_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"no train-images-idx3-ubyte .*dataset_download"):
        open_data(TrainConfig(dataset="mnist", data_dir=str(tmp_path)))


@pytest.mark.parametrize("spoil", [lambda d: d[:-5], lambda d: b"\x1f" + d, lambda d: d[:3], lambda d: b""])
def test_damaged_idx(tmp_path, spoil):
    write_mnist(tmp_path, "train", 4)
    write_mnist(tmp_path, "t10k", 4)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UsageError, match="train-images-idx3-ubyte: "):
        open_data(TrainConfig(dataset="mnist", data_dir=str(tmp_path)))


def test_damaged_gzip(tmp_path):
    write_mnist(tmp_path, "train", 4, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UsageError, match="can't be read"):
        open_evaluation("mnist", str(tmp_path), "train")


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    source = open_evaluation("fashion_mnist", str(FASHION), "val", channels=1)
    assert len(source) == 10_000 and source.class_names[source.target(0)] == "Ankle boot"
    assert source.load(0).size == (28, 28) and source.load(0).mode == "L"


def cifar_part(count: int, labels: dict) -> dict:
    return {"data": np.arange(count * 3072, dtype=np.int64).astype(np.uint8).reshape(count, 3072)} | labels


def dump(path: Path, content: dict, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("below", ["cifar-10-batches-py", ""])
def test_cifar10_python(tmp_path, below):
    names = [f"class{i}" for i in range(10)]
    for i in range(1, 6):
        dump(tmp_path / below / f"data_batch_{i}", cifar_part(2, {"labels": [i, 0]}))
    dump(tmp_path / below / "test_batch", cifar_part(3, {"labels": [1, 2, 3]}))
    dump(tmp_path / below / "batches.meta", {"label_names": names})
    data = open_data(TrainConfig(dataset="cifar10", data_dir=str(tmp_path)))
    assert (len(data.train), len(data.val), data.class_names) == (10, 3, names)
    assert data.train.target(4) == 3
    assert data.val.load(0).getpixel((1, 0)) == (1, 1025 % 256, 2049 % 256)


def test_cifar100_python(tmp_path):
    for split in ("train", "test"):
        part = cifar_part(2, {"fine_labels": [99, 5], "coarse_labels": [1, 2]})
        dump(tmp_path / "cifar-100-python" / split, part, protocol=4)
    dump(tmp_path / "cifar-100-python" / "meta", {"fine_label_names": [f"f{i}" for i in range(100)]})
    source = open_evaluation("cifar100", str(tmp_path), "val")
    assert source.class_names[source.target(0)] == "f99"


def test_cifar_binary(tmp_path):
    ten, hundred = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-100-binary"
    ten.mkdir()
    hundred.mkdir()
    record = np.arange(3072, dtype=np.int64).astype(np.uint8).tobytes()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (ten / f"{name}.bin").write_bytes(b"\x07" + record)
    (ten / "batches.meta.txt").write_text("\n".join(f"c{i}" for i in range(10)) + "\n\n")
    for name in ("train", "test"):
        (hundred / f"{name}.bin").write_bytes(b"\x01\x63" + record)
    (hundred / "fine_label_names.txt").write_text("\n".join(f"f{i}" for i in range(100)))
    source = open_evaluation("cifar10", str(tmp_path), "train")
    assert len(source) == 5 and source.class_names[source.target(0)] == "c7"
    assert source.load(0).getpixel((2, 0)) == (2, 2, 2)
    assert open_evaluation("cifar100", str(hundred), "val").target(0) == 99
    (ten / "test_batch.bin").write_bytes(record)
    with pytest.raises(UsageError, match="not a whole number"):
        open_evaluation("cifar10", str(tmp_path), "val")


def test_cifar_pickle_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "owned", "x")

    dump(tmp_path / "test_batch", {"data": Attack()})
    dump(tmp_path / "batches.meta", {})
    with pytest.raises(UsageError, match="not one of CIFAR's batches"):
        open_evaluation("cifar10", str(tmp_path), "val")
    assert not (tmp_path / "owned").exists()


def test_cifar_that_is_not_there(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match="neither cifar-100-python/train nor"):
        open_evaluation("cifar100", str(tmp_path), "train")


def test_digits_are_scikit_learns():
    wanted = load_digits()
    parts = [digits(training, 1) for training in (True, False)]
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(1797))
    source = parts[0].source
    np.testing.assert_array_equal(source.images, (wanted.images * (255 / 16)).round())
    np.testing.assert_array_equal(source.labels, wanted.target)


def test_digits_are_split_the_same_way_for_every_seed():
    first, second = (open_data(TrainConfig(dataset="digits", seed=seed)) for seed in (1, 2))
    assert len(first.train) + len(first.val) == 1797 and first.split is None
    assert first.class_names == list("0123456789")
    assert np.array_equal(first.val.indices, second.val.indices)
    assert np.array_equal(open_evaluation("digits", "").indices, first.val.indices)
    counts = np.bincount([first.val.target(i) for i in range(len(first.val))])
    assert counts.min() >= 34
    assert max(np.asarray(first.train.load(i)).max() for i in range(20)) == 255
    assert first.train.load(0).size == (8, 8)


@pytest.mark.parametrize(
    "images, labels",
    [
        (np.zeros((2, 4, 4)), [0, 0]),
        (np.zeros((2, 4), np.uint8), [0, 0]),
        (np.zeros((2, 4, 4, 2), np.uint8), [0, 0]),
        (np.zeros((2, 4, 4), np.uint8), [0]),
        (np.zeros((2, 4, 4), np.uint8), [0, 5]),
        (np.zeros((2, 4, 4), np.uint8), [-1, 0]),
    ],
)
def test_wrong_arrays(images, labels):
    with pytest.raises(UsageError, match="mine: "):
        ArraySource(images, labels, ["a", "b"], "mine")


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 4, 1), (2, 5, 4, 3), (2, 5, 4, 4)])
@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_array_shapes(shape, channels, mode):
    source = ArraySource(np.zeros(shape, np.uint8), [0, 1], ["a", "b"], "mine", channels)
    assert source.load(1).mode == mode and source.load(1).size == (4, 5)
    pickle.dump(source, io.BytesIO())  # it goes to worker processes
