"""What `visformer convert` adds to importing torch: seconds and memory, for visformer_small in each format.

    python benchmarks/convert_cost.py [--repeats 5] [--json FILE]

Writes visformer_small (161 MB) with random weights in MindCV's, the authors' and timm's format, then runs in turn, each
time in a process of its own, `import torch` alone and the conversion of each file. Figures are medians; memory is the
peak resident set, which counts pages of mapped files too. The limits are 3 s and 3 times the file's size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from visformer.checkpoint import Checkpoint
from visformer.conversion import write_as
from visformer.data.preprocessing import Preprocessing
from visformer.machine import processor_name
from visformer.models import create_model

FORMATS = {"mindcv": ".ckpt", "authors": ".pth", "timm": ".safetensors"}
MAX_SECONDS, MAX_SIZES = 3.0, 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        commands = {"import torch": [sys.executable, "-c", "import torch"]} | {
            name: [sys.executable, "-m", "visformer", "convert", str(path), f"{folder}/{name}_out.safetensors",
                   "--overwrite", "True"]
            for name, path in files.items()
        }  # fmt: skip
        runs = [{name: measure(command) for name, command in commands.items()} for _ in range(options.repeats)]
        rows = [row(name, path, runs) for name, path in files.items()]
    print(f"{'format':10} {'file, MB':>9} {'added, s':>9} {'added, MB':>10} {'of the file':>11}")
    for figures in rows:
        print(
            f"{figures['format']:10} {figures['file_mb']:9.1f} {figures['added_s']:9.2f} {figures['added_mb']:10.1f} "
            f"{figures['added_sizes']:11.2f}"
        )
    if options.json:
        document = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": processor_name(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(document | {"repeats": options.repeats}, indent=1) + "\n")
    return int(any(r["added_s"] > MAX_SECONDS or r["added_sizes"] > MAX_SIZES for r in rows))


def write_files(folder: Path) -> dict[str, Path]:
    model = create_model("visformer_small")
    checkpoint = Checkpoint("visformer_small", model.config, [], Preprocessing((224, 224)), model.state_dict())
    files = {name: folder / f"small{suffix}" for name, suffix in FORMATS.items()}
    for name, path in files.items():
        write_as(path, checkpoint, name)
    return files


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of one run."""
    reporter = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)"
    reporter += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    begin = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", reporter, *command], capture_output=True, text=True, check=True
    ).stdout
    return time.perf_counter() - begin, int(output) / 1e3


def row(name: str, path: Path, runs: list[dict[str, tuple[float, float]]]) -> dict:
    seconds = statistics.median(run[name][0] - run["import torch"][0] for run in runs)
    megabytes = statistics.median(run[name][1] - run["import torch"][1] for run in runs)
    size = path.stat().st_size / 1e6
    return {
        "format": name,
        "file_mb": round(size, 1),
        "added_s": round(seconds, 2),
        "added_mb": round(megabytes, 1),
        "added_sizes": round(megabytes / size, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
