"""What every file must meet, even a hostile one: a result or a one-line error that names it, soon, in little memory."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from visformer.conversion.containers import Foreign
from visformer.conversion.foreign import read_foreign
from visformer.errors import UsageError

FIXTURES = Path(__file__).parents[1] / "fixtures"
MINI = FIXTURES / "upstream" / "mini"
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
DESTRUCTION = settings(PROPERTY, max_examples=300)

GROWTH = """
import re, sys
from visformer.conversion.foreign import read_foreign
def anonymous():
    text = open('/proc/self/smaps_rollup').read()
    return int(re.search(r'Anonymous: +([0-9]+) kB', text)[1]) * 1024
for path in sys.argv[1:] * 2:  # the first round loads what the readers need
    before = anonymous()
    tensors = read_foreign(path).tensors
    touched = sum(float(tensor.reshape(-1)[::1024].sum()) for tensor in tensors.values())
    print(anonymous() - before, touched, sum(tensor.nbytes for tensor in tensors.values()))
    del tensors
"""


def saved(document, **options) -> bytes:
    """The file that `torch.save` writes."""
    out = io.BytesIO()
    torch.save(document, out, **options)
    return out.getvalue()


def attempt(path: Path, data: bytes | None = None) -> Foreign | str:
    """What reading gives, or the message with which it is refused; anything else fails the test."""
    if data is not None:
        path.write_bytes(data)
    try:
        found = read_foreign(path)
    except UsageError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 400
        return message
    assert found.tensors and all(isinstance(tensor, Tensor) for tensor in found.tensors.values())
    for tensor in found.tensors.values():  # whatever came out can be touched
        tensor.clone().numel()
    return found


def taken(path: Path, data: bytes | None = None) -> Foreign:
    """What reading gives, which must be a result."""
    found = attempt(path, data)
    assert isinstance(found, Foreign), found
    return found


def refused(path: Path, data: bytes | None, *words: str, within_s: float = 4.0) -> str:
    """The message that `data` is refused with, which must say all of `words` and take little processor time."""
    start = time.process_time()
    message = attempt(path, data)
    assert time.process_time() - start < within_s
    assert isinstance(message, str), "this was to be refused"
    for word in words:
        assert word in message
    return message


def private_growth(*paths: Path) -> list[tuple[int, float, int]]:
    """For each file, read in a process of its own, every page of it: bytes of private memory that this took, the sum
    of a value out of each page, and the bytes that its tensors come to."""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("only Linux says how much memory is private")
    command = [sys.executable, "-c", GROWTH, *map(str, paths)]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[len(paths) :]
    return [(int(growth), float(touched), int(total)) for growth, touched, total in map(str.split, filter(None, rows))]
