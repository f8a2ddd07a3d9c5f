"""The page of a model on a hub: what it is, how good it was found to be, and how to use it.

Everything is taken from the checkpoint, and from `validate`'s report if there is one. A fact that is not known is left
out: there are no blanks to fill in. The head of the page is what a hub's search reads; its form is `huggingface_hub`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from visformer.checkpoint import Checkpoint
from visformer.conversion import CUSTOM
from visformer.data import imagenet
from visformer.hub.published import PUBLISHED, Weights
from visformer.models import Visformer

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PAPER = "https://arxiv.org/abs/2104.12533"
LISTED = 20  # classes that are named in the running text
FOLDERS = "images in class folders"
_ON_HUB = {  # our name of a data set -> the hub's, and how people call it
    "cifar10": ("uoft-cs/cifar10", "CIFAR-10"),
    "cifar100": ("uoft-cs/cifar100", "CIFAR-100"),
    "mnist": ("ylecun/mnist", "MNIST"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "Fashion-MNIST"),
}
_IMAGENET = ("ILSVRC/imagenet-1k", "ImageNet-1k")

Row = tuple[str, str]


def model_card(
    checkpoint: Checkpoint,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    report: Mapping[str, Any] | None = None,
) -> str:
    """The text of a model card, README.md: YAML between two lines of dashes, then Markdown.

    Args:
        checkpoint: the model and what its training recorded.
        repo_id: owner/name of the repository that it is for; None: the page speaks of a file.
        license: a hub's name of the licence, such as apache-2.0; None: the page is silent about it.
        report: report.json of `visformer validate`, whose figures go before those of training.
    """
    title = (repo_id or "").rpartition("/")[2] or checkpoint.model_name
    measured = list(_measured(checkpoint, report))
    sections = [
        _head(checkpoint, title, license, measured),
        f"# {_plain(title)}\n\n{_opening(checkpoint)}",
        _table(_facts(checkpoint)),
        _section("Accuracy", _accuracy(checkpoint, measured, report)),
        _section("Use", _use(checkpoint, f"hf-hub:{repo_id}" if repo_id else "model.safetensors")),
        _section("Preprocessing", _preprocessing(checkpoint)),
        _section("Training", _table(_training(checkpoint))),
        _section("Classes", _classes(checkpoint.class_names)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(checkpoint: Checkpoint, title: str, license: str | None, measured: list[EvalResult]) -> str:
    from huggingface_hub import ModelCardData

    dataset = _dataset(checkpoint.training.get("dataset"), checkpoint.class_names)
    data = ModelCardData(
        base_model=_base_model(checkpoint),
        datasets=[dataset[0]] if "/" in dataset[0] else None,
        eval_results=measured or None,
        library_name="visformer",
        license=license,
        metrics=["accuracy"] if measured else None,
        model_name=title if measured else None,
        pipeline_tag="image-classification" if checkpoint.class_names else "image-feature-extraction",
        tags=["visformer", *({checkpoint.model_name} - {CUSTOM}), "pytorch", "safetensors"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _opening(checkpoint: Checkpoint) -> str:
    what = f"an image classifier of {len(checkpoint.class_names):,} classes"
    if not checkpoint.class_names:
        what = "an extractor of image features"
    return f"{_code(checkpoint.model_name)}, {what} of the [Visformer]({PAPER}) family."


def _facts(checkpoint: Checkpoint) -> Iterator[Row]:
    architecture, source = checkpoint.architecture, checkpoint.source
    with torch.device("meta"):
        model = Visformer(architecture)
    height, width = architecture.image_size
    yield "parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    yield "input", f"{architecture.in_channels} x {height} x {width} (channels, height, width in pixels)"
    if checkpoint.class_names:
        yield "output", f"logits of {architecture.num_classes:,} classes"
    else:
        yield "output", f"{architecture.num_features:,} features"
    stages = ", ".join(f"{stage.depth} of width {stage.width}" for stage in architecture.stages)
    yield "blocks of each stage", stages
    yield (
        "attention in stages (the first is 0)",
        ", ".join(str(i) for i, s in enumerate(architecture.stages) if s.attention) or "none",
    )
    yield "GELU", f"{architecture.gelu} form"
    if source.get("project"):
        yield "converted from", f"{_plain(source['project'])}, {_code(str(source.get('file', '')))}"
    if source.get("sha256"):
        yield "SHA-256 of that file", _code(str(source["sha256"]))
    begun = str(source.get("from") or "scratch")
    if source.get("kind") == "trained" and begun != "scratch":
        yield "fine-tuned from", _code(_without_folders(begun))


def _measured(checkpoint: Checkpoint, report: Mapping[str, Any] | None) -> Iterator[EvalResult]:
    """Accuracies measured with this package: those of the report, else those of training's last validation."""
    from huggingface_hub import EvalResult

    figures = report or checkpoint.training
    dataset, name = _dataset(figures.get("dataset"), checkpoint.class_names)
    k = figures.get("top5_k") or min(5, len(checkpoint.class_names))
    kinds = [("top1", "accuracy", "top-1 accuracy, %"), ("top5", f"top_{k}_accuracy", f"top-{k} accuracy, %")]
    for key, kind, words in kinds[: 2 if len(checkpoint.class_names) > k else 1]:
        if _is_number(figures.get(key)):
            yield EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=name,
                dataset_split=(str(report.get("split", "")).partition(" ")[0] or None) if report else "validation",
                metric_type=kind,
                metric_name=words,
                metric_value=round(figures[key], 4),
            )


def _accuracy(checkpoint: Checkpoint, measured: list[EvalResult], report: Mapping[str, Any] | None) -> str:
    parts = []
    if measured:
        images = report.get("num_images") if report else checkpoint.training.get("val_images")
        many = f", {images:,} images" if isinstance(images, int) and images else ""
        rows = [(str(result.metric_name), f"{result.metric_value:.2f}") for result in measured]
        parts += [f"Measured with this package on {_plain(measured[0].dataset_name)}{many}.", _table(rows)]
    row = _published(checkpoint)
    if row is not None and row.top1 is not None:
        top5 = f" and top-5 {row.top5:.2f} %" if row.top5 is not None else ""
        parts.append(
            f"Published by {_plain(checkpoint.source['project'])} for the file that this was converted from, on "
            f"ImageNet-1k's validation set: top-1 {row.top1:.2f} %{top5}."
        )
    return "\n\n".join(parts)


def _published(checkpoint: Checkpoint) -> Weights | None:
    """The row of the published weights that this was converted from, told by the SHA-256."""
    sha256 = str(checkpoint.source.get("sha256", ""))
    rows = (row for row in PUBLISHED.values() if row.sha256 and sha256.startswith(row.sha256))
    return next((row for row in rows if row.model == checkpoint.model_name), None)


def _use(checkpoint: Checkpoint, reference: str) -> str:
    channels, (height, width) = checkpoint.architecture.in_channels, checkpoint.architecture.image_size
    label = "print(model.class_names[int(output.argmax())])" if checkpoint.class_names else "print(output.shape)"
    gives = "logits (1, classes)" if checkpoint.class_names else "features (1, channels)"
    python = [
        "import torch",
        "from PIL import Image",
        "",
        "import visformer",
        "",
        f'model = visformer.load("{reference}")  # in evaluation mode',
        f'pixels = model.preprocessing(Image.open("image.jpg"))  # uint8 ({channels}, {height}, {width})',
        "with torch.no_grad():",
        f"    output = model(model.preprocessing.normalize(pixels[None]))  # {gives}",
        label,
    ]
    blocks = ["```python", *python, "```"]
    if checkpoint.class_names:
        blocks += ["", "```bash", f"visformer predict image.jpg --ckpt_path {reference}", "```"]
    return "\n".join(blocks)


def _preprocessing(checkpoint: Checkpoint) -> str:
    p = checkpoint.preprocessing
    height, width = p.image_size
    antialias = "with" if p.antialias else "without"
    rounded = "rounded half to even" if p.crop_rounding == "round" else "rounded down"
    return (
        f"Resize ({p.interpolation}, {antialias} antialiasing) so that the image just covers "
        f"{math.floor(height / p.crop_pct)} x {math.floor(width / p.crop_pct)} pixels (height, width), cut "
        f"{height} x {width} from the centre (offset {rounded}), subtract the mean {_numbers(p.mean)} and divide by "
        f"the standard deviation {_numbers(p.std)}, on the scale of 0 to 255. The checkpoint has all of this with it."
    )


def _training(checkpoint: Checkpoint) -> Iterator[Row]:
    training = checkpoint.training
    if training.get("dataset"):
        yield "data", _plain(_dataset(training["dataset"], checkpoint.class_names)[1])
    for key, name in (("train_images", "images to train on"), ("val_images", "images to validate on")):
        if isinstance(training.get(key), int) and training[key]:
            yield name, f"{training[key]:,}"
    if isinstance(training.get("epoch"), int):
        of = f" of {training['epochs']}" if isinstance(training.get("epochs"), int) else ""
        yield "epochs", f"{training['epoch']}{of}"
    for key, name in (("train_loss", "training loss"), ("val_loss", "validation loss")):
        if _is_number(training.get(key)):
            yield name, f"{training[key]:.4f}"
    if training.get("ema") is True:
        yield "weights", "their exponential moving average"
    if training.get("seed") is not None:
        yield "seed", _plain(str(training["seed"]))
    if training.get("device"):
        yield "device", _plain(str(training["device"]))
    if isinstance(training.get("versions"), dict):
        yield "versions", _plain(", ".join(f"{name} {version}" for name, version in training["versions"].items()))


def _classes(names: Sequence[str]) -> str:
    if not names:
        return ""
    words = imagenet.describe(names)
    shown = [_code(name) + (f" ({_plain(words[name])})" if name in words else "") for name in names]
    if len(names) <= LISTED:
        return "In the order of the logits: " + ", ".join(shown) + "."
    lines = "\n".join(f"{index}. {name}" for index, name in enumerate(shown))
    return f"<details>\n<summary>All {len(names):,}, in the order of the logits</summary>\n\n{lines}\n\n</details>"


def _dataset(name: Any, class_names: Sequence[str]) -> Row:
    """A data set's identifier, which has a slash when it is a hub's, and how people call it."""
    name = str(name or "")
    if name in ("", "imagenet", "folder"):
        is_imagenet = len(class_names) == imagenet.NUM_CLASSES and list(class_names) == imagenet.class_names()
        return _IMAGENET if is_imagenet else ("imagefolder", FOLDERS)
    if name == "digits":
        return "digits", "scikit-learn's handwritten digits"
    if re.fullmatch(r"hfds/[\w.-]+/[\w.-]+", name):
        return name.removeprefix("hfds/"), name.removeprefix("hfds/")
    return _ON_HUB.get(name, (name.rpartition("/")[2], name.rpartition("/")[2]))


def _base_model(checkpoint: Checkpoint) -> str | None:
    """The repository of a hub from which training began."""
    begun = re.fullmatch(r"hf[-_]hub:([\w.-]+/[\w.-]+)(@.*)?", str(checkpoint.source.get("from", "")))
    return begun[1] if begun else None


def _without_folders(place: str) -> str:
    """A path's last part, as its folders are nobody's business; an address or a name as it is."""
    return place if re.match(r"hf[-_]hub:|hf://|https://", place) else re.split(r"[/\\]", place)[-1]


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(rows: Iterator[Row] | list[Row]) -> str:
    lines = ["| {} | {} |".format(*(cell.replace("|", "\\|") for cell in row)) for row in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _code(text: str) -> str:
    """`text` as Markdown's code, which nothing in it can end."""
    text = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text)).strip() or "-"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _plain(text: str) -> str:
    """`text` in which Markdown and HTML find nothing of theirs."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", text)


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
