"""What the Open Inference Protocol tells of a server and its models, as dictionaries, for both wire formats."""

from __future__ import annotations

from typing import Any

from visformer.serving.model import ServedModel
from visformer.serving.request import OUTPUTS
from visformer.serving.settings import Settings

EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
]


def server_metadata(release: str) -> dict[str, Any]:
    return {"name": "visformer", "version": release, "extensions": EXTENSIONS}


def model_metadata(model: ServedModel, versions: list[str]) -> dict[str, Any]:
    """Names, datatypes and shapes; -1 is any number."""
    classes = len(model.labels)
    shapes = {"logits": [-1, classes], "probabilities": [-1, classes], "error": [-1]}
    return {
        "name": model.name,
        "versions": versions,
        "platform": f"visformer_{model.loaded.platform}",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "images", "datatype": "FP32", "shape": [-1, *_input_sides(model)]},
        ],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shapes.get(name, [-1, -1])}
            for name, datatype in OUTPUTS.items()
        ],
    }


def model_config(model: ServedModel, settings: Settings) -> dict[str, Any]:
    """The model's configuration in Triton's terms; the dimensions leave the batch out. Labels are in `parameters`."""
    classes = len(model.labels)
    dims = {"logits": [classes], "probabilities": [classes], "error": [1]}
    types = {"FP32": "TYPE_FP32", "BYTES": "TYPE_STRING", "INT64": "TYPE_INT64"}
    gpu = model.loaded.platform == "torch_cuda"
    return {
        "name": model.name,
        "platform": f"visformer_{model.loaded.platform}",
        "backend": "visformer",
        "version_policy": {"all": {}} if settings.versions == "all" else {"latest": {"num_versions": 1}},
        "max_batch_size": settings.max_images,
        "input": [
            {"name": "image", "data_type": "TYPE_STRING", "format": "FORMAT_NONE", "dims": [1], "optional": True},
            {
                "name": "images",
                "data_type": "TYPE_FP32",
                "format": "FORMAT_NCHW",
                "dims": _input_sides(model),
                "optional": True,
            },
        ],
        "output": [
            {"name": name, "data_type": types[datatype], "dims": dims.get(name, [-1])}
            for name, datatype in OUTPUTS.items()
        ],
        "dynamic_batching": {"preferred_batch_size": [settings.batch_size], "max_queue_delay_microseconds": 0},
        "instance_group": [
            {"name": model.name, "kind": "KIND_GPU" if gpu else "KIND_CPU", "count": settings.model_workers}
        ],
        "parameters": {
            key: {"string_value": value}
            for key, value in {
                "architecture": model.loaded.model_name,
                "precision": model.loaded.precision,
                "labels": "\n".join(model.labels),
            }.items()
        },
    }


def _input_sides(model: ServedModel) -> list[int]:
    sides = [-1, -1] if model.loaded.any_size else list(model.preprocessing.image_size)
    return [model.preprocessing.in_channels, *sides]
