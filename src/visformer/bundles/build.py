"""A bundle from a model: write the graph, run it beside the source, and say in `bundle.json` what came of it.

All of it happens in a folder of its own beside the destination, which takes the destination's place when everything has
passed; a failure leaves nothing behind and what was there before untouched.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visformer.atomic import TEMPORARY_PREFIX
from visformer.bundles.bundle import DOCUMENT, FORMAT, FORMAT_VERSION, Bundle, is_bundle, sha256
from visformer.bundles.engines import Engine, to_picture
from visformer.bundles.parity import LEAST_AGREEMENT, Parity, compare, judge, other_size_difference
from visformer.bundles.plain import Form
from visformer.bundles.samples import PARITY_SIZES, SAMPLE_SIZES, generated
from visformer.errors import RunError, UsageError

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch"}
_PACKAGES = {
    "onnx": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "openvino": ("torch", "onnx", "onnxscript", "openvino"),
    "torch": ("torch",),
}
# How far a sample's logits may lie from the recorded ones on another machine, in units of the largest logit.
_TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2}

Images = Sequence[Callable[[], np.ndarray]]  # each gives uint8 (H, W, channels)


@dataclass
class Request:
    """What to export, and on what to try it.

    With `fit_gelu`, GELU is a hard swish fitted on the calibration images (`fitted_gelu.py`); None: where it is worth
    that, in int8 for OpenVINO.

    `calibration` is what int8 takes its ranges from. `real_images` are compared in generated ones' place when there are
    any; in half precision the best class must be the source's for `min_agreement` percent of them. `measure` gives the
    accuracies to record for an engine, and raises `RunError` when they are too low.
    """

    format: str
    precision: str
    input: str
    fit_gelu: bool | None = None
    dynamic_image_size: bool = False
    checkpoint: str = ""
    calibration: Images = ()
    real_images: Images = ()
    min_agreement: float = LEAST_AGREEMENT
    measure: Callable[[Bundle, Engine], dict[str, Any]] | None = None
    note: Callable[[str], None] = field(default=lambda message: None)

    def __post_init__(self) -> None:
        if self.fit_gelu is None:
            self.fit_gelu = (self.format, self.precision) == ("openvino", "int8")


def build(model: Any, request: Request, destination: Path, *, overwrite: bool = False) -> Bundle:
    """Export `model`, as `visformer.load` gives it, to the folder `destination`, and open it.

    Raises `UsageError` for what can't be exported so, and `RunError` when the result does not give the source's logits.
    """
    with new_folder(destination, overwrite) as folder:
        request.note(f"writing {request.format}, {request.precision}")
        files = _write_model(model, request, folder)
        document = _document(model, request, *files)
        _write_document(folder, document)
        bundle = Bundle.open(folder)
        engine = bundle.engine()
        request.note("comparing with the source")
        parity = _parity(model, request, bundle, engine)
        judge(parity, request.precision, request.min_agreement)
        measured = parity.to_dict()
        if request.dynamic_image_size:
            measured["other_size_difference"] = other_size_difference(model, engine, parity, request.precision)
        accuracy = None if request.measure is None else request.measure(bundle, engine)
        document |= {
            "parity": measured,
            "largest_logit_difference": parity.largest_difference,
            "accuracy": accuracy,
            "tolerance": _TOLERANCES[request.precision] * parity.scale,
            "samples": _write_samples(folder, engine, model.preprocessing.in_channels),
        }
        _write_document(folder, document)
        _check(Bundle.open(folder), engine)
    return Bundle.open(destination)


def check_destination(
    destination: Path, overwrite: bool, is_ours: Callable[[Path], bool] = is_bundle, what: str = "a bundle"
) -> None:
    """Raise `UsageError` when a bundle, or what else `is_ours` knows, may not be written there."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise UsageError(f"output: {destination} is no folder; name one that is new")
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not is_ours(destination):
        none = f"no{what.removeprefix('a')}"
        raise UsageError(f"output: {destination} holds something that is {none}; name a folder that is new or empty")
    if not overwrite:
        raise UsageError(f"output: {destination} holds {what} already; --overwrite True replaces it")


@contextmanager
def new_folder(
    destination: Path, overwrite: bool, is_ours: Callable[[Path], bool] = is_bundle, what: str = "a bundle"
) -> Iterator[Path]:
    """A folder to write to, which becomes `destination` when the block ends well."""
    check_destination(destination, overwrite, is_ours, what)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=destination.parent))
    except OSError as error:
        raise RunError(f"cannot write {destination}: {error.strerror}; choose another folder") from error
    before = folder.with_name(f"{folder.name}-before")
    try:
        yield folder
        os.chmod(folder, 0o755)
        if destination.exists():
            os.rename(destination, before)
        os.rename(folder, destination)
    except OSError as error:
        raise RunError(f"cannot write {destination}: {error.strerror or error}; nothing was changed") from error
    finally:
        if before.exists() and not destination.exists():
            os.rename(before, destination)
        for left in (folder, before):
            with suppress(OSError):
                shutil.rmtree(left)


def _write_model(model: Any, request: Request, folder: Path) -> tuple[str, str | None]:
    with_image = request.input == "image"
    if request.format == "torch":
        from visformer.bundles.torch_files import write_torch

        return write_torch(folder, model, request.precision, with_image)
    from visformer.bundles import graphs

    # OpenVINO stores and computes halves by itself; in ONNX they are part of the graph.
    is_half_graph = request.format == "onnx" and request.precision == "fp16"
    dtype = torch.float16 if is_half_graph else torch.float32
    form = _form(request.format, request.precision)
    fitting = _calibration(model, request) if request.fit_gelu else ()
    batch = graphs.batch_graph(
        model, dynamic_size=request.dynamic_image_size, dtype=dtype, form=form, gelu_images=fitting
    )
    preprocessing = graphs.preprocessing_graph(model.preprocessing) if with_image else None
    metadata = _metadata(model, request)
    if request.format == "onnx":
        from visformer.bundles.onnx_files import quantised_onnx, write_onnx

        if request.precision == "int8":
            request.note(f"calibrating on {len(request.calibration):,} images")
            batch = quantised_onnx(batch, _calibration(model, request))
        image = None if preprocessing is None else graphs.joined(preprocessing, batch)
        return write_onnx(folder, batch, image, metadata)
    from visformer.bundles.openvino_files import openvino_model, quantised_openvino, write_openvino

    converted = openvino_model(batch)
    if request.precision == "int8":
        request.note(f"calibrating on {len(request.calibration):,} images")
        converted = quantised_openvino(converted, list(_calibration(model, request)))
    before = None if preprocessing is None else openvino_model(preprocessing)
    return write_openvino(folder, converted, before, request.precision, metadata)


def _form(format: str, precision: str) -> Form:
    """See `plain.Form`."""
    in_openvino = format == "openvino"
    return Form(split_first=not in_openvino or precision == "bf16", wide_groups=in_openvino and precision == "int8")


def _calibration(model: Any, request: Request) -> Iterator[np.ndarray]:
    """The calibration images as the model takes them: float32 (1, C, H, W)."""
    for image in request.calibration:
        pixels = model.preprocessing(to_picture(image()))
        yield model.preprocessing.normalize(pixels[None]).contiguous().numpy()


def _metadata(model: Any, request: Request) -> dict[str, str]:
    """What the model's own file says of itself, text for text."""
    return {
        "visformer": _version("visformer"),
        "model": model.model_name,
        "precision": request.precision,
        "labels": json.dumps(list(model.class_names), ensure_ascii=False),
        "preprocessing": json.dumps(model.preprocessing.to_dict()),
    }


def _document(model: Any, request: Request, model_file: str, batch_file: str | None) -> dict[str, Any]:
    height, width = model.preprocessing.image_size
    channels = model.preprocessing.in_channels
    sides: list[Any] = ["height", "width"] if request.dynamic_image_size else [height, width]
    images = {"name": "images", "dtype": "float32", "shape": ["batch", channels, *sides]}
    image = {"name": "image", "dtype": "uint8", "shape": ["height", "width", "channels"]}
    options = {}
    if request.format == "openvino":
        from visformer.bundles.openvino_files import engine_options

        options = engine_options(request.precision, request.input == "image")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": model.model_name,
        "engine": ENGINES[request.format],
        "engine_options": options,
        "precision": request.precision,
        "fit_gelu": request.fit_gelu,
        "input": request.input,
        "model_file": model_file,
        "batch_file": batch_file,
        "inputs": [image if request.input == "image" else images],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", len(model.class_names)]}],
        "dynamic_image_size": request.dynamic_image_size,
        "preprocessing": model.preprocessing.to_dict(),
        "source": _source(model, request.checkpoint),
        "versions": _versions(request),
        "parity": {},
        "largest_logit_difference": 0.0,
        "accuracy": None,
        "tolerance": 0.0,
        "samples": [],
        "labels": list(model.class_names),
        "files": {},
    }


def _source(model: Any, checkpoint: str) -> dict[str, Any]:
    path = Path(checkpoint)
    return {
        "checkpoint": path.name if path.is_file() else checkpoint,
        "sha256": sha256(path) if path.is_file() else None,
        "architecture": model.config.to_dict(),
        "training": model.training_summary,
        "origin": model.source,
    }


def _versions(request: Request) -> dict[str, str]:
    names = ("visformer", "numpy", "pillow", *_PACKAGES[request.format])
    if request.format == "openvino" and request.precision == "int8":
        names += ("nncf",)
    return {"python": platform.python_version(), "machine": platform.machine(), **{n: _version(n) for n in names}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return "unknown"


def _parity(model: Any, request: Request, bundle: Bundle, engine: Engine) -> Parity:
    channels = model.preprocessing.in_channels
    made = [lambda size=size: generated(size, channels, seed=1) for size in PARITY_SIZES]
    return compare(
        model,
        engine,
        bundle.preprocessing,
        request.real_images or made,
        real=bool(request.real_images),
        takes_images=request.input == "image",
    )


def _write_samples(folder: Path, engine: Engine, channels: int) -> list[dict[str, Any]]:
    """Three images as PNG files, with the logits that the bundle gives for them here."""
    (folder / "samples").mkdir()
    samples = []
    for number, size in enumerate(SAMPLE_SIZES, start=1):
        image = generated(size, channels, seed=number)
        name = f"samples/{number}.png"
        to_picture(image).save(folder / name)
        samples.append({"file": name, "logits": [float(value) for value in engine.run_image(image)]})
    return samples


def _write_document(folder: Path, document: dict[str, Any]) -> None:
    """Write bundle.json with the size and the hash of every other file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DOCUMENT)
    document["files"] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / DOCUMENT).write_text(text + "\n", encoding="utf-8")


def _check(bundle: Bundle, engine: Engine) -> None:
    """The samples as they come from their files give the logits that were recorded."""
    for sample in bundle.samples:
        with Image.open(sample.path) as picture:
            array = np.asarray(picture)
        got = engine.run_image(array if array.ndim == 3 else array[:, :, None])
        assert np.abs(got - sample.logits).max() <= bundle.tolerance, sample.path
