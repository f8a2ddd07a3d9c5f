"""From YAML, command line or keywords to an options dataclass: defaults < YAML file or recipe < what was typed.

An options dataclass is one whose fields come from `config.option`; its annotations say what a value must be
(`option_types.py`), its own `__post_init__` what range it may have. This module finds the values, and turns each
mistake into one line that names the option, the value, the rule and where it stands.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from visformer.config import TrainConfig, fields_by_group
from visformer.errors import UsageError, nearest
from visformer.option_types import BOOLEANS, convert, expected, kinds, takes_several

T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?\.?\d")
_COMMAND_LINE = ""  # the origin of what was typed, which needs no pointing at


@dataclasses.dataclass(frozen=True)
class Given:
    """A value as it was found, and where: "FILE, line N", or nothing when it was typed."""

    value: Any
    origin: str = _COMMAND_LINE

    def at(self) -> str:
        return f" ({self.origin})" if self.origin else ""


def parse(cls: type[T], argv: Sequence[str], *, prog: str) -> T:
    """Fill `cls` from command-line words; `-c/--config` names a YAML file or recipe, over which the other words win.

    `prog` is the command's name. Raises `UsageError` for what is unknown, missing, of the wrong type or out of range.
    """
    config, given = _read_command_line(cls, argv, prog)
    return _build(cls, {**_read_config(cls, config), **given}, from_file=config is not None)


def from_keywords(cls: type[T], keywords: Mapping[str, Any], *, config: str | os.PathLike | None = None) -> T:
    """Fill `cls` from Python keywords over a YAML file or recipe, with the same checks as the command line's."""
    known = _hints(cls)
    for name in keywords:
        if name not in known:
            raise UsageError(f"{name}: no such option{nearest(name, [*known, 'config'])}")
    given = {name: Given(value) for name, value in keywords.items()}
    read = _read_config(cls, None if config is None else os.fspath(config))
    return _build(cls, {**read, **given}, from_file=config is not None)


def to_yaml(options: Any, names: Collection[str] | None = None) -> str:
    """Every option with its value, or those of `names`, in sections, as YAML that reads back to equal options."""
    sections = []
    for title, fields in fields_by_group(type(options)).items():
        kept = [field.name for field in fields if names is None or field.name in names]
        lines = [_yaml_line(name, getattr(options, name)) for name in kept]
        sections.append(f"# {title.lower()}\n{''.join(lines)}")
    return "\n".join(sections)


def _yaml_line(name: str, value: Any) -> str:
    # PyYAML writes the line breaks of Unicode as they are and folds them to a space when it reads; escapes come back.
    readable = not any(mark in str(value) for mark in "\x85\u2028\u2029")
    if isinstance(value, (list, tuple)):
        return f"{name}: {yaml.safe_dump(list(value), default_flow_style=True, allow_unicode=readable, width=10**6)}"
    return yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=readable, width=10**6)


def recipes() -> dict[str, Path]:
    """The recipes that come with the package (in a checkout: configs/visformer), by name."""
    packaged = Path(__file__).parent / "recipes"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs" / "visformer"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


# ---- the command line


def _read_command_line(cls: type, argv: Sequence[str], prog: str) -> tuple[str | None, dict[str, Given]]:
    """The config's name, if any, and the flags given (`--name value` or `--name=value`; hyphens are underscores)."""
    hints, flags = _hints(cls), _flags(cls)
    words = list(argv)
    bare: list[str] = []
    config: str | None = None
    given: dict[str, Given] = {}
    while words:
        word = words.pop(0)
        if word == "--":
            bare += words
            break
        if not _is_flag(word):
            bare.append(word)
            continue
        flag, equals, attached = word.partition("=")
        name = _name_of(flag, flags, prog)
        value = attached if equals else _take(words, hints.get(name, str), flag)
        if name == "config":
            if config is not None:
                raise UsageError(f"{flag} {value}: a second config; {config} is given already, and only one can be")
            config = value
        elif name in _positional(cls) and takes_several(hints[name]):
            bare.append(value)
        else:
            given[name] = Given(value)
    return config, {**given, **_assign_positional(cls, bare, prog)}


def _is_flag(word: str) -> bool:
    """True for `-c` and `--name`; False for `-` (stdin) and for negative numbers."""
    return len(word) > 1 and word.startswith("-") and not _NUMBER.match(word)


def _name_of(flag: str, flags: Mapping[str, str], prog: str) -> str:
    """The option that a flag stands for; `UsageError` with the nearest ones if there is none."""
    name = flag.removeprefix("--").replace("-", "_")
    if flag == "-c":
        return "config"
    if flag.startswith("--") and name in flags:
        return flags[name]
    if flag.startswith("--") and name in _hints(TrainConfig):
        raise UsageError(f"{flag}: an option of visformer train, not of {prog}; see {prog} --help")
    near = nearest(f"--{name}", [f"--{known}" for known in flags]) if flag.startswith("--") else ""
    raise UsageError(f"{flag}: no such option of {prog}{near or f'; see {prog} --help'}")


def _take(words: list[str], hint: Any, flag: str) -> Any:
    """Remove from `words` the value of `flag`: nothing after a bare boolean, every number where several are allowed."""
    value = words[0] if words and not _is_flag(words[0]) else None
    if bool in kinds(hint) and (
        value is None or (str not in kinds(hint) and value.lower() not in {*BOOLEANS, "none", "null"})
    ):
        return True
    if value is None:
        raise UsageError(f"{flag}: needs a value ({expected(hint)})")
    count = 1
    if takes_several(hint) and _NUMBER.match(value):
        while count < len(words) and _NUMBER.match(words[count]):
            count += 1
    taken = [words.pop(0) for _ in range(count)]
    return taken if count > 1 else value


def _assign_positional(cls: type, bare: list[str], prog: str) -> dict[str, Given]:
    """Hand the bare words to the positional options in order; a list takes all that are left."""
    given: dict[str, Given] = {}
    for name in _positional(cls):
        if bare and takes_several(_hints(cls)[name]):
            given[name], bare = Given(bare), []
        elif bare:
            given[name], bare = Given(bare[0]), bare[1:]
    if bare:
        raise UsageError(f"{bare[0]}: not expected here; {prog} takes its options as --name value, see {prog} --help")
    return given


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Name of each option -> its annotation."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _flags(cls: type) -> dict[str, str]:
    """Flag without its dashes -> name of the option, aliases and `config` included."""
    fields = dataclasses.fields(cls)
    aliases = {field.metadata["alias"]: field.name for field in fields if field.metadata.get("alias")}
    return {"config": "config", **{field.name: field.name for field in fields}, **aliases}


@functools.cache
def _positional(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("positional")]


# ---- the YAML file


def _read_config(cls: type, config: str | None) -> dict[str, Given]:
    """The options in a YAML file or recipe; those that only train has are passed over: a recipe serves every verb."""
    if config is None:
        return {}
    path = _find_config(config)
    known = {**_hints(TrainConfig), **_hints(cls)}
    given: dict[str, Given] = {}
    for key, value, line in _read_mapping(path):
        if key not in known:
            raise UsageError(f"{key}: no such option ({path}, line {line}){nearest(key, known)}")
        if key in given:
            raise UsageError(f"{key}: given twice ({given[key].origin}, and line {line}); keep one of the two")
        given[key] = Given(value, f"{path}, line {line}")
    return {key: entry for key, entry in given.items() if key in _hints(cls)}


def _find_config(config: str) -> Path:
    path = Path(config).expanduser()
    if path.exists() and not path.is_dir():
        return path
    known = recipes()
    if config in known:
        return known[config]
    raise UsageError(
        f"{config}: no such config file or recipe; recipes are {', '.join(known)}{nearest(path.stem, known)}"
    )


def _read_mapping(path: Path) -> list[tuple[str, Any, int]]:
    """Key, value and line (from 1) of each entry of a flat YAML file; an empty file has none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a YAML file: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        entries = root.value if isinstance(root, yaml.MappingNode) else None
        build = yaml.SafeLoader("").construct_object
        read = [(str(key.value), build(value, deep=True), key.start_mark.line + 1) for key, value in entries or []]
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist, say
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if entries is None and root is not None and root.value:
        raise UsageError(f"{path}: holds no options; each line must be a name and a value, such as lr: 5e-4")
    return read


# ---- values


def _build(cls: type[T], given: Mapping[str, Given], *, from_file: bool) -> T:
    """Give each value its type and construct `cls`, whose complaint about a range gets the value's origin added."""
    hints = _hints(cls)
    values = {}
    for name, entry in given.items():
        try:
            values[name] = convert(entry.value, hints[name])
        except ValueError:
            raise UsageError(_wrong_value(name, entry, hints[name])) from None
    try:
        options = cls(**values)
    except UsageError as error:
        name = str(error).partition(":")[0]
        raise UsageError(f"{error}{given[name].at() if name in given else ''}") from None
    if isinstance(options, TrainConfig):
        options.given, options.from_file = frozenset(values), from_file
    return options


def _wrong_value(name: str, entry: Given, hint: Any) -> str:
    value = repr(entry.value)
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    choices = [c for kind in kinds(hint) if typing.get_origin(kind) is Literal for c in typing.get_args(kind)]
    near = nearest(str(entry.value), choices)
    quotes = "; put it in quotes" if str in kinds(hint) and isinstance(entry.value, (int, float)) else ""
    return f"{name}: {shown} is not {expected(hint)}{entry.at()}{near}{quotes}"
