"""HTML and SVG that cannot be broken into: text is escaped as it is put in, and only what `tag` made is not.

tag("p", "5 < 6, says ", tag("b", name), class_="note")
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

_EMPTY = {"meta", "img", "br", "link", "hr"}  # elements without content or end


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Children are text, numbers, `Markup`, or iterables of these; None is left out.

    An attribute's underscores are hyphens, one at its end is dropped (`class_`); None and False leave it out, True
    gives it no value.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None and value != "")
    if name in _EMPTY:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Any], separator: str = "") -> Markup:
    """Children one after another, as HTML."""
    return Markup(separator.join(_flatten(children)))


def escape(text: str) -> str:
    """`text` as HTML shows it: nothing in it opens a tag or ends an attribute, and no character breaks the page."""
    kept = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return html.escape(kept, quote=True)


def _flatten(children: Iterable[Any]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, (str, int, float)):
            yield escape(str(child))
        elif child is not None:
            yield from _flatten(child)


def _attribute(key: str, value: Any) -> str:
    if value is False:
        return ""
    name = key.removesuffix("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
