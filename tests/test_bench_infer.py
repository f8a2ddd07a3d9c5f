"""`visformer bench --what infer`: every contender infers the same thing, and is held against the roofline."""

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch

from tests.bundles.conftest import small_model
from tests.fusion.models import build
from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.cli import main
from visformer.data.preprocessing import Preprocessing
from visformer.errors import RunError
from visformer.fusion import roofline
from visformer.verbs import bench_infer, bench_memory, bench_timm
from visformer.verbs.bench_timing import Contender

TINY = ["--image_size", "32", "--batch_sizes", "2", "--repeats", "2", "--warmup", "0", "--device_target", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A folder of its own for what is tuned, and short looks at the machine's peak."""
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(roofline._SIDES, "cpu", 256)
    monkeypatch.setitem(roofline._COPIED_BYTES, "cpu", 1 << 22)
    monkeypatch.setattr(roofline, "_SECONDS", 0.01)


def test_the_document_has_shares_of_a_roofline(capsys, monkeypatch):
    monkeypatch.setattr(bench_infer, "peak_memory", lambda *_: {"timm": 2.0, "visformer fused": 1.0})
    assert main(["bench", "--what", "infer", "--json", *TINY]) == 0
    [result] = json.loads(capsys.readouterr().out)["results"]
    limits = result["roofline"]
    assert set(limits) == {"fp32", "bf16"}
    assert limits["fp32"]["flops"] == limits["bf16"]["flops"]
    assert limits["fp32"]["bytes"] == pytest.approx(2 * limits["bf16"]["bytes"], rel=1e-6)
    for limit in limits.values():
        least = max(limit["flops"] / limit["flops_per_s"], limit["bytes"] / limit["bytes_per_s"])
        most = limit["flops"] / limit["flops_per_s"] + limit["bytes"] / limit["bytes_per_s"]
        assert least <= limit["seconds_per_step"] <= most
        assert limit["images_per_s"] == pytest.approx(2 / limit["seconds_per_step"])
    for record in result["contenders"]:
        expected = limits[record["precision"]]["seconds_per_step"] / record["seconds_per_step"]
        assert record["roofline_share"] == pytest.approx(expected)
    assert {"visformer fused fp32", "visformer fused bf16"} == set(result["logit_differences"])
    assert result["peak_memory_mib"] == {"timm": 2.0, "visformer fused": 1.0}
    assert isinstance(result["clocks"], dict)


def test_the_table_says_the_share_and_what_it_is_of(capsys, monkeypatch):
    monkeypatch.setattr(bench_infer, "peak_memory", lambda *_: {})
    assert main(["bench", "--what", "infer", *TINY]) == 0
    out = capsys.readouterr().out
    assert "% of roofline" in out
    assert "roofline in fp32: " in out and "TFLOP/s and" in out


def test_a_precision_whose_peak_is_not_measured_has_no_share(monkeypatch):
    records = [{"precision": precision, "seconds_per_step": 0.5} for precision in ("int8", "fp32")]
    found = bench_infer.against_roofline(build("spatial, then attention"), records, 4, CPU)
    assert records[0]["roofline_share"] is None and records[1]["roofline_share"] > 0
    assert set(found["roofline"]) == {"fp32"}


def test_the_first_images_of_a_batch_are_compared_in_float64():
    model = build("spatial, then attention")
    images = torch.randn(bench_infer.CHECKED + 3, 3, *model.config.image_size)
    expected = bench_infer.exact_logits(model, images)
    assert expected.shape == (bench_infer.CHECKED, 7) and expected.dtype == torch.float64
    contender = bench_infer.fused(model, images, "fp32")
    assert contender.step().shape == (len(images), 7)
    assert bench_infer.difference(contender, expected) < 1e-5
    assert next(model.parameters()).dtype == torch.float32  # the model stayed as it was


def test_a_contender_with_other_logits_is_not_timed():
    expected = torch.eye(3, dtype=torch.float64)
    off = Contender("another", "bf16", "contiguous", lambda: 1.2 * torch.eye(3))
    with pytest.raises(RunError, match=r"another in bf16: its logits differ by 2.0e-01 .* at most 1e-01"):
        bench_infer.difference(off, expected)
    assert bench_infer.difference(off, expected, 0.3) == pytest.approx(0.2, rel=1e-6)
    nothing = Contender("another", "fp32", "contiguous", lambda: torch.full((3, 3), float("nan")))
    with pytest.raises(RunError, match="differ by nan"):
        bench_infer.difference(nothing, expected, 0.3)


def test_compiled_peers_give_the_models_logits(monkeypatch):
    asked = []

    def compile_(model, **options):
        asked.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    pair = bench_timm.build_pair("visformer_tiny", 32)
    images = torch.randn(3, 3, 32, 32)
    [peer] = bench_infer.peers(pair.theirs, images)
    assert (peer.name, peer.precision) == ("timm compiled", "fp32") and asked == [{}]
    assert bench_infer.difference(peer, bench_infer.exact_logits(pair.ours.eval(), images)) < 1e-4


def test_a_graph_infers_the_images_that_it_is_given_each_time(monkeypatch):
    """With a stand-in for the device: what is recorded is computed again at each replay."""

    class Graph:
        def replay(self):
            self.logits.copy_(model(self.inputs))

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def recording(graph):
        begun = len(seen)
        yield
        [(graph.inputs, graph.logits)] = seen[begun:]

    seen, weight = [], torch.randn(5, 3 * 4 * 4)

    def model(images):
        logits = images.flatten(1) @ weight.T
        seen.append((images, logits))
        return logits

    for name, stand_in in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph": recording}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    step = bench_infer.recorded(model, images)
    assert len(seen) == 4  # three to warm up, one recorded
    assert seen[-1][0] is not images and seen[-1][0].is_contiguous(memory_format=torch.channels_last)
    first = step()
    assert torch.equal(first, model(images))
    images.mul_(2)
    assert torch.equal(step(), model(images)) and not torch.equal(first, model(images))  # the first was a copy


@pytest.mark.slow
@pytest.mark.parametrize("engine", bench_infer.ENGINES)
def test_bundles_of_every_precision_agree(engine, tmp_path):
    pytest.importorskip(engine)
    images = torch.randn(2, 3, 64, 64)
    found, differences = bench_infer.contenders("small", small_model(), images, [engine], tmp_path)
    precisions = bench_infer.ENGINES[engine][1]
    assert [c.precision for c in found] == ["fp32", "bf16", *precisions]
    assert differences[f"visformer, {engine} fp32"] < 1e-4
    assert set(differences) == {f"{c.name} {c.precision}" for c in found}


# ---- memory


def test_a_process_says_how_much_memory_it_had(capsys, monkeypatch):
    task = {"kind": "visformer fused", "model": "visformer_tiny", "image_size": 32, "batch_size": 1}
    resident = bench_infer.memory_of(task)
    assert 100 < resident < 3000
    assert 50 < bench_memory.peak_mib() < 20_000
    assert bench_memory.peak_on("cpu") == pytest.approx(bench_memory.peak_mib(), rel=0.01)


@pytest.mark.parametrize("task", [{"kind": "timm"}, {"kind": "visformer fused", "precision": "bf16"}])
def test_a_task_runs_in_its_precision(task, monkeypatch):
    seen = []
    call = torch.nn.Module.__call__

    def remembering(self, *inputs, **options):
        seen.append(inputs[0].dtype)
        return call(self, *inputs, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", remembering)
    bench_memory.infer({"model": "visformer_tiny", "image_size": 32, "batch_size": 1} | task)
    assert set(seen) == {torch.bfloat16 if "precision" in task else torch.float32}


def test_a_bundles_memory(tmp_path):
    pytest.importorskip("onnxruntime")
    model = build("visformer_tiny", image_size=32)
    record = Checkpoint("visformer_tiny", model.config, ["a"] * 1000, Preprocessing((32, 32)), model.state_dict())
    write_checkpoint(tmp_path / "model.safetensors", record)
    bench_infer.bundle("visformer_tiny", model, "onnxruntime", "fp32", tmp_path)
    task = {"kind": "bundle", "model": str(tmp_path / "onnxruntime-fp32"), "image_size": 32, "batch_size": 1}
    assert 20 < bench_infer.memory_of(task) < 3000


def test_on_a_gpu_the_models_are_asked_for_in_half_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_infer, "memory_of", lambda task: task)
    tasks = bench_infer.peak_memory("visformer_tiny", 224, 64, ["timm", "openvino"], tmp_path, "cuda")
    assert set(tasks) == {"timm", "visformer fused"}
    shared = {"image_size": 224, "batch_size": 64, "device": "cuda", "precision": "bf16", "model": "visformer_tiny"}
    assert tasks["timm"] == {"kind": "timm"} | shared
    on_cpu = bench_infer.peak_memory("visformer_tiny", 224, 64, ["timm", "openvino"], tmp_path)
    assert set(on_cpu) == {"timm", "visformer fused", "visformer, openvino int8"}
    assert on_cpu["timm"]["precision"] == "fp32"


def test_a_process_that_fails_is_an_error_of_one_line(monkeypatch):
    def failing(command, **options):
        return subprocess.CompletedProcess([sys.executable], 1, "", "Traceback\nMemoryError: too much\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(RunError, match="memory of timm: MemoryError: too much"):
        bench_infer.memory_of({"kind": "timm"})
