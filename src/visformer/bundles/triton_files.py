"""A model repository for NVIDIA Triton Inference Server, with one model in it.

    MODEL/config.pbtxt     what Triton is told: names, types and dimensions, labels, batching
    MODEL/labels.txt       a line for each class, by which Triton's classification extension names them
    MODEL/1/model.onnx     the model
    MODEL/1/bundle.json    with it the folder is a bundle like any other: validate, predict and serve take it too

The backend is Triton's for ONNX Runtime. A model for preprocessed batches is batched by Triton (`dynamic_batching`);
one that takes a decoded image is not, since images differ in size: its `max_batch_size` is 0, and a request is one
image.
Configuration: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from visformer.atomic import atomic_text
from visformer.bundles.build import Request, build, check_destination, new_folder
from visformer.bundles.bundle import DOCUMENT, Bundle, is_bundle
from visformer.errors import UsageError

CONFIG, LABELS, VERSION = "config.pbtxt", "labels.txt", "1"
KIND = "a model for Triton"
MAX_BATCH = 64  # images that Triton may put together
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}


def check_repository(repository: Path, name: str, overwrite: bool) -> None:
    """Raise `UsageError` when no model called `name` may be written there; an empty name will be the architecture's."""
    if name and not _NAME.fullmatch(name):
        raise UsageError(f"name: {name!r} can't name a model; give letters, digits, _, . and -, the first no sign")
    if is_bundle(repository) or (repository.exists() and not repository.is_dir()):
        raise UsageError(f"output: {repository} is no folder of models; name a repository, new or with models in it")
    if name:
        check_destination(repository / name, overwrite, is_ours, KIND)


def is_ours(folder: Path) -> bool:
    """True for a folder that `write_repository` may replace: a model of one version, which is a bundle."""
    return {path.name for path in folder.iterdir()} == {CONFIG, LABELS, VERSION} and (
        folder / VERSION / DOCUMENT
    ).is_file()


def write_repository(model: Any, request: Request, destination: Path, *, overwrite: bool = False) -> Bundle:
    """Export `model` as `build` does, to version 1 of the model's folder `destination`, which appears whole or not at
    all. Raises what `build` raises."""
    with new_folder(destination, overwrite, is_ours, KIND) as folder:
        bundle = build(model, dataclasses.replace(request, format="onnx"), folder / VERSION)
        atomic_text(folder / CONFIG, config(bundle, destination.name))
        atomic_text(folder / LABELS, "".join(f"{_one_line(label)}\n" for label in bundle.labels))
    return Bundle.open(destination / VERSION)


def config(bundle: Bundle, name: str) -> str:
    """The text of config.pbtxt for an ONNX bundle."""
    (given,), (result,) = bundle.document["inputs"], bundle.document["outputs"]
    batched = bundle.input == "tensor"
    dims, layout = _dims(given["shape"]), ""
    if batched:
        dims, layout = dims[1:], "\n    format: FORMAT_NCHW"
    logits = [len(bundle.labels)] if batched else [1, len(bundle.labels)]
    batching = "dynamic_batching { }\n" if batched else ""
    parameters = {
        "model": bundle.model_name,
        "precision": bundle.precision,
        "preprocessing": json.dumps(bundle.document["preprocessing"]),
    }
    return f"""name: {_text(name)}
backend: "onnxruntime"
default_model_filename: {_text(bundle.document["model_file"])}
max_batch_size: {MAX_BATCH if batched else 0}
input [
  {{
    name: {_text(given["name"])}
    data_type: {_TYPES[given["dtype"]]}{layout}
    dims: {dims}
  }}
]
output [
  {{
    name: {_text(result["name"])}
    data_type: {_TYPES[result["dtype"]]}
    dims: {logits}
    label_filename: "{LABELS}"
  }}
]
{batching}""" + "".join(
        f"parameters {{\n  key: {_text(key)}\n  value {{ string_value: {_text(value)} }}\n}}\n"
        for key, value in parameters.items()
    )


def _dims(shape: list[Any]) -> list[int]:
    """A bundle's shape, in which words stand for any number, as Triton writes it."""
    return [side if isinstance(side, int) else -1 for side in shape]


def _text(value: str) -> str:
    """A string of protobuf's text format."""
    return '"' + "".join(_escaped(byte) for byte in value.encode()) + '"'


def _escaped(byte: int) -> str:
    if byte in b'"\\':
        return f"\\{chr(byte)}"
    return chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"


def _one_line(label: str) -> str:
    return " ".join(label.splitlines())
