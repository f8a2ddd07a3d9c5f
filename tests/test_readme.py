"""The README run as its reader would run it, and the other pages held against the code.

Every block of the README marked `bash` or `python` runs, in order, in one folder with the data that the text speaks of:
folders of small generated images, an IDX copy of Fashion-MNIST in miniature. `text` blocks are layouts and are not run.
Three things differ from a reader's terminal, and nothing else:

- PLACES: the paths of big datasets stand for generated ones.
- REDUCED: `train` gets these options on top of what is written, so that a run takes a second. A resumed run gets an
  epoch more, so that there is something left to do.
- `make TARGET` is looked up in the Makefile instead of being run.

Commands run in this process, through `visformer.cli.main` or the script that is named. Commands of the pages in docs/
are parsed, not run.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import visformer
from visformer import cli
from visformer.checkpoint import Checkpoint
from visformer.config import TrainConfig
from visformer.conversion import write_as
from visformer.data.preprocessing import Preprocessing
from visformer.models import VARIANTS, create_model
from visformer.options import parse, to_yaml

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "text"}

PLACES = {"/path/to/imagenet": "imagenet", "/usr/share/datasets/fashion-mnist": "fashion-mnist"}
REDUCED = {
    "epoch_size": 1,
    "image_resize": 32,
    "num_samples": 16,
    "batch_size": 4,
    "num_parallel_workers": 0,
    "ckpt_save_interval": 100,
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of each command; a backslash joins lines, `#` begins a comment."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2])
        for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    ]


def is_make_target(name: str) -> bool:
    return re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE) is not None


# ---- the data that the README speaks of


def write_images(folder: Path, classes: list[str], count: int) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([number, i]).integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A reader's folder: the checkout's scripts and recipes, and images."""
    for name in ("configs", "train.py", "validate.py", "infer.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_images(tmp_path / "photos", ["bird", "cat", "dog"], 10)
    write_images(tmp_path / "pets", ["cat", "dog", "hamster"], 10)
    write_images(tmp_path / "imagenet" / "train", ["n01440764", "n01443537"], 8)
    write_images(tmp_path / "imagenet" / "val", ["n01440764", "n01443537"], 2)
    write_images(tmp_path / "more", ["."], 2)
    Image.new("RGB", (64, 48), "orange").save(tmp_path / "cat.jpg")
    model = create_model("visformer_tiny")
    published = Checkpoint("visformer_tiny", model.config, [], Preprocessing((224, 224)), model.state_dict())
    write_as(tmp_path / "visformer_tiny-daee0322.ckpt", published, "mindcv")
    (tmp_path / "fashion-mnist").mkdir()
    for prefix, count in (("train", 40), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / "fashion-mnist" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / "fashion-mnist" / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a test needs no durable files
    return tmp_path


# ---- running blocks


def reduced(words: list[str]) -> list[str]:
    """The words of a `train` command made small."""
    options = REDUCED | ({"epoch_size": REDUCED["epoch_size"] + 1} if "--resume" in words else {})
    return [*words, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def run_command(words: list[str], monkeypatch) -> int:
    """Run one command, or two with a pipe between them, and return its exit code."""
    if "|" in words:
        before, words = words[: words.index("|")], words[words.index("|") + 1 :]
        output = subprocess.run(before, capture_output=True, check=True).stdout
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(output)))
    program, *arguments = words
    if program == "make":
        return 0 if is_make_target(arguments[0]) else 2
    if program == "visformer":
        return cli.main(["train", *reduced(arguments[1:])] if arguments[0] == "train" else arguments)
    assert program == "python", f"no way to run {program} here"
    script, *options = arguments
    monkeypatch.setattr(sys, "argv", [script, *(reduced(options) if script == "train.py" else options)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    return end.value.code  # type: ignore[return-value]


@pytest.mark.slow
def test_the_readme_runs(folder, monkeypatch, capfd):
    train = visformer.train
    monkeypatch.setattr(visformer, "train", lambda **options: train(**(options | REDUCED)))
    names: dict = {}
    for block in blocks(README):
        text = block.text
        for place, stand_in in PLACES.items():
            text = text.replace(place, stand_in)
        if block.language == "python":
            exec(compile(text, str(block), "exec"), names)
        elif block.language == "bash":
            for words in Block(block.page, block.line, block.language, text).commands():
                code = run_command(words, monkeypatch)
                assert code == 0, f"{block}: {shlex.join(words)}: exit code {code}\n{capfd.readouterr().err[-2000:]}"
    left_behind = {path.name for path in (folder / "runs" / "photos").iterdir()}
    assert left_behind >= {"last.safetensors", "best.safetensors", "last.state.pt", "config.yaml", "split.json"}
    assert left_behind >= {"metrics.jsonl", "curves.png"}
    for name in ("report.json", "per_class.csv", "confusion.csv", "confusion.png"):
        assert (folder / "report" / name).is_file(), name
    assert (folder / "labels.csv").read_text().startswith("path,rank,label,description,index,probability,error\n")


# ---- what the pages say


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page):
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_commands_of_a_page_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.yaml").write_text(to_yaml(TrainConfig()))
    for block in blocks(page):
        for program, verb, *words in block.commands() if block.language == "bash" else ():
            assert program == "visformer", f"{block}: {program}"
            parse(cli._options_class(verb), words, prog=f"visformer {verb}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_that_a_page_names_exist(page):
    known = {"help", "config", "version"}
    for verb in cli.VERBS:
        known |= {name for name in vars(cli._options_class(verb)()) if not name.startswith("_")} | {"image_path"}
    own = set(re.findall(r"`--([a-z_0-9]+)", page.read_text(encoding="utf-8")))
    assert own <= known, own - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_table_of_models_is_what_the_models_are():
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w*visformer_\w+|net\d)` \|(.*)\|$", text, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(VARIANTS)
    for name, row in rows:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = create_model(name).eval()
            model(torch.empty(1, 3, 224, 224))
        published = {entry.source: entry for entry in VARIANTS[name].published}
        mindcv, authors = published.get("MindCV"), published.get("authors")
        assert [cell.strip() for cell in row.split("|")] == [
            f"{sum(p.numel() for p in model.parameters()):,}",
            f"{counter.get_total_flops() / 2e9:.2f}",
            f"{mindcv.top1:.2f}, {mindcv.top5:.2f}" if mindcv else "",
            f"{authors.top1:g}" if authors else "",
        ]
