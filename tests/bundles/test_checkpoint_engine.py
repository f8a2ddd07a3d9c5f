"""A checkpoint as an engine: batches of any number, in few sizes where each has a graph of its own."""

import threading

import numpy as np
import pytest
import torch

from tests.bundles.conftest import small_model
from visformer.bundles.checkpoint_engine import CheckpointEngine, filled_up, sizes
from visformer.data.preprocessing import Preprocessing


@pytest.fixture
def model():
    model = small_model()
    model.preprocessing = Preprocessing((64, 64))
    return model


def test_sizes_end_at_the_largest():
    assert sizes(1) == [1] and sizes(16) == [1, 2, 4, 8, 16] and sizes(12) == [1, 2, 4, 8, 12]


def test_a_batch_is_filled_with_zeros():
    batch = torch.ones(3, 1, 2, 2)
    filled = filled_up(batch, [1, 2, 4])
    assert len(filled) == 4 and torch.equal(filled[:3], batch) and not filled[3].any()
    assert filled_up(batch, [1, 3]) is batch and filled_up(batch, []) is batch and filled_up(batch, [1, 2]) is batch


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_any_number_of_images_gives_the_models_logits(model, precision, tolerance):
    """As on CUDA, with the sizes that have a graph there."""
    images = torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(images).numpy()
    engine = CheckpointEngine(model, device="cpu", precision=precision, batch_size=4)
    engine._sizes, engine._one_at_a_time = sizes(4), threading.Lock()
    seen = []
    engine._fused.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    engine.warm()
    assert seen == [1, 2, 4]
    for count in (1, 2, 3, 4, 9):
        got = engine.run(images[:count].numpy())
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted[:count], atol=tolerance * np.abs(wanted).max())
    assert seen[3:] == [1, 2, 4, 4, 9]


def test_without_graphs_nothing_is_filled_or_prepared(model):
    engine = CheckpointEngine(model, device="cpu")
    seen = []
    engine._fused.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    engine.warm()
    engine.run(np.zeros((3, 3, 64, 64), dtype=np.float32))
    assert seen == [3]
