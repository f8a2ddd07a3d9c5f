"""ONNX files: one with all in it, or, for a bundle that takes images, two that share their weights.

Every file passes the checker with its shapes inferred, and carries labels and preprocessing in `metadata_props`. Int8
is ONNX Runtime's static quantisation: quantise and dequantise nodes around convolutions and products, weights symmetric
and by channel, ranges the extremes over the calibration images.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from visformer.errors import UsageError

if TYPE_CHECKING:
    import onnx

MODEL, BATCH, WEIGHTS = "model.onnx", "batch.onnx", "weights.bin"
_SHARED_FROM = 1024  # bytes; smaller tensors stay in their file
_ALIGNMENT = 4096  # of a tensor in the file of weights, so that it can be mapped


def write_onnx(
    folder: Path, batch: onnx.ModelProto, image: onnx.ModelProto | None, metadata: dict[str, str]
) -> tuple[str, str | None]:
    """Write the graph for batches, and with it that for images; the names of the model's file and of the batch's."""
    import onnx

    graphs = {MODEL: batch} if image is None else {BATCH: batch, MODEL: image}
    for graph in graphs.values():
        onnx.helper.set_model_props(graph, metadata)
        graph.producer_name, graph.producer_version = "visformer", metadata["visformer"]
    if image is not None:
        _share_weights(folder / WEIGHTS, list(graphs.values()))
    for name, graph in graphs.items():
        onnx.save_model(graph, folder / name)
        onnx.checker.check_model(str(folder / name), full_check=True)
    return MODEL, None if image is None else BATCH


def _share_weights(path: Path, graphs: list[onnx.ModelProto]) -> None:
    """Put large tensors into one file and let each graph point at them."""
    import onnx
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, tuple[int, int]] = {}
    with open(path, "wb") as file:
        for graph in graphs:
            for tensor in graph.graph.initializer:
                array = onnx.numpy_helper.to_array(tensor)
                data = array.tobytes()
                if len(data) < _SHARED_FROM:
                    continue
                if data not in places:
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                    places[data] = (file.tell(), len(data))
                    file.write(data)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))  # as bytes, whatever it was before
                offset, length = places[data]
                set_external_data(tensor, path.name, offset, length)
                tensor.ClearField("raw_data")


def quantised_onnx(batch: onnx.ModelProto, calibration: Iterable[np.ndarray]) -> onnx.ModelProto:
    """The graph in int8. `calibration` gives float32 (1, C, H, W), preprocessed."""
    import onnx

    quantization = onnxruntime_quantization()

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            array = next(self.batches, None)
            return None if array is None else {"images": array}

    with tempfile.TemporaryDirectory(prefix="visformer-") as name:
        before, prepared, after = (str(Path(name) / f"{stage}.onnx") for stage in ("before", "prepared", "after"))
        onnx.save_model(batch, before)
        quantization.shape_inference.quant_pre_process(before, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            after,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        return onnx.load_model(after)


def onnxruntime_quantization():
    """ONNX Runtime's quantisation. Raises `UsageError` when it is not installed."""
    try:
        quantization = importlib.import_module("onnxruntime.quantization")
        importlib.import_module("onnxruntime.quantization.shape_inference")
    except ImportError as error:
        raise UsageError(f"format: onnx needs onnxruntime ({error}): pip install 'visformer[export]'") from None
    return quantization
