"""Several processes for one run: how many, with which learning rate, and started by `visformer train` itself.

A plain start on a machine with several accelerators starts itself once for each, as torchrun would, waits, and hands on
signals; `torchrun`, `mpirun` and `srun` start the processes themselves, and nothing here happens.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visformer import console
from visformer.config import TrainConfig
from visformer.errors import Interrupted, RunError, UsageError
from visformer.options import to_yaml
from visformer.processes import place

RESULT = "VISFORMER_RESULT"  # names the file in which the first process leaves what `train` returns
_PATHS = ("run_folder", "last", "best")
GRACE_S = 60.0  # for the others to end by themselves when one has ended


def devices_to_start(config: TrainConfig) -> int:
    """Processes that a plain start makes; 1 where a launcher has made this one, or where one is enough."""
    if place().launcher or config.distribute is False:
        return 1
    if config.num_devices is not None:
        return config.num_devices
    here = config.device_target != "CPU" and config.device_target != "cpu" and torch.accelerator.is_available()
    return torch.accelerator.device_count() if here else 1


def restarted() -> bool:
    """True in a process that torchrun has started anew after one was lost, which goes on from the last save."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def scaled(config: TrainConfig, processes: int) -> TrainConfig:
    """`config` with lr and min_lr for the global batch that this run has, and a line that says so."""
    own = config.batch_size * processes * config.gradient_accumulation_steps
    meant = (config.recipe_batch_size or 0) * config.recipe_devices
    if not meant or own == meant or not config.scale_lr:
        return config
    factor = own / meant
    console.note(
        f"global batch {own:,} where lr is meant for {meant:,}: lr {config.lr:g} becomes {config.lr * factor:g}, "
        f"min_lr {config.min_lr:g} becomes {config.min_lr * factor:g} (--scale_lr False keeps them)"
    )
    return replace(config, lr=config.lr * factor, min_lr=config.min_lr * factor)


def is_helper() -> bool:
    """True in a process whose result another one tells."""
    return not place().is_first or RESULT in os.environ


def hand_back(result: dict[str, Any]) -> None:
    """Leave the result where the process that started this one looks for it, if one did."""
    if RESULT in os.environ:
        Path(os.environ[RESULT]).write_text(json.dumps(result, default=str))


def start_processes(config: TrainConfig, count: int) -> dict[str, Any]:
    """Run `config` in `count` processes on this machine and return the first one's result.

    Raises what a single process would, `UsageError`, `RunError` or `Interrupted`; the process has printed its message.
    """
    with tempfile.TemporaryDirectory(prefix="visformer-") as folder:
        options, result = Path(folder) / "options.yaml", Path(folder) / "result.json"
        names = config.given if config.given is None or config.from_file else config.given | {"fine_tune"}
        options.write_text(to_yaml(config, names), encoding="utf-8")
        shared = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        shared |= {RESULT: str(result), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads(count))}
        command = [sys.executable, "-m", "visformer", "train", "-c", str(options)]
        processes = [
            subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        code = _wait(processes)
        if code:
            failed = {UsageError.exit_code: UsageError, Interrupted.exit_code: Interrupted}.get(code, RunError)
            raise failed(f"training in {count} processes ended with code {code}; the lines above say why")
        document = json.loads(result.read_text())
    return document | {key: Path(document[key]) if document[key] else None for key in _PATHS}


def _wait(processes: list[subprocess.Popen]) -> int:
    """The exit code of the first process that failed, or 0; signals are handed on, and no process is left behind."""

    def hand_on(number: int, _: Any) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM,)}
    try:
        codes: dict[int, int] = {}
        while len(codes) < len(processes):
            for index, process in enumerate(processes):
                with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # Ctrl-C reaches the others by itself
                    if index not in codes:
                        codes[index] = process.wait(timeout=0.2)
            if any(code not in (0, Interrupted.exit_code) for code in codes.values()):
                break
        first = next((code for code in codes.values() if code), 0)
        return 1 if first < 0 else first
    finally:
        _end(processes)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _threads(count: int) -> str:
    return str(max(1, torch.get_num_threads() // count))
