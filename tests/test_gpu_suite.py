"""The suite of a GPU: that it runs through where there is none, keeps to its budget, and leaves what it has."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from visformer.errors import RunError

ROOT = Path(__file__).parents[1]
BARE = """
import sys
from importlib.machinery import PathFinder

class Bare:
    def find_spec(name, path=None, target=None):
        if name in {hidden}:
            spec = PathFinder.find_spec(name, [place for place in sys.path if place.endswith("stand_ins")])
            if spec is None:
                raise ModuleNotFoundError(name)
            return spec

sys.meta_path.insert(0, Bare)
"""


@pytest.fixture
def suite(monkeypatch):
    """The module `gpu_suite`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_suite")


@pytest.fixture
def checks(suite):
    """The module `gpu_checks`."""
    return importlib.import_module("gpu_checks")


@pytest.fixture
def parts(suite):
    """The module `gpu_parts`."""
    return importlib.import_module("gpu_parts")


def options(folder: Path, **changes) -> argparse.Namespace:
    given = {"parts": ["kernels"], "models": ["visformer_tiny"], "batch_sizes": [2], "image_size": 32}
    others = {"budget_s": 100.0, "device": "cpu", "quick": True, "output": folder / "suite.json"}
    return argparse.Namespace(**(given | others | changes))


def run(words: list[str], hidden: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess:
    """The suite in a process of its own, on a machine without the packages `hidden`."""
    (folder / "bare").mkdir()
    (folder / "bare" / "sitecustomize.py").write_text(BARE.format(hidden=hidden))
    environment = dict(os.environ, PYTHONPATH=str(folder / "bare"), VISFORMER_CACHE=str(folder / "cache"))
    command = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)


# ---- from end to end


@pytest.mark.slow
def test_it_runs_through_on_a_bare_machine(tmp_path):
    """Everything but CUDA itself, without what a machine with PyTorch, Triton and timm lacks."""
    output = tmp_path / "new" / "suite.json"
    words = ["--device", "cpu", "--quick", "--output", str(output)]
    done = run(words, ("simplejpeg", "jsonargparse"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "simplejpeg is not installed; it is for nothing that is measured here" in done.stderr
    assert done.stdout == f"{output}\n"
    document = json.loads(output.read_text())
    assert (
        set(document["parts"]) == {"kernels", "infer", "train", "memory", "fp8", "tests"} and document["left_out"] == []
    )
    assert {"torch", "timm", "python"} <= set(document["versions"]) and document["quick"]
    off_by = document["parts"]["kernels"]["all"]["off_by"]
    assert {"linear float32", "stem bfloat16", "mlp bfloat16"} <= set(off_by)
    assert all(off_by[key] <= document["parts"]["kernels"]["all"]["limits"][key.split()[-1]] for key in off_by)
    [inference] = document["parts"]["infer"].values()
    assert [c["name"] for c in inference["contenders"]] == ["visformer fused", "timm eager"]
    assert inference["contenders"][1]["ratio"] == 1 and inference["contenders"][0]["roofline_share"] > 0
    layers = inference["layers"]
    assert sum(layer["count"] for layer in layers) == 66
    measured = [layer for layer in layers if layer["chosen"]]
    assert len(measured) >= 10 and all(layer["chosen_us"] <= layer["library_us"] for layer in measured)
    [training] = document["parts"]["train"].values()
    assert {"visformer", "timm"} <= {c["name"] for c in training["contenders"]}
    [memory] = document["parts"]["memory"].values()
    assert set(memory["peak_memory_mib"]) == {"timm", "visformer fused"}
    [tests] = document["parts"]["tests"].values()
    assert tests["exit_code"] == 0 and re.search(r"\d+ (passed|skipped)", tests["summary"])


def test_what_is_needed_is_named_and_nothing_runs_without_it(tmp_path):
    done = run(["--device", "cpu", "--quick"], ("torch", "timm"), tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "not installed, and needed: torch, timm; pip install torch timm brings them all" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_one_line(tmp_path):
    done = run([], (), tmp_path)
    assert done.returncode == 2
    assert "there is no CUDA device here; --device cpu --quick looks whether the suite works" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "kernels,speed"], "--parts: speed is not one of kernels, infer, train"),
        (["--models", "visformer"], "--models: visformer is not one of visformer_tiny"),
        (["--batch_sizes", "many"], "--batch_sizes: many is not a list of numbers"),
        (["--batch_sizes", "0"], "--batch_sizes must be at least 1"),
        (["--image_size", "100"], "--image_size a multiple of 32"),
    ],
)
def test_wrong_options_are_refused(words, message, suite, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", *words])
    with pytest.raises(SystemExit) as end:
        suite.parse()
    assert end.value.code == 2 and message in capsys.readouterr().err


# ---- the budget


def made(suite, folder: Path, pieces: list, **changes):
    """A suite of these pieces alone."""
    whole = suite.Suite(options(folder, **changes), time.monotonic())
    whole.pieces = lambda: pieces
    return whole


def test_what_has_no_time_left_is_named_and_the_rest_runs(suite, tmp_path, capsys):
    long = suite.Piece("train", "long", 500, 0, lambda: pytest.fail("ran"))
    short = suite.Piece("infer", "short", 1, 1, lambda: {"seconds": 1})
    whole = made(suite, tmp_path, [long, short], quick=False)
    assert whole.run() == 0
    document = json.loads((tmp_path / "suite.json").read_text())
    assert document["parts"]["infer"]["short"]["seconds"] == 1
    [missing] = document["left_out"]
    assert (missing["part"], missing["name"]) == ("train", "long")
    assert re.fullmatch(r"no time left: \d+ s of about 500 that it takes", missing["reason"])
    assert "left out: train long: no time left" in capsys.readouterr().err


def test_a_piece_that_outlasts_the_budget_is_cut_off_and_what_was_before_it_stays(suite, tmp_path):
    first = suite.Piece("infer", "first", 0, 0, lambda: {"seconds": float("nan")})
    endless = suite.Piece("train", "endless", 0, 1, lambda: time.sleep(60))
    began = time.monotonic()
    assert made(suite, tmp_path, [first, endless], budget_s=1.5).run() == 0
    assert time.monotonic() - began < 20
    document = json.loads((tmp_path / "suite.json").read_text())
    assert document["parts"]["infer"]["first"]["seconds"] is None  # JSON has no word for it
    assert document["left_out"][0]["reason"].startswith("cut off at the end of the budget")


def test_a_piece_that_fails_does_not_cost_the_others(suite, tmp_path, capsys):
    def failing():
        raise RunError("the kernel is wrong")

    pieces = [suite.Piece("kernels", "all", 0, 0, failing), suite.Piece("infer", "next", 0, 1, dict)]
    assert made(suite, tmp_path, pieces).run() == 1
    document = json.loads((tmp_path / "suite.json").read_text())
    assert document["parts"]["kernels"]["all"]["failed"] == "RunError: the kernel is wrong"
    assert set(document["parts"]["infer"]) == {"next"}
    assert "kernels all failed: RunError: the kernel is wrong" in capsys.readouterr().err


def test_tests_that_fail_fail_the_suite(suite, tmp_path):
    assert made(suite, tmp_path, [suite.Piece("tests", "a", 0, 0, lambda: {"exit_code": 1})]).run() == 1


def test_a_part_whose_package_is_missing_is_left_out(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_found", lambda name: None if name == "rich" else True)
    assert made(suite, tmp_path, [suite.Piece("train", "a", 0, 0, lambda: pytest.fail("ran"))]).run() == 0
    assert json.loads((tmp_path / "suite.json").read_text())["left_out"][0]["reason"] == "rich is not installed"


def test_a_second_run_adds_to_the_first(suite, tmp_path):
    late = suite.Piece("train", "late", 500, 0, lambda: pytest.fail("ran"))
    made(suite, tmp_path, [suite.Piece("infer", "a", 0, 0, lambda: {"n": 1}), late], quick=False).run()
    again = suite.Piece("train", "late", 0, 0, lambda: {"n": 2})
    made(suite, tmp_path, [again], quick=False).run()
    document = json.loads((tmp_path / "suite.json").read_text())
    assert document["parts"]["infer"]["a"]["n"] == 1 and document["parts"]["train"]["late"]["n"] == 2
    assert document["left_out"] == []
    made(suite, tmp_path, [again], quick=False, image_size=64).run()  # another size: another document
    assert set(json.loads((tmp_path / "suite.json").read_text())["parts"]) == {"train"}


def test_the_terminal_shows_what_a_piece_found(suite, tmp_path, capsys):
    found = {
        "contenders": [{"name": "ours", "images_per_s": 12345.6, "ratio": 1.5, "roofline_share": 0.614}],
        "left_out": {"theirs": "no"},
        "peak_memory_mib": {"ours": 1234.5},
        "summary": "3 passed",
    }
    made(suite, tmp_path, [suite.Piece("infer", "a", 0, 0, lambda: found)]).run()
    lines = capsys.readouterr().err.splitlines()
    assert "  ours: 12,346 images/s, x 1.50, 61 % of the roofline" in lines
    assert {"  theirs left out: no", "  ours: 1,234 MiB", "  3 passed"} <= set(lines)


def test_pieces_are_those_asked_for_the_most_valuable_first(suite, tmp_path):
    every = {"models": list(suite.MODELS), "batch_sizes": [256, 1], "parts": list(suite.PARTS), "quick": False}
    names = [f"{p.part} {p.name}" for p in suite.Suite(options(tmp_path, **every), time.monotonic()).pieces()]
    assert names[:3] == ["kernels all", "infer visformer_tiny 256", "infer visformer_small 256"]
    assert names[-1] == "tests tests/kernels" and len(names) == len(set(names)) == 1 + 8 + 2 + 4 + 4 + 2
    assert "train visformer_tiny_v2 256" not in names  # timm has none
    some = suite.Suite(options(tmp_path, parts=["memory"], batch_sizes=[4]), time.monotonic()).pieces()
    assert [f"{p.part} {p.name}" for p in some] == ["memory visformer_tiny 4"]


def test_the_file_is_named_after_the_day_and_the_device(suite):
    document = {"date": "2026-11-23", "device": "cuda, NVIDIA H200"}
    assert suite.file_name(document) == "2026-11-23-nvidia-h200-suite.json"


def test_what_a_piece_has_kept_outlives_its_end(suite, tmp_path):
    """Cut off, or failed after that: the record stays, says so, and is replaced by a whole one."""

    def cut_off():
        whole._keep("infer", "a", {"n": 1})
        time.sleep(60)

    def failing():
        whole._keep("infer", "a", {"n": 2})
        raise RunError("no memory")

    whole = made(suite, tmp_path, [], budget_s=1.5)
    whole.pieces = lambda: [suite.Piece("infer", "a", 0, 0, cut_off)]
    assert whole.run() == 0
    document = json.loads((tmp_path / "suite.json").read_text())
    assert document["parts"]["infer"]["a"] == {"n": 1, "unfinished": True}
    assert document["left_out"][0]["reason"].startswith("cut off at the end of the budget")
    whole = made(suite, tmp_path, [])
    whole.pieces = lambda: [suite.Piece("infer", "a", 0, 0, failing)]
    assert whole.run() == 1
    result = json.loads((tmp_path / "suite.json").read_text())["parts"]["infer"]["a"]
    assert (result["n"], result["failed"], result["unfinished"]) == (2, "RunError: no memory", True)
    made(suite, tmp_path, [suite.Piece("infer", "a", 0, 0, lambda: {"n": 3})]).run()
    whole = made(suite, tmp_path, [])
    whole._keep("infer", "a", {"n": 4})  # less than there is
    document = json.loads((tmp_path / "suite.json").read_text())
    assert document["parts"]["infer"]["a"]["n"] == 3 and document["left_out"] == []


# ---- the parts


def test_every_kernel_is_checked(checks):
    off_by = checks.check_kernels(torch.device("cpu"))["off_by"]
    kernels = {name.rpartition(" ")[0] for name in off_by}
    assert {"linear", "linear_fp8", "mlp", "attention", "attention in windows", "patch_embed", "pool_head"} < kernels
    assert {"stem", "stem of words", "stem of bytes", "grouped_conv, gradient of the weight"} < kernels
    reading_words = [c for c in checks.cases(torch.device("cpu"), torch.bfloat16) if c.name == "stem of words"]
    assert [tile[3] for tile in reading_words[0].tiles[:2]] == [1, 1]


def test_a_kernel_that_is_wrong_is_named(checks, monkeypatch, capsys):
    case = checks.Case("linear", [(1,), (2,), (3,)], lambda tile: torch.ones(2) * tile[0], torch.ones(2).double)
    monkeypatch.setattr(checks, "cases", lambda device, dtype: [case])
    monkeypatch.setattr(sys, "argv", ["gpu_checks.py", "--device", "cpu"])
    assert checks.main() == 1
    assert "linear bfloat16, tile (2,): off by 1.0e+00, where 2e-02 is allowed" in capsys.readouterr().err


def test_a_check_that_ends_its_process_is_a_failure(parts, monkeypatch):
    ended = subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(parts.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RunError, match="exit code -11"):
        parts.check_kernels(parts.Setting(torch.device("cpu"), 32, True))


def test_tiles_that_a_device_refuses_are_passed_over(checks, monkeypatch):
    """Fewer than all: another is tried in place of each. All: that is an error."""

    def run(tile):
        tried.append(tile)
        if tile[0] < refused:
            raise RuntimeError("out of resource: shared memory")
        return torch.ones(2)

    case = checks.Case("linear", [(1,), (2,), (3,), (4,)], run, torch.ones(2).double)
    monkeypatch.setattr(checks, "cases", lambda device, dtype: [case] if dtype == torch.bfloat16 else [])
    tried, refused = [], 2
    assert checks.check_kernels(torch.device("cpu"))["off_by"] == {"linear bfloat16": 0.0}
    assert tried == [(1,), (2,), (3,)]
    refused = 9
    with pytest.raises(RunError, match=r"no tile runs here: linear bfloat16, tile \(1,\): RuntimeError: out"):
        checks.check_kernels(torch.device("cpu"))


def test_tests_that_take_too_long_are_cut_off(parts, tmp_path):
    path = tmp_path / "test_endless.py"
    path.write_text("import time\ndef test_endless():\n    time.sleep(60)\n")
    began = time.monotonic()
    result = parts.tests([str(path)], 3.0)
    assert time.monotonic() - began < 20
    assert result["exit_code"] != 0 and result["summary"] == "cut off after 3 s"


def test_tests_that_fail_are_listed(parts, tmp_path):
    path = tmp_path / "test_wrong.py"
    path.write_text("def test_wrong():\n    assert 1 == 2\n\ndef test_right():\n    pass\n")
    result = parts.tests([str(path)], 60.0)
    assert result["exit_code"] == 1 and len(result["failed"]) == 1 and "test_wrong" in result["failed"][0]
    assert "1 failed, 1 passed" in result["summary"]


def test_a_peer_that_does_not_run_is_left_out(parts, monkeypatch, tmp_path):
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path))

    def broken():
        raise RuntimeError("no  such\nkernel")

    monkeypatch.setattr(parts, "_peers", lambda *_: {"timm broken": broken})
    monkeypatch.setattr(parts, "_models", lambda *_: (parts.create_model("visformer_tiny", image_size=32).eval(), None))
    kept = []
    setting = parts.Setting(torch.device("cpu"), 32, True)
    result = parts.infer(setting, "visformer_tiny", 2, 10.0, kept.append)
    assert [len(record["layers"]) for record in kept] == [len(result["layers"])]
    assert result["left_out"] == {"timm broken": "RuntimeError: no such kernel"}
    assert [c["name"] for c in result["contenders"]] == ["visformer fused"]


# ---- compiling ahead


CASE = ("visformer_tiny", 2, 32, "fp32")


@pytest.fixture
def prepare(suite, tmp_path, monkeypatch):
    """The module `gpu_prepare`."""
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path / "cache"))
    return importlib.import_module("gpu_prepare")


def test_every_way_of_every_layer_is_compiled_by_one_of_the_processes(prepare):
    names = [(signature, name) for signature, name, _, _ in prepare.ways(*CASE, "cpu")]
    assert len(names) == len(set(names)) > 20
    words = [sys.executable, prepare.__file__, *map(str, CASE), "--device", "cpu", "--parts", "3"]
    done = subprocess.run([*words, "--part", "1", "--after", "6"], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    begun = [(line["signature"], line["name"]) for line in lines if "name" in line]
    assert begun == names[7::3] and [line["done"] for line in lines if "name" not in line] == [*range(len(names))][7::3]


def test_what_was_compiled_is_counted(prepare):
    result = prepare.prepare(*CASE, device="cpu", most=1, timeout_s=100.0)
    assert (result["processes"], result["finished"], result["refused"], result["errors"]) == (1, 1, [], {})
    assert result["compiled"] == len(list(prepare.ways(*CASE, "cpu")))


CRASHING = """
import json, os, sys, time
after = int(sys.argv[sys.argv.index("--after") + 1])
for number in range(after + 1, 4):
    print(json.dumps(dict(number=number, signature="linear 2x3", name=f"kernel {number}", at=time.time())), flush=True)
    if number == 1:
        sys.exit(3)
    if number == 2:
        os.abort()
    print(json.dumps(dict(done=number)), flush=True)
"""


def test_a_way_that_ends_its_process_is_refused_and_the_rest_is_compiled(prepare, tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "crashing.py"))
    result = prepare.prepare(*CASE, device="cpu", most=1, timeout_s=60.0)
    assert result["compiled"] == 2 and result["finished"] == 1
    assert result["refused"] == ["linear 2x3: kernel 1", "linear 2x3: kernel 2"]
    (file,) = (tmp_path / "cache" / "tuning").iterdir()
    assert json.loads(file.read_text()) == {"linear 2x3": {"refused": ["kernel 1", "kernel 2"]}}


def test_a_way_that_does_not_end_is_refused(prepare, tmp_path, monkeypatch):
    (tmp_path / "hanging.py").write_text(CRASHING.replace("sys.exit(3)", "time.sleep(60)"))
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "hanging.py"))
    assert prepare.prepare(*CASE, device="cpu", most=1, timeout_s=2.0)["refused"] == []  # it may only be slow
    monkeypatch.setattr(prepare, "STUCK_S", 0.1)
    assert prepare.prepare(*CASE, device="cpu", most=1, timeout_s=2.0)["refused"] == ["linear 2x3: kernel 1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_processes_that_fail_or_take_too_long_are_counted_and_ended(prepare):
    cut_off = prepare.prepare(*CASE, most=1, timeout_s=0.0)
    assert (cut_off["processes"], cut_off["finished"]) == (1, 0) and cut_off["seconds"] < 10
    failed = prepare.prepare(*CASE, most=1, timeout_s=60.0)  # there is no CUDA
    assert (failed["processes"], failed["finished"]) == (1, 0) and failed["seconds"] < 60
