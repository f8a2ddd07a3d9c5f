"""The tuner takes the fastest candidate that is right."""

import json
import time

import pytest
import torch

from visformer.errors import RunError
from visformer.fusion import tuner as module
from visformer.fusion.tuner import Tuner


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path))
    return Tuner("fastest", torch.device("cpu"), torch.float32)


def sleeping(seconds: float, factor: float = 2.0):
    def run(x: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return x * factor

    return run


def failing(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of\nshared memory")


def test_the_fastest_that_is_right_wins(tuner, capsys):
    right = sleeping(0.002)
    candidates = {
        "library": lambda: sleeping(0.02),
        "kernel wrong": lambda: sleeping(0, factor=2.1),
        "kernel failing": lambda: failing,
        "kernel slow": lambda: sleeping(0.05),
        "kernel right": lambda: right,
    }
    assert tuner.choose("double", candidates, (torch.ones(3),)) is right
    said = capsys.readouterr().err
    assert "kernel wrong is left out: it is off by" in said
    assert "kernel failing can't be used here: RuntimeError: out of shared memory" in said


def test_one_that_can_not_be_timed_is_passed_over(tuner, capsys):
    calls = []

    def late(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError("no memory left")
        return x * 2

    candidates = {"library": lambda: sleeping(0.001), "kernel late": lambda: late}
    library = tuner.choose("double", candidates, (torch.ones(3),))
    assert library is not late and "kernel late can't be timed here: RuntimeError: no memory" in capsys.readouterr().err


def test_a_result_that_is_no_number_is_not_right(tuner):
    candidates = {"library": lambda: sleeping(0.01), "kernel": lambda: sleeping(0, factor=float("nan"))}
    library = tuner.choose("double", candidates, (torch.ones(3),))
    assert library(torch.ones(1)).item() == 2


def test_by_a_result_of_the_library_that_is_no_number_nothing_is_chosen(tuner, tmp_path):
    """Numbers too large for half precision, say: it is the caller's to see them, and the next input may be another."""
    candidates = {"library": lambda: sleeping(0.001, factor=float("inf")), "kernel": lambda: sleeping(0)}
    assert tuner.choose("double", candidates, (torch.ones(3),))(torch.ones(1)).isinf().all()
    assert not list(tmp_path.iterdir())
    candidates["library"] = lambda: sleeping(0.001)
    assert tuner.choose("double", candidates, (torch.ones(3),))(torch.ones(1)).item() == 2


@pytest.mark.parametrize("choice", ["fastest", "kernels"])
def test_what_lost_the_device_is_not_tried_again(choice, tuner, tmp_path, monkeypatch):
    candidates = {"library": lambda: sleeping(0.001), "kernel bad": lambda: failing, "kernel good": lambda: sleeping(0)}
    monkeypatch.setattr(module, "is_lost", lambda device: True)
    with pytest.raises(RunError, match=r"kernel bad ended the use of the device .* out of shared memory.*start again"):
        tuner.choose("double", candidates, (torch.ones(3),))
    (file,) = (tmp_path / "tuning").iterdir()
    assert json.loads(file.read_text()) == {"double": {"refused": ["kernel bad"]}}
    again = Tuner(choice, torch.device("cpu"), torch.float32)  # of the next process
    assert again.choose("double", candidates, (torch.ones(3),)) is not failing
    if choice == "fastest":
        entry = json.loads(file.read_text())["double"]
        assert entry["choice"] == "kernel good" and entry["refused"] == ["kernel bad"]


def test_the_librarys_error_is_the_callers(tuner):
    with pytest.raises(RuntimeError, match="shared memory"):
        tuner.choose("double", {"library": lambda: failing, "other": lambda: failing}, (torch.ones(3),))


@pytest.mark.parametrize(("choice", "chosen"), [("library", 0), ("kernels", 2)])
def test_without_measuring(choice, chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path))
    runs = [sleeping(0), sleeping(0), sleeping(0)]
    candidates = dict(
        zip(("library", "convolution", "kernel 16,16"), (lambda run=run: run for run in runs), strict=True)
    )
    tuner = Tuner(choice, torch.device("cpu"), torch.float32)
    assert tuner.choose("double", candidates, (torch.ones(3),)) is runs[chosen]
    assert not list(tmp_path.iterdir())


def test_eight_bits_may_be_further_off(tuner, capsys):
    candidates = {
        "library": lambda: sleeping(0.02),
        "kernel fp8 16": lambda: sleeping(0.005, factor=2.1),
        "kernel 16": lambda: sleeping(0, factor=2.1),
        "kernel fp8 32": lambda: sleeping(0, factor=2.3),
    }
    assert tuner.choose("double", candidates, (torch.ones(3),))(torch.ones(1)).item() == pytest.approx(2.1)
    said = capsys.readouterr().err
    assert "kernel 16 is left out" in said and "kernel fp8 32 is left out" in said
