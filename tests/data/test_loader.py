"""The loader's promises: the same batches with any workers, exact restart, one global order, broken files listed."""

import contextlib
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from visformer.cli import main
from visformer.config import TrainConfig
from visformer.data import (
    ArraySource,
    EpochSampler,
    FolderSource,
    ImageError,
    Preprocessing,
    TrainLoader,
    make_eval_loader,
    make_train_loader,
)
from visformer.data.loader import available_cores
from visformer.errors import RunError, UsageError

PREPROCESSING = Preprocessing((32, 32))


class Source:
    """Grey images whose level tells their index; those in `broken` can't be read."""

    def __init__(self, size: int, broken=()) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (size, 12, 10), dtype=np.uint8)
        self.arrays = ArraySource(self.images, np.arange(size) % 3, ["a", "b", "c"], "test")
        self.class_names = ["a", "b", "c"]
        self.broken = set(broken)
        self.target, self.key = self.arrays.target, self.arrays.key

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int):
        if index in self.broken:
            raise ImageError("cut short", self.name(index))
        return self.arrays.load(index)

    def name(self, index: int) -> str:
        return f"image{index}"


def config(**options) -> TrainConfig:
    return TrainConfig(**{"image_resize": 32, "batch_size": 4, "num_parallel_workers": 0, "seed": 7} | options)


@contextlib.contextmanager
def loading(source, *, cores: int = 2, monkeypatch=None, **options):
    ranks = {key: options.pop(key) for key in ("rank", "world_size") if key in options}
    loader = make_train_loader(source, config(**options), **ranks)
    try:
        yield loader
    finally:
        loader.close()


def drawn(loader: TrainLoader, epoch: int, start: int = 0):
    loader.set_epoch(epoch, start)
    return [(batch.indices, batch.targets.tolist(), batch.images.numpy().tobytes()) for batch in loader]


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr("visformer.data.loader.available_cores", lambda: 2)


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5", "trivialaugwide"])
def test_the_same_batches_with_any_number_of_workers(policy, two_cores):
    results = []
    for workers in (0, 1, 2):
        with loading(Source(22), num_parallel_workers=workers, auto_augment=policy) as loader:
            assert loader.num_workers == workers
            results.append([drawn(loader, epoch) for epoch in (0, 1)])
    assert results[0] == results[1] == results[2]
    assert results[0][0] != results[0][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_starts_at_any_batch(workers, two_cores):
    with loading(Source(22), num_parallel_workers=workers, drop_remainder=False) as loader:
        whole = drawn(loader, 3)
        assert len(whole) == len(loader) == 6
        for start in (0, 1, 4, 5, 6):
            assert drawn(loader, 3, start) == whole[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_leaves_nothing_behind(workers, two_cores):
    with loading(Source(40), num_parallel_workers=workers) as loader:
        whole = drawn(loader, 1)
        for stop in (1, 3):
            loader.set_epoch(5)
            for number, _ in enumerate(loader, 1):
                if number == stop:
                    break
            assert drawn(loader, 1, 2) == whole[2:]


def test_a_closed_loader_can_be_used_again(two_cores):
    with loading(Source(12), num_parallel_workers=1) as loader:
        first = drawn(loader, 0)
        loader.close()
        loader.close()
        assert drawn(loader, 0) == first


@pytest.mark.parametrize(
    "options", [{}, {"drop_remainder": False}, {"aug_repeats": 3}, {"num_samples": 17}, {"shuffle": False}]
)
def test_two_processes_share_the_global_batches_of_one(options):
    with loading(Source(24), **{"batch_size": 8} | options) as one:
        whole = drawn(one, 2)
    parts = []
    for rank in (0, 1):
        with loading(Source(24), rank=rank, world_size=2, **options) as loader:
            parts.append(drawn(loader, 2))
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for both, first, second in zip(whole, *parts, strict=True):
        count = len(both[0])
        assert both[0][0::2] == first[0] and both[0][1::2] == second[0][: count // 2]
        images = np.frombuffer(both[2], np.uint8).reshape(count, -1)
        assert images[0::2].tobytes() == first[2]


def test_the_global_generators_are_left_alone(two_cores):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 2):
        with loading(Source(12), num_parallel_workers=workers, auto_augment="augmix") as loader:
            drawn(loader, 0)
        for _ in make_eval_loader(Source(5), PREPROCESSING, batch_size=2, num_workers=workers):
            pass
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_batch_layout():
    with loading(Source(9)) as loader:
        batch = next(iter(loader))
    assert len(loader) == 2 and len(batch) == 4
    assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.targets.dtype == torch.int64 and batch.targets.tolist() == [index % 3 for index in batch.indices]


def test_clean_images_come_first():
    options = {"color_jitter": None, "aug_splits": 3, "auto_augment": "augmix"}
    with loading(Source(8), **options) as splits, loading(Source(8), color_jitter=None) as plain:
        three, one = next(iter(splits)), next(iter(plain))
    assert three.images.shape == (12, 3, 32, 32) and three.targets.shape == (4,)
    assert torch.equal(three.images[:4], one.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_and_listed(workers, two_cores):
    with loading(Source(12, broken=[0, 5]), num_parallel_workers=workers, shuffle=False) as loader:
        batches = list(loader)
    assert [batch.failures for batch in batches] == [[("image0", "cut short")], [("image5", "cut short")], []]
    assert [batch.indices for batch in batches] == [[1, 1, 2, 3], [4, 4, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(batches[0].images[0], batches[0].images[1]) and batches[0].targets[0] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_a_good_image_stops_the_run(workers, two_cores):
    with loading(Source(8, broken=range(8)), num_parallel_workers=workers, shuffle=False) as loader:
        with pytest.raises(RunError, match="image0: cut short; and none of the other") as caught:
            list(loader)
        assert "\n" not in str(caught.value)


def test_what_is_held_on_to_stays_as_it_was(two_cores):
    """Batches lie in memory that is used again, but never while someone still has a tensor on it."""
    with loading(Source(60), num_parallel_workers=2) as loader:
        seen = drawn(loader, 0)
        loader.set_epoch(0)
        kept = [batch.images[1:] for batch in loader]  # views, of all batches at once
        drawn(loader, 1)
    for view, (_, _, pixels) in zip(kept, seen, strict=True):
        assert view.numpy().tobytes() == pixels[len(pixels) // 4 :]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(workers, two_cores):
    broken = {"num_parallel_workers": workers, "shuffle": False, "max_bad_images": 2}
    with loading(Source(16, broken=[1, 5]), **broken) as loader:
        for epoch in range(3):  # the same image counts once
            loader.set_epoch(epoch)
            assert len(list(loader)) == 4
        assert loader.bad_images == {"image1": "cut short", "image5": "cut short"}
    with loading(Source(16, broken=[1, 5, 9]), **broken) as loader:
        seen = []
        with pytest.raises(
            RunError, match=r"3 training images .* the 2 that max_bad_images allows; .*image9"
        ) as caught:
            seen += [batch.indices for batch in loader]
        assert "\n" not in str(caught.value)


def test_a_small_set_may_have_ten_bad_images_and_a_large_one_a_hundredth():
    assert make_train_loader(Source(30), config()).max_bad_images == 10
    assert make_train_loader(Source(5000), config()).max_bad_images == 50
    assert make_train_loader(Source(30), config(max_bad_images=0)).max_bad_images == 0


def test_files_that_vanish_are_replaced_and_counted(tmp_path, two_cores):
    for index in range(12):
        folder = tmp_path / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), index * 20, np.uint8)).save(folder / f"{index:02}.jpg")
    source = FolderSource(tmp_path)
    with loading(source, num_parallel_workers=2, shuffle=False, color_jitter=None, max_bad_images=1) as loader:
        assert sum(len(batch.failures) for batch in loader) == 0
        gone = source.name(5)
        os.remove(gone)
        batches = list(loader)
        assert [batch.failures for batch in batches] == [[], [(gone, "no such file")], []]
        assert batches[1].indices == [4, 4, 6, 7] and torch.equal(batches[1].images[0], batches[1].images[1])
        os.remove(source.name(9))
        with pytest.raises(RunError, match=r"2 training images could not be read") as caught:
            list(loader)
        assert f"{source.name(9)}: no such file" in str(caught.value) and gone in str(caught.value)


def test_ctrl_c_does_not_reach_the_workers(two_cores):
    with loading(Source(40), num_parallel_workers=2) as loader:
        iterator = iter(loader)
        next(iterator), next(iterator)  # one of each worker: both have started
        for worker in loader.processes:
            assert os.getpgid(worker.pid) != os.getpgid(0)
            os.kill(worker.pid, signal.SIGINT)
        time.sleep(0.1)
        assert len(list(iterator)) == 8


def test_more_images_asked_for_than_there_are():
    with pytest.raises(UsageError, match="batch_size: 4 images are more than the 3"):
        make_train_loader(Source(3), config())
    with pytest.raises(UsageError, match="batch_size: 8 images"):
        make_train_loader(Source(6), config(), world_size=2)
    assert len(make_train_loader(Source(3), config(drop_remainder=False))) == 1


def test_workers_are_no_more_than_cores():
    with loading(Source(8), num_parallel_workers=500) as loader:
        assert loader.num_workers == available_cores()
        assert next(iter(loader)).images.is_contiguous(memory_format=torch.channels_last)
    small = ArraySource(np.zeros((20, 8, 8), np.uint8), [0] * 20, ["a"], "small")
    with loading(small, num_parallel_workers=8) as loader:
        assert loader.num_workers == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_complete_and_in_order(workers, two_cores):
    source = Source(11, broken=[2, 8, 9, 10])
    loader = make_eval_loader(source, PREPROCESSING, batch_size=4, num_workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert [batch.indices for batch in batches] == [[0, 1, 3], [4, 5, 6, 7], []]
        assert [name for batch in batches for name, _ in batch.failures] == ["image2", "image8", "image9", "image10"]
        assert len(batches[2]) == 0 and len(loader) == 3
        assert torch.equal(batches[1].images[1], PREPROCESSING(source.load(5)))
        assert batches[0].targets.tolist() == [0, 1, 0]
    loader.close()


def test_evaluation_shared_by_processes():
    seen = []
    for rank in range(3):
        loader = make_eval_loader(Source(10), PREPROCESSING, batch_size=2, num_workers=0, rank=rank, world_size=3)
        seen += [index for batch in loader for index in batch.indices]
    assert sorted(seen) == list(range(10))


def test_an_empty_share_gives_no_batches():
    loader = make_eval_loader(Source(1), PREPROCESSING, batch_size=2, num_workers=2, rank=1, world_size=2)
    assert len(loader) == 0 and list(loader) == []


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 60),
    world_size=st.integers(1, 5),
    repeats=st.integers(0, 4),
    num_samples=st.none() | st.integers(1, 80),
    shuffle=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_sampler(size, world_size, repeats, num_samples, shuffle, epoch):
    """The ranks' items interleave to the order of one process, filled up from its front; no item comes twice."""
    options = {"seed": 3, "shuffle": shuffle, "repeats": repeats, "num_samples": num_samples}
    one = EpochSampler(size, **options)
    one.set_epoch(epoch)
    whole = list(one)
    assert len(whole) == len(one) == one.total == min(size, num_samples or size)
    assert len(set(whole)) == len(whole)
    if repeats < 2:
        assert len({item.index for item in whole}) == len(whole)
    ranks = []
    for rank in range(world_size):
        sampler = EpochSampler(size, rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == len(ranks[0])
        sampler.set_epoch(epoch, start=len(sampler) // 2)
        assert list(sampler) == ranks[-1][len(sampler) // 2 :]
    interleaved = [item for items in zip(*ranks, strict=True) for item in items]
    assert interleaved[: len(whole)] == whole
    assert interleaved[len(whole) :] == (whole * world_size)[: len(interleaved) - len(whole)]


def test_num_samples_is_one_subset_in_every_epoch():
    sampler = EpochSampler(100, seed=1, num_samples=10)
    subsets = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        subsets.add(frozenset(item.index for item in sampler))
    assert len(subsets) == 1 and len(subsets.pop()) == 10


def test_repeats_stand_side_by_side():
    sampler = EpochSampler(9, seed=1, repeats=3)
    items = list(sampler)
    assert [item.copy for item in items] == [0, 1, 2] * 3 and len({item.index for item in items}) == 3


def test_training_ends_with_one_line_when_too_many_images_are_bad(tmp_path, capsys):
    for index in range(24):
        folder = tmp_path / "data" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index:02}.jpg"
        Image.fromarray(np.full((40, 50, 3), index * 10, np.uint8)).save(path)
        if index % 4 == 3:
            path.write_bytes(path.read_bytes()[:200])  # cut short
    words = [
        "train", "--data_dir", str(tmp_path / "data"), "--ckpt_save_dir", str(tmp_path / "run"), "--image_resize", "32",
        "--batch_size", "8", "--epoch_size", "1", "--num_parallel_workers", "1", "--val_while_train", "False",
        "--device_target", "cpu",
    ]  # fmt: skip
    assert main([*words, "--max_bad_images", "2"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "training images could not be read, more than the 2 that max_bad_images allows" in last and ".jpg" in last
    assert main(words) == 0
