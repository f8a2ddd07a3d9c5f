"""Visformer image classifiers: train, validate, predict.

    import visformer

    visformer.train(data_dir="photos", ckpt_save_dir="run")           # the verbs, with their options as keywords
    visformer.Predictor("run/best.safetensors").predict(["cat.jpg"])
    model = visformer.create_model("visformer_tiny", num_classes=10)  # a torch module

Importing the package loads neither torch nor timm; each name loads what it needs when it is first used.
`visformer.models` is the subpackage of the models, not the verb: `list_models` is that verb in Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from visformer import models
    from visformer.client import AsyncClient, Client
    from visformer.fusion import fuse
    from visformer.hub import Visformer, list_pretrained
    from visformer.models import list_models
    from visformer.pretrained import create_model, load
    from visformer.verbs.predictor import Predictor

    bench: Callable[..., Any]
    convert: Callable[..., Any]
    export: Callable[..., Any]
    pack: Callable[..., Any]
    predict: Callable[..., Any]
    quickstart: Callable[..., Any]
    report: Callable[..., Any]
    serve: Callable[..., Any]
    train: Callable[..., Any]
    validate: Callable[..., Any]

__all__ = [
    "AsyncClient",
    "Client",
    "Predictor",
    "Visformer",
    "bench",
    "convert",
    "create_model",
    "export",
    "fuse",
    "list_models",
    "list_pretrained",
    "load",
    "models",
    "pack",
    "predict",
    "quickstart",
    "report",
    "serve",
    "train",
    "validate",
]

_OBJECTS = {  # public name -> module and name there
    "create_model": ("visformer.pretrained", "create_model"),
    "list_models": ("visformer.models", "list_models"),
    "list_pretrained": ("visformer.hub", "list_pretrained"),
    "load": ("visformer.pretrained", "load"),
    "Visformer": ("visformer.hub", "Visformer"),
    "Predictor": ("visformer.verbs.predictor", "Predictor"),
    "fuse": ("visformer.fusion", "fuse"),
    "Client": ("visformer.client", "Client"),
    "AsyncClient": ("visformer.client", "AsyncClient"),
}
_VERBS = ("bench", "convert", "export", "pack", "predict", "quickstart", "report", "serve", "train", "validate")


def __getattr__(name: str) -> Any:
    """Import what a public name stands for, once (PEP 562)."""
    if name == "__version__":
        value = _version()
    elif name == "models":
        return importlib.import_module("visformer.models")  # the import itself sets the attribute
    elif name in _OBJECTS:
        module, attribute = _OBJECTS[name]
        value = getattr(importlib.import_module(module), attribute)
    elif name in _VERBS:
        from visformer.cli import verb_function

        value = verb_function(name)
    else:
        raise AttributeError(f"module 'visformer' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("visformer")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "0+unknown"
