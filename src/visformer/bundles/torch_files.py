"""AOTInductor packages: the model as machine code for this processor, loaded by torch without Python's interpreter.

Compiled with the system's C++ compiler, which takes minutes. The model is the one that is trained, not its plainer
form: Inductor wants channels_last and matrix products, as eager torch does.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visformer.bundles.graphs import ImageModel, InPrecision, batch_example, image_example, quiet
from visformer.errors import RunError, UsageError

MODEL, BATCH = "model.pt2", "batch.pt2"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_compiler() -> None:
    """Raise `UsageError` when no C++ compiler is there."""
    wanted = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (wanted, "g++", "clang++")):
        raise UsageError(
            f"format: torch compiles with {wanted}, which is not there; install a C++ compiler, or set CXX"
        )


def write_torch(folder: Path, model: Any, precision: str, with_image: bool) -> tuple[str, str | None]:
    """Compile the model for batches and, if asked, for images; the names of the model's file and of the batch's."""
    check_compiler()
    half: nn.Module = model if precision == "fp32" else InPrecision(copy.deepcopy(model), DTYPES[precision])
    _compile(half.eval(), *batch_example(model, False), folder / (BATCH if with_image else MODEL))
    if not with_image:
        return MODEL, None
    _compile(ImageModel(model.preprocessing, half).eval(), *image_example(model.preprocessing), folder / MODEL)
    return MODEL, BATCH


def _compile(module: nn.Module, example: Tensor, shapes: dict[int, Any], path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=(shapes,))
            aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # the compiler's and Inductor's kinds
        raise RunError(f"format: torch: compiling failed: {' '.join(str(error).split())[:300]}") from error
