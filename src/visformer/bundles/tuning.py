"""Measuring how to compute a model in a process of its own, beside one that answers requests.

    python -m visformer.bundles.tuning MODEL.safetensors --device cuda --precision bf16 --batch_sizes 1 2 4

Measuring compiles some 250 kernels and runs each: minutes of a processor, and a kernel that fails may end the process's
use of the device. The process that answers reads afterwards what was remembered (`fusion/tuner.py`). On standard output
stands each size of batch as soon as all is known of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from visformer.errors import RunError, VisformerError

_STARTS = 10  # of the process, one for each kernel that ends it
_LOST = 3  # exit code of a process that lost the device
_POLL_S = 0.2


def tune(
    checkpoint: str | Path, device: str, precision: str, batch_sizes: Sequence[int], *, goes_on: Callable[[], bool]
) -> Iterator[int]:
    """Measure for batches of each size; yields a size when it is done.

    Ends early, and with it the process, when `goes_on` gives False. Raises `RunError` with the last line that the
    process wrote when it fails.
    """
    left = list(batch_sizes)
    for _ in range(_STARTS):
        with tempfile.TemporaryFile("w+", encoding="utf-8") as said, tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, "-m", "visformer.bundles.tuning", str(checkpoint)]
            words = ["--device", device, "--precision", precision, "--batch_sizes", *map(str, left)]
            process = subprocess.Popen([*command, *words], stdin=subprocess.DEVNULL, stdout=said, stderr=errors)
            try:
                for size in _sizes(process, said.fileno(), goes_on):
                    left.remove(size)
                    yield size
            finally:
                process.kill()
                process.wait()
            if not left or not goes_on():
                return
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
        if process.returncode != _LOST:
            break
    raise RunError(lines[-1])


def _sizes(process: subprocess.Popen, said: int, goes_on: Callable[[], bool]) -> Iterator[int]:
    """The numbers that a process writes, a line each, as they come, until it ends or is not wanted any more."""
    place, rest = 0, b""
    while goes_on():
        ended = process.poll() is not None
        while text := os.pread(said, 4096, place):
            place += len(text)
            *lines, rest = (rest + text).split(b"\n")
            yield from map(int, lines)
        if ended:
            return
        time.sleep(_POLL_S)


def main() -> int:
    """Measure; exit code `_LOST` when a kernel ended the use of the device, 1 when something else is wrong, with a line
    on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), required=True)
    parser.add_argument("--batch_sizes", type=int, nargs="+", required=True)
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    import torch

    from visformer.distributed import HALF
    from visformer.fusion import fuse
    from visformer.fusion.tuner import DeviceLostError
    from visformer.pretrained import load

    generator = torch.Generator().manual_seed(0)
    try:
        model = load(options.checkpoint)
        fused = fuse(model, dtype=HALF.get(options.precision, torch.float32), device=options.device)
        for size in options.batch_sizes:
            shape = (size, model.config.in_channels, *model.config.image_size)
            fused.prepare(torch.randn(shape, generator=generator))
            print(size, flush=True)
    except VisformerError as error:
        print(error, file=sys.stderr)
        return _LOST if isinstance(error, DeviceLostError) else 1
    return 0


def _end_with_parent(parent: int) -> None:
    """End this process when the one that started it has ended, however that came about."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
