"""Predictions as text, JSON or CSV, record by record, so that a run over many files needs no memory for its output.

Each format is a generator from records to pieces of text. A record is `{"path", "predictions": [{"label", "index",
"probability"}, ...]}`, best first, or `{"path", "error"}`; a class of ImageNet also has its "description".
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Record = dict[str, Any]

SAMPLE = 64  # records that are looked at before the first line, to find the widths of the columns
WIDEST = 60  # cells; a longer path moves its own line alone
BAR_CELLS = 10
CSV_COLUMNS = ["path", "rank", "label", "description", "index", "probability", "error"]


def as_json(records: Iterable[Record]) -> Iterator[str]:
    """One JSON array, a record a line."""
    separator = "[\n"
    for record in records:
        yield f"{separator}  {json.dumps(record, ensure_ascii=False, allow_nan=False)}"
        separator = ",\n"
    yield "\n]\n" if separator != "[\n" else "[]\n"


def as_csv(records: Iterable[Record]) -> Iterator[str]:
    """A header, then one row for each prediction, `rank` counting from 1; a failed image has one row with `error`."""
    yield _csv_row(CSV_COLUMNS)
    for record in records:
        if "error" in record:
            yield _csv_row([record["path"], "", "", "", "", "", record["error"]])
            continue
        for rank, best in enumerate(record["predictions"], start=1):
            words = best.get("description", "")
            yield _csv_row([record["path"], rank, best["label"], words, best["index"], repr(best["probability"]), ""])


def as_text(records: Iterable[Record]) -> Iterator[str]:
    """One line an image: path, best label, its probability with a bar, then the others that reach 0.01 %."""
    records = iter(records)
    sample = list(itertools.islice(records, SAMPLE))
    path_width = max((_cells(printable(r["path"])) for r in sample), default=0)
    label_width = max((_cells(_words(r["predictions"][0])) for r in sample if "error" not in r), default=0)
    path_width, label_width = min(path_width, WIDEST), min(label_width, WIDEST // 2)
    for record in itertools.chain(sample, records):
        path = _pad(printable(record["path"]), path_width)
        if "error" in record:
            yield f"{path}  error: {printable(record['error'])}\n"
            continue
        best, *others = record["predictions"]
        bar = _bar(best["probability"])
        line = f"{path}  {_pad(_words(best), label_width)}  {_percent(best['probability']):>8}  {bar}"
        rest = [f"{_words(o)} {_percent(o['probability'])}" for o in others if o["probability"] >= 5e-5]
        yield f"{line}  {', '.join(rest)}".rstrip() + "\n"


FORMATS: dict[str, Callable[[Iterable[Record]], Iterator[str]]] = {"text": as_text, "json": as_json, "csv": as_csv}


def _words(prediction: dict[str, Any]) -> str:
    """What a person calls the class: the first of its describing words if there are any, else its label."""
    return printable(prediction.get("description", "").split(",")[0] or prediction["label"])


def _csv_row(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _percent(probability: float) -> str:
    return f"{100 * probability:.2f} %"


def _bar(probability: float) -> str:
    """A bar of ten cells, filled to an eighth of a cell."""
    eighths = round(probability * BAR_CELLS * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()).ljust(BAR_CELLS)


def printable(text: str) -> str:
    """`text` without what would break a line or move the cursor: control characters and broken bytes as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _cells(text: str) -> int:
    """The columns that `text` takes in a terminal; a Chinese character takes two."""
    from rich.cells import cell_len

    return cell_len(text)


def _pad(text: str, width: int) -> str:
    return text + " " * max(0, width - _cells(text))
