"""Batches that are computed in pieces, each by a graph of its own."""

import threading
from collections import Counter

import numpy as np
import pytest

from visformer.bundles.engines import InPieces


class Graphs:
    """Stands for the compiler: what it compiled, what ran, and a gate before each of `gated` sizes."""

    def __init__(self, gated=()):
        self.compiled = Counter()
        self.ran = []
        self.begun = threading.Event()
        self.gates = {size: threading.Event() for size in gated}

    def __call__(self, size):
        self.compiled[size] += 1
        if size in self.gates:
            self.begun.set()
            assert self.gates[size].wait(30)

        def run(piece):
            assert len(piece) == size
            self.ran.append(size)
            return piece.reshape(size, -1)[:, :2] * 2

        return run


def batch_of(size):
    return np.arange(size * 12, dtype=np.float32).reshape(size, 3, 2, 2)


@pytest.mark.parametrize(
    ("size", "pieces"), [(1, [1]), (3, [1, 1, 1]), (4, [4]), (7, [4, 1, 1, 1]), (16, [16]), (37, [16, 16, 4, 1])]
)
def test_a_batch_is_computed_in_order_by_the_largest_graphs(size, pieces):
    graphs = Graphs()
    run = InPieces(graphs)
    for _ in range(2):
        graphs.ran.clear()
        np.testing.assert_array_equal(run(batch_of(size)), batch_of(size).reshape(size, -1)[:, :2] * 2)
        assert graphs.ran == pieces
    assert graphs.compiled == dict.fromkeys({1, *pieces}, 1), "each once, and no more than were needed"


def test_nobody_waits_for_a_graph_that_another_compiles():
    graphs = Graphs(gated=[16])
    run = InPieces(graphs)
    warming = threading.Thread(target=run.warm, args=(20,))
    warming.start()
    assert graphs.begun.wait(30)
    run(batch_of(17))
    assert graphs.ran == [4, 4, 4, 4, 1]
    graphs.gates[16].set()
    warming.join()
    run(batch_of(17))
    assert graphs.ran[5:] == [16, 1]
    assert graphs.compiled == {1: 1, 4: 1, 16: 1}


def test_what_cannot_be_needed_is_not_compiled():
    graphs = Graphs()
    InPieces(graphs).warm(15)
    assert graphs.compiled == {1: 1, 4: 1}


def test_a_graph_that_could_not_be_compiled_is_tried_again():
    graphs = Graphs()
    failures = [RuntimeError("no memory")]

    def compiled(size):
        if size == 4 and failures:
            raise failures.pop()
        return graphs(size)

    run = InPieces(compiled)
    with pytest.raises(RuntimeError, match="no memory"):
        run(batch_of(4))
    run(batch_of(4))
    assert graphs.ran == [4]


@pytest.mark.parametrize("input", ["image", "tensor"])
def test_openvino_gives_each_image_its_logits_whatever_the_batch(bundles, model, input, tmp_path):
    bundle = bundles("openvino", "fp32", input)
    engine = bundle.engine(threads=1, cache_dir=tmp_path)
    batch = np.random.default_rng(0).standard_normal((21, 3, 64, 64), dtype=np.float32)
    engine.warm(16)
    whole = engine.run(batch)
    assert whole.shape == (21, len(bundle.labels))
    alone = np.concatenate([engine.run(image[None]) for image in batch])
    np.testing.assert_allclose(whole, alone, atol=1e-5 * np.abs(alone).max())
