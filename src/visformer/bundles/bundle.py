"""What a bundle says of itself: `bundle.json`, read with suspicion, as it may come from anywhere.

docs/export.md describes every field. A bundle whose format is newer than this release, whose files are missing or of
another size, or whose values are out of range is an error that names the field; nothing of it is run before.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from visformer.bundles.pixels import ImagePreprocessing
from visformer.errors import UsageError

if TYPE_CHECKING:
    from visformer.bundles.engines import BundleEngine

DOCUMENT = "bundle.json"
FORMAT = "visformer-bundle"
FORMAT_VERSION = 1
ENGINES = ("onnxruntime", "openvino", "torch")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
INPUTS = ("image", "tensor")
_OPTIONS = {"INFERENCE_PRECISION_HINT": ("f32", "f16", "bf16")}
_LARGEST_DOCUMENT = 64 * 2**20  # bytes; labels and sample logits of 20,000 classes take 2 MB
_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "engine": str,
    "precision": str,
    "input": str,
    "model_file": str,
    "engine_options": dict,
    "dynamic_image_size": bool,
    "labels": list,
    "preprocessing": dict,
    "source": dict,
    "versions": dict,
    "parity": dict,
    "largest_logit_difference": (int, float),
    "tolerance": (int, float),
    "samples": list,
    "files": dict,
}


@dataclass(frozen=True)
class Sample:
    """An image of the bundle with the logits that it must give."""

    path: Path
    logits: np.ndarray  # float32 (classes,)


@dataclass(frozen=True)
class Bundle:
    """An exported model. `document` is bundle.json, checked; the fields are what a program needs of it."""

    path: Path
    document: dict[str, Any]
    model_name: str
    engine_name: str  # one of ENGINES
    precision: str  # one of PRECISIONS
    input: str  # image: the model takes one decoded uint8 (H, W, C); tensor: the preprocessed batch
    labels: list[str]
    preprocessing: ImagePreprocessing
    samples: list[Sample]
    tolerance: float  # of a logit of a sample on another machine

    @classmethod
    def open(cls, path: str | Path, name: str = "") -> Bundle:
        """Read and check a bundle; with a `name`, also that it holds this model. Raises `UsageError` naming the folder,
        the field and the rule."""
        path = Path(path)
        path = path.parent if path.name == DOCUMENT else path
        try:
            found = cls._from_document(path, _read(path / DOCUMENT))
        except UsageError as error:
            raise UsageError(f"{path}: not a bundle that can be used: {error}") from None
        if name and name != found.model_name:
            raise UsageError(f"{path}: it holds {found.model_name}, not {name}")
        return found

    def engine(self, *, threads: int | None = None, cache_dir: str | Path | None = None) -> BundleEngine:
        """Load the model, ready to run.

        `threads` is the number that one call may use (None: the engine's own choice, all cores). `cache_dir` keeps what
        OpenVINO compiles, so that the next start is quicker; the other engines do without. Raises `UsageError` when the
        engine is not installed, and for a file that it refuses.
        """
        from visformer.bundles.engines import open_engine

        return open_engine(self, threads, None if cache_dir is None else Path(cache_dir))

    def changed_files(self) -> list[str]:
        """Names of files whose content is not what was exported (SHA-256)."""
        return [name for name, entry in self.document["files"].items() if sha256(self.path / name) != entry["sha256"]]

    @classmethod
    def _from_document(cls, path: Path, document: dict[str, Any]) -> Bundle:
        _check_types(document)
        for name, known in (("engine", ENGINES), ("precision", PRECISIONS), ("input", INPUTS)):
            if document[name] not in known:
                raise UsageError(f"{name}: {document[name]!r} is none of {', '.join(known)}")
        for name, value in document["engine_options"].items():
            if value not in _OPTIONS.get(name, ()):
                raise UsageError(f"engine_options: {name}: {value!r} is not possible")
        labels = document["labels"]
        if not labels or not all(isinstance(label, str) for label in labels):
            raise UsageError("labels: must be a list of names, one at least")
        _check_files(path, document)
        return cls(
            path=path,
            document=document,
            model_name=document["model"],
            engine_name=document["engine"],
            precision=document["precision"],
            input=document["input"],
            labels=labels,
            preprocessing=ImagePreprocessing.from_dict(document["preprocessing"]),
            samples=[_sample(path, entry, len(labels)) for entry in document["samples"]],
            tolerance=float(document["tolerance"]),
        )


def is_bundle(path: str | Path) -> bool:
    """True for a folder with a bundle.json, or for that file itself."""
    path = Path(path)
    return path.name == DOCUMENT if path.is_file() else (path / DOCUMENT).is_file()


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_DOCUMENT:
            raise UsageError(f"{DOCUMENT}: {path.stat().st_size:,} bytes, more than the {_LARGEST_DOCUMENT:,} allowed")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{DOCUMENT}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{DOCUMENT}: not JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f"{DOCUMENT}: its format is not {FORMAT!r}")
    version = document.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise UsageError(
            f"format_version: {version!r}, where this release reads {FORMAT_VERSION}; use the release that wrote it"
        )
    return document


def _check_types(document: dict[str, Any]) -> None:
    for name, kind in _TYPES.items():
        if name not in document:
            raise UsageError(f"{name}: is missing")
        value = document[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{name}: {str(value)[:60]!r} is of the wrong type")


def _check_files(path: Path, document: dict[str, Any]) -> None:
    files = document["files"]
    for name, entry in files.items():
        _check_inside(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "sha256" not in entry:
            raise UsageError(f"files: {name}: must have bytes and sha256")
        if not (path / name).is_file():
            raise UsageError(f"files: {name} is missing")
        if (path / name).stat().st_size != entry["bytes"]:
            raise UsageError(f"files: {name} has {(path / name).stat().st_size:,} bytes, not {entry['bytes']:,}")
    for name in (document["model_file"], document.get("batch_file")):
        if name is not None and name not in files:
            raise UsageError(f"model_file: {name!r} is not among the bundle's files")


def _check_inside(name: str) -> None:
    """A file's name may not lead out of the bundle."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise UsageError(f"files: {name!r} is no name of a file within the bundle")


def _sample(path: Path, entry: Any, num_classes: int) -> Sample:
    file, logits = (entry.get("file"), entry.get("logits")) if isinstance(entry, dict) else (None, None)
    if not isinstance(file, str) or not isinstance(logits, list) or len(logits) != num_classes:
        raise UsageError(f"samples: each must have a file, and {num_classes} logits")
    if not all(type(value) in (int, float) for value in logits):
        raise UsageError(f"samples: {file}: its logits must be numbers")
    _check_inside(file)
    return Sample(path / file, np.asarray(logits, dtype=np.float32))
