"""Datasets that fit in memory: arrays, scikit-learn's digits, and the files of MNIST, Fashion-MNIST and CIFAR.

The files are read from wherever their usual tools put them: IDX, plain or gzipped (MNIST's own layout, torchvision's,
MindCV's), and CIFAR's Python or binary batches. CIFAR's pickles are read with an unpickler that knows arrays and
nothing else.
"""

from __future__ import annotations

import gzip
import importlib.util
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visformer.data.decode import MODES, to_mode
from visformer.data.sources import Subset, stratified
from visformer.errors import RunError, UsageError

FASHION_MNIST_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DIGIT_NAMES = tuple("0123456789")
DIGITS_HELD_OUT = 0.2  # scikit-learn's digits come without a test set: this share of each digit, the same in every run

_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
# timm's names for the four, torch/mnist and so on, open the same files; torchvision itself does not take gzipped ones.
NAMED_ARRAYS = ("digits", *_TORCHVISION, *(f"torch/{name}" for name in _TORCHVISION))


class ArraySource:
    """Images in memory: uint8 (N, H, W) grey or (N, H, W, C) with C of 1, 3 or 4; `labels` are indices into
    `class_names`.

    `title` is what messages call the dataset. Images come out with `channels` channels.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        title: str,
        channels: int = 3,
    ) -> None:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in MODES):
            raise UsageError(
                f"{title}: images of {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, C), C 1, 3 or 4"
            )
        self.images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = list(class_names)
        self.title = title
        self.channels = channels
        if self.labels.shape != (len(images),):
            raise UsageError(
                f"{title}: {len(images)} images and labels of shape {self.labels.shape}; give one label for each image"
            )
        if len(images) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            span = f"{self.labels.min()} to {self.labels.max()}"
            raise UsageError(f"{title}: labels from {span} for {len(self.class_names)} classes; they must be from 0 up")

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return to_mode(Image.fromarray(self.images[index]), self.channels)

    def target(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def key(self, index: int) -> str:
        return str(index)


def named_arrays(dataset: str, data_dir: str, training: bool, channels: int, download: bool) -> ArraySource | Subset:
    """The training or the test images of `digits`, `mnist`, `fashion_mnist`, `cifar10` or `cifar100`."""
    if dataset == "digits":
        return digits(training, channels)
    dataset = dataset.removeprefix("torch/")
    if download:
        fetch(dataset, data_dir, training)
    read = idx_arrays if dataset.endswith("mnist") else cifar_arrays
    return read(dataset, Path(data_dir), training, channels)


def digits(training: bool, channels: int) -> Subset:
    """scikit-learn's 1,797 digits, 8 x 8, levels 0 to 16 scaled to 0 to 255; a fixed fifth is the test set."""
    package = importlib.util.find_spec("sklearn")  # where it lies; to import it takes a second, in each process
    if package is None or package.origin is None:
        raise UsageError("dataset: digits needs scikit-learn; pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=int)
    images = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    source = ArraySource(images, table[:, -1], DIGIT_NAMES, "digits", channels)
    return stratified(source, DIGITS_HELD_OUT, seed=0)[0 if training else 1]


def fetch(dataset: str, data_dir: str, training: bool) -> None:
    """Download the dataset with torchvision unless it is there. Raises `RunError` when that fails."""
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, _TORCHVISION[dataset])(data_dir, train=training, download=True)
    except Exception as error:  # whatever the network, the mirror or the disk had to say
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"dataset: {dataset} could not be fetched into {data_dir} ({reason}); put its files there"
        ) from error


def idx_arrays(dataset: str, data_dir: Path, training: bool, channels: int) -> ArraySource:
    """MNIST or Fashion-MNIST from IDX files, gzipped or not."""
    prefix = "train" if training else "t10k"
    folder = "FashionMNIST" if dataset == "fashion_mnist" else "MNIST"
    places = [data_dir, data_dir / folder / "raw", data_dir / "raw", data_dir / ("train" if training else "test")]
    images = read_idx(
        _find(places, [f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte"], dataset, data_dir), 3
    )
    labels = read_idx(
        _find(places, [f"{prefix}-labels-idx1-ubyte", f"{prefix}-labels.idx1-ubyte"], dataset, data_dir), 1
    )
    names = FASHION_MNIST_NAMES if dataset == "fashion_mnist" else DIGIT_NAMES
    return ArraySource(images, labels, names, dataset, channels)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file (magic 0x0000 08 DIMENSIONS, big-endian sizes, bytes). Raises `UsageError`."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: can't be read ({error}); fetch the file again") from None
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise UsageError(f"{path}: not an IDX file of bytes with {dimensions} dimensions; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != np.prod(shape, dtype=np.int64):
        raise UsageError(
            f"{path}: holds {len(data) - header} values where its header says {shape}; fetch the file again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def cifar_arrays(dataset: str, data_dir: Path, training: bool, channels: int) -> ArraySource:
    """CIFAR-10 or CIFAR-100 from the Python or the binary distribution, in their folder below `data_dir` or in it."""
    if dataset == "cifar10":
        batches = [f"data_batch_{i}" for i in range(1, 6)] if training else ["test_batch"]
        python, binary, meta = "cifar-10-batches-py", "cifar-10-batches-bin", ("batches.meta", "batches.meta.txt")
    else:
        batches = ["train" if training else "test"]
        python, binary, meta = "cifar-100-python", "cifar-100-binary", ("meta", "fine_label_names.txt")
    # The plain names are asked for with their meta file, because a folder called train is usual and no CIFAR batch.
    for folder in (data_dir / python, data_dir):
        if (folder / batches[0]).is_file() and (folder / meta[0]).is_file():
            return _cifar_python(dataset, folder, batches, meta[0], channels)
    for folder in (data_dir / binary, data_dir):
        if (folder / f"{batches[0]}.bin").is_file():
            return _cifar_binary(dataset, folder, batches, meta[1], channels)
    raise UsageError(
        f"data_dir: {data_dir} has neither {python}/{batches[0]} nor {binary}/{batches[0]}.bin; "
        "give the folder that has, or fetch it with --dataset_download True"
    )


def _cifar_python(dataset: str, folder: Path, batches: list[str], meta: str, channels: int) -> ArraySource:
    label, names = ("labels", "label_names") if dataset == "cifar10" else ("fine_labels", "fine_label_names")
    parts = [_unpickle(folder / batch) for batch in batches]
    try:
        pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([part[label] for part in parts])
        class_names = [str(name) for name in _unpickle(folder / meta)[names]]
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{folder}: not {dataset}'s Python batches ({error!r}); fetch them again") from None
    return ArraySource(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels, class_names, dataset, channels)


def _cifar_binary(dataset: str, folder: Path, batches: list[str], meta: str, channels: int) -> ArraySource:
    """Records of 1 label byte (CIFAR-100: coarse, then fine) and 3 x 32 x 32 bytes."""
    labels_first = 1 if dataset == "cifar10" else 2
    record = labels_first + 3072
    parts = []
    for batch in batches:
        path = folder / f"{batch}.bin"
        data = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.zeros(1, np.uint8)
        if data.size == 0 or data.size % record:
            raise UsageError(f"{path}: missing or not a whole number of {record}-byte records; fetch it again")
        parts.append(data.reshape(-1, record))
    data = np.concatenate(parts)
    path = folder / meta
    if not path.is_file():
        raise UsageError(f"{path}: missing; it names the classes of {dataset}; fetch it again")
    class_names = path.read_text(encoding="utf-8").split()
    pixels = data[:, labels_first:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArraySource(np.ascontiguousarray(pixels), data[:, labels_first - 1], class_names, dataset, channels)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays; refuses whatever could run code."""

    _ALLOWED = frozenset({"_reconstruct", "scalar", "ndarray", "dtype"})

    def find_class(self, module: str, name: str):
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in self._ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")


def _unpickle(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, IndexError, AttributeError) as error:
        raise UsageError(f"{path}: not one of CIFAR's batches ({error}); fetch it again") from None


def _find(places: list[Path], names: list[str], dataset: str, data_dir: Path) -> Path:
    for place, name, suffix in ((p, n, s) for p in places for n in names for s in ("", ".gz")):
        path = place / (name + suffix)
        if path.is_file():
            return path
    below = "FashionMNIST/raw" if dataset == "fashion_mnist" else "MNIST/raw"
    raise UsageError(
        f"data_dir: {data_dir} has no {names[0]} (or .gz) in it or in {below}; give the folder that has, "
        "or fetch it with --dataset_download True"
    )
