"""A checkpoint as an engine: batches of any number, in few sizes where each has a graph of its own."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bundles.conftest import small_model
from visformer.bundles import tuning
from visformer.bundles.checkpoint_engine import CheckpointEngine, filled_up, sizes
from visformer.data.preprocessing import Preprocessing
from visformer.errors import RunError
from visformer.fusion.fused import WARM_SHAPES


@pytest.fixture
def model():
    model = small_model()
    model.preprocessing = Preprocessing((64, 64))
    model.model_name, model.class_names = "small", ["bird", "cat", "dog", "frog", "horse"]
    return model


def test_sizes_end_at_the_largest():
    assert sizes(1) == [1] and sizes(2) == [1, 2] and sizes(16) == [1, 2, 4, 8, 16] and sizes(12) == [1, 2, 4, 8, 12]


def test_there_are_no_more_sizes_than_keep_a_graph():
    assert sizes(128) == [1, 2, 4, 8, 16, 32, 64, 128] and sizes(129) == [1, 4, 8, 16, 32, 64, 128, 129]
    assert all(len(sizes(n)) <= WARM_SHAPES and sizes(n)[0] == 1 and sizes(n)[-1] == n for n in range(1, 5000, 7))


def test_a_batch_is_filled_with_zeros():
    batch = torch.ones(3, 1, 2, 2)
    filled = filled_up(batch, [1, 2, 4])
    assert len(filled) == 4 and torch.equal(filled[:3], batch) and not filled[3].any()
    assert filled_up(batch, [1, 3]) is batch and filled_up(batch, []) is batch and filled_up(batch, [1, 2]) is batch


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_any_number_of_images_gives_the_models_logits(model, precision, tolerance):
    """As on CUDA, with the sizes that have a graph there."""
    images = torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(images).numpy()
    engine = CheckpointEngine(model, device="cpu", precision=precision, batch_size=4)
    engine._sizes, engine._one_at_a_time = sizes(4), threading.Lock()
    seen = []
    engine._fused.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for count in (1, 2, 3, 4, 9):
        got = engine.run(images[:count].numpy())
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted[:count], atol=tolerance * np.abs(wanted).max())
    assert seen == [1, 2, 4, 4, 9]


def test_without_graphs_nothing_is_filled_or_prepared(model):
    engine = CheckpointEngine(model, device="cpu")
    seen = []
    engine._fused.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    engine.warm()
    assert not seen
    engine.run(np.zeros((3, 3, 64, 64), dtype=np.float32))
    assert seen == [3]


# ---- measuring beside it


@pytest.fixture
def engine(model, tmp_path, monkeypatch):
    """With the sizes that have a graph on CUDA, and nothing measured yet."""
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path))
    engine = CheckpointEngine(model, device="cpu", batch_size=2)
    engine._sizes, engine._one_at_a_time = [1, 2], threading.Lock()
    return engine


def test_what_is_not_known_is_measured_by_another_process(engine, model, tmp_path, capfd):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(images).numpy()
    at_first = engine._fused
    engine.warm()
    assert engine._fused is not at_first and not engine._tuned and engine._fused.is_measured
    np.testing.assert_allclose(engine.run(images.numpy()), wanted, atol=1e-5 * np.abs(wanted).max())
    (file,) = (tmp_path / "tuning").iterdir()
    assert len(json.loads(file.read_text())) > 10
    assert "PyTorch's serve until then" in capfd.readouterr().err


def test_what_is_known_is_not_measured_again(engine, model, monkeypatch):
    engine.warm()
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("measured"))
    again = CheckpointEngine(model, device="cpu", batch_size=2)
    again._sizes, again._one_at_a_time = [1, 2], threading.Lock()
    again.warm()
    assert again._fused.is_measured


def test_a_size_is_served_in_the_fastest_ways_as_soon_as_it_is_measured(engine, monkeypatch):
    at_first, served = engine._fused, []

    def two(*_, **__):
        yield 1
        served.append([engine._tuned.get(size, engine._fused) for size in (1, 2)])
        raise RunError("no memory")

    monkeypatch.setattr(tuning, "tune", two)
    engine.warm()
    assert served[0][0] is not at_first and served[0][1] is at_first
    assert engine._tuned.keys() == {1} and engine._fused is at_first


def test_a_measurement_that_fails_is_said_in_a_line(engine, monkeypatch, capsys):
    monkeypatch.setattr("visformer.bundles.checkpoint_engine.write_checkpoint", lambda path, _: path.write_text("no"))
    at_first = engine._fused
    engine.warm()
    assert engine._fused is at_first
    said = capsys.readouterr().err
    assert "warning: the fastest ways to compute were not found (" in said and "model.safetensors" in said


def test_closing_ends_the_process_that_measures(engine, monkeypatch):
    started = []
    popen = subprocess.Popen

    def starting(*args, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[0]

    monkeypatch.setattr(tuning.subprocess, "Popen", starting)
    thread = threading.Thread(target=engine.warm)
    thread.start()
    while not started:
        time.sleep(0.01)
    engine.close()
    thread.join(20)
    assert not thread.is_alive() and started[0].poll() is not None


@pytest.mark.parametrize(
    ("codes", "ended"), [([3, 3, 0], "sizes"), ([3, 1], "error"), ([-11], "error"), ([3] * 10, "error")]
)
def test_a_process_that_lost_the_device_is_followed_by_another(codes, ended, tmp_path, monkeypatch):
    """Each ends with one of the codes, the last of them after having measured what is left."""
    codes, popen, commands = list(codes), subprocess.Popen, []

    def starting(command, **options):
        commands.append(command)
        code = codes.pop(0)
        does = "print(1); print(2)" if code == 0 else "sys.stderr.write('kernel 1 failed\\n')"
        ends = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
        return popen([sys.executable, "-c", f"import os, sys; {does}; sys.stdout.flush(); {ends}"], **options)

    monkeypatch.setattr(tuning.subprocess, "Popen", starting)
    found = tuning.tune("model", "cpu", "fp32", [1, 2], goes_on=lambda: True)
    if ended == "sizes":
        assert list(found) == [1, 2]
    else:
        with pytest.raises(RunError, match="kernel 1 failed"):
            list(found)
    assert not codes and all(command[-3:] == ["--batch_sizes", "1", "2"] for command in commands)


def test_it_ends_with_the_process_that_started_it(tmp_path):
    """However that ends."""
    pid = tmp_path / "pid"
    child = "import os; from visformer.bundles import tuning; print(os.getpid(), flush=True); "
    child += "tuning._end_with_parent(os.getppid())"
    starting = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", {child!r}], stdout=open({str(pid)!r}, "w"))
while not os.path.getsize({str(pid)!r}):
    pass
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", starting], check=True, timeout=30)
    number = int(pid.read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{number}") or "Z" in Path(f"/proc/{number}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("it goes on")
