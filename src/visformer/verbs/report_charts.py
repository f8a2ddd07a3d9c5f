"""Line charts and confusion matrices as inline SVG: no script, no font and no picture from elsewhere.

Colours are the page's variables, so that a chart follows light and dark mode. Sizes are in the units of the view box,
about a pixel each on a wide screen and 0.8 on a telephone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from visformer.verbs.markup import Markup, tag

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 12, 34
MOST_POINTS = 400  # of a line; more are thinned out to the lowest and highest of each stretch
FEW_POINTS = 40  # of a line that gets a dot for each
CELL, SMALL_CELL = 34, 13
COUNTED_CLASSES, NAMED_CLASSES = 25, 120  # in a confusion matrix whose cells, or rows, have room for that
LONGEST_NAME = 18  # letters
MARK_GAP = 11  # between the letters at the ends of lines


@dataclass(frozen=True)
class Line:
    """One line of a chart; `color` is a number of the page's palette, `mark` what stands at the line's end."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int
    dashed: bool = False
    mark: str = ""


def line_chart(title: str, lines: Sequence[Line], *, x_label: str = "epoch", from_zero: bool = False) -> Markup:
    """Lines over a common axis. `from_zero` lets the y axis begin at 0. At least one line has a point."""
    lines = [line for line in lines if len(line.xs)]
    assert lines
    x_ticks = ticks(min(min(line.xs) for line in lines), max(max(line.xs) for line in lines), 6, whole=True)
    low, high = min(min(line.ys) for line in lines), max(max(line.ys) for line in lines)
    y_ticks = ticks(min(low, 0.0) if from_zero else low, high, 5)
    scale = _Scale(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    return tag(
        "svg",
        [_grid(scale, x_ticks, y_ticks), tag("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 4, class_="axis end")],
        [_drawn(line, scale) for line in lines],
        _end_marks(lines, scale),
        tag("line", class_="cursor", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM, visibility="hidden"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: " + "; ".join(_in_words(line) for line in lines),
        data_lines=_as_data(lines, scale),
    )


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x_low) / (self.x_high - self.x_low or 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(
            HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low or 1) * (HEIGHT - TOP - BOTTOM), 1
        )


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round numbers, about as many as asked for, the first at most `low` and the last at least `high`."""
    if whole:
        low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    elif high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-15:  # a flat line, in the middle
        pad = max(abs(low) * 0.1, 1e-12) if low else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's or a tooltip's number in as few signs as it takes."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.4g}"


def _grid(scale: _Scale, x_ticks: list[float], y_ticks: list[float]) -> list[Markup]:
    lines = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=scale.y(y), y2=scale.y(y), class_="grid") for y in y_ticks]
    labels = [tag("text", number(y), x=LEFT - 7, y=scale.y(y) + 4, class_="axis end") for y in y_ticks]
    base = HEIGHT - BOTTOM
    ticks_x = [tag("line", x1=scale.x(x), x2=scale.x(x), y1=base, y2=base + 4, class_="tick") for x in x_ticks]
    labels_x = [tag("text", number(x), x=scale.x(x), y=base + 17, class_="axis middle") for x in x_ticks]
    return [*lines, *labels, *ticks_x, *labels_x]


def _drawn(line: Line, scale: _Scale) -> list[Markup]:
    xs, ys = thinned(line.xs, line.ys)
    points = [(scale.x(x), scale.y(y)) for x, y in zip(xs, ys, strict=True)]
    style = f"run-{line.color}" + (" dashed" if line.dashed else "")
    path = tag("polyline", points=" ".join(f"{x:g},{y:g}" for x, y in points), class_=f"line {style}")
    dots = [tag("circle", cx=x, cy=y, r=2.4, class_=f"dot {style}") for x, y in points]
    return [path, *(dots if len(points) <= FEW_POINTS else [])]


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """The line with at most `MOST_POINTS` points: of each stretch the lowest and the highest, in their order."""
    if len(xs) <= MOST_POINTS:
        return list(xs), list(ys)
    kept = {0, len(xs) - 1}
    stretches = MOST_POINTS // 2 - 1
    for stretch in range(stretches):
        span = range(len(xs) * stretch // stretches, len(xs) * (stretch + 1) // stretches)
        kept |= {min(span, key=ys.__getitem__), max(span, key=ys.__getitem__)}
    return [xs[i] for i in sorted(kept)], [ys[i] for i in sorted(kept)]


def _end_marks(lines: Sequence[Line], scale: _Scale) -> list[Markup]:
    """The runs' letters right of their lines' ends, moved apart where they would lie on one another."""
    ends = sorted((scale.y(line.ys[-1]), place) for place, line in enumerate(lines) if line.mark)
    heights = apart([y for y, _ in ends], HEIGHT - BOTTOM)
    return [
        tag(
            "text",
            lines[place].mark,
            x=scale.x(lines[place].xs[-1]) + 6,
            y=round(height + 4, 1),
            class_=f"mark run-{lines[place].color}",
        )
        for (_, place), height in zip(ends, heights, strict=True)
    ]


def apart(heights: Sequence[float], lowest: float) -> list[float]:
    """Rising heights, moved by no more than it takes to lie `MARK_GAP` apart and not below `lowest`."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + MARK_GAP) if moved else height)
    for place in reversed(range(len(moved))):
        limit = moved[place + 1] - MARK_GAP if place + 1 < len(moved) else lowest
        moved[place] = min(moved[place], limit)
    return moved


def _in_words(line: Line) -> str:
    if len(line.ys) == 1:
        return f"{line.label} {number(line.ys[0])}"
    lowest, highest = number(min(line.ys)), number(max(line.ys))
    return f"{line.label} from {number(line.ys[0])} to {number(line.ys[-1])}, between {lowest} and {highest}"


def _as_data(lines: Sequence[Line], scale: _Scale) -> str:
    """What the page's script shows under the pointer: for each line its name, colour and points."""
    rows = []
    for line in lines:
        points = zip(*thinned(line.xs, line.ys), strict=True)
        rows.append([line.label, line.color, [[scale.x(x), number(round(x, 2)), number(y)] for x, y in points]])
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))


def confusion_chart(confusion: dict[tuple[str, str], int], names: Sequence[str]) -> Markup:
    """A confusion matrix for up to `NAMED_CLASSES` classes, true classes in rows.

    Up to `COUNTED_CLASSES` each cell says its count; above, it tells it to who points at it.
    """
    counted = len(names) <= COUNTED_CLASSES
    cell = CELL if counted else SMALL_CELL
    side, margin = cell * len(names), 12 + 6.2 * min(max(map(len, names)), LONGEST_NAME)
    totals = {true: sum(confusion.get((true, given), 0) for given in names) for true in names}
    drawn = [tag("rect", x=margin, y=0, width=side, height=side, class_="cell empty")]
    for row, true in enumerate(names):
        for column, given in enumerate(names):
            if count := confusion.get((true, given), 0):
                place = (margin + cell * column, cell * row)
                words = f"{count:,} of {totals[true]:,} images of {true} were given {given}"
                drawn.append(_cell(place, cell, words, count if counted else None, count / totals[true], row == column))
    for place, name in enumerate(names):
        middle = cell * place + cell / 2 + 4
        turned = f"translate({margin + middle:g} {side + 8}) rotate(-90)"
        drawn.append(tag("text", shortened(name), x=margin - 6, y=middle, class_="name end"))
        drawn.append(tag("text", shortened(name), class_="name end", transform=turned))
    right = sum(confusion.get((name, name), 0) for name in names)
    width = round(margin + side)
    return tag(
        "svg",
        drawn,
        viewBox=f"0 0 {width} {width}",
        # A matrix of many classes is scrolled rather than shrunk until its names cannot be read.
        style=f"max-width:{width}px" + ("" if counted else f";min-width:{width}px"),
        role="img",
        aria_label=f"confusion matrix of {len(names)} classes; {right:,} of {sum(totals.values()):,} images are right",
    )


def _cell(place: tuple[float, float], size: int, words: str, count: int | None, share: float, right: bool) -> Markup:
    x, y = place
    color = f"cell {'right' if right else 'wrong'}"
    # The square root lets a few per cent of mistakes stand out from none.
    opacity = round(math.sqrt(share), 3)
    square = tag("rect", x=x, y=y, width=size - 1, height=size - 1, class_=color, fill_opacity=opacity)
    text = None
    if count is not None:
        kind = f"count {'strong' if share > 0.25 else 'weak'}"
        text = tag("text", f"{count:,}", x=x + size / 2, y=y + size / 2 + 4, class_=kind)
    return tag("g", tag("title", words), square, text)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """`name` with its middle left out when it is long: names that differ only at the end stay apart."""
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-(longest // 2 - 1) :]}"
