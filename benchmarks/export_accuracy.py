"""What each form of a bundle costs: how often its best class is the checkpoint's, and its accuracy, on real images.

    visformer train -c visformer_tiny_v2_fashion_mnist --data_dir /usr/share/datasets/fashion-mnist --epoch_size 2 \
        --warmup_epochs 0 --amp_level O0 --ckpt_save_dir fashion
    python benchmarks/export_accuracy.py --ckpt_path fashion/best.safetensors --output export-accuracy.json

Fashion-MNIST's ten thousand test images are labelled by the checkpoint and by each bundle; int8 is calibrated on 300 of
its training images. Agreement is counted on the first 1,000 that `visformer export` takes, spread over all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from visformer import console
from visformer.atomic import atomic_text, atomic_write
from visformer.data import open_evaluation
from visformer.verbs.export import PRECISIONS, ExportOptions, export

FORMATS = ("onnx", "openvino", "torch")
CALIBRATION = 300


def main() -> None:
    """Export in every form, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--data_dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--output", type=Path, default=Path("export-accuracy.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="visformer-") as place:
        calibration = Path(place) / "calibration"
        write_calibration(options.data_dir, calibration)
        rows = []
        for form in options.formats.split(","):
            for precision in PRECISIONS[form]:
                rows.append(row(options, calibration, Path(place) / f"{form}-{precision}", form, precision))
                document = {"what": "export_accuracy", "data": "fashion_mnist", "rows": rows}
                atomic_text(options.output, json.dumps(document, indent=2) + "\n")
    cells = [
        [f"{r['format']} {r['precision']}", f"{100 * r['agreement']:.1f}", f"{r['difference']:.1e}", f"{r['top1']:.2f}"]
        for r in rows
    ]
    first = rows[0]
    console.table(
        f"{first['num_images']:,} images agreed on or not; top-1 of the checkpoint {first['source_top1']:.2f} %",
        ["bundle", "same class %", "logits off by", "top-1 %"],
        cells,
    )


def write_calibration(data_dir: str, folder: Path) -> None:
    """Training images as PNG files, spread over all."""
    source = open_evaluation("fashion_mnist", data_dir, split="train", channels=1)
    for index in np.linspace(0, len(source) - 1, CALIBRATION).round().astype(int):
        picture = source.load(int(index))
        atomic_write(folder / f"{index:05d}.png", lambda file, picture=picture: picture.save(file, "PNG"))


def row(options: argparse.Namespace, calibration: Path, folder: Path, form: Any, precision: Any) -> dict[str, Any]:
    """Export one form, and what was measured of it."""
    console.note(f"{form} {precision}")
    bundle = export(
        ExportOptions(
            ckpt_path=options.ckpt_path,
            format=form,
            precision=precision,
            output=str(folder),
            dataset="fashion_mnist",
            data_dir=options.data_dir,
            calib_dir=str(calibration) if precision == "int8" else "",
            calib_images=CALIBRATION,
            num_parallel_workers=1,
        )
    )
    parity, accuracy = bundle.document["parity"], bundle.document["accuracy"]
    return {
        "format": form,
        "precision": precision,
        "num_images": parity["num_images"],
        "agreement": parity["image_agreement"],
        "difference": bundle.document["largest_logit_difference"],
        "source_top1": accuracy["source"]["top1"],
        "top1": accuracy["bundle"]["top1"],
    }


if __name__ == "__main__":
    main()
