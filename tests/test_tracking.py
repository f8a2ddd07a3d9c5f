"""Where figures go besides metrics.jsonl, what goes wrong there, and the lines that a person reads meanwhile."""

import json
import re
import sys
import types

import pytest
import torch

from visformer import console
from visformer.config import TrainConfig
from visformer.errors import UsageError
from visformer.metrics import Metrics
from visformer.run_folder import RunFolder
from visformer.tracking import Tracking, open_tracking, run_name
from visformer.verbs import progress as progress_module
from visformer.verbs.progress import Progress, _fitting

RECORD = {"kind": "epoch", "epoch": 3, "step": 30, "time": 1e9, "top1": 71.5, "train_loss": 0.5}
FIGURES = {"epoch/epoch": 3.0, "epoch/top1": 71.5, "epoch/train_loss": 0.5}


class Sink:
    def __init__(self, broken: str = ""):
        self.logged, self.closed, self.broken = [], 0, broken

    def log(self, figures, step):
        if self.broken == "log":
            raise RuntimeError("the server is gone\nand more")
        self.logged.append((figures, step))

    def close(self):
        self.closed += 1
        if self.broken == "close":
            raise OSError("disk full")


def test_each_sink_gets_each_figure_once_and_is_closed_once():
    sinks = {"one": Sink(), "two": Sink()}
    tracking = Tracking(sinks)
    tracking.log("epoch", RECORD | {"flag": True, "name": "x"})
    tracking.close()
    tracking.log("epoch", RECORD)
    tracking.close()
    assert all(sink.logged == [(FIGURES, 30)] and sink.closed == 1 for sink in sinks.values())


def test_without_a_sink_nothing_happens(tmp_path):
    tracking = open_tracking(TrainConfig(), tmp_path)
    tracking.log("epoch", RECORD)
    tracking.close()
    assert not tracking.sinks and not list(tmp_path.iterdir())


def test_a_sink_that_fails_is_warned_of_once_and_the_others_go_on(capsys):
    good, bad, worse = Sink(), Sink("log"), Sink("close")
    tracking = Tracking({"good": good, "bad": bad, "worse": worse})
    for _ in range(3):
        tracking.log("epoch", RECORD)
    tracking.close()
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "warning: bad takes no more figures (the server is gone); training goes on without it",
        "warning: worse takes no more figures (disk full); training goes on without it",
    ]
    assert len(good.logged) == 3 and good.closed == 1


def test_tensorboard_holds_the_figures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracking = open_tracking(TrainConfig(tensorboard=True), tmp_path)
    tracking.log("epoch", RECORD)
    tracking.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(FIGURES)
    assert [(e.step, e.value) for e in events.Scalars("epoch/top1")] == [(30, 71.5)]


@pytest.fixture
def trackio(monkeypatch):
    """A stand-in with the calls that the real package has; it prints, as that does."""
    module = types.ModuleType("trackio")
    module.calls, module.logged, module.finished = [], [], 0

    class Run:
        def __init__(self, name):
            self.name = name

        def log(self, metrics, step=None):
            print("noise")
            module.logged.append((metrics, step))

    def init(project, name=None, config=None, resume="never", embed=True):
        print("noise")
        if "/" in project:
            raise ValueError(f"Invalid project name {project!r}")
        module.calls.append({"project": project, "name": name, "config": config, "resume": resume, "embed": embed})
        return Run(name)

    def finish():
        print("noise")
        module.finished += 1

    module.init, module.finish = init, finish
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


@pytest.mark.parametrize("resumed, resume", [(False, "never"), (True, "allow")])
def test_trackio_gets_the_run_its_options_and_its_figures(tmp_path, trackio, capsys, resumed, resume):
    config = TrainConfig(trackio="photos", lr=0.25)
    tracking = open_tracking(config, tmp_path / "run", resumed=resumed)
    tracking.log("epoch", RECORD)
    tracking.close()
    (call,) = trackio.calls
    assert call["project"] == "photos" and call["name"] == run_name(tmp_path / "run") and call["resume"] == resume
    assert call["config"]["lr"] == 0.25 and None not in call["config"].values() and not call["embed"]
    assert trackio.logged == [(FIGURES, 30)] and trackio.finished == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "trackio show --project photos" in captured.err and "noise" not in captured.err


def test_a_project_that_trackio_refuses_is_a_usage_error(tmp_path, trackio):
    with pytest.raises(UsageError, match=r"^trackio: Invalid project name 'a/b'$"):
        open_tracking(TrainConfig(trackio="a/b"), tmp_path)


def test_a_tracker_that_cannot_be_opened_costs_a_warning(tmp_path, trackio, monkeypatch, capsys):
    def init(**_):
        raise OSError("read-only file system")

    monkeypatch.setattr(trackio, "init", init)
    assert not open_tracking(TrainConfig(trackio="photos"), tmp_path).sinks
    assert "warning: trackio cannot be opened (read-only file system)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, module", [({"tensorboard": True}, "tensorboard"), ({"trackio": "photos"}, "trackio")], ids=str
)
def test_a_missing_package_names_the_install_line(tmp_path, monkeypatch, options, module):
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", "tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"^{module}: it is not installed; pip install 'visformer\[{module}\]'$"):
        open_tracking(TrainConfig(**options), tmp_path)


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    first, second = run_name(tmp_path / "a" / "ckpt"), run_name(tmp_path / "b" / "ckpt")
    assert first != second and first.startswith("ckpt-") and re.fullmatch(r"ckpt-[0-9a-f]{6}", second)
    monkeypatch.chdir(tmp_path)
    assert run_name(RunFolder("a/ckpt").path) == first


# ---- the lines of progress


class Trainer:
    """As much of a trainer as progress looks at: 4 batches an epoch."""

    step, batches_per_epoch, steps_per_epoch = 0, 4, 4

    def __init__(self):
        self.loss_sum = torch.zeros(())

    def learning_rate(self, step):
        return 0.5


class Clock:
    now = 1000.0

    def perf_counter(self):
        return self.now

    time = perf_counter


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress_module, "time", Clock())
    return progress_module.time


def figures(top1):
    return Metrics(8, 0.5, top1, 99.0, 5, 1.0, {}, [], [], torch.zeros(2, 2).numpy(), 0)


def run_epochs(progress, clock, epochs, *, seconds=1.0, wait=0.25, first=0):
    """Epochs of four batches of 8 images, each of `seconds`, of which the loader takes `wait` of the time."""

    def loader():
        for _ in range(4):
            clock.now += seconds * wait
            yield None

    for epoch in range(first, first + epochs):
        progress.begin_epoch(epoch, 0)
        progress.trainer.loss_sum.zero_()
        for batch, _ in enumerate(progress.batches(loader()), start=1):
            clock.now += seconds * (1 - wait)
            progress.trainer.step += 1
            progress.trainer.loss_sum += 2.0
            progress.advance(epoch, batch, 8)
        progress.end_epoch(epoch, 2.0, figures([70.0, 80.0, 75.0][epoch % 3]))


def open_progress(tmp_path, *, epochs=3, log_interval=1, **more):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir(exist_ok=True)
    config = TrainConfig(epoch_size=epochs, log_interval=log_interval)
    return Progress(config, folder, Trainer(), **more)


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_log_file_gets_a_line_an_epoch_and_not_one_a_batch(tmp_path, clock, capsys):
    run_epochs(open_progress(tmp_path), clock, 3)
    lines = capsys.readouterr().err.splitlines()
    rest = "top-5 99.00 %  8 images/s"
    assert lines == [
        f"epoch 1/3  loss 2.0000  val loss 0.5000  top-1 70.00 % (best)  {rest}  8 s left  data wait 25 %",
        f"epoch 2/3  loss 2.0000  val loss 0.5000  top-1 80.00 % (best)  {rest}  4 s left  data wait 25 %",
        f"epoch 3/3  loss 2.0000  val loss 0.5000  top-1 75.00 % (best 80.00 %)  {rest}  took 12 s  data wait 25 %",
    ]
    kinds = [(record["kind"], record["epoch"], record["step"]) for record in records(tmp_path)]
    assert kinds[:5] == [("step", 1, 1), ("step", 1, 2), ("step", 1, 3), ("step", 1, 4), ("epoch", 1, 4)]


def test_a_slow_run_is_heard_of_every_minute_though_no_record_is_due(tmp_path, clock, capsys):
    run_epochs(open_progress(tmp_path, log_interval=100), clock, 1, seconds=40.0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "batch" in line]
    rest = "0 images/s  6 min 40 s left  data wait 25 %"
    assert lines[0] == f"epoch 1/3  batch 2/4  loss 2.0000  lr 5.0e-01  {rest}" and len(lines) == 2
    assert [record["kind"] for record in records(tmp_path)] == ["epoch"]


def test_the_records_hold_what_the_page_draws(tmp_path, clock):
    progress = open_progress(tmp_path, log_interval=2, figures=lambda: {"grad_norm": 1.5}, processes=2)
    run_epochs(progress, clock, 1)
    step, _, epoch = records(tmp_path)
    assert step["epochs_done"] == 0.5 and step["grad_norm"] == 1.5 and step["data_wait"] == 25.0
    assert step["images_per_s"] == 16.0, "two processes train at twice the rate of one"
    assert epoch["seconds"] == 4.0 and epoch["top1"] == 70.0 and epoch["grad_norm"] == 1.5


def test_a_quiet_process_says_and_writes_nothing(tmp_path, clock, capsys):
    run_epochs(open_progress(tmp_path, quiet=True), clock, 2)
    assert capsys.readouterr() == ("", "") and not list((tmp_path / "run").iterdir())


def test_a_resumed_run_knows_what_its_best_was(tmp_path, clock, capsys):
    run_epochs(open_progress(tmp_path), clock, 2)
    capsys.readouterr()
    progress = open_progress(tmp_path)
    progress.trainer.step = 8
    run_epochs(progress, clock, 1, first=2)
    assert "top-1 75.00 % (best 80.00 %)" in capsys.readouterr().err


def test_a_full_disk_does_not_stop_the_watching(tmp_path, clock, monkeypatch, capsys):
    progress = open_progress(tmp_path)

    def append(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(progress.folder, "append", append)
    monkeypatch.setattr(console, "_warned", set())
    run_epochs(progress, clock, 2)
    err = capsys.readouterr().err
    assert err.count("takes no more lines (No space left on device); training goes on") == 1 and "epoch 2/3" in err


def test_a_narrow_terminal_keeps_what_matters_most():
    parts = ["loss 0.5", "top-1 70.00 %", "lr 1e-3", "5,000 images/s", "1 h left", "data wait 4 %"]
    assert _fitting(parts, 100) == parts
    assert _fitting(parts, 65) == [part for part in parts if not part.startswith("lr")]
    assert _fitting(parts, 10) == ["loss 0.5", "5,000 images/s", "1 h left"]
