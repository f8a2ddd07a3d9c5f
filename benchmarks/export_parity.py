"""Every model of the family exported at full size, and how far its logits are from the source's.

    python benchmarks/export_parity.py --output export-parity.json

Weights are random; norms have scales, shifts, and the statistics of generated images, as training leaves them: with a
fresh model's statistics numbers grow through the network until rounding decides the logits, torch's own among them.
Compared are twelve generated images of several sizes, in fp32, preprocessed, for ONNX Runtime, OpenVINO and
AOTInductor, which compiles C++ for each model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visformer import console
from visformer.atomic import atomic_text
from visformer.bundles.build import Request, build
from visformer.bundles.engines import to_picture
from visformer.bundles.samples import generated
from visformer.data.preprocessing import Preprocessing
from visformer.models import Visformer, create_model, list_models
from visformer.verbs.bench_infer import exportable

CLASSES = 1000
FORMATS = ("onnx", "openvino", "torch")


def main() -> None:
    """Export each model in each format, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(list_models()))
    parser.add_argument("--output", type=Path, default=Path("export-parity.json"))
    options = parser.parse_args()
    rows = [row(name) for name in options.models.split(",")]
    atomic_text(options.output, json.dumps({"what": "export_parity", "rows": rows}, indent=2) + "\n")
    console.table(
        "largest difference of a logit from the source's, fp32, 224 px",
        ["model", "largest logit", *FORMATS],
        [[r["model"], f"{r['largest_logit']:.1f}", *(f"{r[form]:.1e}" for form in FORMATS)] for r in rows],
    )


def row(name: str) -> dict[str, Any]:
    """What was measured of one model."""
    console.note(name)
    preprocessing = Preprocessing((224, 224))
    torch.manual_seed(0)
    model = settled(create_model(name, num_classes=CLASSES), preprocessing)
    found: dict[str, Any] = {"model": name}
    with tempfile.TemporaryDirectory(prefix="visformer-") as place:
        source = exportable(name, model, Path(place) / "model.safetensors")
        for form in FORMATS:
            bundle = build(source, Request(form, "fp32", "tensor"), Path(place) / form)
            parity = bundle.document["parity"]
            found |= {form: parity["batch_difference"], "largest_logit": parity["largest_logit"]}
    return found


@torch.no_grad()
def settled(model: Visformer, preprocessing: Preprocessing) -> Visformer:
    """`model` with scales, shifts and statistics in its norms."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics are the mean over all that is given
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
    pictures = [to_picture(generated((224 + i, 300), 3, seed=100 + i)) for i in range(16)]
    images = preprocessing.normalize(torch.stack([preprocessing(picture) for picture in pictures]))
    model.train()
    for _ in range(2):
        model(images)
    return model.eval()


if __name__ == "__main__":
    main()
