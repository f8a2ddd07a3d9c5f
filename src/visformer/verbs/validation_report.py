"""What `validate` found: as an object, as JSON, as text for a person, and as the files of `--output`.

Rates are percentages; the JSON document has them in full precision, text with two decimals.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visformer import console
from visformer.verbs.records import printable

if TYPE_CHECKING:
    from visformer.metrics import Metrics
    from visformer.verbs.evaluation import Measured
    from visformer.verbs.validate import ValidateOptions

LISTED = 10  # classes, pairs and skipped images in the text


@dataclass(frozen=True)
class Report:
    """One validation. `metrics` has every figure, classes by their index in `class_names`, which are the model's."""

    model: str
    ckpt_path: str
    dataset: str
    data_dir: str
    split: str
    device: str
    amp_level: str
    class_names: list[str]
    metrics: Metrics
    skipped: list[tuple[str, str]]  # (name, reason) of the images that could not be read
    seconds: float

    @classmethod
    def of(cls, measured: Measured, model: Any, options: ValidateOptions, split: str, device: object) -> Report:
        """The report of a pass over `split` of what `options` name, by `model` on `device`."""
        return cls(
            model=model.model_name,
            ckpt_path=options.ckpt_path,
            dataset=options.dataset,
            data_dir=options.data_dir,
            split=split,
            device=str(device),
            amp_level=options.val_amp_level,
            class_names=list(model.class_names),
            metrics=measured.metrics,
            skipped=measured.skipped,
            seconds=measured.seconds,
        )

    @property
    def title(self) -> str:
        """What was measured, in a few words; data in folders is called by its folder."""
        data = self.data_dir if self.dataset in ("imagenet", "folder") else self.dataset
        return f"{self.model} on {data}, {self.split}"

    @property
    def top1(self) -> float:
        return self.metrics.top1

    @property
    def top5(self) -> float:
        return self.metrics.top5

    @property
    def loss(self) -> float:
        return self.metrics.loss

    @property
    def images_per_s(self) -> float:
        return self.metrics.num_images / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the confusion matrix, as plain JSON values; a figure that is not finite becomes None."""
        metrics = self.metrics
        return {
            "model": self.model,
            "ckpt_path": self.ckpt_path,
            "dataset": self.dataset,
            "data_dir": self.data_dir,
            "split": self.split,
            "device": self.device,
            "amp_level": self.amp_level,
            "num_classes": len(self.class_names),
            "classes_in_set": len(metrics.per_class),
            "num_images": metrics.num_images,
            "num_skipped": len(self.skipped),
            "non_finite": metrics.non_finite,
            "top1": metrics.top1,
            "top5": metrics.top5,
            "top5_k": metrics.top5_k,
            "loss": _finite(metrics.loss),
            "ece": _finite(metrics.ece),
            "macro": metrics.macro,
            "images_per_s": self.images_per_s,
            "seconds": self.seconds,
            "per_class": [{"class": self.class_names[c.index], **dataclasses.asdict(c)} for c in metrics.per_class],
            "worst_confused": [
                {
                    "true": self.class_names[pair.true],
                    "predicted": self.class_names[pair.predicted],
                    "count": pair.count,
                    "share": pair.share,
                }
                for pair in metrics.worst_confused
            ],
            "skipped": [{"path": name, "reason": reason} for name, reason in self.skipped],
        }

    def write(self, folder: str | Path) -> None:
        """Write report.json, per_class.csv, confusion.csv and confusion.png into `folder`, each whole or not at all.

        confusion.csv holds the cells that are not zero.
        """
        from visformer.atomic import atomic_text
        from visformer.figures import confusion_figure

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_text(
            folder / "report.json", json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
        atomic_text(folder / "per_class.csv", self._per_class_csv())
        atomic_text(folder / "confusion.csv", self._confusion_csv())
        if self.metrics.confusion.any():
            confusion_figure(self.metrics.confusion, self.class_names, folder / "confusion.png", self.title)

    def _per_class_csv(self) -> str:
        columns = ["class", *(field.name for field in dataclasses.fields(self.metrics.per_class[0]))]
        rows = [[self.class_names[c.index], *dataclasses.astuple(c)] for c in self.metrics.per_class]
        return _csv(columns, rows)

    def _confusion_csv(self) -> str:
        confusion = self.metrics.confusion
        cells = zip(*(axis.tolist() for axis in confusion.nonzero()), strict=True)
        rows = [[self.class_names[true], self.class_names[given], int(confusion[true, given])] for true, given in cells]
        return _csv(["true", "predicted", "count"], rows)


def print_report(report: Report) -> None:
    """Print the figures on stdout: a summary, the worst classes, the worst-confused pairs, and what was skipped."""
    metrics, names = report.metrics, report.class_names
    classes = f"{len(metrics.per_class):,} classes"
    if len(metrics.per_class) < len(names):
        classes = f"{len(metrics.per_class):,} of the model's {len(names):,} classes"
    print(f"{report.title}: {metrics.num_images:,} images, {classes}\n")
    figures = [
        ("top-1", f"{metrics.top1:.2f} %"),
        (f"top-{metrics.top5_k}", f"{metrics.top5:.2f} %"),
        ("loss", f"{metrics.loss:.4f}"),
        ("macro recall", f"{metrics.macro['recall']:.2f} %"),
        ("macro precision", f"{metrics.macro['precision']:.2f} %"),
        ("macro F1", f"{metrics.macro['f1']:.2f} %"),
        ("calibration error", f"{metrics.ece:.2f} %"),
        ("skipped images", f"{len(report.skipped):,}"),
    ]
    for name, value in figures:
        print(f"  {name:<18} {value:>10}")
    took = console.duration(report.seconds)
    print(f"  {'speed':<18} {report.images_per_s:>10,.0f} images/s ({report.device}, {report.amp_level}, {took})\n")
    worst = sorted(metrics.per_class, key=lambda c: (c.recall, -c.support))[:LISTED]
    console.table(
        "classes, lowest recall first" if len(metrics.per_class) > LISTED else "classes",
        ["class", "images", "recall, %", "precision, %", "F1, %"],
        [[names[c.index], f"{c.support:,}", *(f"{v:.2f}" for v in (c.recall, c.precision, c.f1))] for c in worst],
    )
    if metrics.worst_confused:
        console.table(
            "worst-confused pairs",
            ["true", "predicted", "images", "of the class, %"],
            [
                [names[p.true], names[p.predicted], f"{p.count:,}", f"{p.share:.2f}"]
                for p in metrics.worst_confused[:LISTED]
            ],
            numeric_from=2,
        )
    for name, reason in report.skipped[:LISTED]:
        print(f"skipped {printable(name)}: {reason}")
    if len(report.skipped) > LISTED:
        print(f"skipped {len(report.skipped) - LISTED:,} more; --json and --output list them all")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _csv(columns: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
