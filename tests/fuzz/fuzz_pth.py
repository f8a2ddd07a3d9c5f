"""A coverage-guided fuzzer of the torch reader, container and pickle; pytest does not collect it.

    python -m venv fuzz && fuzz/bin/pip install atheris             # Linux, in an environment of its own
    export PYTHONPATH=.venv/lib/python3.11/site-packages:src
    fuzz/bin/python tests/fuzz/fuzz_pth.py --seeds CORPUS           # small files that torch.save writes, and pickles
    fuzz/bin/python tests/fuzz/fuzz_pth.py CORPUS -max_total_time=600 -rss_limit_mb=2048

Bytes that begin like a file of torch.save are read as one; any others are taken for the pickle in a well-formed archive
with two storages, so that the fuzzer need not find its way through zip. Whatever the bytes, reading must give tensors
that can be copied, of no more than twice the file, or raise `UsageError`; another exception is a finding, and so is
more memory or a second of work.
"""

# pyright: reportAttributeAccessIssue=false, reportMissingModuleSource=false

import argparse
import io
import pickle
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["visformer.conversion", "pickletools"]):
    from visformer.conversion.archives import LEGACY_MAGIC, ZIP_MAGIC
    from visformer.conversion.pickles import read_pth
from visformer.errors import UsageError

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm"))


def archive(pickled: bytes) -> bytes:
    """A zip archive as torch writes it, around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for name, content in [
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            ("data/0", bytes(96)),
            ("data/1", b"\1"),
        ]:
            file.writestr(f"a/{name}", content)
    return out.getvalue()


def one(data: bytes) -> None:
    path = FOLDER / "a.pth"
    file = data if data.startswith((ZIP_MAGIC, LEGACY_MAGIC)) else archive(data)
    path.write_bytes(file)
    for ema in (True, False):
        try:
            found = read_pth(path, ema=ema)
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        assert found.tensors
        assert sum(tensor.clone().nbytes for tensor in found.tensors.values()) <= 2 * len(file)
        assert len(repr(found.facts)) < 100 * len(file) + 1000


def seeds(folder: Path) -> None:
    """Documents of the layouts that are known, as files and as bare pickles."""
    state = OrderedDict([("module.a", torch.arange(6.0).reshape(2, 3).t()), ("module.b", torch.tensor(True))])
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    averaged = {"module.n_averaged": torch.tensor(3), **state}
    arguments = argparse.Namespace(lr=0.1, model="x", size=(1, 2), nested={"a": [None, -1]})
    documents = [
        state,
        {"w": parameter, "e": torch.zeros(0, 3), "u": torch.ones(1, dtype=torch.uint16)},
        {"model": state, "model_ema": averaged, "args": arguments, "epoch": 9, "optimizer": {"state": {0: state}}},
        {"state_dict": {"state_dict": state}, "state_dict_ema": state, "metric": 0.5, "dtype": torch.float16},
        {"model": state, "device": torch.device("cpu"), "size": torch.Size([1, 2]), "s": {1, 2}, "big": 1 << 70},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for index, document in enumerate(documents):
        for zipped in (True, False):
            out = io.BytesIO()
            torch.save(document, out, _use_new_zipfile_serialization=zipped)
            (folder / f"file-{index}-{zipped}").write_bytes(out.getvalue())
            if zipped:
                with zipfile.ZipFile(out) as file:
                    (folder / f"pickle-{index}").write_bytes(file.read("archive/data.pkl"))
    (folder / "protocol-4").write_bytes(pickle.dumps({"a": arguments, "b": [1, 2.5, None], "c": b"x"}, 4))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seeds"]:
        seeds(Path(sys.argv[2]))
    else:
        atheris.Setup([*sys.argv, "-timeout=5"], one)
        atheris.Fuzz()
