"""Loads every checkpoint that upstream's code wrote and holds our logits against upstream's.

    python tests/upstream_full/compare.py OUT [--json FILE] [--only PART ...] [--round-trips FOLDER]

OUT is what the write_*.py scripts filled. A row gives the largest absolute difference from upstream's float32 logits,
and from its float64 logits where there are some; of a file with an average of the weights it says which set was
loaded. `--round-trips` also converts each file to ours, to every layout that can hold it, and back, and compares the
tensors bit for bit; what it wrote for other projects stays in FOLDER, for their own loaders (check_written.py).
The exit code is 1 when anything differs by more than 5e-5, is refused, or changes on the way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import visformer

LIMIT = 5e-5
SUFFIXES = {".ckpt", ".pth", ".safetensors"}
WRITTEN = {"mindcv": ".ckpt", "authors": ".pth", "timm": ".safetensors"}  # layout -> suffix of the file to ask for


def main() -> int:
    options = parse()
    files = [
        path
        for path in sorted(options.out.iterdir())
        if path.suffix in SUFFIXES and (not options.only or any(part in path.name for part in options.only))
    ]
    if not files:
        sys.exit(f"{options.out}: no checkpoint there; the scripts write_*.py beside this one make them")
    print(f"{'file':50} {'model':26} {'weights':8} {'difference':>10} {'from f64':>9} {'seconds':>7}")
    rows = [show(parity(path)) for path in files]
    travelling = files if options.round_trips else []
    trips = [show_trip(trip) for path in travelling for trip in round_trips(path, options.round_trips)]
    if options.json:
        options.json.write_text(json.dumps({"limit": LIMIT, "parity": rows, "round_trips": trips}, indent=1) + "\n")
    bad = [row for row in (*rows, *trips) if not row["ok"]]
    print(f"{len(rows)} checkpoints, {len(trips)} round trips, {len(bad)} of them wrong; the limit is {LIMIT:g}")
    return 1 if bad else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder with the checkpoints and their .npz")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", nargs="+", default=[], help="only files whose name holds one of these")
    parser.add_argument("--round-trips", type=Path, metavar="FOLDER", help="convert there and back, by way of FOLDER")
    return parser.parse_args()


def reference(path: Path) -> dict[str, np.ndarray]:
    """The arrays that go with a checkpoint: those of A.B.npz serve A.B.pth and A.B.train.pth."""
    stem = path.name.removesuffix(path.suffix)
    while stem:
        if (found := path.with_name(f"{stem}.npz")).exists():
            with np.load(found) as arrays:
                return dict(arrays)
        stem = stem.rpartition(".")[0]
    raise FileNotFoundError(f"{path}: no .npz of upstream's output beside it")


@torch.no_grad()
def parity(path: Path) -> dict[str, Any]:
    """One row: how far the logits of the loaded model are from upstream's."""
    expected = reference(path)
    images = torch.from_numpy(expected["input"])
    row: dict[str, Any] = {"file": path.name, "ok": False}
    try:
        start = time.perf_counter()
        model = visformer.load(path)
        row |= {"model": model.model_name, "seconds": time.perf_counter() - start}
        logits = model(images).double().numpy()
    except Exception as error:  # any refusal is a row of the table, and the next file is tried
        return row | {"error": f"{type(error).__name__}: {error}"}
    sets = {"plain": "logits", "average": "logits_ema"}
    differences = {name: float(np.abs(logits - expected[key]).max()) for name, key in sets.items() if key in expected}
    row["weights"] = min(differences, key=lambda name: differences[name])
    row["difference"] = differences[row["weights"]]
    if "logits_f64" in expected and row["weights"] == "plain":
        row["from_float64"] = float(np.abs(logits - expected["logits_f64"]).max())
    row["ok"] = row["difference"] <= LIMIT
    return row


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row of the first table and hand it on."""
    if "error" in row:
        print(f"{row['file']:50} {row['error']}", flush=True)
        return row
    double = f"{row['from_float64']:9.1e}" if "from_float64" in row else f"{'':9}"
    figures = f"{row['difference']:10.1e} {double} {row['seconds']:7.2f}{'' if row['ok'] else '  TOO FAR'}"
    print(f"{row['file']:50} {row['model']:26} {row['weights']:8} {figures}", flush=True)
    return row


def round_trips(path: Path, folder: Path) -> list[dict[str, Any]]:
    """upstream's file -> ours -> each layout -> ours: the tensors of the first and the second ours must be equal bits.

    A layout that can't hold a model must say so with exit code 2; that is not an error here, and is recorded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours, again = folder / f"{path.name}.ours.safetensors", folder / f"{path.name}.again.safetensors"
    code, message = convert(path, ours)
    if code:
        return [{"file": path.name, "layout": "ours", "ok": False, "error": message}]
    results = []
    for layout, suffix in WRITTEN.items():
        row = {"file": path.name, "layout": layout, "ok": False}
        foreign = folder / f"{path.name}.to-{layout}{suffix}"
        code, message = convert(ours, foreign, "--to", layout)
        if code == 2:
            results.append(row | {"ok": True, "refused": message})
            continue
        if code == 0:
            code, message = convert(foreign, again)
        row |= {"error": message} if code else same_tensors(ours, again)
        results.append(row)
        again.unlink(missing_ok=True)
    return results


def convert(source: Path, destination: Path, *more: str) -> tuple[int, str]:
    """`visformer convert` in a process of its own: exit code and the last line it said. An older file is replaced."""
    destination.unlink(missing_ok=True)
    command = [sys.executable, "-m", "visformer", "convert", str(source), str(destination), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return done.returncode, lines[-1] if lines else ""


def same_tensors(first: Path, second: Path) -> dict[str, Any]:
    """Whether two of our files hold the same names, shapes, types and bits.

    The authors' V2 models have relative position bias where MindCV's have none: of a MindCV file written in their
    layout, tables of zeros come back, which change nothing. Nothing else may be added.
    """
    a, b = load_file(first), load_file(second)
    added = [key for key in b.keys() - a.keys() if not (key.endswith("position_bias.table") and not b[key].any())]
    if lost := sorted((a.keys() - b.keys()) | set(added)):
        return {"ok": False, "error": f"names differ: {lost[:3]}"}
    changed = [key for key in a if a[key].dtype != b[key].dtype or a[key].tobytes() != b[key].tobytes()]
    result = {"ok": not changed, "tensors": len(a), "zero_tables": len(b) - len(a)}
    return result | ({"error": f"values differ: {changed[:3]}"} if changed else {})


def show_trip(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row of the second table and hand it on."""
    outcome = row.get("error") or row.get("refused") or f"{row['tensors']} tensors, the same bits"
    outcome += f", and {row['zero_tables']} tables of zeros" if row.get("zero_tables") else ""
    print(f"{row['file']:50} -> {row['layout']:8} {'' if row['ok'] else 'WRONG: '}{outcome}", flush=True)
    return row


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
