"""OpenVINO's intermediate representation, from the ONNX graphs.

Left to itself the CPU plugin computes in bf16 wherever the processor can, also a model of fp32; so the bundle says
which precision it was measured at, and every reader of it compiles with that. The preprocessing counts to 2048 ** 2,
which fp16 does not hold: its constants stay in fp32, and its nodes are marked as precise, so that bf16 does not reach
them. Int8 is NNCF's post-training quantisation.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

MODEL = "model.xml"
_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}  # of what is computed in floating point


def engine_options(precision: str, with_image: bool) -> dict[str, str]:
    """What the engine must be told. With the image graph fp16 is that of the weights: OpenVINO 2026.4 would compute
    levels in it whatever is marked, and fp16 ends at 65,504."""
    return {"INFERENCE_PRECISION_HINT": "f32" if precision == "fp16" and with_image else _HINTS[precision]}


def openvino_model(graph: onnx.ModelProto) -> Any:
    """An OpenVINO model from an ONNX graph."""
    import onnx
    import openvino as ov

    with tempfile.TemporaryDirectory(prefix="visformer-") as folder:
        path = str(Path(folder) / "model.onnx")
        onnx.save_model(graph, path)
        return ov.Core().read_model(path)  # ov.convert_model would tell its makers that it was used


def write_openvino(
    folder: Path, batch: Any, preprocessing: Any | None, precision: str, metadata: dict[str, str]
) -> tuple[str, None]:
    """Write the model, behind its preprocessing if there is one; the name of its file."""
    import openvino as ov

    if precision in ("fp16", "bf16"):
        batch = _compressed(batch)
    model = batch if preprocessing is None else _behind(preprocessing, batch)
    for name, value in metadata.items():
        model.set_rt_info(value, ["visformer", name])
    ov.save_model(model, folder / MODEL, compress_to_fp16=False)
    if preprocessing is not None:
        _mark_precise(folder / MODEL)
    return MODEL, None


def quantised_openvino(batch: Any, calibration: list[np.ndarray]) -> Any:
    """The model in int8. `calibration` holds float32 (1, C, H, W), preprocessed.

    Constants are folded first: NNCF gives the weights of a grouped convolution whose shape is still to be computed a
    scale for each column of the kernel, and OpenVINO then computes it in fp32.
    """
    from openvino.passes import ConstantFolding, Manager

    from visformer.bundles.graphs import quiet

    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(batch)
    with contextlib.redirect_stdout(sys.stderr), quiet():
        nncf = _nncf()
        return nncf.quantize(
            batch,
            nncf.Dataset(calibration),
            subset_size=len(calibration),
            preset=nncf.QuantizationPreset.MIXED,  # activations behind GELU are not symmetric
            # The products of attention take little time, and in int8 OpenVINO 2026.4 fuses them into something else.
            ignored_scope=nncf.IgnoredScope(types=["MatMul"], validate=False),
        )


def _nncf() -> Any:
    """NNCF, without the package by which it would report over the network that it is used."""
    name = "openvino_telemetry"
    before = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("nncf")
    finally:
        del sys.modules[name]
        sys.modules.update(before)


def _compressed(model: Any) -> Any:
    """The model with its weights in fp16."""
    import openvino as ov

    with tempfile.TemporaryDirectory(prefix="visformer-") as folder:
        path = Path(folder) / MODEL
        ov.save_model(model, path, compress_to_fp16=True)
        core = ov.Core()
        core.set_property({"ENABLE_MMAP": False})  # the files are deleted here
        return core.read_model(path)


def _behind(preprocessing: Any, batch: Any) -> Any:
    """One model from `image` to `logits`; what lies between is still called `images`."""
    ov: Any = importlib.import_module("openvino")

    (images,) = batch.get_parameters()
    images.output(0).replace(preprocessing.get_results()[0].input_value(0))
    return ov.Model(batch.get_results(), preprocessing.get_parameters(), "visformer")


def _mark_precise(path: Path) -> None:
    """Mark `images` and all that it is computed from as what is not computed in lower precision."""
    tree = ElementTree.parse(path)
    root = tree.getroot()
    sources: dict[str | None, list[str | None]] = {}
    for edge in root.iterfind("edges/edge"):
        sources.setdefault(edge.get("to-layer"), []).append(edge.get("from-layer"))
    layers = {layer.get("id"): layer for layer in root.iterfind("layers/layer")}
    waiting = [key for key, layer in layers.items() if layer.get("name") == "images"]
    assert waiting, "the joined model has lost the tensor between preprocessing and model"
    marked: set[str | None] = set()
    while waiting:
        key = waiting.pop()
        if key in marked:
            continue
        marked.add(key)
        waiting += sources.get(key, [])
        info = layers[key].find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layers[key].insert(0 if layers[key].find("data") is None else 1, info)
        ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)
