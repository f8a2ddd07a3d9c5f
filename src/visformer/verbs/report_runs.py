"""What a run folder tells, read so that damage costs a sentence on the page and not the page.

Everything in it may be missing or cut short: the run may be going on, or have been killed. Only a folder with neither
config.yaml nor metrics.jsonl is no run.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visformer.errors import UsageError

CLASS_FIGURES = ("support", "recall", "precision", "f1")
COLORS = 8  # in the page's palette, which repeats when there are more runs
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class Validation:
    """One measurement of a checkpoint. `document` is what report.json holds; `confusion` counts images by the names
    of their true and their given class, and is empty when it isn't known."""

    document: dict[str, Any]
    confusion: dict[tuple[str, str], int]
    class_names: list[str]
    origin: str  # in words


@dataclass
class Run:
    """One run folder. `epochs` and `steps` are the records of metrics.jsonl in order, each epoch and step once.

    `summary` is what the latest checkpoint says of the training, `options` what config.yaml holds; empty where they
    are missing. `problems` says in sentences what could not be read.
    """

    folder: Path
    name: str = ""
    mark: str = ""
    color: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    class_names: list[str] = field(default_factory=list)
    parameters: int | None = None
    validation: Validation | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def data(self) -> str:
        """What it trained on, in a word or two: class folders are called by their folder."""
        dataset = str(self.options.get("dataset") or self.summary.get("dataset") or "")
        if dataset in ("imagenet", "folder", ""):
            return Path(str(self.options.get("data_dir") or "")).name
        return dataset

    @property
    def epochs_done(self) -> int:
        return int(self.epochs[-1]["epoch"]) if self.epochs else 0

    @property
    def epochs_wanted(self) -> int | None:
        wanted = self.options.get("epoch_size", self.summary.get("epochs"))
        return wanted if isinstance(wanted, int) else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch with the highest top-1, at a tie the earliest."""
        measured = [record for record in self.epochs if "top1" in record]
        return max(measured, key=lambda record: record["top1"]) if measured else None

    def last(self, name: str) -> float | None:
        """The latest value of a figure."""
        return next((record[name] for record in reversed(self.epochs) if name in record), None)

    @property
    def images_per_s(self) -> float | None:
        """The middle of the epochs' training rates."""
        rates = sorted(record["images_per_s"] for record in self.epochs if "images_per_s" in record)
        return rates[len(rates) // 2] if rates else None

    @property
    def seconds(self) -> float | None:
        """Time that the epochs took, validation included; worked out from the records' times in runs of old."""
        if not self.epochs:
            return None
        if all("seconds" in record for record in self.epochs):
            return sum(record["seconds"] for record in self.epochs)
        times = [record["time"] for record in self.epochs if "time" in record]
        return (times[-1] - times[0]) * len(times) / (len(times) - 1) if len(times) > 1 else None

    def points(self, name: str, *, fine: bool = False) -> tuple[list[float], list[float]]:
        """A figure over the epochs: x in epochs done, and y. `fine` takes the records of steps as well.

        A run that has finished no epoch shows its steps in any case, where it is known how far they reach.
        """
        per_epoch = next((r["step"] / r["epoch"] for r in self.epochs if r.get("step") and r["epoch"]), None)
        found: dict[float, float] = {}
        for record in self.steps if fine or not self.epochs else []:
            x = record.get("epochs_done", record["step"] / per_epoch if per_epoch and "step" in record else None)
            if x is not None and name in record:
                found[x] = record[name]
        found |= {float(record["epoch"]): record[name] for record in self.epochs if name in record}
        xs = sorted(found)
        return xs, [found[x] for x in xs]


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in `folders`, with names that tell them apart. Raises `UsageError` for one that is no run folder."""
    if not folders:
        raise UsageError("runs: no run folder given; name one or several, such as visformer report ckpt")
    paths = [Path(folder) for folder in folders]
    runs = [_read_run(path) for path in paths]
    for number, (run, name) in enumerate(zip(runs, _names(paths), strict=True)):
        run.name, run.color = name, number % COLORS
        run.mark = MARKS[number] if number < len(MARKS) else str(number + 1)
    return runs


def _read_run(folder: Path) -> Run:
    if not folder.is_dir():
        what = "is a file; give the run folder it lies in" if folder.exists() else "is not there"
        raise UsageError(f"{folder}: {what}; a run folder is what --ckpt_save_dir of visformer train names")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))[:4]
        hint = f"; in it there are {', '.join(inside)}" if inside else ""
        raise UsageError(f"{folder}: no run folder, for it has neither config.yaml nor metrics.jsonl{hint}")
    run = Run(folder)
    _read_options(run)
    _read_metrics(run)
    _read_checkpoint(run)
    run.model = run.model or str(run.options.get("model") or "")
    run.validation = _find_validation(run)
    return run


def _names(paths: list[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while length < max(map(len, parts)) and len({p[-length:] for p in parts}) < len(set(parts)):
        length += 1
    return ["/".join(p[-length:]).replace("//", "/") for p in parts]


def _read_options(run: Run) -> None:
    import yaml

    path = run.folder / "config.yaml"
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        run.problems.append("There is no config.yaml, so the options are not known.")
        return
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(f"config.yaml cannot be read: {' '.join(str(error).split())}")
        return
    if isinstance(options, dict):
        run.options = {str(name): value for name, value in options.items()}
    else:
        run.problems.append("config.yaml holds no options.")


def _read_metrics(run: Run) -> None:
    path = run.folder / "metrics.jsonl"
    epochs: dict[int, dict[str, Any]] = {}
    steps: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in _lines(run, path):
        record = _record(line)
        if record is None:
            damaged += 1
        elif record["kind"] == "epoch":
            epochs[record["epoch"]] = record  # what came later is what the run went on from
        elif "step" in record:
            steps[record["step"]] = record
    run.epochs, run.steps = [epochs[key] for key in sorted(epochs)], [steps[key] for key in sorted(steps)]
    if damaged:
        run.problems.append(f"metrics.jsonl: {damaged:,} of its lines could not be read and {_is(damaged)} left out.")
    if not run.epochs:
        run.problems.append("No epoch is finished yet.")


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _lines(run: Run, path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from (line for line in file if line.strip())
    except FileNotFoundError:
        run.problems.append("There is no metrics.jsonl, so there are no curves.")
    except OSError as error:
        run.problems.append(f"metrics.jsonl cannot be read: {error.strerror}")


def _record(line: str) -> dict[str, Any] | None:
    """A record with its finite numbers alone; None for a line that holds none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("kind") not in ("epoch", "step"):
        return None
    numbers = {name: value for name, value in values.items() if _is_number(value)}
    whole = all(isinstance(numbers.get(name, 0), int) for name in ("epoch", "step"))
    return {"kind": values["kind"], **numbers} if "epoch" in numbers and whole else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


def _read_checkpoint(run: Run) -> None:
    """The metadata of the latest checkpoint, without its weights."""
    from safetensors import SafetensorError, safe_open

    path = next((p for name in ("last", "best") if (p := run.folder / f"{name}.safetensors").is_file()), None)
    if path is None:
        run.problems.append("There is no checkpoint yet.")
        return
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        document = {key: json.loads(metadata[key]) for key in ("model_name", "class_names", "training")}
        run.model, run.summary = str(document["model_name"]), dict(document["training"])
        run.class_names = [str(name) for name in document["class_names"]]
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        run.problems.append(f"{path.name} cannot be read: {error}")
        return
    counted = (shape for name, shape in shapes.items() if not name.endswith(("running_mean", "running_var", "tracked")))
    run.parameters = sum(math.prod(shape) for shape in counted)


def _find_validation(run: Run) -> Validation | None:
    """The newest report that `validate --output` wrote into the run folder, or beside it for one of its checkpoints."""
    inside = [run.folder / "report.json", *run.folder.glob("*/report.json")]
    beside = [path for path in run.folder.resolve().parent.glob("*/report.json") if path.parent != run.folder.resolve()]
    found = []
    for path in [*inside, *beside]:
        document = _report_document(path)
        if document is None:
            continue
        measured = Path(str(document.get("ckpt_path", "")))
        if path in inside or measured.parent.resolve() == run.folder.resolve():
            found.append((path.stat().st_mtime, str(path), path, document))
    if not found:
        return None
    *_, path, document = max(found, key=lambda entry: entry[:2])
    names = run.class_names or [str(row["class"]) for row in document["per_class"]]
    origin = f"from {path}, which visformer validate wrote for {document.get('ckpt_path', 'a checkpoint')}"
    return Validation(document, _read_confusion(path.with_name("confusion.csv")), names, origin)


def _report_document(path: Path) -> dict[str, Any] | None:
    """A report that `validate` wrote; None for any other file of that name."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows, macro = document["per_class"], document.get("macro") or {}
        figures = [document["top1"], *(row[name] for row in rows for name in CLASS_FIGURES), *macro.values()]
        figures += [document[name] for name in ("num_images", "top5", "loss", "ece") if document.get(name) is not None]
        whole = all(isinstance(row["class"], str) for row in rows) and macro.keys() <= {"recall", "precision", "f1"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return document if whole and all(map(_is_number, figures)) else None


def _read_confusion(path: Path) -> dict[tuple[str, str], int]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {(row["true"], row["predicted"]): int(row["count"]) for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return {}
