"""Checkpoints of the other projects: read as ours, and ours written as theirs.

`read_any` takes any known format; `convert_file` also tells how it came about; `write_as` goes the other way.
"""

from visformer.conversion.changing import resized, with_new_head
from visformer.conversion.layouts import LAYOUTS
from visformer.conversion.reading import CONTAINERS, Conversion, convert_file, read_any
from visformer.conversion.recognise import CUSTOM, Choices, name_and_source
from visformer.conversion.writing import Written, check_suffix, write_as

__all__ = [
    "CONTAINERS",
    "CUSTOM",
    "LAYOUTS",
    "Choices",
    "Conversion",
    "Written",
    "check_suffix",
    "convert_file",
    "name_and_source",
    "read_any",
    "resized",
    "with_new_head",
    "write_as",
]
