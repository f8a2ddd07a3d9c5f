"""Training end to end on small real data: it learns, saves, stops, resumes to the same bits, and fails in one line."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from visformer.checkpoint import load_state, read_checkpoint
from visformer.cli import main
from visformer.config import TrainConfig
from visformer.errors import RunError, UsageError
from visformer.fusion.training import spatial_mlps
from visformer.options import to_yaml
from visformer.pretrained import load
from visformer.run_folder import RunFolder
from visformer.verbs.train import train
from visformer.verbs.trainer import Trainer

SMALL = {
    "dataset": "digits",
    "in_channels": 1,
    "mean": (77.0,),
    "std": (95.0,),
    "image_resize": 32,
    "crop_pct": 1.0,
    "num_samples": 96,
    "batch_size": 32,
    "num_parallel_workers": 0,
    "hflip": 0.0,
    "color_jitter": None,
    "opt": "adamw",
    "lr": 1e-3,
    "warmup_epochs": 0,
    "decay_epochs": 2,
    "epoch_size": 2,
    "keep_checkpoint_max": 1,
}


def config(folder, **changes):
    return TrainConfig(**(SMALL | {"ckpt_save_dir": str(folder)} | changes))


def tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same_weights(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(config(folder, num_samples=None, epoch_size=3, decay_epochs=3))


def test_it_learns_and_leaves_a_run_folder(finished):
    assert finished.best_top1 > 80
    names = {path.name for path in finished.run_folder.iterdir()}
    assert {
        "last.safetensors",
        "best.safetensors",
        "last.state.pt",
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
    } <= names
    assert "epoch_0003.safetensors" in names and "epoch_0002.safetensors" not in names
    records = [json.loads(line) for line in (finished.run_folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    assert epochs[-1]["top1"] == finished.top1 and epochs[-1]["images_per_s"] > 0
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


def test_the_checkpoint_describes_itself(finished):
    checkpoint = read_checkpoint(finished.last)
    assert checkpoint.model_name == "visformer_tiny"
    assert checkpoint.class_names == [str(i) for i in range(10)]
    assert checkpoint.preprocessing.image_size == (32, 32) and checkpoint.preprocessing.in_channels == 1
    assert checkpoint.training["top1"] == finished.top1 and checkpoint.training["epoch"] == 3
    model = load(finished.last)
    assert model.config == checkpoint.architecture and not model.training
    with torch.no_grad():
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_validate_agrees_with_training(finished, capsys):
    assert main(["validate", "--ckpt_path", str(finished.last), "--dataset", "digits", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["top1"] == pytest.approx(finished.top1)


def test_a_second_run_does_not_overwrite_the_first(finished, capsys):
    before = finished.last.read_bytes()
    arguments = ["train", "-c", str(finished.run_folder / "config.yaml")]
    assert main(arguments) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert finished.last.read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(finished):
    before = finished.last.read_bytes()
    again = train(config(finished.run_folder, num_samples=None, epoch_size=3, decay_epochs=3, resume="auto"))
    assert finished.last.read_bytes() == before and again.best_top1 == finished.best_top1


def test_the_same_seed_gives_the_same_bits(tmp_path):
    for name in ("a", "b"):
        train(config(tmp_path / name, mixup=0.8, cutmix=1.0, re_prob=0.5, drop_rate=0.1))
    assert_same_weights(tmp_path / "a/last.safetensors", tmp_path / "b/last.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {
            "amp_level": "O2",
            "mixup": 0.8,
            "cutmix": 1.0,
            "re_prob": 0.25,
            "label_smoothing": 0.1,
            "drop_path_rate": 0.2,
        },
        {"ema": True, "gradient_accumulation_steps": 2, "clip_grad": True, "clip_value": 1.0, "opt": "momentum"},
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch, changes):
    """SIGTERM in the middle of an epoch, then --resume auto."""
    changes = {"num_samples": 128, "batch_size": 16} | changes
    train(config(tmp_path / "whole", **changes))
    original, seen = Trainer.train_batch, []

    def stop_in_the_middle(self, batch, index):
        original(self, batch, index)
        seen.append(index)
        if len(seen) == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_batch", stop_in_the_middle)
    assert main(["train", "-c", save_config(tmp_path, config(tmp_path / "parts", **changes))]) == 130
    state = load_state(tmp_path / "parts/last.state.pt")
    assert state["epoch"] == 1 and 0 < state["batch"] < 8
    train(config(tmp_path / "parts", resume="auto", **changes))
    assert_same_weights(tmp_path / "whole/last.safetensors", tmp_path / "parts/last.safetensors")
    whole, parts = (epoch_records(tmp_path / name) for name in ("whole", "parts"))
    assert [r["train_loss"] for r in whole] == pytest.approx([r["train_loss"] for r in parts], rel=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"opt": "sgd"}, "opt: the run to resume has adamw, not sgd"),
        ({"batch_size": 16}, "batch_size"),
        ({"image_resize": 64}, "image_resize"),
        ({"model": "visformer_tiny_v2"}, "model: the run to resume has visformer_tiny, not visformer_tiny_v2"),
    ],
)
def test_a_run_cannot_be_resumed_as_another(finished, changes, words):
    options = {"num_samples": None, "epoch_size": 4, "decay_epochs": 3, "resume": "auto"} | changes
    with pytest.raises(UsageError, match=words):
        train(config(finished.run_folder, **options))


def epoch_records(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "epoch"]


def save_config(tmp_path, options):
    path = tmp_path / "options.yaml"
    path.write_text(to_yaml(options))
    return str(path)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    """SIGKILL, twice, each at a moment drawn anew, then an undisturbed end; tests/soak/kills.py does it 200 times."""
    changes = {"num_samples": 128, "batch_size": 32, "epoch_size": 3, "mixup": 0.8, "re_prob": 0.25, "ema": True}
    train(config(tmp_path / "whole", **changes))
    path = save_config(tmp_path, config(tmp_path / "killed", resume="auto", **changes))
    command = [sys.executable, "-m", "visformer", "train", "-c", path]
    draw = random.Random(time.time_ns())
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if "images to train on" in line:
                break
        time.sleep(draw.uniform(0, 2.5))
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert_same_weights(tmp_path / "whole/last.safetensors", tmp_path / "killed/last.safetensors")
    assert_same_weights(tmp_path / "whole/best.safetensors", tmp_path / "killed/best.safetensors")
    assert [r["epoch"] for r in epoch_records(tmp_path / "killed")] == [1, 2, 3]


def test_resume_opt_continues_into_another_folder_and_that_one_resumes(tmp_path):
    train(config(tmp_path / "whole", epoch_size=3))
    train(config(tmp_path / "half", epoch_size=1))
    checkpoint = str(tmp_path / "half/last.safetensors")
    part = train(config(tmp_path / "rest", epoch_size=2, ckpt_path=checkpoint, resume_opt=True))
    assert part.best is not None and part.best.parent == tmp_path / "rest"
    rest = config(tmp_path / "rest", epoch_size=3, ckpt_path=checkpoint, resume_opt=True, resume="auto")
    train(rest)
    assert_same_weights(tmp_path / "whole/last.safetensors", tmp_path / "rest/last.safetensors")


def test_a_stop_during_validation_keeps_what_the_epoch_saved(tmp_path, monkeypatch):
    from visformer.verbs.train import Fit

    original = Fit._validate

    def stopped(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Fit, "_validate", stopped)
    assert main(["train", "-c", save_config(tmp_path, config(tmp_path / "run"))]) == 130
    summary = read_checkpoint(tmp_path / "run/last.safetensors").training
    assert summary["epoch"] == 1 and summary["top1"] is not None and summary["train_loss"] > 0


def class_folders(root, names, count=8, color=0):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(count):
            noise = Image.effect_noise((40, 36), 60).convert("RGB")
            Image.blend(noise, Image.new("RGB", noise.size, (60 * i + color, 200 - 50 * i, 100)), 0.6).save(
                root / name / f"{j}.jpg"
            )
    return root


def on_folders(tmp_path, data, **changes):
    images = {"dataset": "imagenet", "data_dir": str(data), "in_channels": 3, "mean": (120.0,) * 3, "std": (60.0,) * 3}
    return config(tmp_path / "run", **(images | {"batch_size": 4, "num_samples": None, "epoch_size": 1} | changes))


def test_a_folder_of_class_folders_is_split_and_recorded(tmp_path):
    data = class_folders(tmp_path / "data", ["cat", "dog", "emu"])
    result = train(on_folders(tmp_path, data))
    split = json.loads((result.run_folder / "split.json").read_text())
    assert len(split["train"]) + len(split["val"]) == 24 and not set(split["train"]) & set(split["val"])
    assert read_checkpoint(result.last).class_names == ["cat", "dog", "emu"]


def test_fine_tuning_keeps_the_rows_of_shared_classes(tmp_path, capsys):
    first = train(on_folders(tmp_path, class_folders(tmp_path / "a", ["cat", "dog", "emu"])))
    second = class_folders(tmp_path / "b", ["dog", "fox"])
    options = on_folders(tmp_path, second, pretrained=str(first.last), lr=1e-12, weight_decay=0.0, image_resize=48)
    options.ckpt_save_dir = str(tmp_path / "second")
    result = train(options)
    err = capsys.readouterr().err
    assert "kept for 1 classes (dog)" in err and "new for 1 classes (fox)" in err
    old, new = tensors(first.last), tensors(result.last)
    torch.testing.assert_close(new["head.weight"][0], old["head.weight"][1], atol=1e-6, rtol=0)
    assert read_checkpoint(result.last).class_names == ["dog", "fox"]


def test_a_broken_image_is_skipped_named_and_counted(tmp_path, capsys):
    data = class_folders(tmp_path / "data", ["cat", "dog"])
    (data / "cat" / "broken.jpg").write_bytes((data / "cat" / "0.jpg").read_bytes()[:200])
    result = train(on_folders(tmp_path, data, val_fraction=0.25, epoch_size=2))
    err = capsys.readouterr().err
    assert err.count("broken.jpg") == 1
    assert read_checkpoint(result.last).training["skipped_images"] == 1


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, capsys):
    good = train(config(tmp_path / "run", epoch_size=1))
    before = good.last.read_bytes()
    options = config(tmp_path / "run", epoch_size=3, resume="auto", lr=1e20, log_interval=1, max_bad_steps=2)
    with pytest.raises(
        RunError, match=r"2 steps in a row had no finite.*last good checkpoint is .*last.safetensors.*lower lr"
    ):
        train(options)
    assert good.last.read_bytes() == before


def test_without_a_validation_set_it_still_trains(tmp_path):
    result = train(config(tmp_path / "run", epoch_size=1, val_while_train=False))
    assert result.top1 is None and result.best is None and result.last.exists()


def test_a_start_killed_before_its_first_save_begins_anew(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 1, "step": 3}\n{"kind": "ep')
    train(config(tmp_path / "run", epoch_size=1, resume="auto"))
    assert [r["epoch"] for r in epoch_records(tmp_path / "run")] == [1]


def test_a_model_without_its_state_is_not_overwritten(tmp_path):
    result = train(config(tmp_path / "run"))
    for name in ("last.state.pt", "last.state.before.pt"):
        (result.run_folder / name).unlink()
    with pytest.raises(UsageError, match=r"no last\.state\.pt to continue from"):
        train(config(tmp_path / "run", resume="auto"))
    assert result.last.exists()


def test_top_k_keeps_the_best(tmp_path):
    result = train(config(tmp_path / "run", epoch_size=3, keep_checkpoint_max=2, ckpt_save_policy="top_k"))
    scores = {r["epoch"]: r["top1"] for r in epoch_records(result.run_folder)}
    kept = sorted(int(path.stem[-4:]) for path in result.run_folder.glob("epoch_*.safetensors"))
    assert len(kept) == 2
    assert min(scores[e] for e in kept) >= min(s for e, s in scores.items() if e not in kept)


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adam", "adamw", "lion", "rmsprop", "adagrad", "lamb", "nadam"])
def test_every_optimizer_trains(tmp_path, opt):
    options = config(
        tmp_path / "run", opt=opt, epoch_size=1, num_samples=32, lr=1e-4, layer_decay=0.8, val_while_train=False
    )
    assert math.isfinite(epoch_records(train(options).run_folder)[0]["train_loss"])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "BCE", "label_smoothing": 0.1, "mixup": 0.5},
        {"loss": "BCE"},
        {"aug_splits": 3, "auto_augment": "augmix-m3-w2", "in_channels": 3, "mean": (77.0,), "std": (95.0,)},
        {"amp_level": "O3", "amp_dtype": "fp16", "loss_scale": 1024.0},
        {"amp_level": "O1", "amp_dtype": "fp16", "loss_scale_type": "dynamic"},
        {"aug_repeats": 3, "grad_checkpointing": True},
        {"scheduler": "one_cycle", "tensorboard": True},
        {"drop_remainder": False, "cutmix": 1.0, "batch_size": 31},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_every_way_of_training_gives_a_finite_loss(tmp_path, changes):
    options = config(tmp_path / "run", **({"epoch_size": 1, "num_samples": 64, "val_while_train": False} | changes))
    assert math.isfinite(epoch_records(train(options).run_folder)[0]["train_loss"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data_dir", "nowhere"], "nowhere"),
        (["--dataset", "digits", "--ckpt_path", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--dataset", "digits", "--resume_opt", "True"], "resume_opt"),
        (["--dataset", "digits", "--model", "visformer_huge"], "visformer_huge"),
        (["--dataset", "digits", "--device_target", "xpu"], "no xpu here"),
        (["--dataset", "digits", "--batch_size", "-1"], "batch_size"),
        (["--dataset", "digits", "--num_classes", "3"], "num_classes: 3"),
        (["--dataset", "digits", "--model", "net4", "--pretrained", "True"], "nobody has published weights of net4"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--image_resize", "32", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    (tmp_path / "text.safetensors").write_text("not a checkpoint at all")
    for name in ("other.safetensors", "text.safetensors"):
        with pytest.raises(UsageError, match=name):
            load(tmp_path / name)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from visformer.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit_mb", [20, 60])  # the checkpoint has 39 MB, the state 118 MB
def test_a_disk_that_refuses_ends_in_one_line_and_loses_nothing(tmp_path, limit_mb):
    """A limit on file size stands for a full disk: the write fails in the middle."""
    folder = train(config(tmp_path / "run", epoch_size=1)).run_folder
    before = {path.name: path.read_bytes() for path in folder.glob("last.*")}
    path = save_config(tmp_path, config(folder, epoch_size=2, resume="auto"))
    command = [sys.executable, "-c", LIMITED, str(limit_mb * 2**20), "train", "-c", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write" in done.stderr and "untouched" in done.stderr
    assert (folder / "last.state.pt").read_bytes() == before["last.state.pt"]
    assert read_checkpoint(folder / "last.safetensors").training["epoch"] in (1, 2)
    assert not list(folder.glob(".writing-*"))
    assert train(config(folder, epoch_size=2, resume="auto")).epochs == 2


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, capsys):
    whole = train(config(tmp_path / "whole", epoch_size=3))
    folder = train(config(tmp_path / "run", epoch_size=2)).run_folder
    state = bytearray((folder / "last.state.pt").read_bytes())
    state[len(state) // 2] ^= 0x10  # one bit, in the middle of a tensor
    (folder / "last.state.pt").write_bytes(state)
    capsys.readouterr()
    result = train(config(folder, epoch_size=3, resume="auto"))
    err = capsys.readouterr().err
    assert "the checksum of" in err and "going on from the save before" in err and "at epoch 2" in err
    assert_same_weights(whole.last, result.last)
    for name in ("last.state.pt", "last.state.before.pt"):
        (folder / name).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(RunError, match=r"last\.state\.before\.pt: the training state cannot be read"):
        train(config(folder, epoch_size=4, resume="auto"))


def test_a_disk_that_is_full_for_a_while_is_outlived(tmp_path, monkeypatch, capsys):
    """Saves fail in the first epoch and succeed in the second: a warning, and a whole run."""
    real, failures = RunFolder.save_last, [1]

    def refusing(self, checkpoint, state):
        if failures:
            failures.pop()
            raise RunError("cannot write last.safetensors: No space left on device")
        real(self, checkpoint, state)

    monkeypatch.setattr(RunFolder, "save_last", refusing)
    result = train(config(tmp_path / "run", epoch_size=2))
    assert "No space left on device; training goes on" in capsys.readouterr().err
    assert read_checkpoint(result.last).training["epoch"] == 2


def test_steps_between_saves(tmp_path):
    """Killed in the middle of an epoch, after a save there: the resumed run ends with the same bits."""
    options = {"epoch_size": 2, "ckpt_save_steps": 2}
    whole = train(config(tmp_path / "whole", **options))
    path = save_config(tmp_path, config(tmp_path / "run", **options))
    saves = "import os\nfrom visformer.run_folder import RunFolder\nreal = RunFolder.save_last\n"
    saves += "def save(self, checkpoint, state):\n    real(self, checkpoint, state)\n"
    saves += '    if (state["epoch"], state["batch"]) == (1, 1):\n        os.kill(os.getpid(), 9)\n'
    saves += "RunFolder.save_last = save\n"
    code = saves + "import sys\nfrom visformer.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "train", "-c", path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    state = load_state(tmp_path / "run" / "last.state.pt")
    assert (state["epoch"], state["batch"]) == (1, 1)
    result = train(config(tmp_path / "run", resume="auto", **options))
    assert_same_weights(whole.last, result.last)


def test_what_was_measured_is_taken_again_on_resume(tmp_path, monkeypatch):
    """The ways and the precision of a run are those it began with, whatever a measurement would say now."""
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path / "cache"))
    changes = {"speed": "measure", "amp_level": "auto", "num_samples": 64, "lr": 1e-4}
    slow = {"O0": 2.0, "O2": 1.0}
    monkeypatch.setattr("visformer.verbs.precision.seconds_of_a_step", lambda *_: slow)
    monkeypatch.setattr(
        "visformer.verbs.trainer.ways_to_train",
        lambda model, *_, **__: dict.fromkeys(spatial_mlps(model), "merged 2"),
    )
    train(config(tmp_path / "whole", **changes))
    original = Trainer.begin_epoch

    def stop_at_the_second(self, epoch):
        original(self, epoch)
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "begin_epoch", stop_at_the_second)
        assert main(["train", "-c", save_config(tmp_path, config(tmp_path / "parts", **changes))]) == 130
    state = load_state(tmp_path / "parts/last.state.pt")
    assert set(state["ways"].values()) == {"merged 2"} and len(state["ways"]) == 7
    assert "amp_level: O2" in state["config"]
    assert "amp_level: O2" in (tmp_path / "parts/config.yaml").read_text()
    for name in ("visformer.verbs.precision.seconds_of_a_step", "visformer.verbs.trainer.ways_to_train"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("measured again"))
    train(config(tmp_path / "parts", resume="auto", **changes))
    assert_same_weights(tmp_path / "whole/last.safetensors", tmp_path / "parts/last.safetensors")


def test_another_speed_on_resume_is_told(tmp_path, capsys):
    train(config(tmp_path / "run", num_samples=32, epoch_size=1))
    train(config(tmp_path / "run", num_samples=32, epoch_size=2, resume="auto", speed="off"))
    assert "resuming with another speed: auto before, off now" in capsys.readouterr().err
