"""What each form of a bundle costs every model of the family, on real images.

    python benchmarks/export_family.py --work family --output export-family.json

Each model is trained for one epoch of Fashion-MNIST at 32 pixels, and exported for ONNX Runtime and
OpenVINO in every precision but fp32 (`export_parity.py` has that); int8 is calibrated on 300 training images. The best
class is compared on 1,000 test images; points of top-1 are of those, and for int8 of all 10,000. Nothing is refused:
what `visformer export` would refuse is to be seen. What `work` and the output already have is left as it is, so that
a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from export_accuracy import CALIBRATION, write_calibration

from visformer import console
from visformer.atomic import atomic_text
from visformer.data import open_evaluation
from visformer.models import list_models
from visformer.verbs.export import ExportOptions, export

FORMS = (("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp16"), ("openvino", "bf16"), ("openvino", "int8"))
IMAGES = 1000
TRAINING = {  # what an epoch is enough for: no augmentation but the flip, and the lr goes down within it
    "epoch_size": 1, "warmup_epochs": 0, "decay_epochs": 1, "min_lr": 1e-6, "batch_size": 32, "ema": False,
    "label_smoothing": 0, "re_prob": 0, "drop_path_rate": 0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0),
    "amp_level": "O0", "val_while_train": False, "num_parallel_workers": 0,
}  # fmt: skip


def main() -> None:
    """Train and export each model, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(list_models()))
    parser.add_argument("--data_dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--work", type=Path, default=Path("export-family"), help="folder of the trained models")
    parser.add_argument("--output", type=Path, default=Path("export-family.json"))
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    with tempfile.TemporaryDirectory(prefix="visformer-") as place:
        folder = Path(place)
        write_calibration(options.data_dir, folder / "calibration")
        write_test_images(options.data_dir, folder / "test")
        for name in options.models.split(","):
            if name not in {row["model"] for row in rows}:
                rows.append(measured(name, options.data_dir, folder, trained(name, options)))
                document = {"what": "export_family", "data": "fashion_mnist", "num_images": IMAGES, "rows": rows}
                atomic_text(options.output, json.dumps(document, indent=2) + "\n")
    shown = [
        [row["model"], f"{row['top1']:.1f}", *(cell(row["bundles"][" ".join(form)]) for form in FORMS)] for row in rows
    ]
    console.table(
        f"best class as the checkpoint's, % of {IMAGES:,} images, and points of top-1 gained or lost",
        ["model", "top-1 %", *(" ".join(form) for form in FORMS)],
        shown,
    )


def cell(bundle: dict[str, float]) -> str:
    """`99.8, -0.1`: the share that agrees, and the points."""
    return f"{100 * bundle['agreement']:.1f}, {bundle['points']:+.1f}"


def write_test_images(data_dir: str, folder: Path) -> None:
    """A test set of fewer images, spread over all, in the dataset's own files."""
    source = open_evaluation("fashion_mnist", data_dir, split="test", channels=1)
    chosen = np.linspace(0, len(source) - 1, IMAGES).round().astype(int)
    images = np.stack([np.asarray(source.load(int(index))) for index in chosen])
    labels = np.array([source.target(int(index)) for index in chosen], dtype=np.uint8)
    folder.mkdir()
    for name, values in (("t10k-images-idx3-ubyte.gz", images), ("t10k-labels-idx1-ubyte.gz", labels)):
        head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)  # 8: unsigned bytes
        (folder / name).write_bytes(gzip.compress(head + values.tobytes()))


def trained(name: str, options: argparse.Namespace) -> Path:
    """The checkpoint of a model, trained unless it has been."""
    run = options.work / name
    given = TRAINING | {"model": name, "data_dir": options.data_dir, "ckpt_save_dir": run, "resume": "auto"}
    words = [
        str(word)
        for option, value in given.items()
        for word in (f"--{option}", *(value if isinstance(value, tuple) else (value,)))
    ]
    command = [sys.executable, "-m", "visformer", "train", "-c", "visformer_tiny_v2_fashion_mnist", *words]
    if not (run / "last.safetensors").exists():
        subprocess.run(command, check=True)
    return run / "last.safetensors"


def measured(name: str, data_dir: str, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Export one model in every form, and what was measured."""
    console.note(name)
    row: dict[str, Any] = {"model": name, "bundles": {}}
    for form, precision in FORMS:
        bundle = export(
            ExportOptions(
                ckpt_path=str(checkpoint),
                format=form,
                precision=precision,
                output=str(folder / f"{name}-{form}-{precision}"),
                dataset="fashion_mnist",
                data_dir=data_dir if precision == "int8" else str(folder / "test"),
                calib_dir=str(folder / "calibration") if precision == "int8" else "",
                calib_images=CALIBRATION,
                parity_images=IMAGES,
                min_agreement=0,
                max_drop=100,
                num_parallel_workers=1,
            )
        )
        accuracy = bundle.document["accuracy"]
        row["top1"] = accuracy["source"]["top1"]  # at last int8's, of all images
        row["bundles"][f"{form} {precision}"] = {
            "agreement": bundle.document["parity"]["image_agreement"],
            "points": accuracy["bundle"]["top1"] - accuracy["source"]["top1"],
            "difference": bundle.document["largest_logit_difference"],
        }
    return row


if __name__ == "__main__":
    main()
