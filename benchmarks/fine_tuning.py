"""What the recipe for fine-tuning gives on few images, beside MindCV's defaults and a training from scratch.

    python benchmarks/fine_tuning.py --data_dir /usr/share/datasets/fashion-mnist --work /tmp/fine_tuning

Fashion-MNIST's first five classes (4,000 images of each) train visformer_tiny_v2 at 32 pixels for four epochs; those
weights are then fine-tuned on its last five classes, of which there are 20 or 100 training images each, and measured on
100 test images of each. Every run is `visformer train` from the command line, on one thread; what has run already in
the folder `--work` is not run again. Top-1 is that of the last epoch, so nothing is chosen on the test images; with 500
of them its standard error is about 1.7 points.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from visformer.atomic import atomic_text
from visformer.data import ImageSource
from visformer.data.arrays import named_arrays

FIRST = 4000  # images of each of the first classes
COUNTS = (20, 100)  # training images of each of the last ones
MODEL = {
    "model": "visformer_tiny_v2", "image_resize": 32, "in_channels": 1, "mean": 72.94, "std": 90.02, "crop_pct": 1.0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data_dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not (options.work / "data").exists():
        write_folders(options.data_dir, options.work / "data")
    first = {"epoch_size": 4, "warmup_epochs": 1, "decay_epochs": 3, "amp_level": "O0", "val_amp_level": "O0"}
    recipe = {"config": "visformer_tiny_v2_fashion_mnist", "dataset": "imagenet"}
    train(options.work, "first", "first", recipe | first)
    weights = {"pretrained": options.work / "first" / "last.safetensors"}
    defaults = {"fine_tune": "off", "batch_size": 32, "epoch_size": 50, "decay_epochs": 47}
    scratch = {
        "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "eps": 1e-8, "batch_size": 16, "epoch_size": 50,
        "decay_epochs": 47, "ema": True, "ema_decay": 0.99, "label_smoothing": 0.1, "scale": "0.35,1",
    }  # fmt: skip
    ways = {
        "weights and no other option": weights,
        "the same, the head alone": weights | {"freeze": "backbone"},
        "MindCV's defaults": weights | defaults | MODEL,
        "from scratch": scratch | MODEL,
    }
    results = {
        str(5 * count): {
            name: train(options.work, f"few{count}", f"{index}_{count}", way)
            for index, (name, way) in enumerate(ways.items())
        }
        for count in COUNTS
    }
    if options.output:
        atomic_text(options.output, json.dumps(results, indent=2) + "\n")
    for images, row in results.items():
        for name, top1 in row.items():
            print(f"{images:>4} images, {name}: top-1 {top1:.1f} %")


def write_folders(data_dir: str, root: Path) -> None:
    """Class folders of PNG files: `first` and `few20`, `few100`, each with train/ and val/."""
    rng = np.random.default_rng(0)
    train, test = (named_arrays("fashion_mnist", data_dir, training, 1, False) for training in (True, False))
    for target in range(10):
        drawn, held_out = (np.array([i for i in range(len(s)) if s.target(i) == target]) for s in (train, test))
        drawn = rng.permutation(drawn)
        sets = {"first": FIRST} if target < 5 else {f"few{count}": count for count in COUNTS}
        for name, count in sets.items():
            write(train, drawn[:count], root / name / "train" / f"kind{target}")
            write(test, held_out[:100], root / name / "val" / f"kind{target}")


def write(source: ImageSource, indices: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True)
    for index in indices:
        image: Image.Image = source.load(int(index))
        image.save(folder / f"{index}.png")


def train(work: Path, data: str, name: str, changes: dict) -> float:
    """Top-1 after the last epoch of a run, which is made unless it is there."""
    folder = work / name
    values = {"num_parallel_workers": 0, "device_target": "CPU", "ckpt_save_dir": folder, "resume": "auto"}
    values |= {"data_dir": work / "data" / data, **changes}
    words = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    subprocess.run(
        [sys.executable, "-m", "visformer", "train", *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["top1"] for record in records if record["kind"] == "epoch"][-1]


if __name__ == "__main__":
    main()
