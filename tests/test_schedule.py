"""Learning rates: equal to MindCV's on every step of its eleven settings, and sane everywhere else."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visformer.config import TrainConfig
from visformer.errors import UsageError
from visformer.schedule import learning_rates

UPSTREAM = json.loads((Path(__file__).parent / "fixtures" / "upstream" / "lr_schedules.json").read_text())
RENAMED = {"num_epochs": "epoch_size", "milestones": "multi_step_decay_milestones"}
WITH_WARMUP = ["constant", "cosine_decay", "exponential_decay", "step_decay", "multi_step_decay"]
ALL = [*WITH_WARMUP, "one_cycle", "cyclic"]


def config_of(settings: dict) -> TrainConfig:
    return TrainConfig(**{RENAMED.get(k, k): v for k, v in settings.items() if k != "steps_per_epoch"})


@pytest.mark.parametrize("case", UPSTREAM, ids=lambda case: case["settings"]["scheduler"])
def test_every_step_equals_mindcv(case):
    settings, expected = case["settings"], case["lr_per_step"]
    rate = learning_rates(config_of(settings), settings["steps_per_epoch"])
    assert len(expected) == settings["num_epochs"] * settings["steps_per_epoch"]
    # the file has nine significant digits
    assert [rate(step) for step in range(len(expected))] == pytest.approx(expected, rel=5.1e-9, abs=1e-12)


def test_the_file_covers_every_scheduler():
    assert {case["settings"]["scheduler"] for case in UPSTREAM} == set(ALL)


@st.composite
def configs(draw, schedulers=ALL):
    scheduler = draw(st.sampled_from(schedulers))
    lr = draw(st.floats(1e-6, 10))
    return TrainConfig(
        scheduler=scheduler,
        lr=lr,
        min_lr=lr * draw(st.floats(0, 1)),
        epoch_size=draw(st.integers(1, 400)),
        warmup_epochs=draw(st.integers(0, 20)),
        warmup_factor=draw(st.floats(0, 1)),
        decay_epochs=draw(st.integers(1, 400)),
        decay_rate=draw(st.floats(0.01, 1)),
        multi_step_decay_milestones=draw(st.lists(st.integers(1, 300), max_size=4)),
        lr_epoch_stair=draw(st.booleans()) and scheduler in WITH_WARMUP,
        num_cycles=draw(st.integers(1, 5)),
        cycle_decay=draw(st.floats(0.1, 1)),
    )


@given(configs(), st.integers(1, 2000), st.integers(0, 1_000_000))
def test_rates_stay_between_zero_and_the_peak(config, steps_per_epoch, step):
    rate = learning_rates(config, steps_per_epoch)(step)
    assert 0 <= rate <= config.lr * (1 + 1e-12)


@given(configs(WITH_WARMUP), st.integers(1, 50))
def test_warmup_rises_to_the_peak(config, steps_per_epoch):
    rate = learning_rates(config, steps_per_epoch)
    warmup = [rate(step) for step in range(config.warmup_epochs * steps_per_epoch + 1)]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(warmup))
    assert warmup[-1] == pytest.approx(config.lr)
    if config.warmup_epochs:
        assert warmup[0] == pytest.approx(config.lr * config.warmup_factor)


@given(configs(["cosine_decay"]), st.integers(1, 50))
def test_cosine_reaches_the_minimum_and_stays(config, steps_per_epoch):
    rate = learning_rates(config, steps_per_epoch)
    end = (config.warmup_epochs + config.num_cycles * config.decay_epochs) * steps_per_epoch
    assert rate(end) == rate(end + 12345) == config.min_lr


@given(configs(["one_cycle"]), st.integers(1, 50))
def test_one_cycle_ends_at_the_minimum(config, steps_per_epoch):
    total = config.epoch_size * steps_per_epoch
    rate = learning_rates(config, steps_per_epoch)
    if total > 1:
        assert rate(total - 1) == pytest.approx(config.min_lr, rel=1e-9, abs=1e-12)
    assert rate(total + 5) == pytest.approx(config.min_lr, rel=1e-9, abs=1e-12)


@given(configs(WITH_WARMUP), st.integers(1, 50), st.integers(0, 500))
def test_a_stair_is_level_within_an_epoch(config, steps_per_epoch, epoch):
    config.lr_epoch_stair = True
    rate = learning_rates(config, steps_per_epoch)
    first = epoch * steps_per_epoch
    assert len({rate(first + i) for i in range(steps_per_epoch)}) == 1


@pytest.mark.parametrize("scheduler", ["one_cycle", "cyclic"])
def test_no_stairs_where_the_rate_changes_every_step(scheduler):
    with pytest.raises(UsageError, match="lr_epoch_stair"):
        learning_rates(TrainConfig(scheduler=scheduler, lr_epoch_stair=True), 10)


def test_step_decay_needs_a_step():
    with pytest.raises(UsageError, match="decay_epochs: 0"):
        learning_rates(TrainConfig(scheduler="step_decay", decay_epochs=0), 10)


def test_cosine_without_decay_epochs_stays_at_the_minimum():
    rate = learning_rates(TrainConfig(decay_epochs=0, warmup_epochs=0), 10)
    assert rate(0) == rate(100) == TrainConfig().min_lr


def test_imports_no_torch():
    code = "import sys, visformer.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
