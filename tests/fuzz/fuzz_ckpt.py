"""A coverage-guided fuzzer of the MindSpore reader; pytest does not collect it.

    python -m venv fuzz && fuzz/bin/pip install atheris             # Linux, in an environment of its own
    PYTHONPATH=.venv/lib/python3.11/site-packages:src \\
        fuzz/bin/python tests/fuzz/fuzz_ckpt.py CORPUS tests/fixtures/ckpt -max_total_time=600 -rss_limit_mb=2048

CORPUS is a folder for what the fuzzer finds worth keeping. Whatever the bytes, reading must give tensors that can be
copied and written again, or raise `UsageError`; another exception, more memory or a second of work is a finding.
"""

# pyright: reportAttributeAccessIssue=false, reportMissingModuleSource=false

import sys
import tempfile
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["visformer.conversion"]):
    from visformer.conversion.containers import aligned
    from visformer.conversion.mindspore import read_mindspore, write_ckpt
from visformer.errors import UsageError

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm"))


def one(data: bytes) -> None:
    path = FOLDER / "a.ckpt"
    path.write_bytes(data)
    try:
        found = read_mindspore(path)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert sum(tensor.nbytes for tensor in found.tensors.values()) <= len(data)
    tensors = {name: aligned(tensor).clone() for name, tensor in found.tensors.items() if tensor.numel()}
    write_ckpt(FOLDER / "b.ckpt", tensors, piece_bytes=64)
    if tensors:
        back = read_mindspore(FOLDER / "b.ckpt").tensors
        assert list(back) == list(tensors)
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
            assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


if __name__ == "__main__":
    atheris.Setup([*sys.argv, "-timeout=5"], one)
    atheris.Fuzz()
