"""Compile what a fused network may choose from, and its compiled peers, on all cores, before it is tuned.

    python benchmarks/gpu_prepare.py visformer_tiny 256 224 bf16 --part 0 --parts 8
    python benchmarks/gpu_prepare.py visformer_tiny 256 224 bf16 --peers

Tuning tries some 250 ways to compute the 20 different layers of a network, and compiling each takes seconds of one
core. Several of these processes share them out (`--part` of `--parts`), another compiles the peers' models, and all
leave what they compiled in the caches of Triton and of torch.compile, where the process that tunes finds it. A way that
can't be compiled here is passed over: tuning says so. One that ends its process, by losing it the device or by a crash,
is refused for good (`Tuner.refuse`), and a new process goes on behind it: so none of them ends the one that measures.

Each process writes a JSON object a line: what it begins, and how that ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOST = 3  # exit code of a process that lost its device
STUCK_S = 90.0  # in one way, when the time is up: it would hold up the process that measures as well


def prepare(
    model: str,
    batch_size: int,
    image_size: int,
    precision: str,
    *,
    device: str = "cuda",
    most: int,
    timeout_s: float,
) -> dict[str, Any]:
    """Run as many processes as there are cores but one, at most 16 and `most`, the last of several for the peers.

    Returns how many processes, how many of them came to their end, how many ways were compiled, how often each error
    was met, the ways that were refused, and the seconds all took.
    """
    count = max(1, min(16, most, len(os.sched_getaffinity(0)) - 1))
    words = [model, str(batch_size), str(image_size), precision, "--device", device]
    began = time.monotonic()
    refused: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="visformer-prepare-") as folder:
        shares = max(1, count - 1)
        parts = [_Part([*words, "--parts", str(shares), "--part", str(n)], folder, n) for n in range(shares)]
        if count > 1:
            parts.append(_Part([*words, "--peers"], folder, shares))
        try:
            running = parts
            while running and time.monotonic() - began < timeout_s:
                time.sleep(0.1)
                running = [part for part in running if not part.is_done(refused)]
        finally:
            finished = sum(part.process.poll() == 0 for part in parts)
            for part in parts:
                part.end(refused)
        lines = [line for part in parts for line in part.lines()]
    if refused:
        _refuse(refused, precision, device)
    return {
        "processes": count,
        "finished": finished,
        "compiled": sum("done" in line for line in lines),
        "errors": dict(Counter(line["error"] for line in lines if "error" in line).most_common(10)),
        "refused": [": ".join(way) for way in refused],
        "seconds": round(time.monotonic() - began, 1),
    }


class _Part:
    """A process and those that go on where it was ended; what they write is in a file."""

    def __init__(self, words: list[str], folder: str, number: int):
        self.words, self.log = words, Path(folder) / f"{number}.jsonl"
        self.restarts = 0
        self._start(-1)

    def lines(self) -> list[dict[str, Any]]:
        """What was written; the last line may not have been whole."""
        found = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def is_done(self, refused: list[tuple[str, str]]) -> bool:
        """Whether nothing is left to do; a process that a way has ended is followed by another, 20 times."""
        code = self.process.poll()
        if code is None:
            return False
        if code != LOST and code >= 0:
            return True
        last = self._unfinished()
        if last is None or self.restarts == 20:
            return True
        if last["signature"]:
            refused.append((last["signature"], last["name"]))
        self.restarts += 1
        self._start(last["number"])
        return False

    def end(self, refused: list[tuple[str, str]]) -> None:
        """Kill it; a way that it has been in for too long is refused."""
        running = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        last = self._unfinished()
        if running and last is not None and last["signature"] and time.time() - last["at"] > STUCK_S:
            refused.append((last["signature"], last["name"]))

    def _unfinished(self) -> dict[str, Any] | None:
        lines = self.lines()
        return lines[-1] if lines and "name" in lines[-1] else None

    def _start(self, after: int) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
        command = [sys.executable, __file__, *self.words, "--after", str(after)]
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.DEVNULL)


def _refuse(ways: list[tuple[str, str]], precision: str, device: str) -> None:
    import torch

    from visformer.fusion.tuner import Tuner
    from visformer.verbs.bench_infer import PRECISIONS

    tuner = Tuner("fastest", torch.device(device), PRECISIONS[precision])
    for signature, name in ways:
        tuner.refuse(signature, name)


def ways(
    model: str, batch_size: int, image_size: int, precision: str, device: str
) -> Iterator[tuple[str, str, Any, Any]]:
    """(signature, name, builder, inputs) of each way to compute each different layer, in the order in which they are
    tuned."""
    import torch

    from visformer.fusion.fused import fuse
    from visformer.fusion.operation import Operation
    from visformer.models import create_model
    from visformer.verbs.bench_infer import PRECISIONS

    dtype = PRECISIONS[precision]
    network = create_model(model, image_size=image_size).eval()
    fused = fuse(network, dtype=dtype, device=device, choose="library", cuda_graphs=False)
    seen: dict[str, tuple[Operation, list[Any]]] = {}
    run = Operation.forward

    def remembering(self, *inputs):
        shapes = [None if value is None else (value.shape, value.dtype) for value in inputs]
        seen.setdefault(self.signature(*inputs), (self, shapes))
        return run(self, *inputs)

    Operation.forward = remembering  # type: ignore[method-assign]
    try:
        fused(torch.randn(batch_size, 3, image_size, image_size))
    finally:
        Operation.forward = run  # type: ignore[method-assign]
    for signature, (operation, shapes) in seen.items():
        inputs = [None if shape is None else _random(*shape, device=device) for shape in shapes]
        for name, build in operation.candidates(*inputs).items():
            yield signature, name, build, inputs


def _random(shape, dtype, device: str):
    import torch

    values = torch.randn(shape, device=device).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def compile_ways(options: argparse.Namespace) -> int:
    """Build and run once each way of this part that comes after the one numbered `--after`."""
    import torch

    from visformer.fusion.tuner import is_lost

    described = (options.model, options.batch_size, options.image_size, options.precision, options.device)
    with torch.inference_mode():
        for number, (signature, name, build, inputs) in enumerate(ways(*described)):
            if number % options.parts != options.part or number <= options.after:
                continue
            write(number=number, signature=signature, name=name, at=time.time())
            try:
                build()(*inputs)
                lost = is_lost(torch.device(options.device))
                ended = {} if lost else {"done": number}
            except Exception as error:  # a tile that does not fit the device: tuning leaves it out with a warning
                lost = is_lost(torch.device(options.device))
                ended = {} if lost else {"error": type(error).__name__}
            if lost:
                return LOST
            write(**ended)
    return 0


def compile_peers(options: argparse.Namespace) -> int:
    """Compile each of the models that ours is measured against and that torch.compile makes."""
    sys.path[:0] = [str(ROOT / "benchmarks")]
    import gpu_parts
    import torch

    setting = gpu_parts.Setting(torch.device(options.device), options.image_size, False)
    pair = gpu_parts._models(options.model, options.image_size)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=options.device)
    for number, (name, make) in enumerate(gpu_parts._peers(setting, options.model, pair, images).items()):
        if "compiled" not in name or number <= options.after:
            continue
        write(number=number, signature="", name=name, at=time.time())
        try:
            make().step()
            write(done=number)
        except Exception as error:  # a peer that does not run here is left out by the process that measures
            write(error=type(error).__name__)
    return 0


def write(**line: Any) -> None:
    """A line for the process that waits."""
    print(json.dumps(line), flush=True)


def main() -> int:
    """Do the part that is asked for; `LOST` when a way lost it the device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("image_size", type=int)
    parser.add_argument("precision")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--peers", action="store_true", help="the peers' models instead of the ways")
    parser.add_argument("--after", type=int, default=-1, help="number of the last one not to do")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "src")]
    sys.path.append(str(ROOT / "benchmarks" / "stand_ins"))
    return compile_peers(options) if options.peers else compile_ways(options)


if __name__ == "__main__":
    sys.exit(main())
