"""One self-describing file: what passes between training, validation, prediction and deployment.

A checkpoint is a `.safetensors` file whose metadata holds everything needed to use it, each value as JSON text:

    format_version   1
    model_name       "visformer_tiny"
    architecture     every field of `Architecture`
    class_names      [name of class 0, ...]
    preprocessing    every field of `Preprocessing`
    training         summary of the run: epochs, accuracy, data, versions
    source           where the weights come from
    format           pt (plain text, as other tools expect it)

Tensors are named by the module tree. Nothing in the file is executed on loading.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from visformer.atomic import atomic_replace, atomic_write
from visformer.data.preprocessing import Preprocessing
from visformer.errors import RunError, UsageError
from visformer.models import Architecture, Visformer

FORMAT_VERSION = 1

M = TypeVar("M", bound=Visformer)


@dataclass
class Checkpoint:
    """A model with all that is known of it."""

    model_name: str
    architecture: Architecture
    class_names: list[str]
    preprocessing: Preprocessing
    state_dict: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """The file's metadata: text for text, as safetensors wants it."""
        document = {
            "format_version": FORMAT_VERSION,
            "model_name": self.model_name,
            "architecture": self.architecture.to_dict(),
            "class_names": self.class_names,
            "preprocessing": self.preprocessing.to_dict(),
            "training": self.training,
            "source": self.source,
        }
        return {"format": "pt", **{key: json.dumps(value, ensure_ascii=False) for key, value in document.items()}}

    def build(self, model_class: type[M] = Visformer) -> M:
        """The model with its weights, in evaluation mode on the CPU, and beside its `config`: `model_name`,
        `class_names`, `preprocessing`, `training_summary` and `source`."""
        with torch.device("meta"):
            model = model_class(self.architecture)
        try:
            model.load_state_dict(self.state_dict, assign=True)
        except RuntimeError as error:
            raise UsageError(f"the tensors are not those of {self.model_name}: {_first_problem(error)}") from error
        model.model_name = self.model_name  # type: ignore[assignment]
        model.class_names = self.class_names  # type: ignore[assignment]
        model.preprocessing = self.preprocessing  # type: ignore[assignment]
        model.training_summary = self.training  # type: ignore[assignment]
        model.source = self.source  # type: ignore[assignment]
        return model.requires_grad_(True).eval()


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, whole or not at all. Raises `RunError` when the disk refuses."""
    write_safetensors(path, checkpoint.state_dict, checkpoint.metadata())


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any device to a `.safetensors` file, whole or not at all, without a copy of them all in memory.

    Raises `RunError` when the disk refuses.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}

    def write_to(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # the library reports the system's errors as its own
            raise OSError(ENOSPC if "No space" in str(error) else EIO, str(error)) from error

    atomic_replace(path, write_to)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours. Raises `UsageError` naming the file and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such checkpoint{_neighbours(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            document = _document(path, metadata)
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path}: not a readable .safetensors checkpoint ({error}); is it damaged or of another kind?"
        ) from error
    try:
        return Checkpoint(
            model_name=document["model_name"],
            architecture=Architecture.from_dict(document["architecture"]),
            class_names=[str(name) for name in document["class_names"]],
            preprocessing=Preprocessing.from_dict(document["preprocessing"]),
            state_dict=state_dict,
            training=document.get("training", {}),
            source=document.get("source", {}),
        )
    except (UsageError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: its metadata is damaged: {error}") from error


def match_head(model: Visformer, checkpoint: Checkpoint, class_names: list[str]) -> tuple[list[str], list[str]]:
    """Load `checkpoint` into `model`, whose head is for `class_names`: rows of the head go by class name.

    Position embeddings are resampled to the model's size. Returns the names whose rows were kept and those that begin
    anew. Raises `UsageError` when anything but the head does not fit.
    """
    state_dict = model.resample_state_dict(checkpoint.state_dict)
    rows = {name: row for row, name in enumerate(checkpoint.class_names)}
    kept = [name for name in class_names if name in rows]
    body = {name: tensor for name, tensor in state_dict.items() if not name.startswith("head.")}
    try:
        result = model.load_state_dict(body, strict=False)
    except RuntimeError as error:
        raise UsageError(
            f"the checkpoint holds {checkpoint.model_name}, which does not fit: {_first_problem(error)}"
        ) from error
    missing = [name for name in result.missing_keys if not name.startswith("head.")]
    if missing or result.unexpected_keys:
        raise UsageError(
            f"the checkpoint holds {checkpoint.model_name}, which does not fit: {(missing + result.unexpected_keys)[0]}"
        )
    if kept and isinstance(model.head, nn.Linear):
        to, source = [class_names.index(name) for name in kept], [rows[name] for name in kept]
        with torch.no_grad():
            model.head.weight[to] = state_dict["head.weight"][source]
            model.head.bias[to] = state_dict["head.bias"][source]
    return kept, [name for name in class_names if name not in rows]


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write training state (tensors and plain values), whole or not at all."""

    def write(file) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch reports a full disk as a failed stream, without an errno
            raise OSError(28, f"writing failed ({str(error).splitlines()[0]})") from error

    atomic_write(path, write)


def snapshot(value: Any) -> Any:
    """A copy of nested dictionaries, lists and tensors, in the host's memory, which training no longer changes."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(item) for item in value)
    return value


def load_state(path: str | Path) -> dict[str, Any]:
    """Read training state; no code in it can run. Raises `RunError` naming the file when it cannot be read, or when a
    part of it is not what was written."""
    try:
        with ZipFile(path) as archive:  # torch itself does not look at the parts' checksums
            if spoilt := archive.testzip():
                raise BadZipFile(f"the checksum of {spoilt} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: the training state cannot be read ({reason})") from error


def _document(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "format_version" not in metadata or "architecture" not in metadata:
        raise UsageError(
            f"{path}: a .safetensors file, but not a visformer checkpoint (its metadata lacks 'architecture'); "
            "checkpoints are written by `visformer train`"
        )
    try:
        document = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
    except ValueError as error:
        raise UsageError(f"{path}: its metadata is not JSON: {error}") from error
    if document["format_version"] != FORMAT_VERSION:
        raise UsageError(
            f"{path}: format version {document['format_version']}, where this release reads {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    return document


def _first_problem(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]


def _neighbours(path: Path) -> str:
    found = sorted(p.name for p in path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
    return f"; in {path.parent} there are {', '.join(found[:5])}" if found else ""
