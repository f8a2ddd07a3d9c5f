"""What products in eight bits cost every model of the family, on real images: `fuse(model, fp8=True)`, emulated.

    python benchmarks/fp8_accuracy.py --work family --output fp8-accuracy.json

Each model is trained for one epoch of Fashion-MNIST at 32 pixels, as for `export_family.py`, whose folder `work` may be
shared. Top-1 of all 10,000 test images is measured in fp32, in bf16, and in bf16 with the blocks' products in e4m3,
and how often the best class is fp32's. Needs no GPU: a product's factors are rounded to the eight bits that a kernel
would give them, and multiplied in fp32. What `work` and the output already have is left as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from export_family import trained

from visformer import console, fuse, load
from visformer.atomic import atomic_text
from visformer.data import make_eval_loader, open_evaluation
from visformer.models import list_models

PRECISIONS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp8": {"dtype": torch.bfloat16, "fp8": True},
}


def main() -> None:
    """Train and measure each model, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(list_models()))
    parser.add_argument("--data_dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--work", type=Path, default=Path("export-family"), help="folder of the trained models")
    parser.add_argument("--output", type=Path, default=Path("fp8-accuracy.json"))
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for name in options.models.split(","):
        if name not in {row["model"] for row in rows}:
            console.note(name)
            rows.append({"model": name, **measured(trained(name, options), options.data_dir)})
            rows.sort(key=lambda row: list_models().index(row["model"]))
            document = {"what": "fp8_accuracy", "data": "fashion_mnist", "num_images": 10000, "rows": rows}
            atomic_text(options.output, json.dumps(document, indent=2) + "\n")
    console.table(
        "top-1 %, and best class as in fp32, % of the images",
        ["model", *(f"{name} top-1" for name in PRECISIONS), "bf16 same", "fp8 same"],
        [
            [row["model"], *(f"{row['top1'][name]:.2f}" for name in PRECISIONS)]
            + [f"{100 * row['agreement'][name]:.2f}" for name in ("bf16", "fp8")]
            for row in rows
        ],
    )


@torch.inference_mode()
def measured(checkpoint: Path, data_dir: str) -> dict[str, Any]:
    """Top-1 in each precision, and the share of images whose best class is fp32's."""
    model: Any = load(checkpoint)
    networks = {name: fuse(model, choose="library", **how) for name, how in PRECISIONS.items()}
    source = open_evaluation("fashion_mnist", data_dir, split="test", channels=model.config.in_channels)
    loader = make_eval_loader(source, model.preprocessing, batch_size=100, num_workers=0)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in networks}
    targets = []
    for batch in loader:
        images = model.preprocessing.normalize(batch.images)
        targets.append(batch.targets)
        for name, network in networks.items():
            found[name].append(network(images).argmax(1))
    best = {name: torch.cat(parts) for name, parts in found.items()}
    truth = torch.cat(targets)
    return {
        "top1": {name: 100 * float((classes == truth).double().mean()) for name, classes in best.items()},
        "agreement": {name: float((classes == best["fp32"]).double().mean()) for name, classes in best.items()},
    }


if __name__ == "__main__":
    main()
