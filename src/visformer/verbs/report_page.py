"""The page of one run or several: what stands where, and in which words.

Everything is in the one file: style, script, charts and pictures. What came from outside, such as class names and
paths, goes through `markup.tag`, which escapes it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visformer import console
from visformer.verbs.markup import Markup, tag
from visformer.verbs.report_charts import Line, line_chart, number
from visformer.verbs.report_findings import badge, findings, setting
from visformer.verbs.report_measure import Mistake
from visformer.verbs.report_options import Row, differing, unusual
from visformer.verbs.report_runs import Run

UNKNOWN = "\N{EN DASH}"  # stands for a figure that is not known

# Title of a chart -> what is drawn in it: (name in the records, what the legend says, dashed, from the steps too).
CHARTS: dict[str, list[tuple[str, str, bool, bool]]] = {
    "Loss": [("train_loss", "training", True, False), ("val_loss", "validation", False, False)],
    "Accuracy, %": [("top5", "top-5", True, False), ("top1", "top-1", False, False)],
    "Learning rate": [("lr", "learning rate", False, True)],
    "Training speed, images/s": [("images_per_s", "images/s", False, False)],
    "Gradient norm": [("grad_norm", "gradient norm", False, True)],
    "Waiting for data, % of the training time": [("data_wait", "waiting", False, False)],
}
FROM_ZERO = {"Learning rate", "Training speed, images/s", "Waiting for data, % of the training time", "Gradient norm"}


def page(runs: Sequence[Run], mistakes: dict[str, list[Mistake]], title: str, version: str) -> str:
    """The whole page as text. `mistakes` are the worst by the run's mark; a run that is not in it was not measured."""
    here = Path(__file__)
    style, script = (here.with_name(f"report_page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    title = title or _title(runs)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"visformer {version}"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    written = time.strftime("%Y-%m-%d %H:%M")
    body = tag(
        "body",
        tag("header", tag("h1", title), _subtitle(runs)),
        tag(
            "main",
            _key_figures(runs[0]) if len(runs) == 1 else _comparison(runs),
            _curves(runs),
            _options(runs),
            [findings(run, mistakes.get(run.mark), len(runs) > 1) for run in runs],
            setting(runs),
        ),
        tag("footer", f"Written {written} by visformer {version}."),
        tag("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _title(runs: Sequence[Run]) -> str:
    models, data = (dict.fromkeys(value for value in values if value) for values in _what(runs))
    named = " and ".join(models) if 0 < len(models) <= 2 else f"{len(models)} models" if models else "A run"
    title = f"{named} on {' and '.join(data)}" if 0 < len(data) <= 2 else named
    return title if len(runs) == 1 else f"{title}: {len(runs)} runs"


def _what(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    return [run.model for run in runs], [run.data for run in runs]


def _subtitle(runs: Sequence[Run]) -> Markup | None:
    if len(runs) > 1:
        return None
    run = runs[0]
    device = run.summary.get("device")
    parts = [_status(run), f"seed {run.options['seed']}" if "seed" in run.options else None, device]
    return tag(
        "p",
        ", ".join(str(part) for part in parts if part),
        " · ",
        tag("span", str(run.folder), class_="path"),
        class_="soft",
    )


def _status(run: Run) -> str:
    wanted = run.epochs_wanted
    if wanted is None or run.epochs_done >= wanted:
        return f"{run.epochs_done} epochs"
    return f"unfinished: {run.epochs_done} of {wanted} epochs"


# ---- key figures


def _key_figures(run: Run) -> Markup:
    best, last = run.best, run.last("top1")
    best5 = best.get("top5") if best else None
    figures = [
        ("best top-1", percent(best["top1"] if best else None), f"epoch {best['epoch']}" if best else "not validated"),
        ("top-5 at the best", percent(best5), ""),
        ("last top-1", percent(last), f"top-5 {percent(run.last('top5'))}" if last is not None else ""),
        ("last loss", _plain(run.last("train_loss")), f"validation {_plain(run.last('val_loss'))}"),
        ("epochs", str(run.epochs_done), f"of {run.epochs_wanted}" if run.epochs_wanted else ""),
        ("training speed", _rate(run), "images/s, median of the epochs"),
        ("time", _time(run), "training and validation"),
        ("parameters", _millions(run.parameters), run.model),
    ]
    return tag(
        "dl",
        [tag("div", tag("dt", name), tag("dd", value, tag("small", small))) for name, value, small in figures],
        class_="key",
    )


def _comparison(runs: Sequence[Run]) -> Markup:
    """The key figures of several runs in a table, the best of each column marked."""
    columns = [
        "",
        "run",
        "model",
        "data",
        "best top-1",
        "epoch",
        "top-5",
        "last top-1",
        "val. loss",
        "epochs",
        "images/s",
        "time",
        "parameters",
    ]
    best = [run.best or {} for run in runs]
    ranked = {  # column -> its numbers, and whether more is better
        4: ([b.get("top1") for b in best], max),
        6: ([b.get("top5") for b in best], max),
        7: ([run.last("top1") for run in runs], max),
        8: ([run.last("val_loss") for run in runs], min),
    }
    rows = []
    for place, (run, top) in enumerate(zip(runs, best, strict=True)):
        wanted = f"/{run.epochs_wanted}" if run.epochs_wanted and run.epochs_wanted != run.epochs_done else ""
        cells = [
            badge(run), tag("span", run.name, class_="path", title=str(run.folder)), run.model, run.data,
            percent(top.get("top1")), top.get("epoch", UNKNOWN), percent(top.get("top5")), percent(run.last("top1")),
            _plain(run.last("val_loss")), f"{run.epochs_done}{wanted}", _rate(run), _time(run),
            _millions(run.parameters),
        ]  # fmt: skip
        row = []
        for column, cell in enumerate(cells):
            values, better = ranked.get(column, ([], max))
            known = [value for value in values if value is not None]
            leads = len(set(known)) > 1 and values[place] == better(known)
            row.append(tag("td", cell, class_=f"{'number' if column > 3 else ''}{' best' if leads else ''}".strip()))
        rows.append(tag("tr", row))
    header = tag(
        "tr", [tag("th", name, scope="col", class_="number" if i > 3 else "") for i, name in enumerate(columns)]
    )
    caption = tag("caption", "Accuracies in percent; the best of a column is bold.")
    return tag("div", tag("table", caption, tag("thead", header), tag("tbody", rows)), class_="scroll", tabindex=0)


def percent(value: float | None) -> str:
    """A percentage as the page writes it."""
    return UNKNOWN if value is None else f"{value:.2f} %"


def _plain(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _rate(run: Run) -> str:
    return UNKNOWN if run.images_per_s is None else f"{run.images_per_s:,.0f}"


def _time(run: Run) -> str:
    return UNKNOWN if run.seconds is None else console.duration(run.seconds)


def _millions(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count / 1e6:.2f} M"


# ---- curves


def _curves(runs: Sequence[Run]) -> Markup:
    figures = [figure for name in CHARTS if (figure := _chart(name, runs))]
    if not figures:
        return tag("section", tag("h2", "Curves"), tag("p", "There is nothing to draw yet."))
    legend = None
    if len(runs) > 1:
        legend = tag("ul", [tag("li", badge(run), " ", run.name) for run in runs], class_="legend")
    return tag("section", tag("h2", "Curves"), legend, tag("div", figures, class_="charts"))


def _chart(name: str, runs: Sequence[Run]) -> Markup | None:
    """One chart with the lines of all runs; None where none of them recorded what it shows."""
    lines, shown = [], []
    for order, (key, label, dashed, fine) in enumerate(CHARTS[name]):
        for run in runs:
            xs, ys = run.points(key, fine=fine)
            if not xs:
                continue
            several = len(runs) > 1
            words = (f"{run.mark} {label}" if len(CHARTS[name]) > 1 else run.mark) if several else label
            shade = run.color if several else (order if len(CHARTS[name]) > 1 else 0)
            lines.append(Line(words, xs, ys, shade, dashed, run.mark if several and not dashed else ""))
            if (label, dashed, order) not in shown:
                shown.append((label, dashed, order))
    if not lines:
        return None
    caption: list[Any] = [
        tag("span", tag("span", class_=_swatch(dashed, None if len(runs) > 1 else order)), label)
        for label, dashed, order in reversed(shown)
        if len(CHARTS[name]) > 1
    ]
    best = runs[0].best if len(runs) == 1 and name.startswith("Accuracy") else None
    if best:
        caption.append(f"best {best['top1']:.2f} % in epoch {best['epoch']}")
    elif len(caption) == 0:
        caption.append(_summary(name, runs))
    return tag(
        "figure", tag("h3", name), tag("figcaption", caption), line_chart(name, lines, from_zero=name in FROM_ZERO)
    )


def _swatch(dashed: bool, shade: int | None) -> str:
    return "swatch" + (" dashed" if dashed else "") + ("" if shade is None else f" run-{shade}")


def _summary(name: str, runs: Sequence[Run]) -> str:
    """A chart with one line a run says in words what it comes to."""
    key, _, _, fine = CHARTS[name][0]
    said = []
    for run in runs:
        _, ys = run.points(key, fine=fine)
        if ys:
            middle = sorted(ys)[len(ys) // 2]
            text = (
                f"peak {number(max(ys))}"
                if key == "lr"
                else f"median {number(round(middle, 0 if middle >= 100 else 2))}"
            )
            said.append(f"{run.mark} {text}" if len(runs) > 1 else text)
    return ", ".join(said)


# ---- options


def _options(runs: Sequence[Run]) -> Markup | None:
    known = [run for run in runs if run.options]
    if not known:
        return None
    parts: list[Any] = [tag("h2", "Options")]
    if len(runs) > 1:
        rows = differing(known)
        said = (
            "The runs differ in these options." if rows else "The runs have the same options, but for where they lie."
        )
        parts += [tag("p", said), _option_table(rows, [badge(run) for run in known], None) if rows else None]
    for run in known:
        recipe, rows = unusual(run)
        measure = f"the recipe {recipe}" if recipe else "the defaults"
        who = [badge(run), " ", run.name] if len(runs) > 1 else ["The run"]
        count = f"{len(rows)} option{'' if len(rows) == 1 else 's'}"
        said = [" differs from ", measure, f", the nearest, in {count}." if rows else ", the nearest, in no option."]
        table = _option_table(rows, ["this run"], recipe) if rows else None
        if len(runs) > 1:
            parts.append(tag("details", tag("summary", who, said), table))
        else:
            parts += [tag("p", who, said), table]
    return tag("section", parts)


def _option_table(rows: Sequence[Row], columns: Sequence[Any], recipe: str | None) -> Markup:
    heads = ["option", *columns, *([f"recipe {recipe}"] if recipe else []), "default"]
    lines = []
    for row in rows:
        given = [tag("td", _value(v), class_="value" + (" same" if v == row.default else "")) for v in row.values]
        if recipe:
            given.append(tag("td", _value(row.recipe), class_="value"))
        lines.append(
            tag(
                "tr",
                tag("th", tag("code", row.name), scope="row"),
                given,
                tag("td", _value(row.default), class_="value same"),
            )
        )
    header = tag("tr", [tag("th", head, scope="col") for head in heads])
    return tag("div", tag("table", tag("thead", header), tag("tbody", lines)), class_="scroll", tabindex=0)


def _value(value: Any) -> Markup:
    """An option's value as config.yaml writes it."""
    if isinstance(value, bool) or value is None:
        return tag("code", str(value))
    if isinstance(value, float):
        return tag("code", f"{value:g}")
    if isinstance(value, list):
        return tag("code", "[" + ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) + "]")
    return tag("code", str(value) if value != "" else "(empty)")
