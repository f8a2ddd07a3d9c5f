"""timm's two Visformers, written by timm: checkpoints in both of its formats, an input, and the logits it gives.

    python tests/upstream_full/write_timm.py OUT

writes of each model
    OUT/timm.NAME.safetensors   as on its hub: tensors without a document
    OUT/timm.NAME.pth           a bare state dict
    OUT/timm.NAME.train.pth     what timm's train.py saves, with optimizer and average
    OUT/timm.NAME.npz           `input`, `logits`, `logits_f64`, `logits_ema`
The package's own environment has timm.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from weights import image_batch, value


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("visformer_tiny", "visformer_small"):
        model, average = (fill(timm.create_model(name), variant) for variant in (0, 1))
        save_file(model.state_dict(), out / f"timm.{name}.safetensors", metadata={"format": "pt"})
        torch.save(model.state_dict(), out / f"timm.{name}.pth")
        torch.save(training_document(name, model, average), out / f"timm.{name}.train.pth")
        images = torch.from_numpy(image_batch())
        with torch.no_grad():
            arrays = {"logits": model(images), "logits_ema": average(images)}
            arrays["logits_f64"] = copy.deepcopy(model).double()(images.double())
        np.savez_compressed(
            out / f"timm.{name}.npz", input=images.numpy(), **{key: array.numpy() for key, array in arrays.items()}
        )
        print(f"timm.{name}: standard deviation {arrays['logits'].std():.3f}")


def fill(model: nn.Module, variant: int) -> nn.Module:
    """Give every parameter and running statistic the value that goes with its name."""
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            tensor.copy_(torch.from_numpy(value(name, tuple(tensor.shape), variant)))
    return model.eval()


def training_document(name: str, model: nn.Module, average: nn.Module) -> dict:
    """The dictionary of timm's CheckpointSaver."""
    return {
        "epoch": 299,
        "arch": name,
        "state_dict": model.state_dict(),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=5e-4).state_dict(),
        "version": 2,
        "args": Namespace(model=name, num_classes=1000, opt="adamw", lr=5e-4, crop_pct=0.9, interpolation="bicubic"),
        "state_dict_ema": average.state_dict(),
        "metric": 78.6,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: write_timm.py OUT")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
