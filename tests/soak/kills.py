"""Kills a training run at random moments, again and again, and holds what it ends with against an undisturbed run.

    python tests/soak/kills.py [--kills 200] [--processes 1] [--seed 0]

A short run on the handwritten digits (visformer_tiny at 32 pixels, in fp32) is started, killed with SIGKILL after a
random time, and started again with `--resume auto`, until it has been killed so often; then it may end. Whenever a
run ends before the last kill, the next one begins. After each kill every checkpoint that is there must be readable,
and each finished run must have the weights of the undisturbed one, bit for bit. pytest does not collect this file: 200
kills take about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from visformer.checkpoint import read_checkpoint

OPTIONS = {
    "dataset": "digits", "in_channels": 1, "mean": 77, "std": 95, "image_resize": 32, "crop_pct": 1.0,
    "num_samples": 192, "num_parallel_workers": 0, "hflip": 0, "opt": "adamw", "lr": 1e-3,
    "warmup_epochs": 0, "decay_epochs": 4, "epoch_size": 4, "ckpt_save_steps": 2, "keep_checkpoint_max": 2,
    "device_target": "CPU",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        begin = time.monotonic()
        start(whole, options.processes).wait()
        length = time.monotonic() - begin
        kills = ends = 0
        while kills < options.kills:
            folder = Path(place) / f"run{ends}"
            process = start(folder, options.processes)
            try:
                process.wait(timeout=generator.uniform(0.2, 1.0) * length)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                check_readable(folder)
                print(f"{kills} kills, {ends} runs ended like the undisturbed one", end="\r", flush=True)
                continue
            ends += finished(process, folder, whole)
        ends += finished(start(folder, options.processes), folder, whole)
    print(f"{kills} kills, {ends} runs ended, all with the weights of the undisturbed one, no checkpoint unreadable")
    return 0


def start(folder: Path, processes: int) -> subprocess.Popen:
    options = OPTIONS | {
        "batch_size": 32 // processes,
        "num_devices": processes,
        "ckpt_save_dir": folder,
        "resume": "auto",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return subprocess.Popen(
        [sys.executable, "-m", "visformer", "train", *words], stderr=subprocess.DEVNULL, start_new_session=True
    )


def check_readable(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        if not path.name.startswith(".writing-"):
            read_checkpoint(path).build()


def finished(process: subprocess.Popen, folder: Path, whole: Path) -> int:
    if process.wait():
        sys.exit(f"{folder.name}: the resumed run ended with code {process.returncode}")
    for name in ("last.safetensors", "best.safetensors"):
        one, other = (read_checkpoint(run / name).state_dict for run in (whole, folder))
        changed = [key for key in one if not torch.equal(one[key], other[key])]
        if changed:
            sys.exit(f"{folder.name}: {name} differs from the undisturbed run's in {len(changed)} tensors")
    return 1


if __name__ == "__main__":
    sys.exit(main())
