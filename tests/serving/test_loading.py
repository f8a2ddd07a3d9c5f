"""A version is loaded: it can compute, and what full batches need is prepared beside its first requests."""

import threading

import numpy as np
import pytest

from visformer.bundles.checkpoint_engine import CheckpointEngine
from visformer.bundles.engines import BundleEngine
from visformer.serving.model import load
from visformer.serving.settings import Settings
from visformer.serving.sources import scan


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_it_computes_while_it_is_prepared_for_full_batches(kind, request, monkeypatch):
    path = request.getfixturevalue(kind)
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def warm(*sizes):
        asked.extend(sizes)
        begun.set()
        assert go_on.wait(20)

    engine = {"checkpoint": CheckpointEngine, "bundle": BundleEngine}[kind]
    monkeypatch.setattr(engine, "warm", lambda self, *sizes: warm(*sizes))
    (found,) = scan([str(path)]).values()
    loaded = load(found.versions[1], Settings(device="CPU", batch_size=7))
    try:
        assert begun.wait(20)
        logits = loaded.run(np.zeros((3, 3, *loaded.preprocessing.image_size), dtype=np.float32))
        assert logits.shape == (3, len(loaded.labels)) and logits.dtype == np.float32
        assert asked == ([7] if kind == "bundle" else [])  # a checkpoint's engine was told when it was made
    finally:
        go_on.set()
    for thread in threading.enumerate():
        if thread.name == "visformer-warm":
            thread.join(20)
