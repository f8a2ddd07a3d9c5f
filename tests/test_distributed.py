"""Several processes that train as one: Gloo on the CPU, started by `train` itself, by torchrun and by mpirun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visformer import processes
from visformer.checkpoint import read_checkpoint
from visformer.config import TrainConfig
from visformer.data.sampler import EpochSampler
from visformer.errors import UsageError
from visformer.processes import LAUNCHERS, Place, first_host, place
from visformer.verbs.launch import devices_to_start, restarted, scaled

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "dataset": "digits", "in_channels": 1, "mean": 77, "std": 95, "image_resize": 32, "crop_pct": 1.0,
    "num_samples": 64, "num_parallel_workers": 0, "hflip": 0, "opt": "sgd", "lr": 0.02, "warmup_epochs": 0,
    "decay_epochs": 2, "epoch_size": 2, "drop_path_rate": 0, "device_target": "CPU", "log_interval": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher's variables from outside."""
    for names in LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)


def words(folder, **changes):
    options = OPTIONS | {"ckpt_save_dir": folder} | changes
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def run(command, **environment):
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def visformer(folder, **changes):
    return run([sys.executable, "-m", "visformer", "train", *words(folder, **changes)])


def records(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same_weights(one, other):
    first, second = (read_checkpoint(folder / "last.safetensors").state_dict for folder in (one, other))
    return all(torch.equal(second[name], tensor) for name, tensor in first.items())


# ---- who this process is


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launchers_variables_are_understood(monkeypatch, launcher):
    for name, value in zip(LAUNCHERS[launcher], ("3", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 8, 1, launcher) and not place().is_first
    assert devices_to_start(TrainConfig(num_devices=2)) == 1  # a launcher has done it


def test_a_process_that_nobody_launched_is_alone(monkeypatch):
    assert place() == Place() and place().is_first and not processes.several()
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a batch script without srun is one process
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert place() == Place()
    assert processes.gather_objects("x") == ["x"] and processes.on_first(lambda: 5) == 5 and processes.anywhere(True)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK: 2 is out of range"),
        ({"PMI_SIZE": "2", "PMI_RANK": "one"}, "not whole numbers"),
    ],
)
def test_half_a_launch_is_a_mistake(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        place()


def test_several_machines_need_an_address(monkeypatch):
    variables = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="mpirun -x MASTER_ADDR"), processes.joined(torch.device("cpu")):
        pass
    refused = pytest.raises(UsageError, match=r"distribute: False.*OpenMPI started 4")
    with refused, processes.joined(torch.device("cpu"), use=False):
        pass


@given(prefix=st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True), first=st.integers(0, 99), more=st.integers(1, 9))
def test_the_first_host_of_slurms_short_form(prefix, first, more):
    assert first_host(f"{prefix}[{first:02d}-{first + more:02d},{first + 20}],other") == f"{prefix}{first:02d}"
    assert first_host(f"{prefix}{first},{prefix}x") == f"{prefix}{first}"
    assert first_host(f"{prefix}[{first}]-ib") == f"{prefix}{first}-ib"


def test_torchrun_has_started_it_again(monkeypatch):
    assert not restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted()


# ---- the learning rate and the samples


def test_the_learning_rate_follows_the_global_batch(capsys):
    recipe = TrainConfig(lr=1e-3, min_lr=1e-5, batch_size=128, recipe_batch_size=128, recipe_devices=8)
    assert scaled(recipe, 8) is recipe
    accumulated = recipe.change(gradient_accumulation_steps=8)
    assert scaled(accumulated, 1) is accumulated
    assert capsys.readouterr().err == ""
    two = scaled(recipe, 2)
    assert (two.lr, two.min_lr) == (pytest.approx(2.5e-4), pytest.approx(2.5e-6))
    assert "global batch 256 where lr is meant for 1,024: lr 0.001 becomes 0.00025" in capsys.readouterr().err
    kept = recipe.change(scale_lr=False)
    assert scaled(kept, 2) is kept
    assert scaled(TrainConfig(lr=1.0), 4).lr == 1.0  # no recipe, nothing to scale from


@given(size=st.integers(1, 200), processes=st.sampled_from([1, 2, 4]), batch=st.sampled_from([4, 8, 16]))
def test_a_global_batch_holds_the_same_samples_however_it_is_split(size, processes, batch):
    one = EpochSampler(size, seed=3)
    split = [EpochSampler(size, seed=3, rank=rank, world_size=processes) for rank in range(processes)]
    whole, shares = list(one), [list(sampler) for sampler in split]
    assert len({len(share) for share in shares}) == 1
    share = batch // processes
    for start in range(0, size // batch * batch, batch):
        together = [item for mine in shares for item in mine[start // processes : start // processes + share]]
        assert sorted(together) == sorted(whole[start : start + batch])


# ---- several processes agree with one


@pytest.mark.slow
def test_two_and_four_processes_agree_with_one(tmp_path):
    log = visformer(tmp_path / "1", batch_size=32, sync_bn=True)
    for count in (2, 4):
        log = visformer(tmp_path / str(count), batch_size=32 // count, num_devices=count, sync_bn=True)
        assert log.count("writing to") == 1 and log.count("done:") == 1 and "Warning" not in log
        for one, several in zip(records(tmp_path / "1", "epoch"), records(tmp_path / str(count), "epoch"), strict=True):
            assert several["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
            assert several["val_loss"] == pytest.approx(one["val_loss"], rel=1e-2)
            assert several["top1"] * 359 / 100 == pytest.approx(round(several["top1"] * 359 / 100))  # each image once
        first, second = (read_checkpoint(tmp_path / name / "last.safetensors") for name in ("1", str(count)))
        assert second.training["processes"] == count
        for name, tensor in first.state_dict.items():
            torch.testing.assert_close(second.state_dict[name], tensor, atol=2e-3, rtol=2e-2)


@pytest.mark.slow
def test_two_processes_freeze_and_free_as_one_does(tmp_path):
    options = {"sync_bn": True, "freeze": "backbone", "freeze_epochs": 1, "class_weights": "balanced"}
    for count in (1, 2):
        visformer(tmp_path / str(count), batch_size=32 // count, num_devices=count, **options)
    one, two = (records(tmp_path / str(count), "epoch") for count in (1, 2))
    assert [r["train_loss"] for r in two] == pytest.approx([r["train_loss"] for r in one], rel=1e-4)
    first, second = (read_checkpoint(tmp_path / str(count) / "last.safetensors").state_dict for count in (1, 2))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-3, rtol=2e-2)


@pytest.mark.slow
def test_accumulation_over_processes_and_a_kill(tmp_path):
    """Two processes, two batches a step, a save at every step: killed in the middle, resumed, the same bits."""
    options = {
        "batch_size": 8,
        "num_devices": 2,
        "gradient_accumulation_steps": 2,
        "ckpt_save_steps": 1,
    }
    visformer(tmp_path / "whole", **options)
    process = subprocess.Popen(
        [sys.executable, "-m", "visformer", "train", *words(tmp_path / "killed", **options)],
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wait_for(tmp_path / "killed" / "last.state.pt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log = visformer(tmp_path / "killed", **options, resume="auto")
    assert "resuming" in log
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, "the run ended, or never saved"
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_saves_and_ends_every_process(tmp_path):
    options = {"batch_size": 16, "num_devices": 2, "epoch_size": 50}
    process = subprocess.Popen(
        [sys.executable, "-m", "visformer", "train", *words(tmp_path / "run", **options)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(tmp_path / "run" / "last.state.pt", process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("continue with visformer train") == 1, err
    assert read_checkpoint(tmp_path / "run" / "last.safetensors").training["epoch"] < 50


@pytest.mark.slow
def test_torchrun_goes_on_after_losing_a_worker(tmp_path):
    options = {"batch_size": 16, "epoch_size": 4}
    visformer(tmp_path / "whole", **options, num_devices=2)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
        "-m", "visformer", "train", *words(tmp_path / "run", **options),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(tmp_path / "run" / "last.state.pt", process)
    os.kill(worker_of(process.pid, rank=1), signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    assert "resuming" in err and len(records(tmp_path / "run", "epoch")) == 4
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def worker_of(parent, rank):
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            status = (path / "status").read_text()
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no worker {rank} of process {parent}")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs OpenMPI: apt-get install openmpi-bin")
def test_mpirun_runs_the_training_script(tmp_path):
    command = [
        "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "train.py",
        "--config", "configs/visformer/visformer_tiny_digits.yaml", "--data_dir", "none", "--distribute", "True",
        *words(tmp_path / "run", batch_size=16, epoch_size=1, recipe_batch_size=64),
    ]  # fmt: skip
    log = run(command)
    assert "global batch 32 where lr is meant for 64" in log and log.count("done:") == 1
    assert read_checkpoint(tmp_path / "run" / "last.safetensors").training["processes"] == 2


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    command = [sys.executable, "-m", "visformer", "train", *words(tmp_path, num_devices=2, model="visformer_huge")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
