"""From a model to ONNX graphs: the model for a batch, the preprocessing for one image, and the two joined.

The input of the model is `images`, float32 (batch, channels, height, width), normalised; that of the preprocessing is
`image`, uint8 (height, width, channels). What comes out is `logits`. A node is named by its module's place and what it
does, as in `stages.1.blocks.0.attn.branch.q/Conv`, and so is what it gives.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from visformer.bundles.fitted_gelu import fit_gelu
from visformer.bundles.image_graph import ImageGraph
from visformer.bundles.plain import BASIC, Form, plain
from visformer.data.preprocessing import Preprocessing
from visformer.models import Visformer

if TYPE_CHECKING:
    import onnx

OPSET = 20  # the first with Gelu; ONNX Runtime from 1.17, OpenVINO from 2024.1
LARGEST_SIDE = 65535  # of an image: positions stay below 2 ** 31, as OpenVINO computes them in 32 bits
_SCOPES = "pkg.torch.onnx.name_scopes"


class InPrecision(nn.Module):
    """A model computed in half precision behind an fp32 input and output."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        """float32 (B, C, H, W) -> float32 logits (B, num_classes)"""
        return self.model(images.to(self.dtype)).float()


class ImageModel(nn.Module):
    """The preprocessing and the model as one."""

    def __init__(self, preprocessing: Preprocessing, model: nn.Module):
        super().__init__()
        self.preprocessing, self.model = ImageGraph(preprocessing), model

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (H, W, channels) -> float32 logits (1, num_classes)"""
        return self.model(self.preprocessing(image))


def batch_graph(
    model: Visformer,
    *,
    dynamic_size: bool,
    dtype: torch.dtype = torch.float32,
    form: Form = BASIC,
    gelu_images: Iterable[np.ndarray] = (),
) -> onnx.ModelProto:
    """The ONNX graph from `images` to `logits`, for batches of any number and, with `dynamic_size`, of any size.

    `form` is what suits the engine. With `gelu_images`, float32 (1, C, H, W) each, GELU is a hard swish fitted on them.
    """
    deployed: nn.Module = plain(model, form, dynamic_size=dynamic_size)
    fitting = [torch.from_numpy(image) for image in gelu_images]
    if fitting:
        fit_gelu(deployed, fitting)
    if dtype != torch.float32:
        deployed = InPrecision(deployed, dtype)
    example, shapes = batch_example(model, dynamic_size)
    return _onnx(deployed.eval(), example, shapes, "images", "logits")


def preprocessing_graph(preprocessing: Preprocessing) -> onnx.ModelProto:
    """The ONNX graph from `image` to `images`."""
    example, shapes = image_example(preprocessing)
    return _onnx(ImageGraph(preprocessing).eval(), example, shapes, "image", "images", prefix="preprocessing")


def batch_example(model: Visformer, dynamic_size: bool) -> tuple[Tensor, dict[int, Any]]:
    """A batch to trace with, and its dynamic axes for `torch.export`."""
    height, width = model.config.image_size
    shapes: dict[int, Any] = {0: Dim("batch", min=1)}
    if dynamic_size:
        height, width = 64, 96
        shapes |= {2: 32 * Dim("rows", min=1, max=256), 3: 32 * Dim("columns", min=1, max=256)}
    return torch.zeros(2, model.config.in_channels, height, width), shapes


def image_example(preprocessing: Preprocessing) -> tuple[Tensor, dict[int, Any]]:
    """An image to trace with, and its dynamic axes for `torch.export`."""
    sides = {axis: Dim(name, min=1, max=LARGEST_SIDE) for axis, name in enumerate(("height", "width"))}
    return torch.zeros(90, 70, 3, dtype=torch.uint8), {**sides, 2: Dim("channels", min=1, max=4)}


def joined(preprocessing: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph from `image` to `logits`."""
    from onnx import compose

    both = compose.merge_models(preprocessing, model, io_map=[("images", "images")])
    both.graph.name = "visformer"
    return both


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter from the person who watches; what fails still raises."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _onnx(
    module: nn.Module, example: Tensor, shapes: dict[int, Any], input_name: str, output_name: str, prefix: str = ""
) -> onnx.ModelProto:
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=(shapes,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _name(proto, prefix)
    return proto


def _name(proto: onnx.ModelProto, prefix: str) -> None:
    """Name nodes and values by the module tree, and drop what the exporter notes of this machine."""
    graph = proto.graph
    graph.name = "visformer"
    kept = {value.name for value in (*graph.input, *graph.output)}
    new_names, counts = {}, Counter()
    for initializer in graph.initializer:
        name = initializer.name.removeprefix("model.") if not prefix else f"{prefix}.{initializer.name}"
        new_names[initializer.name] = name
    for node in graph.node:
        place = ".".join(part for part in (prefix, _place(node)) if part)
        name = f"{place}/{node.op_type}" if place else node.op_type
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        for i, value in enumerate(node.output):
            new_names[value] = node.name if i == 0 else f"{node.name}:{i}"
    new_names = {old: new for old, new in new_names.items() if old not in kept}
    for node in graph.node:
        node.input[:] = [new_names.get(value, value) for value in node.input]
        node.output[:] = [new_names.get(value, value) for value in node.output]
        del node.metadata_props[:]
    for value in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        value.name = new_names.get(value.name, value.name)
        del value.metadata_props[:]
    del graph.metadata_props[:], proto.metadata_props[:]


def _place(node: onnx.NodeProto) -> str:
    """The module in which a node arose, such as `stages.1.embed.proj`."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    places = [scope for scope in ast.literal_eval(scopes)[:-1] if scope.replace(".", "").replace("_", "").isalnum()]
    return places[-1].removeprefix("model.") if places and "hook" not in places[-1] else ""
