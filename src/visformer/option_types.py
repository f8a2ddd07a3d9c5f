"""What the value of an option may be: from text to a typed value, and from an annotation to words.

An annotation is one of float, int, bool, str, None, a Literal, a tuple or a list of these, or a union. `convert` lets
jsonargparse judge the value, after making the spellings that people use into the one that it knows: `1` and `yes` for
True, `0.08,1` and `(0.08, 1)` for [0.08, 1], `None` for nothing, `BICUBIC` and `ce` for bicubic and CE (MindCV's files
have these), and `1e-3`, which PyYAML reads as text, for a number.
"""

from __future__ import annotations

import argparse
import math
import os
import types
import typing
from typing import Any, Literal

import yaml

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_COUNTS = {2: "two", 3: "three", 4: "four"}


def kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def takes_several(hint: Any) -> bool:
    """True when a tuple or list is among what the annotation allows."""
    return any(typing.get_origin(kind) in (list, tuple) for kind in kinds(hint))


def convert(value: Any, hint: Any) -> Any:
    """`value`, from a command line, a YAML file or Python, as the annotation wants it; `ValueError` if it cannot be."""
    import jsonargparse

    value = _common_spelling(value, hint)
    if value is None and type(None) not in kinds(hint):  # jsonargparse lets None pass everywhere
        raise ValueError("None")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        converted = parser.parse_object({"value": value}).value
    except (argparse.ArgumentError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError("not finite")
    return converted


def _common_spelling(value: Any, hint: Any) -> Any:
    """The spelling of `value` that jsonargparse reads as `hint`; a value that needs no help comes back as it is."""
    allowed = kinds(hint)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None and type(None) not in allowed and str in allowed:
        return ""  # `ckpt_path:` with nothing after it
    if isinstance(value, int) and value in (0, 1) and bool in allowed and int not in allowed:
        return bool(value)
    if not isinstance(value, str):
        return value
    if value in ("None", "null") and type(None) in allowed:
        return None
    if value.lower() in BOOLEANS and bool in allowed:
        return BOOLEANS[value.lower()]
    if takes_several(hint) and (
        value[:1] in ("[", "(") or "," in value or not any(k in (int, float, str) for k in allowed)
    ):
        return _split(value)
    choices = [choice for kind in allowed if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if value not in choices:
        value = next((choice for choice in choices if choice.lower() == value.lower()), value)
    return value


def _split(text: str) -> Any:
    """'0.08, 1' or '(0.08, 1)' -> ['0.08', '1']; what is YAML's own list is left to YAML."""
    if text.startswith("["):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return [part.strip() for part in text.strip("()").split(",") if part.strip()]


def expected(hint: Any) -> str:
    """The annotation in words, for an error message: 'a number or None'."""
    return " or ".join(_words(kind) for kind in kinds(hint))


def _words(kind: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "True or False", str: "text", type(None): "None"}
    if kind in names:
        return names[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        choices = [str(choice) or "''" for choice in arguments]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    plural = {float: "numbers", int: "whole numbers", str: "texts"}[arguments[0]]
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"{_COUNTS[len(arguments)]} {plural} such as {','.join('12'[i % 2] for i in range(len(arguments)))}"
    return f"a list of {plural} such as {'a,b' if arguments[0] is str else '1,2'}"


def placeholder(hint: Any) -> str:
    """The annotation in capitals, for the help: NUMBER, {a,b} or A,B."""
    names = {float: "NUMBER", int: "N", bool: "True|False", str: "TEXT"}
    parts = []
    for kind in kinds(hint):
        if kind is type(None):
            continue
        arguments = typing.get_args(kind)
        if typing.get_origin(kind) is Literal:
            parts.append("|".join(str(choice) for choice in arguments if choice != ""))
        elif arguments:
            several = arguments[0] is str or arguments[-1] is Ellipsis or typing.get_origin(kind) is list
            parts.append("A,B,..." if several else ",".join("ABCD"[: len(arguments)]))
        else:
            parts.append(names[kind])
    return "|".join(parts)
