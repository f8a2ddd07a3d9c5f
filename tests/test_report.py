"""The page of `visformer report`: one file, whole, safe, and saying what the run folders hold."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.cli import main
from visformer.config import TrainConfig
from visformer.data.preprocessing import Preprocessing
from visformer.models import create_model
from visformer.options import to_yaml
from visformer.verbs.report_charts import number
from visformer.verbs.report_page import page
from visformer.verbs.report_runs import read_runs
from visformer.verbs.train import train

EMPTY = {"meta", "img", "br", "link", "hr"}
EVIL = "<img src=x onerror=alert(1)>\"'&"
DIGITS = {
    "dataset": "digits",
    "in_channels": 1,
    "mean": (77.0,),
    "std": (95.0,),
    "image_resize": 32,
    "crop_pct": 1.0,
    "num_parallel_workers": 0,
    "hflip": 0.0,
    "color_jitter": None,
}


class Page(HTMLParser):
    """A parsed page: its text, its elements, and whether each was closed where it should be."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


def report(*arguments) -> tuple[int, str]:
    return main(["report", *map(str, arguments)])


def read(path) -> Page:
    return check(path.read_text(encoding="utf-8"))


def check(text: str) -> Page:
    """The page, parsed, with what every page must be."""
    assert text.startswith("<!DOCTYPE html>")
    elsewhere = re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert not elsewhere, "the page refers to something outside itself"
    parsed = Page(text)
    assert not [a for name in ("link", "iframe", "object") for a in parsed.all(name)]
    assert all(str(image["src"]).startswith("data:image/") and image["alt"] for image in parsed.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in parsed.all("svg"))
    assert not [a for _, a in parsed.elements if any(key.startswith("on") for key in a)]
    return parsed


def write_run(folder, *, epochs=3, class_names=None, **changes):
    """A run folder as training leaves it, without the training."""
    folder.mkdir(parents=True)
    config = TrainConfig(**(DIGITS | {"epoch_size": 3, "ckpt_save_dir": str(folder)} | changes))
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, epochs + 1):
            step = {"kind": "step", "epoch": epoch, "train_loss": 2.5, "lr": 1e-3 / epoch, "step": 10 * epoch - 5}
            figures = {
                "train_loss": 2.0 / epoch,
                "val_loss": 1.5 / epoch,
                "top1": 60.0 + 10 * (epoch % 3),
                "top5": 95.5,
            }
            whole = {
                "kind": "epoch",
                "epoch": epoch,
                "lr": 1e-3 / epoch,
                "step": 10 * epoch,
                "seconds": 60.0,
                **figures,
            }
            for record in (step, whole):
                file.write(json.dumps(record | {"images_per_s": 1000.0 + epoch, "time": 1e9 + 60 * epoch}) + "\n")
    if class_names is not None:
        torch.manual_seed(0)
        channels = config.in_channels
        model = create_model("visformer_tiny", num_classes=len(class_names), image_size=32, in_channels=channels)
        summary = {"epoch": epochs, "device": "cpu, 1 threads", "versions": {"torch": "2.99"}, "skipped_images": 2}
        preprocessing = Preprocessing.from_config(config)
        checkpoint = Checkpoint(config.model, model.config, class_names, preprocessing, model.state_dict(), summary)
        write_checkpoint(folder / "best.safetensors", checkpoint)
        write_checkpoint(folder / "last.safetensors", checkpoint)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run on digits, small."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = {"num_samples": 64, "batch_size": 16, "opt": "adamw", "warmup_epochs": 0, "log_interval": 2}
    train(TrainConfig(**DIGITS, **options, epoch_size=2, decay_epochs=2, ckpt_save_dir=str(folder)))
    return folder


def test_a_real_run_from_end_to_end(trained, capsys):
    capsys.readouterr()
    assert report(trained) == 0
    assert capsys.readouterr().out.strip() == str(trained / "report.html")
    page = read(trained / "report.html")
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert f"{max(record['top1'] for record in epochs):.2f} %" in page.text
    assert "visformer_tiny on digits" in page.text and "2 epochs" in page.text and "9.81 M" in page.text
    charts = [svg for svg in page.all("svg") if "data-lines" in svg]
    loss = next(svg for svg in charts if svg["aria-label"].startswith("Loss"))
    drawn = {label: points for label, _, points in json.loads(loss["data-lines"])}
    assert [y for _, _, y in drawn["training"]] == [number(record["train_loss"]) for record in epochs]
    rate = next(svg for svg in charts if svg["aria-label"].startswith("Learning rate"))
    assert len(json.loads(rate["data-lines"])[0][2]) == 4, "the learning rate is drawn from the steps as well"


def test_the_worst_mistakes_are_the_images_with_the_highest_loss(trained):
    from visformer.data import open_evaluation
    from visformer.pretrained import load

    assert report(trained, "--worst", "5") == 0
    page = read(trained / "report.html")
    model, digits = load(trained / "best.safetensors"), open_evaluation("digits", "", channels=1)
    images = torch.stack([model.preprocessing(digits.load(i)) for i in range(len(digits))])
    with torch.no_grad():
        shares = model(model.preprocessing.normalize(images)).log_softmax(dim=1)
    targets = torch.tensor([digits.target(i) for i in range(len(digits))])
    losses = -shares.gather(1, targets[:, None])[:, 0]
    losses[shares.argmax(dim=1) == targets] = 0
    worst = losses.argsort(descending=True, stable=True)[:5].tolist()
    shown = [image["alt"] for image in page.all("img")]
    assert [words.partition(":")[0] for words in shown] == [digits.name(i) for i in worst]
    assert all(f"is {digits.class_names[digits.target(i)]}," in words for i, words in zip(worst, shown, strict=True))


def test_runs_side_by_side(tmp_path):
    first = write_run(tmp_path / "x" / "run", class_names=list("0123456789"))
    second = write_run(tmp_path / "y" / "run", class_names=list("0123456789"), lr=0.5, epoch_size=7, mixup=0.25)
    assert report(first, second, "--output", tmp_path / "out" / "page.html", "--title", "Two of them") == 0
    page = read(tmp_path / "out" / "page.html")
    assert page.all("title") and page.text.startswith("Two of them Two of them")
    assert "x/run" in page.text and "y/run" in page.text
    losses = next(svg for svg in page.all("svg") if svg["aria-label"].startswith("Loss"))
    assert {line[0] for line in json.loads(losses["data-lines"])} == {
        "A training", "A validation", "B training", "B validation",
    }  # fmt: skip
    table = page.text[page.text.index("The runs differ in these options") : page.text.index("x/run differs")]
    assert re.findall(r"(?:^| )(lr|epoch_size|mixup|batch_size|seed) ", table) == ["mixup", "epoch_size", "lr"]
    assert "3/7" in page.text, "the second is unfinished"


def test_the_nearest_recipe_is_the_measure(tmp_path):
    from visformer.options import from_keywords

    recipe = from_keywords(
        TrainConfig, {"lr": 0.123, "ckpt_save_dir": str(tmp_path / "run")}, config="visformer_tiny_v2"
    )
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(to_yaml(recipe))
    assert report(run, "--measure", "False") == 0
    text = read(run / "report.html").text
    assert text.startswith("visformer_tiny_v2 visformer_tiny_v2 unfinished: 3 of 400 epochs")
    assert "differs from the recipe visformer_tiny_v2, the nearest, in 1 option." in text and "lr 0.123 0.001" in text


def folders(root, names, size=40):
    for number_, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (size + 60, size), (80 * number_, 60 * i, 120)).save(root / name / f"{i}{EVIL}.jpg")


def test_what_comes_from_outside_is_escaped(tmp_path):
    names = [EVIL, "b", "<script>alert(2)<script>"]
    folders(tmp_path / "data" / "val", names)
    (tmp_path / "data" / "val" / "b" / f"broken{EVIL}.jpg").write_bytes(b"nothing")
    run = write_run(
        tmp_path / f"run {EVIL}", class_names=sorted(names), dataset="imagenet", data_dir=str(tmp_path / "data" / EVIL),
        in_channels=3, mean=(1.0, 1.0, 1.0), std=(9.0, 9.0, 9.0),
    )  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "<b>"}\n<script>\n')
    assert report(run, "--data_dir", tmp_path / "data", "--title", EVIL, "--num_parallel_workers", 0) == 0
    page = read(run / "report.html")
    assert EVIL in page.text and len(page.all("script")) == 1
    assert {str(image["src"])[:23] for image in page.all("img")} == {"data:image/jpeg;base64,"}
    assert any(EVIL in str(image["alt"]) for image in page.all("img"))
    assert (
        "1 could not be read when measuring" in page.text and "2 images could not be read while training" in page.text
    )
    assert "2 of its lines could not be read" in page.text


def test_unfinished_and_damaged_runs_still_give_a_page(tmp_path):
    begun = write_run(tmp_path / "begun", epochs=0)
    (begun / "metrics.jsonl").write_text(
        '{"kind": "step", "epoch": 1, "epochs_done": 0.25, "step": 5, "train_loss": 2.25, "lr": 0.5}\n'
        '{"kind": "step", "epoch": 1, "epochs_done": 0.5, "step": 10, "train_loss": 2.0, "lr": 0.5}\n'
    )
    damaged = write_run(tmp_path / "damaged", epochs=3)
    lines = (damaged / "metrics.jsonl").read_bytes().splitlines()
    nonsense = [
        b"\xff\xfe",
        b"[1, 2]",
        b'{"kind": "epoch", "epoch": "two"}',
        b'{"kind": "epoch", "epoch": 2, "top',
        b"[" * 5000,
    ]
    (damaged / "metrics.jsonl").write_bytes(b"\n".join([*nonsense, *lines, lines[-1][:30]]))
    (damaged / "config.yaml").write_text("lr: [1\n: :")
    (damaged / "last.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (damaged / "report.json").write_text('{"top1": 3, "per_class": [5]}')
    diverged = write_run(tmp_path / "diverged", epochs=1)
    (diverged / "metrics.jsonl").write_text(
        '{"kind": "epoch", "epoch": 1, "step": 3, "train_loss": NaN, "lr": Infinity}\n'
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("")
    for folder in (begun, damaged, diverged, bare):
        assert report(folder) == 0
        read(folder / "report.html")
    text = read(begun / "report.html").text
    assert "No epoch is finished yet" in text and "unfinished: 0 of 3 epochs" in text and "Loss training" in text
    text = read(damaged / "report.html").text
    assert "6 of its lines could not be read" in text and "config.yaml cannot be read" in text and "80.00 %" in text
    assert report(begun, damaged, diverged, bare, "--output", tmp_path / "all.html") == 0
    read(tmp_path / "all.html")


def test_a_validation_report_serves_where_the_images_are_not_at_hand(tmp_path, capsys):
    run = write_run(tmp_path / "run", class_names=list("0123456789"))
    assert (
        main(
            [
                "validate",
                "--ckpt_path",
                str(run / "best.safetensors"),
                "--dataset",
                "digits",
                "--output",
                str(tmp_path / "found"),
            ]
        )
        == 0
    )
    document = json.loads((tmp_path / "found" / "report.json").read_text())
    capsys.readouterr()
    assert report(run, "--measure", "False") == 0
    page = read(run / "report.html")
    assert f"359 images, top-1 {document['top1']:.2f} %" in page.text and "which visformer validate wrote" in page.text
    assert any(svg["aria-label"].startswith("confusion matrix of 10 classes") for svg in page.all("svg"))
    assert "Worst mistakes" not in page.text
    elsewhere = write_run(tmp_path / "other", epochs=1)
    assert report(elsewhere, "--measure", "False") == 0
    assert "confusion" not in (elsewhere / "report.html").read_text(), "another run's report is not this one's"


@pytest.mark.parametrize("count, pictures", [(60, 0), (130, 1)])
def test_the_confusion_of_many_classes(tmp_path, count, pictures):
    run = write_run(tmp_path / "run")
    names = [f"class {i}" for i in range(count)]
    rows = [{"class": n, "support": 2, "recall": 50.0, "precision": 50.0, "f1": 50.0} for n in names]
    (run / "report.json").write_text(json.dumps({"top1": 50.0, "per_class": rows, "num_images": 2 * count}))
    cells = [f"{name},{name},1\n{name},class 0,1\n" for name in names]
    (run / "confusion.csv").write_text("true,predicted,count\n" + "".join(cells))
    assert report(run, "--measure", "False") == 0
    page = read(run / "report.html")
    assert [image["src"][:22] for image in page.all("img")] == ["data:image/png;base64,"] * pictures
    drawn = [svg for svg in page.all("svg") if svg["aria-label"].startswith(f"confusion matrix of {count} classes")]
    assert len(drawn) == 1 - pictures
    assert f"{count - 12} more classes" in page.text and f"class {count - 1}" in page.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["kind", "epoch", "step", "epochs_done", "train_loss", "top1", "top5", "lr", "seconds", "time", "images_per_s"]
RECORDS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["epoch", "step"]), "epoch": st.integers(-3, 10**9) | JSON},
    optional={name: st.floats() | st.integers() | JSON for name in NAMES[2:]},
)
REPORTS = st.fixed_dictionaries(
    {"top1": st.floats(0, 100) | JSON, "per_class": JSON | st.lists(st.fixed_dictionaries(
        {"class": JSON, "support": st.integers(0, 9), "recall": st.floats(0, 1), "precision": JSON, "f1": st.just(1)}
    ))},
    optional=dict.fromkeys(["macro", "num_images", "top5", "loss", "ece", "skipped", "ckpt_path"], JSON),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(RECORDS | JSON, max_size=6),
    st.dictionaries(st.sampled_from(["lr", "seed", "epoch_size", "model", "dataset"]), JSON),
    REPORTS,
)
def test_whatever_the_files_hold_there_is_a_page(tmp_path_factory, records, options, document):
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "config.yaml").write_text(json.dumps(options))
    (folder / "report.json").write_text(json.dumps(document))
    check(page(read_runs([str(folder)]), {}, "", "1.0"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no run folder given"),
        (["nowhere"], "nowhere: is not there; a run folder is"),
        (["file.txt"], "file.txt: is a file"),
        (["."], "neither config.yaml nor metrics.jsonl; in it there are run"),
        (["run", "--output", "run"], "output: run is a folder"),
        (["run", "--data_dir", "nowhere"], "run: there is no checkpoint to measure"),
        (["run", "--worst", "-1"], "worst: -1 is out of range"),
        (["run", "--measure", "False", "--data_dir", "x"], "data_dir"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    write_run(tmp_path / "run")
    (tmp_path / "file.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert report(*arguments) in (1, 2)
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.html"))


def test_names_tell_runs_apart(tmp_path):
    made = [write_run(tmp_path / name, epochs=1) for name in ("a/x/run", "b/x/run", "b/y/run")]
    assert [run.name for run in read_runs([str(path) for path in made])] == ["a/x/run", "b/x/run", "b/y/run"]
    assert [run.name for run in read_runs([str(made[0]), str(made[2])])] == ["x/run", "y/run"]
    assert read_runs([str(made[0])])[0].name == "run"


def test_an_epoch_that_was_run_again_counts_as_it_came_last(tmp_path):
    run = write_run(tmp_path / "run", epochs=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "epoch": 2, "step": 20, "train_loss": 9.0}\n')
    assert read_runs([str(run)])[0].points("train_loss") == ([1.0, 2.0], [2.0, 9.0])
