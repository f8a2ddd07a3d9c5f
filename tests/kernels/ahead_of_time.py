"""Compile kernels for a GPU that is not there, as far as machine code, and say what each takes of it.

A process of its own, because Triton's interpreter must be off: it reads Python statements on standard input, in which
`torch` is known, and runs them with every launch of a kernel replaced by its compilation for compute capability 9.0
(H100, H200). Arguments are those of the launch itself, so what is compiled is what would run. Writes one JSON object a
line: kernel, registers and spilled bytes of a thread, shared bytes of a program, warps, and what its
instructions are.
"""

import contextlib
import io
import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from visformer.kernels import launch


class Absent:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main() -> None:
    """Run what is on standard input."""
    driver.set_active(Absent())
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    launch.runs_triton = lambda x: True  # before the kernels' modules take it
    compile_and_launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
        print(json.dumps(used(kernel, log.getvalue())), flush=True)
        return kernel

    JITFunction.run = compile_only
    exec(sys.stdin.read(), {"torch": torch})


def used(kernel, log: str) -> dict:
    """What the assembler says in `log` of the one kernel that it has just made; a kernel met before says nothing."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return {
        "kernel": kernel.metadata.name,
        "registers": int(registers[1]) if registers else 0,
        "spilled_bytes": sum(map(int, spills)),
        "shared_bytes": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
        "mma": "mma.sync" in kernel.asm["ptx"],
        "widest_access": widest_access(kernel.asm["ptx"]),
    }


def widest_access(ptx: str) -> int:
    """Bytes that a thread reads of global memory by one instruction, at most."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x[0-9a-f]+|\d+)", ptx)
    return max([int(many or 1) * int(bits) // 8 for many, bits in loads] + [int(n, 0) for n in copies] + [0])


if __name__ == "__main__":
    main()
