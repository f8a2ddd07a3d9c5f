"""What was found out about one run: the confusion of its classes, their figures, the worst mistakes, what was skipped,
and what the runs ran on."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visformer.verbs.markup import Markup, tag
from visformer.verbs.report_charts import COUNTED_CLASSES, NAMED_CLASSES, confusion_chart
from visformer.verbs.report_measure import Mistake
from visformer.verbs.report_runs import Run, Validation

LISTED = 12  # classes and pairs before the rest is folded away
MOST_ROWS = 1000  # of any list


def badge(run: Run) -> Markup:
    """The run's letter in its colour."""
    return tag("span", run.mark, class_=f"badge run-{run.color}")


def findings(run: Run, mistakes: Sequence[Mistake] | None, several: bool) -> Markup:
    """The sections of one run; with `several` on the page, under a heading with its letter and name."""
    heading: Any = None
    level = "h2"
    if several:
        heading = [
            tag("h2", badge(run), " ", run.name),
            tag("p", tag("span", str(run.folder), class_="path"), class_="soft"),
        ]
        level = "h3"
    parts = [_problems(run)]
    if run.validation:
        parts += [_classes(run.validation, level)]
    if mistakes is not None:
        parts.append(_gallery(mistakes, level))
    parts.append(_skipped(run, level))
    return tag("section", heading, parts)


def _problems(run: Run) -> Markup | None:
    if not run.problems:
        return None
    return tag("div", [tag("p", problem) for problem in run.problems], class_="note", role="note")


# ---- classes


def _classes(validation: Validation, level: str) -> Markup:
    document = validation.document
    rows = sorted(document["per_class"], key=lambda row: (row["recall"], -row["support"]))
    worst = _confused(validation)
    return tag(
        "div",
        tag(level, "Classes"),
        tag("p", _in_words(document), class_="soft"),
        tag("p", "Figures ", validation.origin, ".", class_="origin"),
        tag(
            "div",
            _confusion(validation) if validation.confusion else None,
            tag("div", _per_class(rows), _pairs(worst) if worst else None),
            class_="pair" if len(_present(validation)) <= COUNTED_CLASSES else "",
        ),
    )


def _in_words(document: dict[str, Any]) -> str:
    said = [f"{document.get('num_images') or 0:,} images", f"top-1 {document['top1']:.2f} %"]
    said += [f"top-{document.get('top5_k', 5)} {document['top5']:.2f} %"] if document.get("top5") is not None else []
    said += [f"loss {document['loss']:.4f}"] if document.get("loss") is not None else []
    macro = document.get("macro") or {}
    if {"recall", "f1"} <= macro.keys():
        said.append(f"mean over the classes of recall {macro['recall']:.2f} %, of F1 {macro['f1']:.2f} %")
    said += [f"calibration error {document['ece']:.2f} %"] if document.get("ece") is not None else []
    return ", ".join(said) + "."


def _present(validation: Validation) -> list[str]:
    """The classes that have images or were given to one, in the model's order."""
    seen = {name for cell in validation.confusion for name in cell}
    return [name for name in dict.fromkeys(validation.class_names) if name in seen]


def _confusion(validation: Validation) -> Markup:
    names = _present(validation)
    if len(names) <= NAMED_CLASSES:
        text = "Which class the images of each class were given: true classes in rows, given ones in columns."
        return tag(
            "figure", tag("div", confusion_chart(validation.confusion, names), class_="scroll"), tag("figcaption", text)
        )
    text = f"The confusion of {len(names):,} classes: true classes in rows, given ones in columns."
    picture = tag("img", src=_drawn(validation, names), alt=text, class_="inverts")
    return tag("figure", tag("div", picture, class_="scroll wide", tabindex=0), tag("figcaption", text))


def _drawn(validation: Validation, names: Sequence[str]) -> str:
    """The matrix as `validate` draws it, for more classes than cells with numbers have room for."""
    import numpy as np

    from visformer.figures import confusion_figure

    place = {name: number for number, name in enumerate(names)}
    matrix = np.zeros((len(names), len(names)), dtype=np.int64)
    for (true, given), count in validation.confusion.items():
        if true in place and given in place:
            matrix[place[true], place[given]] += count
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "confusion.png"
        confusion_figure(matrix, names, path)
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _confused(validation: Validation) -> list[tuple[str, str, int, float]]:
    """(true, given, images, percent of the true class), the most images first."""
    totals: dict[str, int] = {}
    for (true, _), count in validation.confusion.items():
        totals[true] = totals.get(true, 0) + count
    pairs = [(t, g, n, 100 * n / totals[t]) for (t, g), n in validation.confusion.items() if t != g]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[3], pair[:2]))[:LISTED]


def _per_class(rows: Sequence[dict[str, Any]]) -> Markup:
    heads = ["class", "images", "recall", "precision, %", "F1, %"]
    lines = []
    for row in rows[:MOST_ROWS]:
        bar = tag("span", tag("i", style=f"width:{row['recall']:.1f}%"), class_="bar", aria_hidden="true")
        cells = [tag("th", row["class"], scope="row"), tag("td", f"{row['support']:,}", class_="number")]
        cells.append(tag("td", bar, tag("span", f"{row['recall']:.2f} %", class_="share"), class_="number"))
        cells += [tag("td", f"{row[name]:.2f}", class_="number") for name in ("precision", "f1")]
        lines.append(tag("tr", cells))
    first = _table("The classes, lowest recall first", heads, lines[:LISTED])
    if len(lines) <= LISTED:
        return first
    return tag(
        "div",
        first,
        tag("details", tag("summary", f"{len(lines) - LISTED:,} more classes"), _table("", heads, lines[LISTED:])),
    )


def _pairs(pairs: Sequence[tuple[str, str, int, float]]) -> Markup:
    lines = [
        tag(
            "tr",
            tag("td", true),
            tag("td", given),
            tag("td", f"{count:,}", class_="number"),
            tag("td", f"{share:.2f}", class_="number"),
        )
        for true, given, count, share in pairs
    ]
    return _table("The pairs most often confused", ["true", "given", "images", "of the class, %"], lines, left=2)


def _table(caption: str, heads: Sequence[str], lines: Sequence[Markup], left: int = 1) -> Markup:
    header = tag(
        "tr", [tag("th", head, scope="col", class_="number" if i >= left else "") for i, head in enumerate(heads)]
    )
    said = tag("caption", caption) if caption else None
    return tag("div", tag("table", said, tag("thead", header), tag("tbody", lines)), class_="scroll", tabindex=0)


# ---- mistakes


def _gallery(mistakes: Sequence[Mistake], level: str) -> Markup:
    if not mistakes:
        return tag("div", tag(level, "Worst mistakes"), tag("p", "None of the images was given a wrong class."))
    said = (
        f"The {len(mistakes)} wrongly labelled images with the highest loss, worst first." if len(mistakes) > 1 else ""
    )
    said += " They are mislabelled, unusual, or what to collect more of."
    figures = [_shown(mistake) for mistake in mistakes]
    return tag(
        "div", tag(level, "Worst mistakes"), tag("p", said, class_="soft"), tag("div", figures, class_="gallery")
    )


def _shown(mistake: Mistake) -> Markup:
    words = f"{mistake.name}: is {mistake.true}, was given {mistake.predicted}"
    picture = tag("div", class_="gone", role="img", aria_label=words)
    if mistake.picture:
        picture = tag("img", src=mistake.picture, alt=words, class_="tiny" if mistake.tiny else "")
    sure = "" if mistake.confidence is None else f" {mistake.confidence:.1f} %"
    own = "" if mistake.of_true is None else f" {mistake.of_true:.1f} %"
    caption = [
        tag("span", "given ", tag("b", mistake.predicted, class_="given"), sure), tag("br"),
        tag("span", "is ", tag("b", mistake.true), own), tag("br"),
        "no finite output" if mistake.loss is None else f"loss {mistake.loss:.2f}",
        tag("span", Path(mistake.name).name, class_="path", title=mistake.name),
    ]  # fmt: skip
    return tag("figure", picture, tag("figcaption", caption))


# ---- what was skipped, and the setting


def _skipped(run: Run, level: str) -> Markup | None:
    document = run.validation.document if run.validation else {}
    listed = [row for row in _list(document.get("skipped")) if isinstance(row, dict)]
    count = run.summary.get("skipped_images")
    count = count if isinstance(count, int) else 0
    if not listed and not count:
        return None
    said = []
    if count:
        said.append(tag("p", f"{count:,} image{'' if count == 1 else 's'} could not be read while training."))
    if listed:
        names = [
            tag("li", tag("span", str(row.get("path", "")), class_="path"), f": {row.get('reason', '')}")
            for row in listed[:MOST_ROWS]
        ]
        said.append(
            tag("details", tag("summary", f"{len(listed):,} could not be read when measuring"), tag("ul", names))
        )
    return tag("div", tag(level, "Skipped images"), said)


def setting(runs: Sequence[Run]) -> Markup | None:
    """On which device and with which versions each run ran, and on how many images, as their checkpoints say."""
    runs = [run for run in runs if run.summary]
    facts = [{name: value for name, value in _facts(run.summary).items() if value} for run in runs]
    rows = [
        tag("tr", tag("th", name, scope="row"), [tag("td", fact.get(name, ""), class_="value") for fact in facts])
        for name in dict.fromkeys(name for fact in facts for name in fact)
    ]
    if not rows:
        return None
    head = tag("thead", tag("tr", tag("td"), [tag("th", badge(run), scope="col") for run in runs]))
    table = tag("table", head if len(runs) > 1 else None, tag("tbody", rows))
    return tag("section", tag("h2", "Device and versions"), tag("div", table, class_="scroll", tabindex=0))


def _facts(summary: dict[str, Any]) -> dict[str, str | None]:
    versions = summary.get("versions")
    return {
        "device": str(summary.get("device") or ""),
        **({name: str(version) for name, version in versions.items()} if isinstance(versions, dict) else {}),
        "training images": _count(summary.get("train_images")),
        "validation images": _count(summary.get("val_images")),
        "optimizer steps": _count(summary.get("step")),
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None
