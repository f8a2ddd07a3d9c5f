"""Which of several ways to compute the same thing is the fastest, here: tried once, remembered on disk.

A candidate is tried on the very tensors that it is for. One that raises, or whose result is not that of the first (the
library's, which is the measure), is left out with a warning. The others take turns; one that is far behind after a
turn drops out. What won is kept in $VISFORMER_CACHE/tuning (see `machine.cache_folder`), in one file for each device,
precision and set of versions, by operation and shape; and with it what is never to be tried again, since the device
was lost to the process by it.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visformer import console, fusion, kernels
from visformer.atomic import atomic_text
from visformer.distributed import wait
from visformer.errors import RunError
from visformer.machine import available_cores, cache_folder, processor_name

Run = Callable[..., Any]  # gives a tensor, or in training several
CHOICES = ("fastest", "remembered", "library", "kernels")

CAPTURING = threading.RLock()  # held while CUDA graphs are recorded: a process records one at a time
_ROUNDS = 5
_HOPELESS = 2.0  # times as slow as the best so far, after a turn
_TURN_S = 0.02  # that a candidate's turn takes at least, unless a single call takes longer
_REPLAYS = 20  # calls of a candidate in one CUDA graph
# How far a candidate's result may be from the library's, in units of the largest value.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
FP8 = "kernel fp8"  # how the names of candidates in eight bits begin
_FP8_TOLERANCE = 0.1  # of a result with three bits of mantissa in each factor
_TF32_TOLERANCE = 1e-2  # the library's convolutions of fp32 on CUDA, unless that is switched off


class DeviceLostError(RunError):
    """A candidate ended this process's use of the device; it is remembered, and a new process can go on."""


class Tuner:
    """Chooses among candidates by `choice`: the fastest; the one remembered as such, else the library's, without ever
    measuring; the library's; or the first kernel of ours that there is.

    With `graphs` a candidate is timed on CUDA as part of a graph; without, as PyTorch starts it.
    """

    def __init__(self, choice: str, device: torch.device, dtype: torch.dtype, *, graphs: bool = True):
        self.choice = choice
        self.graphs = graphs
        self.is_measured = True  # whether no choice was taken for want of a measurement
        in_tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
        self.tolerance = _TF32_TOLERANCE if in_tf32 else _TOLERANCES[dtype]
        self._path = cache_folder() / "tuning" / f"{_slug(device_name(device), dtype)}.json"
        self._known: dict[str, Any] | None = None

    def choose(self, signature: str, candidates: Mapping[str, Callable[[], Run]], inputs: tuple[Any, ...]) -> Run:
        """The candidate for `inputs`, built. The first of `candidates` is the library's.

        `signature` names the operation and its shapes, and is what the choice is remembered by.
        """
        candidates = self._allowed(signature, candidates)
        names = list(candidates)
        ours = [name for name in names if name.startswith("kernel")]
        if self.choice == "kernels" and ours:
            return candidates[ours[0]]()
        if self.choice not in ("fastest", "remembered") or len(names) == 1:
            return candidates[names[0]]()
        known = self._choice(signature)
        if known in candidates:
            return candidates[known]()
        if self.choice == "remembered":
            self.is_measured = False
            return candidates[names[0]]()
        built, seconds = self._measure(signature, candidates, inputs)
        if not seconds:
            return built[names[0]]
        fastest = min(seconds, key=seconds.__getitem__)
        self._remember(signature, fastest, seconds)
        return built[fastest]

    def _measure(
        self, signature: str, candidates: Mapping[str, Callable[[], Run]], inputs: tuple[Any, ...]
    ) -> tuple[dict[str, Run], dict[str, float]]:
        """Those that are right, and the seconds of each; none where the library's own result is not finite, by which
        nothing can be told."""
        expected, built = None, {}
        for name, build in candidates.items():
            try:
                run = build()
                result = run(*inputs)
                expected = result if expected is None else expected
                difference = _difference(result, expected)
            except Exception as error:  # a kernel that does not fit the device, a compiler that is not there
                if is_lost(_device(inputs)):
                    self.refuse(signature, name)
                    raise DeviceLostError(
                        f"{signature}: {name} ended the use of the device by this process ({_line(error)}); start "
                        "again: it will not be tried any more"
                    ) from error
                if expected is None:
                    raise
                console.warn(f"{signature}: {name} can't be used here: {_line(error)}", once=True)
                continue
            if result is expected and difference != 0:
                return {name: run}, {}
            if not difference <= (_FP8_TOLERANCE if name.startswith(FP8) else self.tolerance):
                console.warn(f"{signature}: {name} is left out: it is off by {difference:.1e} of the largest value")
                continue
            built[name] = run
        if len(built) == 1:
            return built, dict.fromkeys(built, 0.0)
        return built, time_candidates(built, inputs, self.graphs)

    # ---- what is remembered

    def refuse(self, signature: str, name: str) -> None:
        """Never try the candidate `name` again; the first of a signature, which is the library's, stays possible."""
        entry = _read(self._path).get(signature, {})
        self._write(signature, entry | {"refused": sorted({name, *entry.get("refused", ())})})

    def _allowed(self, signature: str, candidates: Mapping[str, Callable[[], Run]]) -> dict[str, Callable[[], Run]]:
        """`candidates` without those that were refused."""
        refused = self._remembered().get(signature, {}).get("refused", ()) if self.choice != "library" else ()
        library, *others = candidates
        return {name: candidates[name] for name in (library, *(name for name in others if name not in refused))}

    def _choice(self, signature: str) -> str | None:
        """What was found to be the fastest, by this process or, it may be just now, by another."""
        if signature not in self._remembered():
            self._known = _read(self._path)
        return self._remembered().get(signature, {}).get("choice")

    def _remembered(self) -> dict[str, Any]:
        if self._known is None:
            self._known = _read(self._path)
        return self._known

    def _remember(self, signature: str, fastest: str, seconds: dict[str, float]) -> None:
        found = {"choice": fastest, "microseconds": {name: round(s * 1e6, 2) for name, s in seconds.items()}}
        self._write(signature, self._remembered().get(signature, {}) | found)

    def _write(self, signature: str, entry: dict[str, Any]) -> None:
        self._known = _read(self._path) | {signature: entry}  # another process may have written meanwhile
        try:
            atomic_text(self._path, json.dumps(self._known, indent=1, sort_keys=True))
        except RunError as error:
            console.warn(f"{error}; what was tuned is measured again by the next process", once=True)


def _read(path: Any) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    entries = document.items() if isinstance(document, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}


def _difference(result: Any, expected: Any) -> float:
    """The largest difference of two tensors, or of two rows of them, each in units of its largest value."""
    pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
    apart = [(a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6) for a, b in pairs]
    return float(torch.stack(apart).max())


def is_lost(device: torch.device) -> bool:
    """Whether a CUDA device can't be used by this process any more, as after a kernel's access to memory that is not
    its own."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _device(inputs: tuple[Any, ...]) -> torch.device:
    return next(value.device for value in inputs if isinstance(value, Tensor))


def time_candidates(built: Mapping[str, Run], inputs: tuple[Any, ...], graphs: bool = True) -> dict[str, float]:
    """Seconds a call of each, the median of its turns; what dropped out keeps what it had."""
    device = _device(inputs)
    prepared: dict[str, Callable[[], float]] = {}
    for name, run in built.items():
        try:
            prepared[name] = _turn(run, inputs, device, graphs)
        except Exception as error:  # it can't be recorded, or no memory is left beside the others' graphs
            if not prepared:
                raise
            console.warn(f"{name} can't be timed here: {_line(error)}", once=True)
    turns: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(_ROUNDS):
        best = min((min(taken) for taken in turns.values() if taken), default=float("inf"))
        for name, taken in turns.items():
            if not taken or min(taken) < _HOPELESS * best:
                taken.append(prepared[name]())
    return {name: statistics.median(taken) for name, taken in turns.items()}


def _turn(run: Run, inputs: tuple[Any, ...], device: torch.device, graphs: bool) -> Callable[[], float]:
    """A function that takes a turn: seconds a call. The first calls are done here, and not counted."""
    for _ in range(2):
        run(*inputs)
    if device.type == "cuda" and graphs:
        return _cuda_turn(run, inputs)

    def seconds(calls: int) -> float:
        wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            run(*inputs)
        wait(device)
        return (time.perf_counter() - began) / calls

    calls = max(1, min(50, round(_TURN_S / max(seconds(1), 1e-7))))
    return lambda: seconds(calls)


def _cuda_turn(run: Run, inputs: tuple[Any, ...]) -> Callable[[], float]:
    """In a CUDA graph, as it will run later: what starting a kernel costs the processor does not count."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # The outer context gives the stream back, which torch.cuda.graph does not when recording fails.
    stream = torch.cuda.stream(torch.cuda.current_stream())
    with CAPTURING, stream, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_REPLAYS):
            run(*inputs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()

    def turn() -> float:
        start.record()  # type: ignore[call-arg]
        graph.replay()
        end.record()  # type: ignore[call-arg]
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / _REPLAYS

    return turn


# ---- the device


@cache
def device_name(device: torch.device) -> str:
    """A device as its maker calls it, with what else decides its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        vectors = torch.backends.cpu.get_cpu_capability()
        return f"{processor_name()} {vectors}, {torch.get_num_threads()} of {available_cores()} threads"
    return device.type


def _slug(device: str, dtype: torch.dtype) -> str:
    searched = ", cudnn searched" if torch.backends.cudnn.benchmark else ""  # another library, for convolutions
    versions = f"torch {torch.__version__}, cuda {torch.version.cuda}{searched}, {_sources()}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{device} {str(dtype).removeprefix('torch.')} {versions}").strip("-")


@cache
def _sources() -> str:
    """A digest of what there is to choose from: a choice among other candidates is none."""
    digest = hashlib.sha256()
    for package in (kernels, fusion):
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
