"""Batches form under load, and only then."""

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visformer.serving.batching import Batcher, Computed, Waiting


def row(value: float, side: int = 2) -> np.ndarray:
    return np.full((1, side, side), value, dtype=np.float32)


class Model:
    """Gives the mean of each image; computes nothing while `open` is clear."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        assert self.open.wait(20)
        self.shapes.append(batch.shape)
        if (batch < 0).any():
            raise ValueError("below 0")
        return batch.mean(axis=(1, 2, 3))[:, None]


def test_a_lone_image_is_computed_at_once_and_alone():
    async def main():
        batcher = Batcher(Model(), max_batch=8)
        (future,) = batcher.submit([row(3)])
        assert batcher.waiting == 0  # a batch has taken it before anything else could happen
        return await future

    result = asyncio.run(main())
    assert result.logits.tolist() == [3]
    assert result.batch_size == 1


def test_the_next_batch_gathers_while_one_is_computed():
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=4)
        model.open.clear()
        futures = [future for value in range(8) for future in batcher.submit([row(value)])]
        assert batcher.waiting == 7
        model.open.set()
        return [await future for future in futures], model.shapes

    results, shapes = asyncio.run(main())
    assert [shape[0] for shape in shapes] == [1, 4, 3]
    assert [result.logits.tolist() for result in results] == [[value] for value in range(8)]


def test_two_workers_compute_two_batches_at_a_time():
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=4, workers=2)
        model.open.clear()
        futures = [future for value in range(3) for future in batcher.submit([row(value)])]
        assert batcher.waiting == 1
        model.open.set()
        await asyncio.gather(*futures)

    asyncio.run(main())


def test_a_large_request_goes_to_every_idle_worker():
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=2, workers=2)
        model.open.clear()
        futures = batcher.submit([row(value) for value in range(5)])
        assert batcher.waiting == 1
        model.open.set()
        return [one.logits.item() for one in await asyncio.gather(*futures)]

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_what_was_withdrawn_is_not_computed():
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=8)
        model.open.clear()
        first, second, third = batcher.submit([row(1)]) + batcher.submit([row(2)]) + batcher.submit([row(3)])
        second.cancel()
        model.open.set()
        assert (await third).logits.tolist() == [3]
        assert (await first).logits.tolist() == [1]
        return [shape[0] for shape in model.shapes]

    assert asyncio.run(main()) == [1, 1]


def test_images_of_different_sizes_are_never_in_one_batch():
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=8)
        model.open.clear()
        futures = batcher.submit([row(0)]) + batcher.submit([row(1), row(2, 4), row(3), row(4, 4)])
        model.open.set()
        results = await asyncio.gather(*futures)
        return [result.logits.item() for result in results], model.shapes

    values, shapes = asyncio.run(main())
    assert values == [0, 1, 2, 3, 4]
    assert shapes == [(1, 1, 2, 2), (2, 1, 2, 2), (2, 1, 4, 4)]


def test_a_batch_that_fails_tells_its_own_and_the_next_goes_on():
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=1)
        bad, good = batcher.submit([row(-1)]) + batcher.submit([row(5)])
        with pytest.raises(ValueError, match="below 0"):
            await bad
        return (await good).logits.item()

    assert asyncio.run(main()) == 5


def test_images_are_decoded_a_batch_ahead_and_no_further():
    async def main():
        model, decoded = Model(), []
        batcher = Batcher(model, max_batch=2)
        model.open.clear()
        answers = []
        for value in range(7):
            answer = asyncio.get_running_loop().create_future()
            answers.append(answer)

            def decode(value=value, answer=answer):
                decoded.append(value)
                if value == 4:  # it can't be read
                    answer.set_result(None)
                    batcher.give_room(1)
                else:
                    batcher.put([Waiting(row(value), answer, 0.0, has_room=True)])

            batcher.when_room(decode)
        assert decoded == [0, 1, 2] and batcher.waiting == 6  # the first is being computed
        answers[1].cancel()
        model.open.set()
        done = await asyncio.gather(*answers, return_exceptions=True)
        batcher.close()
        return decoded, [one.logits.item() for one in done if isinstance(one, Computed)], batcher

    decoded, values, batcher = asyncio.run(main())
    assert sorted(decoded) == list(range(7)) and values == [0, 2, 3, 5, 6]
    assert batcher._room == 2 and batcher.waiting == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=5), min_size=1, max_size=12), st.integers(1, 6))
def test_everyone_gets_their_own_result(requests, max_batch):
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=max_batch)
        futures = [batcher.submit([row(value) for value in values]) for values in requests]
        results = [[(await one).logits.item() for one in group] for group in futures]
        assert all(shape[0] <= max_batch for shape in model.shapes)
        batcher.close()
        return results

    assert asyncio.run(main()) == requests
