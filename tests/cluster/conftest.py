"""The small real model of the server's tests, as a checkpoint and as a bundle called `pets`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.models import write_small_bundle, write_small_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("run") / "best.safetensors")


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return write_small_bundle(checkpoint, tmp_path_factory.mktemp("bundles") / "pets")
