"""What `visformer VERB --help` prints: examples first, then every option with its sentence and default."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from visformer.config import fields_by_group
from visformer.option_types import placeholder, takes_several
from visformer.options import recipes


def help_text(cls: type, *, prog: str, summary: str, examples: Sequence[str]) -> str:
    """The whole help of a verb whose options are the dataclass `cls`, wrapped to the terminal's width."""
    positional = [field for field in dataclasses.fields(cls) if field.metadata.get("positional")]
    hints = typing.get_type_hints(cls)
    words = "".join(
        f" [{field.name.upper()} ...]" if takes_several(hints[field.name]) else f" {field.name.upper()}"
        for field in positional
    )
    commands = "\n".join(f"  {example}" for example in examples)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s{words} [-c CONFIG] [--name value ...]",
        description=f"{summary}\n\nexamples:\n{commands}",
        formatter_class=_Formatter,
        add_help=False,
    )
    general = parser.add_argument_group("General")
    general.add_argument("-h", "--help", action="store_true", help="print this and end")
    general.add_argument(
        "-c",
        "--config",
        metavar="FILE|RECIPE",
        help=f"YAML file of options, or a recipe ({', '.join(recipes())}); what is typed wins over it",
    )
    for title, fields in fields_by_group(cls).items():
        group = parser.add_argument_group(title)
        for field in fields:
            flags = [f"--{name}" for name in (field.name, field.metadata.get("alias")) if name]
            shape = "TEXT" if field in positional else placeholder(hints[field.name])
            group.add_argument(*flags, metavar=shape, help=_sentence(field))
    return parser.format_help()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines, and gives the sentences one column however long the flags are."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=28, **settings)


def _sentence(field: dataclasses.Field) -> str:
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
    if isinstance(default, (list, tuple)):
        default = ",".join(str(item) for item in default)
    shown = "" if default == "" else f" (default: {default})"
    return f"{field.metadata['help']}{shown}".replace("%", "%%")
