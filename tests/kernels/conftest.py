"""Kernels are tested where there is no GPU: their numbers in Triton's interpreter, their machine code by compiling
ahead.

On a machine with a GPU the same tests run the compiled kernels on it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton's interpreter, for one test: on for others of this process, operators would run by it on the CPU."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        interpret_what_is_loaded()


def interpret_what_is_loaded() -> None:
    """Triton decides as it decorates a function whether that is compiled or interpreted, its own functions, `tl.zeros`
    or `tl.sum`, when it is imported; a test of another folder may have brought that about before."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in [m for name, m in sys.modules.items() if name.startswith(("triton.language", "visformer.kernels."))]:
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                setattr(module, name, InterpretedFunction(function.fn))


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch):
    """The library's convolutions on a GPU, which kernels are held against, in fp32 instead of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: a GPU, or the CPU with the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def compile_ahead(tmp_path_factory):
    """A function of Python statements that launch kernels on CPU tensors, as large as they may be: it compiles each
    launch for compute capability 9.0 instead, in one process, and gives a list of what the kernels take, in order, as
    `ahead_of_time.used` names it. Torch is at hand as `torch`."""

    def compile_them(statements: str) -> list[SimpleNamespace]:
        environment = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
        script = Path(__file__).with_name("ahead_of_time.py")
        done = subprocess.run(
            [sys.executable, script],
            input=statements,
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [SimpleNamespace(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]

    return compile_them
