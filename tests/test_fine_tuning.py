"""Fine-tuning: the recipe by the number of images, freezing, early stop, class weights, and a teacher."""

import itertools
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.test_trainer import batch
from tests.upstream import mini_architecture
from visformer.checkpoint import Checkpoint, load_state, read_checkpoint, snapshot, write_checkpoint
from visformer.cli import main
from visformer.config import TrainConfig
from visformer.data import Preprocessing
from visformer.errors import UsageError
from visformer.freezing import frozen_parts
from visformer.losses import balanced_weights, build_distillation, build_loss
from visformer.models import Visformer
from visformer.models import architecture as named_architecture
from visformer.options import from_keywords
from visformer.verbs import fine_tuning
from visformer.verbs.patience import Patience
from visformer.verbs.teacher import load_teacher
from visformer.verbs.train import train
from visformer.verbs.trainer import Trainer

NAMES = ["cat", "dog", "emu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of visformer_tiny at 48 pixels with statistics of its own.

    Those of its norms are of noise, so that activations stay near 1 and rounding is not amplified.
    """
    torch.manual_seed(1)
    model = Visformer(named_architecture("visformer_tiny", num_classes=3, image_size=48))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all that is given
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 48, 48))
    preprocessing = Preprocessing(
        (48, 48), crop_pct=0.9, interpolation="bicubic", mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0)
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_checkpoint(
        path, Checkpoint("visformer_tiny", model.config, NAMES, preprocessing, model.state_dict(), {}, {"kind": "test"})
    )
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of unequal size: 12 cats, 6 dogs, 4 emus."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for target, (name, count) in enumerate(zip(NAMES, (12, 6, 4), strict=True)):
        (root / name).mkdir()
        for index in range(count):
            pixels = rng.integers(0, 80, (50, 60, 3), dtype=np.uint8)
            pixels[..., target] += 120
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def options(weights, photos, folder, **changes):
    values = {
        "pretrained": str(weights), "data_dir": str(photos), "ckpt_save_dir": str(folder), "num_parallel_workers": 0,
        "device_target": "CPU",
    }  # fmt: skip
    return from_keywords(TrainConfig, values | changes)


def recorded(folder):
    return from_keywords(TrainConfig, {}, config=folder / "config.yaml")


# ---- the recipe


def test_nothing_but_weights_and_images_is_a_whole_recipe(weights, photos, tmp_path, capsys):
    result = train(options(weights, photos, tmp_path / "run", epoch_size=2))
    used, err = recorded(tmp_path / "run"), capsys.readouterr().err
    assert (used.model, used.image_size, used.crop_pct) == ("visformer_tiny", (48, 48), 0.9)
    assert (used.mean, used.std, used.interpolation) == ((100.0, 110.0, 120.0), (50.0, 60.0, 70.0), "bicubic")
    assert read_checkpoint(result.best).preprocessing.mean == (100.0, 110.0, 120.0)
    assert (used.opt, used.layer_decay, used.ema) == ("adamw", fine_tuning.TABLE[0].layer_decay, True)
    assert (used.freeze, used.warmup_epochs, used.decay_epochs) == ("none", 1, 1)  # too short for the head alone
    assert used.batch_size == 8
    assert "head rows kept for 3 classes" in err and "recipe for 18 images (up to 1,000)" in err
    assert "2 epochs of batches of 8; each layer at 0.85" in err and "15 epochs without a better" in err


def test_what_is_given_stays(weights, photos, tmp_path):
    given_ = {"opt": "sgd", "lr": 0.5, "batch_size": 6, "image_resize": 64, "scale": (0.9, 1.0), "ema": False}
    train(options(weights, photos, tmp_path / "run", epoch_size=1, **given_))
    used = recorded(tmp_path / "run")
    assert {name: getattr(used, name) for name in given_} == given_
    assert used.min_lr == 0.005 and used.crop_pct == 0.9


def test_without_it_the_defaults_hold(weights, photos, tmp_path):
    changes = {"fine_tune": "off", "epoch_size": 1, "image_resize": 48, "batch_size": 4}
    train(options(weights, photos, tmp_path / "run", **changes))
    used = recorded(tmp_path / "run")
    assert (used.opt, used.layer_decay, used.mean) == ("adam", None, TrainConfig().mean)


def test_a_config_made_in_python_is_taken_as_it_is():
    config = TrainConfig(pretrained="x.safetensors")
    assert not fine_tuning.applies(config) and not fine_tuning.applies(config.change(lr=1.0))
    assert fine_tuning.applies(from_keywords(TrainConfig, {"pretrained": "x.safetensors"}).change(lr=1.0))
    assert not fine_tuning.applies(from_keywords(TrainConfig, {}))
    resumed = from_keywords(TrainConfig, {"ckpt_path": "x.safetensors", "resume_opt": True})
    assert not fine_tuning.applies(resumed)


def test_a_file_says_all_there_is_to_say(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("pretrained: x.safetensors\nlr: 0.1\n")
    assert not fine_tuning.applies(from_keywords(TrainConfig, {}, config=file))
    asked = from_keywords(TrainConfig, {"fine_tune": "auto"}, config=file)
    assert fine_tuning.applies(asked)
    chosen = fine_tuning.choose(asked, 5_000, 1, False, None)
    assert (chosen.lr, chosen.epoch_size) == (0.1, 30)


@pytest.mark.slow
def test_processes_that_it_starts_choose_the_same(weights, photos, tmp_path):
    result = train(options(weights, photos, tmp_path / "run", num_devices=2, epoch_size=1))
    used = recorded(tmp_path / "run")
    assert result.last.exists() and (used.opt, used.image_size, used.recipe_devices) == ("adamw", (48, 48), 2)


@given(images=st.integers(2, 3_000_000), processes=st.sampled_from([1, 2, 8]), epochs=st.none() | st.integers(1, 300))
def test_every_size_has_a_recipe_that_can_run(images, processes, epochs):
    keywords = {"pretrained": "x"} | ({} if epochs is None else {"epoch_size": epochs})
    chosen = fine_tuning.choose(from_keywords(TrainConfig, keywords), images, processes, False, None)
    assert chosen.batch_size * processes <= max(images, processes)
    head = (chosen.freeze_epochs or 0) if chosen.freeze != "none" else 0
    assert head <= chosen.epoch_size // 5 and (chosen.freeze == "none" or head)
    assert chosen.warmup_epochs + chosen.decay_epochs <= chosen.epoch_size + (chosen.epoch_size == 1)
    assert 0 < chosen.min_lr < chosen.lr <= fine_tuning.MOST_LR
    assert chosen.recipe_batch_size == chosen.batch_size and chosen.recipe_devices == processes
    again = fine_tuning.choose(from_keywords(TrainConfig, keywords), images, processes, False, None)
    assert chosen == again


def test_the_more_images_the_fewer_epochs_and_the_freer_the_layers():
    rows = [fine_tuning.recipe(images) for images in (500, 5_000, 50_000, 500_000)]
    for name, rising in (("epoch_size", False), ("layer_decay", True), ("batch_size", True)):
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=not rising) and len(set(values)) >= 3, name
    assert fine_tuning.recipe(500_000, processes=2)["lr"] == pytest.approx(1e-3 * 2**0.5)


def test_a_resumed_run_keeps_the_recipe_it_began_with(weights, photos, tmp_path, monkeypatch):
    kept = {"epoch_size": 4, "seed": 3}
    train(options(weights, photos, tmp_path / "whole", **kept))
    original, seen = Trainer.train_batch, []

    def stop(self, batch, index):
        original(self, batch, index)
        seen.append(index)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    words = ["--epoch_size", "4", "--seed", "3", "--pretrained", str(weights), "--data_dir", str(photos)]
    words += ["--ckpt_save_dir", str(tmp_path / "parts"), "--num_parallel_workers", "0", "--device_target", "CPU"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_batch", stop)
        assert main(["train", *words]) == 130
    # another table, as a later release might have, changes nothing in a run that has begun
    later = [fine_tuning.Row(float("inf"), 2, 9, 1, 0.5, None, 0.0)]
    monkeypatch.setattr(fine_tuning, "TABLE", later)
    assert main(["train", *words, "--resume", "auto"]) == 0
    whole, parts = (read_checkpoint(tmp_path / run / "last.safetensors").state_dict for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# ---- freezing


def trainer_of(**changes):
    torch.manual_seed(0)
    values = {"image_resize": 64, "lr": 0.01, "warmup_epochs": 0, "scheduler": "constant", "color_jitter": None}
    config = TrainConfig(**(values | {"opt": "adamw", "weight_decay": 0.1} | changes))
    model = Visformer(mini_architecture("orig_mini_v1"))
    return Trainer(model, config, torch.device("cpu"), batches_per_epoch=4)


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adam", "adamw", "lion", "rmsprop", "adagrad", "lamb", "nadam"])
def test_every_optimizer_takes_what_is_freed_later(opt):
    trainer = trainer_of(freeze="stage1", freeze_epochs=1, opt=opt, clip_grad=True)
    for epoch in range(3):
        trainer.begin_epoch(epoch)
        trainer.train_batch(batch(epoch), epoch)
    saved = snapshot(trainer.state_dict())
    again = trainer_of(freeze="stage1", freeze_epochs=1, opt=opt, clip_grad=True)
    again.load_state_dict(saved)
    for one in (trainer, again):
        one.begin_epoch(3)
        one.train_batch(batch(3), 3)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("freeze, first_free", [("stem", "stages.0."), ("stage1", "stages.1."), ("backbone", "head.")])
def test_what_is_frozen_does_not_move_and_the_rest_does(freeze, first_free):
    trainer = trainer_of(freeze=freeze, freeze_epochs=1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.begin_epoch(0)
    trainer.train_batch(batch(0), 0)
    names = list(before)
    free = [name for name in names if name >= first_free] if freeze != "backbone" else ["head.weight", "head.bias"]
    moved = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved and set(moved) <= set(free) | {name for name in names if name.startswith(("norm.", "head."))}
    assert "head.weight" in moved and (freeze == "backbone" or any(name.startswith(first_free) for name in moved))
    trainer.begin_epoch(1)  # freed
    trainer.train_batch(batch(1), 0)
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "stem.0.weight" in moved and "stem.1.running_mean" in moved


def test_frozen_for_good_without_epochs():
    trainer = trainer_of(freeze="backbone")
    trainer.begin_epoch(1000)
    assert not trainer.model.stem.training and trainer.model.training
    assert [name for name, p in trainer.model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_a_stage_that_is_not_there():
    with pytest.raises(UsageError, match="stage4 is not there; the model has stages 1 to 3"):
        frozen_parts(Visformer(named_architecture("visformer_tiny")), "stage4")


@pytest.mark.parametrize("stop_after", [2, 5])
def test_a_run_stopped_while_frozen_or_freed_resumes_to_the_same_bits(
    weights, photos, tmp_path, monkeypatch, stop_after
):
    changes = {"epoch_size": 4, "freeze": "backbone", "freeze_epochs": 1, "batch_size": 6, "ema": True}
    train(options(weights, photos, tmp_path / "whole", **changes))
    original, seen = Trainer.train_batch, []

    def stop(self, batch, index):
        original(self, batch, index)
        seen.append(index)
        if len(seen) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_batch", stop)
        with pytest.raises(Exception, match="stopped by SIGTERM"):
            train(options(weights, photos, tmp_path / "parts", **changes))
    assert load_state(tmp_path / "parts/last.state.pt")["batch"] > 0
    train(options(weights, photos, tmp_path / "parts", resume="auto", **changes))
    whole, parts = (read_checkpoint(tmp_path / run / "last.safetensors").state_dict for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# ---- early stop


def metrics_of(top1, loss):
    return SimpleNamespace(top1=top1, loss=loss)


def test_patience_counts_epochs_without_a_better_result():
    patience = Patience(2)
    for top1, loss, epochs in [(50, 1.0, 0), (50, 1.0, 1), (50, 0.9, 0), (60, 2.0, 0), (40, 1.0, 1), (60, 0.9, 2)]:
        assert not patience.is_over
        patience.count(metrics_of(top1, loss))
        assert patience.epochs == epochs
    assert patience.is_over and not Patience(None, epochs=10**6).is_over
    patience.count(None)
    assert patience.epochs == 2


def test_a_run_ends_early_and_says_so(weights, photos, tmp_path, capsys):
    changes = {"epoch_size": 9, "lr": 1e-30, "weight_decay": 0.0, "early_stop_epochs": 2, "freeze": "backbone"}
    result = train(options(weights, photos, tmp_path / "run", ema=False, re_prob=0.0, **changes))
    assert result.epochs == 3 and "ending after epoch 3: 2 epochs without a better result" in capsys.readouterr().err
    before = result.last.read_bytes()
    again = train(options(weights, photos, tmp_path / "run", resume="auto", ema=False, re_prob=0.0, **changes))
    assert again.epochs == 3 and result.last.read_bytes() == before
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3]


# ---- class weights


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20).filter(any))
def test_balanced_weights_make_classes_equal(counts):
    counts = torch.tensor(counts)
    weights = balanced_weights(counts)
    totals = (weights * counts)[counts > 0]
    assert torch.allclose(totals, totals[0].expand_as(totals), rtol=1e-4)
    assert totals.sum().item() == pytest.approx(counts.sum().item(), rel=1e-4)
    assert (weights[counts == 0] == 1).all()


@pytest.mark.parametrize("loss", ["CE", "BCE"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_weighted_loss_is_the_weighted_sum_of_the_images_own(loss, reduction, soft):
    config = TrainConfig(loss=loss, reduction=reduction, label_smoothing=0.1)
    class_weights = torch.tensor([0.5, 2.0, 1.0])
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    if soft:
        targets = torch.softmax(torch.randn(5, 3), 1)
    each = torch.stack([build_loss(config)(logits[i : i + 1], targets[i : i + 1]) for i in range(5)])
    weights = targets @ class_weights if soft else class_weights[targets]
    expected = (each * weights).mean() if reduction == "mean" else (each * weights).sum()
    torch.testing.assert_close(build_loss(config, class_weights)(logits, targets), expected)
    ones = build_loss(config, torch.ones(3))(logits, targets)
    torch.testing.assert_close(ones, build_loss(config)(logits, targets))


def test_the_log_says_which_classes_weigh_what(weights, photos, tmp_path, capsys):
    train(options(weights, photos, tmp_path / "run", epoch_size=1, class_weights="balanced"))
    # held out: 2 cats, 1 dog, 1 emu
    assert "class weights: from cat (10 images) 0.60 to emu (3 images) 2.00" in capsys.readouterr().err


# ---- a teacher


def test_hard_distillation_is_a_second_cross_entropy_and_soft_a_divergence():
    student, teacher, loss = torch.randn(4, 5), torch.randn(4, 5), torch.tensor(3.0)
    hard = build_distillation(TrainConfig(distillation_alpha=0.25))
    expected = 0.75 * 3.0 + 0.25 * F.cross_entropy(student, teacher.argmax(1))
    torch.testing.assert_close(hard(loss, student, teacher), expected)
    soft = build_distillation(TrainConfig(distillation_type="soft", distillation_alpha=1.0, distillation_tau=2.0))
    assert soft(loss, teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    told, learnt = F.softmax(teacher / 2, 1), F.softmax(student / 2, 1)
    divergence = (told * (told / learnt).log()).sum() / 4 * 4  # over 4 images, times the temperature squared
    torch.testing.assert_close(soft(loss, student, teacher), divergence)


@pytest.mark.parametrize("channels, side", list(itertools.product((1, 3), (48, 64))))
def test_the_teacher_sees_the_image_as_it_was_trained_to(weights, channels, side):
    """Its logits are those of its own preprocessing, whatever the student's size, statistics and channels are."""
    student = TrainConfig(
        teacher=str(weights), image_resize=side, in_channels=channels,
        mean=(80.0,) * channels, std=(40.0,) * channels,
    )  # fmt: skip
    names = ["emu", "cat"]
    teacher = load_teacher(student, names, torch.device("cpu"))
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8, generator=noise)
    logits = teacher.logits(Preprocessing.from_config(student).normalize(pixels))
    checkpoint = read_checkpoint(weights)
    full = pixels.float().expand(-1, 3, -1, -1)
    if side != 48:
        full = F.interpolate(full, size=(48, 48), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (checkpoint.preprocessing.mean, checkpoint.preprocessing.std))
    with torch.no_grad():
        expected = checkpoint.build()((full - mean) / std)[:, [2, 0]]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_run_with_a_teacher_learns_from_it(weights, photos, tmp_path, kind, capsys):
    changes = {"teacher": str(weights), "distillation_type": kind, "distillation_alpha": 1.0, "epoch_size": 2}
    result = train(options(weights, photos, tmp_path / "run", **changes))
    assert result.last.exists()
    words = "first class" if kind == "hard" else "probabilities"
    assert f"100% of the loss is its {words}" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_model_of_timms_with_weights_from_a_file(tmp_path, suffix):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4, in_chans=1).eval()
    path = tmp_path / f"teacher.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    config = TrainConfig(
        teacher="timm:resnet10t",
        teacher_ckpt_path=str(path),
        in_channels=1,
        mean=(0.0,),
        std=(255.0,),
        image_resize=176,
    )
    teacher = load_teacher(config, ["a", "b", "c", "d"], torch.device("cpu"))
    images = torch.rand(2, 1, 176, 176)
    mean, std = np.mean([0.485, 0.456, 0.406]), np.mean([0.229, 0.224, 0.225])  # timm's, over the channels
    with torch.no_grad():
        expected = model((images - mean) / std)
    torch.testing.assert_close(teacher.logits(images), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, names, message",
    [
        ({"teacher": "timm:resnet10x"}, NAMES, "timm has no model 'resnet10x'"),
        ({"teacher": "TINY"}, ["cat", "yak"], "class 'yak' of the data is not one of the model's 3"),
        ({"teacher": "TINY", "in_channels": 4, "mean": (1.0,), "std": (1.0,)}, NAMES, "takes images of 3 channels"),
        ({"teacher": "nowhere.safetensors"}, NAMES, "nowhere.safetensors"),
        ({"teacher": "timm:resnet10t", "teacher_ckpt_path": "nowhere.pth"}, NAMES, "nowhere.pth: no such file"),
        ({"teacher": "timm:resnet10t", "teacher_ckpt_path": "TINY"}, NAMES, "not weights of timm's resnet10t"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_clear_error(weights, changes, names, message):
    changes = {name: str(weights) if value == "TINY" else value for name, value in changes.items()}
    with pytest.raises(UsageError, match=message):
        load_teacher(TrainConfig(**changes), names, torch.device("cpu"))


def test_a_teacher_of_other_classes(tmp_path):
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    config = TrainConfig(teacher="timm:resnet10t", teacher_ckpt_path=str(tmp_path / "seven.safetensors"))
    with pytest.raises(UsageError, match="tells 7 classes apart, and the data has 3"):
        load_teacher(config, NAMES, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"freeze_epochs": 3}, "nothing is frozen"),
        ({"early_stop_epochs": 3, "val_while_train": False}, "needs val_while_train"),
        ({"aug_splits": 3, "class_weights": "balanced"}, "neither teacher nor class_weights"),
        ({"teacher_ckpt_path": "x", "teacher": "y"}, "goes with --teacher timm:NAME"),
        ({"distillation_alpha": 1.5}, "between 0 and 1"),
        ({"distillation_tau": 0.0}, "at least"),
    ],
)
def test_options_that_do_not_go_together(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**changes)
