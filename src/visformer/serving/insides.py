"""What lies before a model's logits, for heat maps: its last map and its head, whoever computes it.

A torch model is looked into as it is. Of a bundle the graph is read again when it is first asked for, with the input of
its average as an output; that takes as much memory as the model once more, and what is found must give the graph's own
logits. AOTInductor's machine code can't be looked into, and a graph that does not end in average and linear head
neither: `open_inside` then gives None.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from visformer.bundles.bundle import Bundle
from visformer.serving import heatmaps
from visformer.serving.heatmaps import LastMap

_PASSED = ("Cast", "QuantizeLinear", "DequantizeLinear", "Convert", "FakeQuantize", "Identity", "Add", "Multiply")
_HEADS, _AVERAGES = ("Gemm", "MatMul"), ("ReduceMean", "GlobalAveragePool")
_PROBES, _CLOSE = 8, 0.1  # images; of the largest logit: so far may the logits be off, which int8 rounds coarsely
Look = Callable[
    [np.ndarray], tuple[np.ndarray, np.ndarray]
]  # (1, C, H, W) -> logits (1, classes), features (1, C, h, w)


class Inside(Protocol):
    """A model that can be looked into. `grid` is the last map's (height, width), `stride` its cells' side in pixels."""

    grid: tuple[int, int]
    stride: int
    attends: bool  # `last_map` gives attention

    def last_map(self, image: np.ndarray) -> LastMap:
        """An input, float32 (C, H, W) -> what the model makes of it"""
        ...

    def head(self, index: int) -> tuple[np.ndarray, float]:
        """The head's weights of one class, float32 (C,), and its bias"""
        ...


class TorchInside:
    """Of a `Visformer`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.grid = model.config.grids[-1]
        self.stride = model.feature_info[-1]["reduction"]
        self.attends = model.config.stages[-1].attention

    def last_map(self, image: np.ndarray) -> LastMap:
        return heatmaps.last_map(self.model, image)

    def head(self, index: int) -> tuple[np.ndarray, float]:
        return heatmaps.head(self.model, index)


class GraphInside:
    """Of a graph that has been opened: `look` runs it, `weight` (classes, C) is its head's.

    Raises `LookupError` when the head is not what it seems.
    """

    attends = False

    def __init__(self, look: Look, weight: np.ndarray, shape: tuple[int, int, int]) -> None:
        self._look, self._weight = look, weight.astype(np.float32)
        probes = np.random.default_rng(0).standard_normal((_PROBES, *shape), dtype=np.float32)
        logits, features = look(probes)
        biases = logits - features.astype(np.float32).mean((2, 3)) @ self._weight.T
        self._bias = biases.mean(0)  # (classes,)
        if not np.abs(biases - self._bias).max() <= _CLOSE * max(1.0, np.abs(logits).max()):
            raise LookupError("a linear head behind an average")
        self.grid = (features.shape[2], features.shape[3])
        # Strides are powers of two, and the last cell of a row may be filled up with zeros.
        self.stride = 2 ** math.ceil(math.log2(max(shape[1] / self.grid[0], shape[2] / self.grid[1])))

    def last_map(self, image: np.ndarray) -> LastMap:
        logits, features = self._look(image[None])
        return LastMap(logits[0].astype(np.float32), features[0].astype(np.float32), None)

    def head(self, index: int) -> tuple[np.ndarray, float]:
        return self._weight[index], float(self._bias[index])


def open_inside(bundle: Bundle, threads: int | None) -> Inside | None:
    """The inside of a bundle, or None where there is no way in. Takes as long as loading it; `threads` as there."""
    opened = {"onnxruntime": _onnx, "openvino": _openvino}.get(bundle.engine_name)
    shape = (bundle.preprocessing.in_channels, *bundle.preprocessing.image_size)
    try:
        return None if opened is None else GraphInside(*opened(bundle, threads), shape)
    except Exception:  # another exporter's graph, or the package `onnx` is not there: occlusion does without
        return None


def _onnx(bundle: Bundle, threads: int | None) -> tuple[Look, np.ndarray]:
    import onnx
    import onnxruntime as ort

    document = bundle.document
    model = onnx.load(bundle.path / (document.get("batch_file") or document["model_file"]))
    makers = {name: node for node in model.graph.node for name in node.output}
    head = _above(makers.get("logits"), _HEADS, lambda node: makers.get(node.input[0]))
    average = _above(makers.get(head.input[0]), _AVERAGES, lambda node: makers.get(node.input[0]))
    features, weight = average.input[0], head.input[1]
    transposed = any(attribute.name == "transB" and attribute.i for attribute in head.attribute)
    for name in (features, weight):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def look(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, maps = session.run(["logits", features], {"images": batch})
        return np.asarray(logits), np.asarray(maps)

    shape = (1, bundle.preprocessing.in_channels, *bundle.preprocessing.image_size)
    (values,) = session.run([weight], {"images": np.zeros(shape, dtype=np.float32)})
    return look, np.asarray(values) if transposed else np.asarray(values).T


def _openvino(bundle: Bundle, threads: int | None) -> tuple[Look, np.ndarray]:
    from visformer.bundles.engines import _from_images, openvino_core

    ov: Any = importlib.import_module("openvino")

    core = openvino_core()
    model = core.read_model(str(bundle.path / bundle.document["model_file"]))
    if bundle.input == "image":
        shape = [-1, bundle.preprocessing.in_channels, *bundle.preprocessing.image_size]
        model = _from_images(model, shape)

    def before(node: Any) -> Any:
        return node.input_value(0).get_node()

    head = _above(before(model.get_results()[0]), _HEADS, before)
    average = _above(before(head), _AVERAGES, before)
    transposed = head.get_attributes()["transpose_b"]
    outputs = [model.get_results()[0].input_value(0), average.input_value(0), head.input_value(1)]
    opened = ov.Model(outputs, model.get_parameters(), "inside")
    settings: dict[str, Any] = dict(bundle.document["engine_options"])
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(opened, "CPU", settings)

    def run(batch: np.ndarray) -> list[np.ndarray]:
        result = compiled.create_infer_request().infer({0: batch})
        return [np.array(result[i]) for i in range(3)]

    shape = (1, bundle.preprocessing.in_channels, *bundle.preprocessing.image_size)
    weight = run(np.zeros(shape, dtype=np.float32))[2]

    def look(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, maps, _ = run(batch)
        return logits, maps

    return look, weight if transposed else weight.T


def _above(node: Any, wanted: tuple[str, ...], before: Callable[[Any], Any]) -> Any:
    """The next node of a wanted kind on the way up. Raises `LookupError` when another kind comes first."""
    while node is not None:
        kind = node.op_type if hasattr(node, "op_type") else node.get_type_name()
        if kind in wanted:
            return node
        if kind not in _PASSED:
            break
        node = before(node)
    raise LookupError(" or ".join(wanted))
