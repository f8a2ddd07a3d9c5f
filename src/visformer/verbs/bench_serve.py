"""`visformer bench --what serve`: the server under load, beside what its engine and its decoder reach without it.

    visformer bench --what serve
    visformer bench --what serve --ckpt_path bundle --clients 64 --seconds 10

`visformer serve` runs as it does for anyone, on loopback; the clients are a process of their own
(bench_serve_client.py) and send 500 x 375 JPEGs. The bare loop (bench_serve_loop.py), a third process, decodes the same
files and runs the same engine, with as many threads and as large batches as the server. They take turns in one run, and
each number of clients is held against the loop's turn of the same round: one client against the loop that computes one
image at a time, several against the one that computes batches.

The clients take processor time that the loop does not need. On a machine with few cores that shows in the rate; so the
processor time of a request, in the server's process alone, stands beside that of an image in the loop.

Without `ckpt_path` an int8 bundle for OpenVINO is exported for the purpose, with random weights: speed does not depend
on them.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visformer import console
from visformer.bundles.needs import INSTALL, missing
from visformer.errors import RunError, UsageError
from visformer.machine import available_cores
from visformer.verbs.bench_data_images import write_jpegs
from visformer.verbs.bench_serve_client import Turn, run_clients
from visformer.verbs.bench_serve_loop import Pass, run_loop
from visformer.verbs.bench_timing import Contender, Timed, cells, summarize, take_turns
from visformer.verbs.serve import ServeOptions

LABELS = 1000
CALIBRATION = 32  # images for int8
STARTED_WITHIN_S = 300.0
ONE, BATCHES = "loop, one image at a time", "loop, batches"
PACKAGES = ("uvicorn", "uvloop", "httptools", "fastapi", "openvino", "onnxruntime", "pillow")  # whose versions matter
_NAME = "bench"  # of the model that is served
_PERCENTILES = (50, 90, 99)


def measure(options: Any, image_size: int) -> list[dict[str, Any]]:
    """One result for each model: model, target, engine, precision, image_size, images (files), bytes_per_image,
    batch_size, decode_threads, and

    loops    name, images_per_s and ratio as `bench_timing.summarize` has them, processor_ms_per_image
    clients  the same for each number of clients; against (the loop's name), processor_ratio (the loop's processor time
             over the server's), latency_ms (p50, p90, p99, max), statuses, errors, peak_memory_bytes,
             client_processor_ms_per_request

    Figures of processor and memory are null where there is no /proc. Raises `UsageError` for what can't be served,
    `RunError` when the server ends or answers nothing.
    """
    with tempfile.TemporaryDirectory(prefix="visformer-bench-") as place:
        files = Path(place) / "photos"
        write_jpegs(files, options.num_images)
        if options.ckpt_path:
            return [_measure(options, options.ckpt_path, files, Path(place))]
        results = []
        for name in options.models:
            console.note(f"{name}: exporting an int8 bundle with random weights")
            bundle = Path(place) / name
            _export(name, image_size, files, bundle)
            results.append(_measure(options, str(bundle), files, Path(place)))
        return results


def _measure(options: Any, target: str, files: Path, place: Path) -> dict[str, Any]:
    given = ServeOptions(device_target=options.device_target)
    threads = given.num_parallel_workers or min(8, available_cores())
    paths = list(files.rglob("*.jpg"))
    with (
        _process(run_loop, target, str(files), options.device_target, threads, given.batch_size) as loop,
        _server(target, options.device_target, place / "server.log") as (process, port),
        _process(run_clients, port, process.pid, str(files)) as clients,
    ):
        about = loop.ask("about")
        turns: dict[str, list[Any]] = {ONE: [], BATCHES: []}
        contenders = [
            _contender(ONE, about["precision"], turns, lambda: loop.ask((1, options.seconds))),
            _contender(BATCHES, about["precision"], turns, lambda: loop.ask((given.batch_size, options.seconds))),
        ]
        for count in options.clients:
            name = f"{count} client{'s' if count > 1 else ''}"
            turns[name] = []
            work = _server_turn(name, clients, count, options.seconds, process, place / "server.log")
            contenders.append(_contender(name, about["precision"], turns, work))
        console.note(
            f"{about['model']}, {about['engine']}, {about['precision']}: {options.repeats} turns of "
            f"{options.seconds:g} s of each of {len(contenders)} contenders"
        )
        cpu = torch.device("cpu")
        timed = take_turns(contenders, cpu, warmup=options.warmup, repeats=options.repeats, title="serve")
    kept = {name: made[options.warmup :] for name, made in turns.items()}
    rated = {
        t.contender.name: Timed(t.contender, [_seconds_each(x) for x in kept[t.contender.name]], True) for t in timed
    }
    return {
        **about,
        "target": options.ckpt_path or "exported with random weights",
        "images": len(paths),
        "bytes_per_image": round(statistics.fmean(path.stat().st_size for path in paths)),
        "batch_size": given.batch_size,
        "decode_threads": threads,
        "loops": [_loop_record(rated[name], rated[BATCHES], kept[name]) for name in (ONE, BATCHES)],
        "clients": [
            _client_record(count, rated[name], rated, kept, turns[name])
            for count, name in zip(options.clients, list(turns)[2:], strict=True)
        ],
    }


def _contender(name: str, precision: str, turns: dict[str, list[Any]], work: Callable[[], Any]) -> Contender:
    """A turn, whose result goes to `turns[name]`."""

    def step() -> Tensor:
        turns[name].append(work())
        return torch.zeros(())

    return Contender(name, precision, "", step)


def _server_turn(
    name: str, clients: _Child, count: int, seconds: float, process: subprocess.Popen[bytes], log: Path
) -> Callable[[], Turn]:
    def work() -> Turn:
        turn: Turn = clients.ask((count, seconds))
        if process.poll() is not None:
            raise RunError(f"{name}: the server ended with code {process.returncode}: {_last_line(log)}")
        if not turn.latencies_s:
            raise RunError(f"{name}: no request was answered in {seconds:g} s ({_counts(turn)}); raise seconds")
        return turn

    return work


# ---- the three processes


class _Child:
    """A process that answers what it is asked."""

    def __init__(self, process: Any, pipe: Any) -> None:
        self._process, self._pipe = process, pipe

    def ask(self, question: Any) -> Any:
        self._pipe.send(question)
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise RunError(f"{self._process.name} ended with code {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def _process(function: Callable[..., None], *arguments: Any) -> Iterator[_Child]:
    """`function(pipe, *arguments)` in a process of its own, until the block ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments), name=function.__name__, daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Child(process, ours)
        ours.send(None)
        process.join(10)
    finally:
        ours.close()
        process.kill()
        process.join()


@contextmanager
def _server(target: str, device: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`visformer serve`, ready, and its port. Raises `RunError` with its last words when it ends before."""
    words = ["serve", f"{_NAME}={target}", "--port", "0", "--device_target", device]
    with open(log, "wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "visformer", *words], stderr=file)
    try:
        deadline = time.monotonic() + STARTED_WITHIN_S
        while not (lines := _events(log, "ready")):
            if process.poll() is not None:
                raise RunError(f"the server ended with code {process.returncode}: {_last_line(log)}")
            if time.monotonic() > deadline:
                raise RunError(f"the server was not ready within {STARTED_WITHIN_S:g} s: {_last_line(log)}")
            time.sleep(0.05)
        assert lines
        yield process, int(_events(log, "listening")[0]["url"].rpartition(":")[2])
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def _events(log: Path, kind: str) -> list[dict[str, Any]]:
    with open(log, encoding="utf-8", errors="replace") as file:
        first = [line for line in itertools.islice(file, 1000) if line.startswith("{") and line.endswith("\n")]
    return [event for event in map(json.loads, first) if event["event"] == kind]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1].removeprefix("visformer: error: ")[:500] if lines else "it said nothing"


# ---- what is served


def _export(name: str, image_size: int, files: Path, bundle: Path) -> None:
    """An int8 bundle of preprocessed batches for OpenVINO, with random weights, always the same."""
    package = missing("openvino", "int8")
    if package:
        raise UsageError(
            f"ckpt_path: to export a bundle takes {package}, which is not there: {INSTALL}, or name a bundle or "
            "checkpoint"
        )
    from visformer.bundles.build import Request, build
    from visformer.bundles.samples import as_channels
    from visformer.data.decode import open_image
    from visformer.models import create_model
    from visformer.verbs.bench_infer import exportable

    torch.manual_seed(0)
    model = create_model(name, num_classes=LABELS, image_size=image_size)
    paths = sorted(files.rglob("*.jpg"))[:CALIBRATION]
    pictures = [lambda path=path: as_channels(open_image(path, 3), 3) for path in paths]
    source = exportable(name, model, bundle.with_name(f"{name}.safetensors"))
    build(source, Request("openvino", "int8", "tensor", calibration=pictures), bundle)


# ---- the figures


def _seconds_each(turn: Any) -> float:
    """Seconds of the clock for each image of a turn, the loop's or the server's."""
    return turn.seconds / (turn.images if isinstance(turn, Pass) else len(turn.latencies_s))


def _loop_record(timed: Timed, baseline: Timed, turns: list[Pass]) -> dict[str, Any]:
    each = [turn.processor_s / turn.images for turn in turns]
    return _rates(timed, baseline) | {"processor_ms_per_image": 1000 * statistics.median(each)}


def _rates(timed: Timed, baseline: Timed) -> dict[str, Any]:
    """The part of `summarize` that means something here: a turn is as long as it is asked to be."""
    left_out = ("memory_format", "seconds_per_step", "finite")
    return {key: value for key, value in summarize(timed, baseline, 1).items() if key not in left_out}


def _client_record(
    count: int, timed: Timed, rated: dict[str, Timed], kept: dict[str, list[Any]], every: list[Turn]
) -> dict[str, Any]:
    against = ONE if count == 1 else BATCHES
    turns: list[Turn] = kept[timed.contender.name]
    latencies = np.concatenate([turn.latencies_s for turn in turns]) * 1000
    loops: list[Pass] = kept[against]
    own = [_per_answer(turn.server_processor_s, turn) for turn in turns]
    ratios = [
        loop.processor_s / loop.images / seconds
        for loop, seconds in zip(loops, own, strict=True)
        if seconds is not None
    ]
    known = [seconds for seconds in own if seconds is not None]
    peaks = [turn.server_peak_bytes for turn in every if turn.server_peak_bytes is not None]
    clients = [turn.client_processor_s / len(turn.latencies_s) for turn in turns]
    return _rates(timed, rated[against]) | {
        "clients": count,
        "against": against,
        "processor_ms_per_request": 1000 * statistics.median(known) if known else None,
        "processor_ratio": statistics.median(ratios) if ratios else None,
        "client_processor_ms_per_request": 1000 * statistics.median(clients),
        "latency_ms": {f"p{share}": float(np.percentile(latencies, share)) for share in _PERCENTILES}
        | {"max": float(latencies.max())},
        "statuses": {str(key): value for key, value in sorted(sum((t.statuses for t in every), Counter()).items())},
        "errors": dict(sum((t.errors for t in every), Counter())),
        "peak_memory_bytes": max(peaks, default=None),
    }


def _per_answer(seconds: float | None, turn: Turn) -> float | None:
    return None if not seconds else seconds / len(turn.latencies_s)


def _counts(turn: Turn) -> str:
    return ", ".join(f"{value} x {key}" for key, value in (turn.statuses + turn.errors).items()) or "nothing"  # type: ignore[operator]


def print_tables(document: dict[str, Any]) -> None:
    """Print what `measure` found."""
    for result in document["results"]:
        side = "x".join(str(one) for one in result["image_size"])
        console.table(
            f"serving {result['model']}, {result['engine']} {result['precision']}, {side} pixels; JPEGs of "
            f"{result['bytes_per_image'] / 1000:.0f} kB; medians and quartiles of {document['repeats']} turns of "
            f"{document['seconds']:g} s",
            ["", "images/s", "quartiles", "x loop", "quartiles", "CPU ms/image", "x loop"],
            [
                [record["name"], *cells(record), *_processor(record)]
                for record in (*result["loops"], *result["clients"])
            ],
        )
        console.table(
            "requests; the clients' CPU time comes on top of the server's",
            ["", *(f"p{share} ms" for share in _PERCENTILES), "max ms", "client CPU ms", "peak MB", "answers"],
            [_request_cells(record) for record in result["clients"]],
        )
    print(
        f"{document['device']}; {document['processor']}, {document['cores']} cores; one client is held against the "
        f"loop of one image, more against that of batches of {document['results'][0]['batch_size']}"
    )


def _processor(record: dict[str, Any]) -> list[str]:
    each = record.get("processor_ms_per_image", record.get("processor_ms_per_request"))
    ratio = record.get("processor_ratio")
    return ["-" if each is None else f"{each:.2f}", "" if ratio is None else f"{ratio:.2f}"]


def _request_cells(record: dict[str, Any]) -> list[str]:
    peak = record["peak_memory_bytes"]
    came = record["statuses"] | record["errors"]
    return [
        record["name"],
        *(f"{value:,.1f}" for value in record["latency_ms"].values()),
        f"{record['client_processor_ms_per_request']:.2f}",
        "-" if peak is None else f"{peak / 1e6:,.0f}",
        ", ".join(f"{value:,} x {key}" for key, value in came.items()),
    ]
