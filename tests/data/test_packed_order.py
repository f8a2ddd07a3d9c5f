"""The order of data that is read block by block: a permutation, the same for any number of processes, resumable."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from visformer.data.sampler import BLOCK_SHARDS, Blocks, EpochSampler


class Fetches:
    """What was asked for, and what was there when."""

    def __init__(self):
        self.calls: list[tuple[list[int], bool]] = []
        self.here: set[int] = set()

    def __call__(self, shards: Sequence[int], now: bool) -> None:
        self.calls.append((list(shards), now))
        if now:
            self.here |= set(shards)


sets = st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(0, 9))


def blocks_for(size, shards, seed):
    shard_of = np.random.default_rng(seed).integers(0, shards, size)
    return shard_of, Fetches()


@settings(max_examples=80, deadline=None)
@given(sets, st.integers(0, 3), st.integers(1, 5), st.data())
def test_each_sample_once_the_same_on_any_number_of_processes_from_any_position(case, epoch, world, data):
    shard_of, fetch = blocks_for(*case)
    size = case[0]
    whole = EpochSampler(size, seed=case[2], blocks=Blocks(shard_of, fetch))
    whole.set_epoch(epoch)
    order = [item.index for item in whole]
    assert sorted(order) == list(range(size))
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(size, seed=case[2], rank=rank, world_size=world, blocks=Blocks(shard_of, Fetches()))
        start = data.draw(st.integers(0, len(sampler)))
        sampler.set_epoch(epoch)
        complete = list(sampler)
        sampler.set_epoch(epoch, start)
        assert list(sampler) == complete[start:]
        ranks.append([item.index for item in complete])
    together = [index for row in zip(*ranks, strict=True) for index in row]
    assert together[:size] == order


@settings(max_examples=60, deadline=None)
@given(sets, st.integers(0, 3))
def test_a_few_shards_at_a_time_and_each_once(case, epoch):
    shard_of, fetch = blocks_for(*case)
    sampler = EpochSampler(case[0], seed=case[2], blocks=Blocks(shard_of, fetch))
    sampler.set_epoch(epoch)
    open_now: list[int] = []
    blocks = []
    for item in sampler:
        shard = int(shard_of[item.index])
        assert shard in fetch.here
        if shard not in open_now:
            open_now = [shards for shards, now in fetch.calls if now][-1]
            blocks.append(open_now)
            assert shard in open_now
    assert all(len(block) <= BLOCK_SHARDS for block in blocks)
    assert sorted(shard for block in blocks for shard in block) == sorted(set(shard_of.tolist()))
    announced = [shards for shards, now in fetch.calls if not now]
    assert announced == blocks[1:]  # each block but the first was asked for one block ahead


def test_epochs_and_seeds_differ_and_shards_are_mixed():
    shard_of = np.repeat(np.arange(20), 50)

    def order(seed, epoch):
        sampler = EpochSampler(1000, seed=seed, blocks=Blocks(shard_of, Fetches()))
        sampler.set_epoch(epoch)
        return [item.index for item in sampler]

    first = order(1, 0)
    assert first == order(1, 0) and first != order(1, 1) and first != order(2, 0)
    assert len(set(shard_of[first[:32]])) >= 6  # of the eight of its block
    assert set(shard_of[first[:400]]) != set(shard_of[order(1, 1)[:400]])


def test_a_subset_and_repeated_augmentation():
    shard_of = np.repeat(np.arange(20), 5)
    sampler = EpochSampler(100, seed=3, num_samples=40, repeats=3, blocks=Blocks(shard_of, Fetches()))
    items = list(sampler)
    assert len(items) == 40 and [item.copy for item in items[:6]] == [0, 1, 2, 0, 1, 2]
    assert len({item.index for item in items}) == 14
    assert {item.index for item in items} <= set(sampler.subset.tolist())


def test_without_shuffling_the_order_is_the_sources():
    sampler = EpochSampler(30, seed=0, shuffle=False, blocks=Blocks(np.arange(30) % 7, Fetches()))
    assert [item.index for item in sampler] == list(range(30))
