"""What the page is made of: markup that cannot be broken into, and the arithmetic of its charts."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_report import Page
from visformer.verbs.markup import Markup, escape, tag
from visformer.verbs.report_charts import MARK_GAP, apart, thinned, ticks


@given(st.text(st.characters(codec=None)))
def test_any_text_survives_as_text(text):
    page = Page(tag("p", text, title=text))
    shown = "".join(page.words)
    kept = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    assert shown == kept and page.elements == [("p", {"title": kept} if text else {})]
    assert escape(text).encode("utf-8").decode() == escape(text)


def test_markup_is_not_escaped_twice():
    assert tag("p", "1 < 2", tag("br"), [None, 3, [Markup("<i></i>")]], hidden=True, class_="a") == (
        '<p hidden class="a">1 &lt; 2<br>3<i></i></p>'
    )


FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(FINITE, FINITE, st.booleans())
def test_ticks_are_round_few_and_span_the_range(a, b, whole):
    low, high = min(a, b), max(a, b)
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return
    marks = ticks(low, high, 5, whole=whole)
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert 2 <= len(marks) <= 9 and marks == sorted(set(marks))
    assert marks[0] <= low + slack and marks[-1] >= high - slack


@given(st.lists(st.floats(0, 226), max_size=12))
def test_letters_lie_apart_and_above_the_axis(heights):
    moved = apart(sorted(heights), 226)
    assert len(moved) == len(heights) and all(y <= 226 for y in moved)
    assert all(b - a >= MARK_GAP - 1e-9 for a, b in itertools.pairwise(moved))


@settings(max_examples=30)
@given(st.lists(FINITE, min_size=1, max_size=3000))
def test_a_thinned_line_keeps_its_ends_and_extremes(ys):
    xs = list(range(len(ys)))
    kept_x, kept_y = thinned(xs, ys)
    assert len(kept_x) <= 400 and kept_x == sorted(set(kept_x)) and [ys[x] for x in kept_x] == kept_y
    assert {kept_x[0], kept_x[-1]} == {0, len(ys) - 1} and {min(kept_y), max(kept_y)} == {min(ys), max(ys)}
