"""Workers that are killed, crash, hang or raise: what is survived, what is said, and when it ends."""

import os
import signal
import time

import numpy as np
import pytest
import torch.multiprocessing as multiprocessing

from visformer.data import workers
from visformer.data.workers import WorkerPool
from visformer.errors import RunError, UsageError

GROUPS = [list(range(start, start + 3)) for start in range(0, 18, 3)]


class Squares:
    """Images of 2 x 2 in the level of their index; `trouble` is what happens at an index, in that process."""

    shape = (3, 2, 2, 1)

    def __init__(self, trouble=None, delay_s: float = 0.0) -> None:
        self.trouble = trouble or {}
        self.delay_s = delay_s

    def __call__(self, group, out, given_up, reading):
        good = [index for index in group if index not in given_up]
        for row, index in enumerate(good):
            reading(index)
            time.sleep(self.delay_s)
            if index in self.trouble:
                self.trouble[index]()
            out[row] = index
        return len(good), [index for index in group if index in given_up]

    def name(self, index: int) -> str:
        return f"image{index}"


class Once:
    """Does a thing the first time only, in whichever process."""

    def __init__(self, path, thing, *arguments) -> None:
        self.path, self.thing, self.arguments = path, thing, arguments

    def __call__(self) -> None:
        if not self.path.exists():
            self.path.touch()
            self.thing(*self.arguments)


def die(how: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), how)


def levels(pool: WorkerPool, groups=GROUPS):
    return [(images[:, 0, 0, 0].tolist(), told) for images, told in pool.run(groups)]


ALL = [(group, []) for group in GROUPS]


@pytest.fixture
def pool_of():
    pools = []

    def make(job, count: int = 2, timeout_s: float = 0.0) -> WorkerPool:
        pools.append(WorkerPool(job, count, timeout_s=timeout_s))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_a_killed_worker_is_replaced_and_nothing_is_lost(pool_of, capsys):
    pool = pool_of(Squares(delay_s=0.1))
    running = pool.run(GROUPS)
    seen = [next(running)[0][:, 0, 0, 0].tolist() for _ in range(2)]  # one of each worker
    time.sleep(0.05)
    victim = pool.processes[1].pid
    os.kill(victim, signal.SIGKILL)
    assert seen + [images[:, 0, 0, 0].tolist() for images, _ in running] == GROUPS
    error = capsys.readouterr().err
    assert f"data worker 1 (process {victim}) was killed by SIGKILL while reading image" in error
    assert "another takes its place" in error and error.count("\n") == 1
    assert len(pool.processes) == 2 and victim not in [process.pid for process in pool.processes]
    assert levels(pool) == ALL


def test_workers_killed_over_and_over_between_batches(pool_of):
    pool = pool_of(Squares(), 3)
    for _ in range(3):
        seen = []
        for images, _ in pool.run(GROUPS):
            seen.append(images[:, 0, 0, 0].tolist())
            os.kill(pool.processes[len(seen) % 3].pid, signal.SIGKILL)
        assert seen == GROUPS


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_an_image_that_ends_its_reader_is_given_up(pool_of, capsys, how):
    pool = pool_of(Squares({7: lambda: die(how)}))
    assert levels(pool) == [(group, []) if group[0] != 6 else ([6, 8], [7]) for group in GROUPS]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(f"was killed by {how.name} while reading image7" in line for line in lines)


def test_a_worker_that_hangs_once_is_replaced(pool_of, capsys, tmp_path):
    pool = pool_of(Squares({4: Once(tmp_path / "hung", time.sleep, 60)}), timeout_s=0.4)
    began = time.monotonic()
    assert levels(pool) == ALL
    assert time.monotonic() - began < 10
    assert "has been silent for 0.4 s (data_timeout_s) while reading image4" in capsys.readouterr().err


def test_an_image_on_which_workers_hang_is_given_up(pool_of):
    pool = pool_of(Squares({4: lambda: time.sleep(60)}), timeout_s=0.3)
    assert levels(pool) == [(group, []) if group[0] != 3 else ([3, 5], [4]) for group in GROUPS]


def test_a_slow_batch_of_quick_images_is_no_hang(pool_of, capsys):
    pool = pool_of(Squares(delay_s=0.2), timeout_s=0.5)
    assert levels(pool, GROUPS[:2]) == ALL[:2]
    assert capsys.readouterr().err == ""


def test_waiting_for_the_consumer_is_no_hang(pool_of, capsys):
    pool = pool_of(Squares(), timeout_s=0.2)
    for _ in pool.run(GROUPS[:4]):
        time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_a_batch_that_ends_worker_after_worker_ends_the_run(pool_of):
    pool = pool_of(Squares(dict.fromkeys(range(18), die)))
    with pytest.raises(
        RunError, match=r"data worker \d \(process \d+\) was killed by SIGKILL while reading image\d+; \d workers ended"
    ) as caught:
        levels(pool)
    assert "\n" not in str(caught.value) and "num_parallel_workers" in str(caught.value)


def test_an_exit_is_named(pool_of, capsys, tmp_path):
    assert levels(pool_of(Squares({2: Once(tmp_path / "left", os._exit, 3)}))) == ALL
    assert "ended with exit code 3 while reading image2" in capsys.readouterr().err


def refuse() -> None:
    raise UsageError("image10: no")


def test_errors_come_at_their_batch_and_the_pool_goes_on(pool_of):
    pool = pool_of(Squares({10: refuse}))
    seen = []
    with pytest.raises(UsageError, match="image10: no"):
        seen += [images[:, 0, 0, 0].tolist() for images, _ in pool.run(GROUPS)]
    running = pool.run(GROUPS)
    assert [next(running)[0][:, 0, 0, 0].tolist() for _ in range(3)] == GROUPS[:3]
    bug = pool_of(Squares({1: lambda: 1 // 0}))
    with pytest.raises(RuntimeError, match=r"in data worker(.|\n)*ZeroDivisionError"):
        levels(bug)


def test_workers_end_with_the_pool(pool_of):
    pool = pool_of(Squares())
    next(iter(pool.run(GROUPS)))
    pids = [process.pid for process in pool.processes]
    pool.close()
    assert pool.processes == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    other = WorkerPool(Squares(), 1)
    assert levels(other) == ALL
    [process] = other.processes
    del other  # nobody closed it
    assert not process.is_alive()


def test_processes_that_are_started_anew(pool_of, monkeypatch):
    """Where there is no fork, results travel by themselves."""
    monkeypatch.setattr(workers, "processes", lambda: multiprocessing.get_context("spawn"))
    pool = pool_of(Squares(), 1)
    assert levels(pool) == ALL
    kept = [images for images, _ in pool.run(GROUPS)]
    assert [images[:, 0, 0, 0].tolist() for images in kept] == GROUPS


def test_zero_copies_for_who_lets_go(pool_of):
    """Whoever drops a batch before the next but one sees a few places in memory only."""
    pool = pool_of(Squares(), 1)
    places = {images.data_ptr() for images, _ in pool.run(GROUPS * 4)}
    assert len(places) <= workers.AHEAD + workers.SPARE
    held = [images for images, _ in pool.run(GROUPS * 4)]
    assert len({images.data_ptr() for images in held}) == len(held)
    assert np.concatenate([images[:, 0, 0, 0] for images in held]).tolist() == [i for g in GROUPS * 4 for i in g]
