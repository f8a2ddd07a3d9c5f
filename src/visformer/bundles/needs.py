"""What has to be installed to make a bundle. Loads nothing."""

from __future__ import annotations

import importlib.util

INSTALL = "pip install 'visformer[export]'"
_NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "triton": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
}


def missing(format: str, precision: str = "fp32") -> str:
    """The first package that is not there to export such a bundle; empty when all are."""
    quantises = ("nncf",) if (format, precision) == ("openvino", "int8") else ()
    needed = (*_NEEDS[format], *quantises)
    return next((package for package in needed if importlib.util.find_spec(package) is None), "")
