"""The measure of the code: short files, short functions, a `forward` that fits the eye, nothing left undone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

FILE_LINES = 400
FUNCTION_LINES = 60
FORWARD_LINES = 20


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end; a decorator or a comment above is not counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_short_and_opens_with_its_story(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < FILE_LINES
    assert ast.get_docstring(ast.parse(text)), "a file says first what it is"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_functions_are_short(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    limits = {"forward": FORWARD_LINES}
    long = {f.name: lines(f) for f in functions(tree) if lines(f) >= limits.get(f.name, FUNCTION_LINES)}
    assert not long


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_left_undone(path):
    marks = re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b|NotImplementedError", path.read_text(encoding="utf-8"))
    assert not marks


def test_no_file_is_for_whatever_has_no_place():
    assert not [name for name in NAMES if Path(name).stem in ("utils", "util", "helpers", "misc", "common")]
