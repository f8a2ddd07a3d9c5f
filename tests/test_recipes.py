"""The recipes: upstream's values to the letter, a header that tells what to run and to expect, commands that parse."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from visformer import options
from visformer.config import TrainConfig
from visformer.options import parse, recipes
from visformer.schedule import learning_rates

FOLDER = Path(__file__).parents[1] / "configs" / "visformer"

# What all four upstream recipes have in common beside MindCV's defaults, and what each has of its own.
COMMON = {
    "distribute": True,
    "val_while_train": True,
    "interpolation": "bicubic",
    "re_prob": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_prob": 1.0,
    "auto_augment": "autoaug",
    "keep_checkpoint_max": 10,
    "amp_level": "O3",
    "label_smoothing": 0.1,
    "lr_epoch_stair": True,
    "warmup_factor": 0.002,
    "warmup_epochs": 5,
    "decay_epochs": 295,
    "opt": "adamw",
    "weight_decay": 0.05,
    "loss_scale": 1024.0,
    "num_classes": 1000,
}
UPSTREAM = {
    "visformer_tiny": {"batch_size": 128, "epoch_size": 300, "lr": 5e-4, "min_lr": 1e-5},
    "visformer_tiny_v2": {"batch_size": 256, "epoch_size": 400, "lr": 1e-3, "min_lr": 2e-5},
    "visformer_small": {"batch_size": 64, "epoch_size": 300, "lr": 5e-4, "min_lr": 1e-5},
    "visformer_small_v2": {"batch_size": 64, "epoch_size": 300, "lr": 5e-4, "min_lr": 1e-5},
}
PUBLISHED = {  # MindCV's top-1 and top-5 on ImageNet-1k
    "visformer_tiny": ("78.28", "94.15"),
    "visformer_tiny_v2": ("78.82", "94.41"),
    "visformer_small": ("81.73", "95.88"),
    "visformer_small_v2": ("82.17", "95.90"),
}


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_values_are_upstreams(name):
    ours = {"recipe_batch_size": UPSTREAM[name]["batch_size"], "recipe_devices": 8}  # what upstream's lr is meant for
    assert parse(TrainConfig, ["-c", name], prog="train") == TrainConfig(model=name, **COMMON, **UPSTREAM[name], **ours)


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_header_says_hardware_accuracy_source_and_batch(name):
    text = header(FOLDER / f"{name}.yaml")
    top1, top5 = PUBLISHED[name]
    batch = UPSTREAM[name]["batch_size"]
    for words in (
        f"top-1 {top1} %",
        f"top-5 {top5} %",
        "eight Ascend 910",
        "MindCV",
        f"8 devices x {batch} = {8 * batch}",
    ):
        assert words in text
    assert "lr and min_lr are for this" in text


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_names_its_model_and_gives_commands_that_parse(path):
    config = parse(TrainConfig, ["-c", path.stem], prog="train")
    assert path.stem.startswith(config.model)
    commands = re.findall(r"^#   .*(?:train\.py|visformer train) (.*)$", header(path), flags=re.MULTILINE)
    assert commands
    for command in commands:
        assert path.stem in command
        words = command.replace(f"configs/visformer/{path.stem}.yaml", str(path)).split()
        assert parse(TrainConfig, words, prog="train").model == config.model


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_line_of_a_recipe_counts(path):
    """Keys are known and written once, and the schedule goes from warm-up to the lowest rate within the run."""
    keys = re.findall(r"^(\w+):", path.read_text(), flags=re.MULTILINE)
    assert len(keys) == len(set(keys)) == len(yaml.safe_load(path.read_text()))
    assert set(keys) <= {field.name for field in dataclasses.fields(TrainConfig)}
    config = parse(TrainConfig, ["-c", path.stem], prog="train")
    rate = learning_rates(config, 100)
    rates = [rate(epoch * 100) for epoch in range(config.epoch_size)]
    assert max(rates) == pytest.approx(config.lr)
    assert rates[-1] < 0.1 * config.lr


def test_the_recipes_are_found_by_name():
    assert set(UPSTREAM) <= set(recipes())
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(recipes())


def test_an_installed_package_brings_its_own_recipes(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "packaged.yaml").write_text("lr: 2\n")
    monkeypatch.setattr(options, "__file__", str(tmp_path / "options.py"))
    assert list(recipes()) == ["packaged"]
    assert parse(TrainConfig, ["-c", "packaged"], prog="train").lr == 2
