"""The best classes, found without sorting all."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from visformer.serving.scores import best, probabilities


@given(
    arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.integers(-3, 3).map(float)),
    st.integers(1, 50),
)
def test_the_best_are_those_of_a_stable_sort(scores, top_k):
    wanted = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    found = best(scores, top_k)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, wanted)


def test_probabilities_are_softmax():
    logits = np.array([[1000.0, 0.0, 999.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    found = probabilities(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[1 / (1 + np.exp(-1)), 0, 1 / (1 + np.exp(1))], [1 / 3] * 3], rtol=1e-5)
