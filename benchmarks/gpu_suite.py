"""The whole suite of a GPU by one command, in a budget of time, on a machine that has PyTorch, Triton and timm.

    make bench-gpu                                            # everything that fits into 520 s
    python3 benchmarks/gpu_suite.py --parts infer --models visformer_tiny --batch_sizes 256
    python3 benchmarks/gpu_suite.py --device cpu --quick      # looks whether it works; its figures mean nothing

Needs no network and no environment of its own: `python3` with torch and timm, and what timm brings. What is missing is
said at the start, with what it costs. What matters most comes first: that the kernels compute what they should, then
inference of each model beside timm's eager, compiled and as a CUDA graph, the training step, memory, torch.compile's
longest search, products in eight bits, and the tests. After each piece
`benchmarks/results/<date>-<device>-suite.json` (or `--output`) is written, and of inference also what it has so far, so
that a run that is cut off leaves what it has; a later run on the same day adds to it. Pieces for which no time was left
are named there, and at the end. Exit code 0: all that was run succeeded; 1: something failed; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "yaml")
WANTED = {
    "triton": "the kernels of ours, and torch.compile",
    "rich": "the training step's table of turns (part train)",
    "pytest": "the tests (part tests); a short check of every kernel is built in",
    "xdist": "the tests on several cores",
    "simplejpeg": "nothing that is measured here: Pillow decodes in its place",
}
FOR_PARTS = {"train": "rich", "tests": "pytest"}
PARTS = ("kernels", "infer", "train", "memory", "fp8", "autotune", "tests")
MODELS = ("visformer_tiny", "visformer_small", "visformer_tiny_v2", "visformer_small_v2")
TIMMS = MODELS[:2]
DATA_TESTS, KERNEL_TESTS = "tests/data/test_device_cuda.py", "tests/kernels"


class TimeUpError(BaseException):
    """The budget is used up; no `except Exception` stops it."""


@dataclass(frozen=True)
class Piece:
    """One thing to measure. `seconds` is what it is expected to take on a GPU; pieces run by `rank`."""

    part: str
    name: str
    seconds: float
    rank: float
    run: Callable[[], Any]


def main() -> int:
    """Run the pieces that are asked for, as far as the budget reaches."""
    began = time.monotonic()
    options = parse()
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    sys.path.append(str(ROOT / "benchmarks" / "stand_ins"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "benchmarks" / "stand_ins")]
    )
    if not packages_are_there():
        return 2
    from visformer.machine import cache_folder

    # torch.compile sets it where it is not set, and then only from then on: what `prepare` compiled would not be found.
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        say("there is no CUDA device here; --device cpu --quick looks whether the suite works")
        return 2
    torch.backends.cudnn.benchmark = True  # as in timm's own validation: the library then takes its best
    suite = Suite(options, began)
    return suite.run()


def parse() -> argparse.Namespace:
    """The options; a wrong one ends the program with 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ",".join(MODELS))
    parser.add_argument("--batch_sizes", default="256,1", help="of inference; the first also of the rest")
    parser.add_argument("--image_size", type=int, default=224, help="side of the images in pixels, a multiple of 32")
    parser.add_argument("--budget_s", type=float, default=520.0, help="seconds for everything, from the start")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny and few: 32 pixels, batch 2; figures mean nothing")
    parser.add_argument("--output", type=Path, help="file of the document")
    options = parser.parse_args()
    for name, known in (("parts", PARTS), ("models", MODELS)):
        given = getattr(options, name).split(",")
        unknown = [word for word in given if word not in known]
        if unknown:
            parser.error(f"--{name}: {', '.join(unknown)} is not one of {', '.join(known)}")
        setattr(options, name, given)
    try:
        options.batch_sizes = [int(word) for word in options.batch_sizes.split(",")]
    except ValueError:
        parser.error(f"--batch_sizes: {options.batch_sizes} is not a list of numbers")
    if min(options.batch_sizes) < 1 or options.image_size < 32 or options.image_size % 32:
        parser.error("--batch_sizes must be at least 1, --image_size a multiple of 32")
    if options.quick:
        options.batch_sizes, options.image_size, options.models = [2], 32, options.models[:1]
    return options


def packages_are_there() -> bool:
    """Say what is missing and what that costs; False when nothing can be measured."""
    missing = [name for name in NEEDED if not _found(name)]
    for name, what in WANTED.items():
        if not _found(name) or (name == "simplejpeg" and "stand_ins" in str(_found(name).origin)):  # type: ignore[union-attr]
            say(f"{name} is not installed; it is for {what}")
    if missing:
        say(f"not installed, and needed: {', '.join(missing)}; pip install torch timm brings them all")
    return not missing


def _found(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def say(line: str) -> None:
    """One line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


class Suite:
    """The pieces, the budget, and the document that grows with them."""

    def __init__(self, options: argparse.Namespace, began: float):
        import gpu_parts as parts
        import torch

        device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        self.options, self.parts = options, parts
        self.deadline = began + options.budget_s
        self.setting = parts.Setting(device, options.image_size, options.quick)
        self.document = circumstances(options, device)
        self.output = options.output or ROOT / "benchmarks" / "results" / file_name(self.document)
        self._take_over()

    def run(self) -> int:
        """All pieces in order of value; the exit code."""
        before = signal.signal(signal.SIGALRM, _time_is_up)
        try:
            failed = self._run_all()
        finally:
            signal.signal(signal.SIGALRM, before)
        for entry in self.document["left_out"]:
            say(f"left out: {entry['part']} {entry['name']}: {entry['reason']}")
        print(self.output)
        return 1 if failed else 0

    def _run_all(self) -> int:
        """How many pieces failed."""
        failed = 0
        for piece in self.pieces():
            lacking = FOR_PARTS.get(piece.part)
            if lacking and not _found(lacking):
                self._leave_out(piece, f"{lacking} is not installed")
                continue
            if self.left() < (0 if self.options.quick else piece.seconds):
                self._leave_out(piece, f"no time left: {self.left():.0f} s of about {piece.seconds:.0f} that it takes")
                continue
            failed += not self._measure(piece)
        return failed

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def pieces(self) -> list[Piece]:
        """What is asked for, in the order in which it runs."""
        options, parts, setting = self.options, self.parts, self.setting
        largest = options.batch_sizes[0]
        found = [Piece("kernels", "all", 60, 0, partial(parts.check_kernels, setting))]
        for i, model in enumerate(options.models):
            apart = model not in TIMMS
            for j, size in enumerate(options.batch_sizes):
                rank = 1 + i + 1.5 * j + apart
                title = f"{model} {size}"
                found.append(Piece("infer", title, 200, rank, partial(self._infer, title, model, size)))
            run = partial(parts.memory, setting, model, largest)
            found.append(Piece("memory", f"{model} {largest}", 40, 5 + apart, run))
            run = partial(parts.fp8, setting, model, largest)
            found.append(Piece("fp8", f"{model} {largest}", 120, 6 + i, run))
            if not apart:
                run = partial(parts.train, setting, model, largest)
                found.append(Piece("train", f"{model} {largest}", 150, 3.6, run))
        if setting.device.type == "cuda":
            run = partial(parts.max_autotune, setting, TIMMS[0], largest)
            found.append(Piece("autotune", f"{TIMMS[0]} {largest}", 120, 5.5, run))
        found.append(Piece("tests", DATA_TESTS, 30, 5.2, partial(self._tests, DATA_TESTS)))
        if not options.quick:
            found.append(Piece("tests", KERNEL_TESTS, 90, 9.5, partial(self._tests, KERNEL_TESTS)))
        return sorted((piece for piece in found if piece.part in options.parts), key=lambda piece: piece.rank)

    def _infer(self, title: str, model: str, batch_size: int) -> dict[str, Any]:
        keep = partial(self._keep, "infer", title)
        return self.parts.infer(self.setting, model, batch_size, min(150.0, self.left() / 2), keep)

    def _tests(self, path: str) -> dict[str, Any]:
        return self.parts.tests([path], max(10.0, self.left() - 3))  # ends before the alarm does

    def _measure(self, piece: Piece) -> bool:
        """Run a piece and write what it found; False when it failed."""
        say(f"{piece.part} {piece.name} ...")
        began, succeeded = time.monotonic(), True
        try:
            signal.alarm(max(1, int(self.left())))
            result: dict[str, Any] = piece.run()
            succeeded = not result.get("exit_code")
        except TimeUpError:
            self._leave_out(piece, f"cut off at the end of the budget, after {time.monotonic() - began:.0f} s")
            return True
        except Exception as error:  # one piece that fails must not cost us the others
            result, succeeded = {"failed": f"{type(error).__name__}: {error}"[:2000]}, False
            result = self._unfinished(piece) | result
            say(f"{piece.part} {piece.name} failed: {result['failed']}")
        finally:
            signal.alarm(0)
        for line in in_short(result):
            say(f"  {line}")
        result["took_s"] = round(time.monotonic() - began, 1)
        self.document["parts"].setdefault(piece.part, {})[piece.name] = result
        left_out = self.document["left_out"]
        left_out[:] = [entry for entry in left_out if (entry["part"], entry["name"]) != (piece.part, piece.name)]
        self._write()
        if self.setting.device.type == "cuda":
            self._free()
        return succeeded

    def _keep(self, part: str, name: str, record: dict[str, Any]) -> None:
        """Write what a piece has so far, unless an earlier run had more."""
        records = self.document["parts"].setdefault(part, {})
        if name not in records or "unfinished" in records[name]:
            records[name] = record | {"unfinished": True}
            self._write()

    def _unfinished(self, piece: Piece) -> dict[str, Any]:
        """What the piece has kept of a run that did not come to its end."""
        record = self.document["parts"].get(piece.part, {}).get(piece.name, {})
        return record if record.get("unfinished") else {}

    def _leave_out(self, piece: Piece, reason: str) -> None:
        if piece.name in self.document["parts"].get(piece.part, {}) and not self._unfinished(piece):
            return  # an earlier run has it
        entry = {"part": piece.part, "name": piece.name, "reason": reason}
        others = [e for e in self.document["left_out"] if (e["part"], e["name"]) != (piece.part, piece.name)]
        self.document["left_out"] = [*others, entry]
        self._write()

    def _write(self) -> None:
        from visformer.atomic import atomic_text

        text = json.dumps(finite(self.document), indent=1, ensure_ascii=False, allow_nan=False)
        atomic_text(self.output, text + "\n")

    def _take_over(self) -> None:
        """What an earlier run of the day left, on the same device and with the same versions."""
        if not self.output.exists():
            return
        try:
            earlier = json.loads(self.output.read_text(encoding="utf-8"))
            same = all(earlier[key] == self.document[key] for key in ("what", "device", "versions", "image_size"))
            if same:
                self.document["parts"], self.document["left_out"] = earlier["parts"], earlier["left_out"]
                say(f"adding to {self.output}")
        except (ValueError, KeyError, TypeError):
            say(f"{self.output} is not a document of this suite, and is written anew")

    def _free(self) -> None:
        """Give back what the piece held, so that the next one finds the memory of a fresh process."""
        import gc

        import torch

        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def in_short(result: dict[str, Any]) -> list[str]:
    """What a piece found, for the terminal: its contenders, its memory, its tests."""
    lines = []
    for record in result.get("contenders", ()):
        share = record.get("roofline_share")
        reached = "" if share is None else f", {100 * share:.0f} % of the roofline"
        lines.append(f"{record['name']}: {record['images_per_s']:,.0f} images/s, x {record['ratio']:.2f}{reached}")
    lines += [f"{name} left out: {reason}" for name, reason in result.get("left_out", {}).items()]
    lines += [f"{name}: {mib:,.0f} MiB" for name, mib in result.get("peak_memory_mib", {}).items()]
    return [*lines, result["summary"]] if "summary" in result else lines


def _time_is_up(*_: Any) -> None:
    raise TimeUpError


def circumstances(options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """What the figures depend on, and the document's empty parts."""
    import platform

    import torch

    from visformer.distributed import describe, versions
    from visformer.fusion import roofline

    found = versions() | {"cuda": str(torch.version.cuda)}
    if _found("triton"):
        import triton

        found["triton"] = triton.__version__
    document = {
        "what": "gpu_suite",
        "date": datetime.date.today().isoformat(),
        "device": describe(device),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": found,
        "image_size": options.image_size,
        "quick": options.quick,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "clocks_at_start": roofline.clocks(device),
        "parts": {},
        "left_out": [],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        document["multiprocessors"] = properties.multi_processor_count
        document["memory_gib"] = round(properties.total_memory / (1 << 30), 1)
    return document


def file_name(document: dict[str, Any]) -> str:
    """Of the date and the device, without its maker's name for `cuda` or `cpu`."""
    device = re.sub(r"^cuda, ", "", document["device"])
    return f"{document['date']}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-suite.json"


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


if __name__ == "__main__":
    sys.exit(main())
