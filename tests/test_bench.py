"""`visformer bench`: what the report holds, that its figures are right, and what it refuses."""

import functools
import json
import time

import pytest
import timm
import torch

from visformer.cli import main
from visformer.errors import RunError
from visformer.models import create_model
from visformer.verbs import bench_timm
from visformer.verbs.bench import BenchOptions, bench
from visformer.verbs.bench_timing import Contender, Timed, summarize, take_turns

TINY = ["--image_size", "32", "--batch_sizes", "2", "--repeats", "2", "--warmup", "0", "--device_target", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def contender(name: str, step) -> Contender:
    return Contender(name, "fp32", "contiguous", step)


# ---- the report


@pytest.mark.parametrize("what", ["train", "infer"])
def test_json_is_one_document_with_every_contender_and_circumstance(what, capsys, tmp_path):
    output = tmp_path / "new" / "bench.json"
    assert main(["bench", "--what", what, "--json", "--output", str(output), *TINY]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert json.loads(output.read_text()) == document
    assert [path.name for path in output.parent.iterdir()] == ["bench.json"]
    assert "same logits as timm's" in captured.err
    assert (document["what"], document["against"]) == (what, ["timm"])
    assert (document["image_size"], document["repeats"], document["warmup"]) == (32, 2, 0)
    assert document["device"].startswith("cpu") and document["processor"]
    assert document["cores"] >= 1 and document["threads"] == 1
    assert document["versions"]["timm"] == timm.__version__
    assert {"python", "torch", "torchvision"} <= set(document["versions"])
    [result] = document["results"]
    assert (result["model"], result["batch_size"]) == ("visformer_tiny", 2)
    assert result["logit_difference"] < 1e-6
    kinds = [(c["name"], c["precision"], c["memory_format"]) for c in result["contenders"]]
    ours = "bf16" if what == "infer" else kinds[0][1]  # what measures faster here
    assert ours in ("fp32", "bf16")
    assert ("times as fast as fp32 here" in captured.err) == (what == "train")
    assert kinds[:3] == [  # infer has more
        ("visformer", ours, "channels_last"),
        ("timm", "fp32", "contiguous"),
        ("timm as ours", ours, "channels_last"),
    ]
    for record in result["contenders"]:
        low, high = record["images_per_s_quartiles"]
        assert 0 < low <= record["images_per_s"] <= high
        assert record["ratio"] > 0 and record["finite"]
    assert result["contenders"][1]["ratio"] == 1.0


def test_the_table_names_every_contender(capsys):
    assert main(["bench", "--what", "infer", "--amp_level", "O0", *TINY]) == 0
    captured = capsys.readouterr()
    assert "forward pass of visformer_tiny, batch 2, 32x32 pixels" in captured.out
    for name in ("visformer (fp32, channels_last)", "timm (fp32, contiguous)", "timm as ours (fp32, channels_last)"):
        assert name in captured.out
    assert "timing 2 turns of each" in captured.err


# ---- the figures


def test_rates_and_ratios_are_medians_of_rounds():
    ours = Timed(contender("visformer", torch.ones), [0.5, 1.0, 2.0], True)
    theirs = Timed(contender("timm", torch.ones), [2.0, 2.0, 2.0], True)
    record = summarize(ours, theirs, images=8)
    assert (record["images_per_s"], record["images_per_s_quartiles"]) == (8.0, [6.0, 12.0])
    assert (record["ratio"], record["ratio_quartiles"]) == (2.0, [1.5, 3.0])
    assert record["seconds_per_step"] == 1.0


def test_contenders_take_turns_and_each_is_first_in_some_round():
    calls = []

    def step(name):
        calls.append(name)
        return torch.tensor(float("nan") if name == "b" else 1.0)

    entries = [contender(name, functools.partial(step, name)) for name in "abc"]
    timed = take_turns(entries, CPU, warmup=1, repeats=3, title="")
    assert "".join(calls) == "abcbcacababc"
    assert [len(t.seconds) for t in timed] == [3, 3, 3]
    assert [t.finite for t in timed] == [True, False, True]


def test_short_steps_are_taken_several_in_a_turn_after_one_that_does_not_count():
    calls = []

    def step(name, seconds):
        calls.append(name)
        time.sleep(seconds)
        return torch.ones(1)

    entries = [contender("slow", lambda: step("slow", 0.2)), contender("fast", lambda: step("fast", 0.01))]
    slow, fast = take_turns(entries, CPU, warmup=0, repeats=3, title="", turn_s=0.1)
    assert len(slow.seconds) == len(fast.seconds) == 3
    assert 0.2 <= min(slow.seconds) < 1 and 0.01 <= min(fast.seconds) < 0.2
    assert calls.count("slow") == 3 + 3, "two show how long a step takes, after one more"
    turns = "".join(name[0] for name in calls[6:]).replace("s", " ").split()
    assert all(len(turn) > 2 for turn in turns)


# ---- the same thing is timed


@pytest.mark.parametrize("name", ["visformer_tiny", "visformer_small"])
def test_every_name_of_timms_becomes_one_of_ours(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name).state_dict(), create_model(name)
    names = bench_timm.timms_names(ours)
    shapes = {names[key]: tensor.shape for key, tensor in theirs.items()}
    assert shapes == {key: tensor.shape for key, tensor in ours.state_dict().items()}


def test_models_that_disagree_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench_timm, "create_model", functools.partial(create_model, gelu="tanh"))
    monkeypatch.setattr(bench_timm, "contenders", lambda *_: pytest.fail("timed"))
    with pytest.raises(RunError, match=r"visformer_tiny: its logits differ from timm .* nothing was timed"):
        bench(BenchOptions(image_size=32, batch_sizes=[2], repeats=2, device_target="cpu"))
    assert main(["bench", *TINY]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_all_train_from_the_same_weights_on_the_same_batch():
    """The contenders' first loss is that of one model, stochastic depth off."""
    pair = bench_timm.build_pair("visformer_tiny", 32)
    for model in (pair.ours, pair.theirs):
        for module in model.modules():
            if hasattr(module, "drop_path"):
                module.drop_path = torch.nn.Identity()
    config = bench_timm.training_config("visformer_tiny", 4, 32, "O0")
    losses = [c.step().item() for c in bench_timm.contenders(pair, config, CPU, "train")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_compiled_contenders_are_asked_for(monkeypatch):
    pair = bench_timm.build_pair("visformer_tiny", 32)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(type(model).__module__) or model)
    config = bench_timm.training_config("visformer_tiny", 2, 32, "O0").change(compile=True)
    names = [c.name for c in bench_timm.contenders(pair, config, CPU, "train")]
    assert names == ["visformer", "timm", "timm as ours", "timm as ours, compiled"]
    assert compiled == ["visformer.models.visformer", "timm.models.visformer"]


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "serving"], "what: 'serving' is not one of train, infer"),
        (["--against", "mindcv"], "against: 'mindcv' is not one of timm, onnxruntime, openvino"),
        (
            ["--models", "visformer_tiny_v2"],
            "models: timm has no visformer_tiny_v2 to measure against; it has visformer_",
        ),
        (["--models", "visformer_tyni"], "there is no model 'visformer_tyni'; did you mean visformer_tiny"),
        (["--image_size", "40"], "image_size: 40 is not possible here; timm's model takes multiples of 32"),
        (["--image_size", "16"], "image_size: 16 is too small"),
        (["--batch_sizes", "0", "--what", "infer"], "batch_sizes: 0 is out of range; it must be at least 1"),
        (["--batch_sizes", "1"], "batch_sizes: 1 is too small"),
        (["--batch_sizes", "[]"], "batch_sizes: the list is empty"),
        (["--repeats", "1"], "repeats: 1 is out of range; it must be at least 2"),
        (["--warmup", "-1"], "warmup: -1 is out of range; it must be at least 0"),
        (["--output", "."], "output: . is a folder; give a file"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(words, message, capsys):
    assert main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"visformer: error: {message}")
    assert captured.err.count("\n") == 1
