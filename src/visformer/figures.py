"""Pictures of a run: the confusion matrix, the training curves, and images with their predicted labels.

Each function draws one PNG and writes it whole or not at all. Figures are made through matplotlib's `Figure` objects
alone, so nothing global is touched and no display is needed; matplotlib is imported when the first one is drawn.

The confusion matrix takes three forms, by the number of classes that the set contains: up to 20, every cell carries its
count; up to 120, every class its name; above, where a cell would be hardly a pixel, the mistakes are dots sized by
their count, beside the distribution of recall over the classes. All but the first list the worst-confused pairs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from visformer.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS_WITH_NUMBERS = 20
CELLS_WITH_NAMES = 120
LISTED_PAIRS = 20
OTHER = "other classes"

INK, FAINT, BLUE, ORANGE = "#1f2933", "#9aa5b1", "#1f6fb2", "#d9622b"


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw a confusion matrix, (C, C) integers with true classes in rows, into the PNG file `path`.

    Classes without images get no row and no column; what was taken for one of them is gathered under "other classes".
    """
    counts, row_names, column_names = _present(confusion, class_names)
    assert len(counts), "a confusion matrix needs an image"
    shares = counts / counts.sum(axis=1, keepdims=True)
    if len(counts) <= CELLS_WITH_NUMBERS:
        figure = _small_matrix(counts, shares, row_names, column_names)
    elif len(counts) <= CELLS_WITH_NAMES:
        figure = _named_matrix(counts, shares, row_names, column_names)
    else:
        figure = _large_matrix(counts, shares, row_names, column_names)
    right = np.trace(counts[:, : len(counts)])
    summary = f"{right:,} of {counts.sum():,} images right ({100 * right / counts.sum():.2f} %)"
    if len(counts) < len(class_names):
        summary += f", {len(counts):,} of the model's {len(class_names):,} classes in the set"
    figure.suptitle(f"{_plain(title)}\n{summary}" if title else summary, color=INK, fontsize=11)
    _save(figure, path)


def _present(confusion: np.ndarray, class_names: Sequence[str]) -> tuple[np.ndarray, list[str], list[str]]:
    """The rows that hold images, and their columns; with a last column for all other classes where it is needed."""
    rows = np.flatnonzero(confusion.sum(axis=1))
    counts = confusion[np.ix_(rows, rows)]
    names = [class_names[i] for i in rows.tolist()]
    elsewhere = confusion[rows].sum(axis=1) - counts.sum(axis=1)
    if not elsewhere.any():
        return counts, names, names
    return np.column_stack([counts, elsewhere]), names, [*names, OTHER]


def _small_matrix(counts: np.ndarray, shares: np.ndarray, row_names: list[str], column_names: list[str]) -> Figure:
    from matplotlib.colors import PowerNorm

    size = 2.4 + 0.62 * len(column_names)
    figure = _figure(max(size, 4.6), max(size - 0.4, 4.2), layout="compressed")
    axes = figure.subplots()
    # Square-root colours: a few per cent of mistakes shall stand out from none.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="equal")
    widest = len(f"{counts.max():,}")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.35 else INK
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=min(10, 42 / widest))
    _name_ticks(axes, row_names, column_names, fontsize=9)
    _share_bar(figure, image, axes, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    return figure


def _named_matrix(counts: np.ndarray, shares: np.ndarray, row_names: list[str], column_names: list[str]) -> Figure:
    from matplotlib.colors import LogNorm

    figure = _figure(18, 13)
    axes, panel = figure.subplots(1, 2, width_ratios=[13, 4])
    # Mistakes are rare, so the colours are logarithmic: one image in the largest class is still seen.
    lowest = max(1 / counts.sum(axis=1).max(), 1e-4)
    image = axes.imshow(np.where(counts > 0, shares, np.nan), cmap="Blues", norm=LogNorm(lowest / 2, 1), aspect="equal")
    _name_ticks(axes, row_names, column_names, fontsize=max(4.5, min(9, 640 / len(row_names))))
    _share_bar(figure, image, axes)
    _list_pairs(panel, counts, shares, row_names, column_names)
    return figure


def _large_matrix(counts: np.ndarray, shares: np.ndarray, row_names: list[str], column_names: list[str]) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    figure = _figure(18, 12)
    grid = figure.add_gridspec(2, 2, width_ratios=[12, 5], height_ratios=[3, 9])
    axes, histogram, panel = (
        figure.add_subplot(grid[:, 0]),
        figure.add_subplot(grid[0, 1]),
        figure.add_subplot(grid[1, 1]),
    )
    rows, columns = np.nonzero(counts)
    wrong = rows != columns
    rows, columns = rows[wrong], columns[wrong]
    order = np.argsort(counts[rows, columns], kind="stable")  # the worst are drawn last, on top
    rows, columns = rows[order], columns[order]
    axes.plot([0, len(row_names) - 1], [0, len(row_names) - 1], color=FAINT, linewidth=0.6)
    most = counts[rows, columns].max(initial=2)
    dots = axes.scatter(
        columns,
        rows,
        s=2 + 80 * (counts[rows, columns] / most) ** 1.5,
        c=counts[rows, columns],
        cmap=LinearSegmentedColormap.from_list("mistakes", ["#b9c3cf", "#5b8db8", "#17466f", "#c0392b"]),
        norm=LogNorm(1, most),
        linewidths=0,
    )
    axes.set(xlim=(-0.5, len(column_names) - 0.5), ylim=(len(row_names) - 0.5, -0.5), aspect="equal")
    axes.set(xlabel="predicted class, by its number in the set", ylabel="true class, by its number in the set")
    axes.set_title("mistakes", fontsize=11, loc="left", color=INK)
    axes.grid(color="#e4e7eb", linewidth=0.5)
    axes.set_axisbelow(True)
    figure.colorbar(dots, ax=axes, label="images", fraction=0.03, pad=0.02, format="%d")
    recall = 100 * shares[np.arange(len(row_names)), np.arange(len(row_names))]
    histogram.hist(recall, bins=list(range(0, 101, 5)), color=BLUE, edgecolor="white")
    histogram.set(xlim=(0, 100), xlabel="recall, %", ylabel="classes")
    histogram.set_title("recall of the classes", fontsize=11, loc="left", color=INK)
    _bare(histogram)
    _list_pairs(panel, counts, shares, row_names, column_names)
    return figure


def _name_ticks(axes: Axes, row_names: list[str], column_names: list[str], fontsize: float) -> None:
    axes.set_yticks(range(len(row_names)), [_short(name) for name in row_names], fontsize=fontsize)
    steep = 45 if len(column_names) <= CELLS_WITH_NUMBERS + 1 else 90
    alignment: dict[str, Any] = {"ha": "right", "rotation_mode": "anchor"} if steep == 45 else {}
    axes.set_xticks(range(len(column_names)), [_short(name) for name in column_names], fontsize=fontsize)
    axes.tick_params(length=2, colors=INK)
    for label in axes.get_xticklabels():
        label.set(rotation=steep, **alignment)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    for spine in axes.spines.values():
        spine.set_color(FAINT)


def _share_bar(figure: Figure, image: Any, axes: Axes, ticks: list[float] | None = None) -> None:
    from matplotlib.ticker import PercentFormatter

    bar = figure.colorbar(image, ax=axes, ticks=ticks, format=PercentFormatter(1), fraction=0.04, pad=0.02)
    bar.set_label("share of the true class", color=INK)
    bar.outline.set_edgecolor(FAINT)


def _list_pairs(
    panel: Axes, counts: np.ndarray, shares: np.ndarray, row_names: list[str], column_names: list[str]
) -> None:
    """Write the pairs with the most mistakes into an empty panel, one to a line."""
    panel.set_axis_off()
    panel.set_title("worst-confused pairs", loc="left", fontsize=11, color=INK)
    rows, columns = np.nonzero(counts)
    wrong = rows != columns
    rows, columns = rows[wrong], columns[wrong]
    worst = np.lexsort((columns, rows, -shares[rows, columns], -counts[rows, columns]))[:LISTED_PAIRS]
    lines = [
        (f"{counts[r, c]:,}", f"{100 * shares[r, c]:.0f} %", f"{_short(row_names[r])} → {_short(column_names[c])}")
        for r, c in zip(rows[worst].tolist(), columns[worst].tolist(), strict=True)
    ]
    step = 1 / (LISTED_PAIRS + 1)
    for line, (count, share, names) in enumerate([("images", "share", "true → predicted"), *lines]):
        style: dict[str, Any] = {
            "transform": panel.transAxes,
            "va": "top",
            "fontsize": 8.5,
            "color": INK if line else FAINT,
        }
        y = 1 - line * step
        panel.text(0.10, y, count, ha="right", **style)
        panel.text(0.22, y, share, ha="right", **style)
        panel.text(0.27, y, names, ha="left", **style)


# Title of a panel -> key in metrics.jsonl -> (name in the legend, colour).
_PANELS = {
    "loss": {"train_loss": ("training", BLUE), "val_loss": ("validation", ORANGE)},
    "accuracy, %": {"top1": ("top-1", ORANGE), "top5": ("top-5", BLUE)},
    "learning rate": {"lr": ("", BLUE)},
    "training, images/s": {"images_per_s": ("", BLUE)},
}


def curves_figure(records: Iterable[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw the curves of a training run into the PNG file `path`.

    `records` are the epoch records of metrics.jsonl, each with `epoch` and any of `train_loss`, `val_loss`, `top1`,
    `top5` (percent), `lr`, `images_per_s`. An epoch that comes twice, as after a resume, counts as it came last; panels
    without a value are left out.
    """
    by_epoch = {record["epoch"]: record for record in records if "epoch" in record}
    panels = []
    for label, lines in _PANELS.items():
        series = {key: _series(by_epoch, key) for key in lines}
        panels.append((label, {key: points for key, points in series.items() if points[0]}))
    panels = [(label, drawn) for label, drawn in panels if drawn]
    rows, columns = max(1, math.ceil(len(panels) / 2)), 2 if len(panels) > 1 else 1
    figure = _figure(5.6 * columns, 3.4 * rows)
    if title:
        figure.suptitle(_plain(title), fontsize=11, color=INK)
    for place, (label, drawn) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for key, (xs, ys) in drawn.items():
            name, color = _PANELS[label][key]
            marker = "o" if len(xs) <= 30 else None
            axes.plot(xs, ys, color=color, label=name, linewidth=1.6, marker=marker, markersize=3.5)
        _finish_curves(axes, label, drawn)
    _save(figure, path)


def _series(by_epoch: dict[int, dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The epochs at which `key` has a finite value, and the values."""
    pairs = [(epoch, by_epoch[epoch].get(key)) for epoch in sorted(by_epoch)]
    kept = [(epoch, float(value)) for epoch, value in pairs if value is not None and math.isfinite(value)]
    return [epoch for epoch, _ in kept], [value for _, value in kept]


def _finish_curves(axes: Axes, label: str, drawn: dict[str, tuple[list[int], list[float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch", color=INK)
    axes.set_title(label, fontsize=11, loc="left", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    epochs = {epoch for xs, _ in drawn.values() for epoch in xs}
    if len(epochs) == 1:
        axes.set_xlim(min(epochs) - 1, min(epochs) + 1)
    axes.grid(color="#e4e7eb", linewidth=0.7)
    _bare(axes)
    for key in drawn.keys() & {"lr", "images_per_s"}:
        axes.set_ylim(0, 1.08 * max(drawn[key][1]) or 1)
    if "lr" in drawn:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if "top1" in drawn:
        xs, ys = drawn["top1"]
        best = int(np.argmax(ys))
        axes.plot(xs[best], ys[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
        text = f"best top-1: {ys[best]:.2f} %, epoch {xs[best]}"
        axes.text(0.98, 0.05, text, transform=axes.transAxes, ha="right", fontsize=9, color=INK)
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=9)


def predictions_figure(
    images: Sequence[Any],
    records: Sequence[dict[str, Any]],
    path: str | Path,
    *,
    true_labels: Sequence[str] | None = None,
    columns: int = 6,
) -> None:
    """Draw images with their best label into the PNG file `path`, in rows of `columns`.

    `images` are PIL images or uint8 arrays (H, W) or (H, W, C), `records` what `predict` returned for them. With
    `true_labels`, a wrong label is red and followed by the right one.
    """
    columns = max(1, min(columns, len(images)))
    rows = math.ceil(len(images) / columns)
    figure = _figure(1.75 * columns, 2.15 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid:
        axes.set_axis_off()
    for place, (axes, image, record) in enumerate(zip(grid, images, records, strict=False)):
        pixels = np.asarray(image)
        axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, interpolation="nearest")
        if "error" in record:
            axes.set_title("error", fontsize=9, color=ORANGE)
            continue
        best = record["predictions"][0]
        text, color = f"{_short(best['label'])}\n{100 * best['probability']:.1f} %", INK
        if true_labels is not None and true_labels[place] != best["label"]:
            text, color = f"{text} (is {_short(true_labels[place])})", "#c0392b"
        axes.set_title(text, fontsize=9, color=color)
    _save(figure, path)


def _figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _plain(text: str) -> str:
    """`text` as matplotlib shall print it: a dollar sign would open a formula."""
    return text.replace("$", r"\$")


def _short(name: str, longest: int = 24) -> str:
    """`name` with its middle left out when it is long: names that differ only at the end stay apart."""
    if len(name) > longest:
        name = f"{name[: longest // 2]}…{name[-(longest // 2 - 1) :]}"
    return _plain(name)


def _save(figure: Figure, path: str | Path) -> None:
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; the warning for each letter helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        atomic_write(
            path, lambda file: figure.savefig(file, format="png", dpi=130, bbox_inches="tight", pad_inches=0.12)
        )
