"""The authors' models at full size, written by their own code: checkpoints, an input, and the logits it gives.

    git clone https://github.com/danczs/Visformer CHECKOUT
    pip install einops        # which their code imports; or `--target DIR` and PYTHONPATH=DIR
    python tests/upstream_full/write_authors.py CHECKOUT OUT

writes OUT/authors.NAME.pth and OUT/authors.NAME.npz (`input`, `logits` in float32, `logits_f64` in float64) for
visformer_tiny and _small, the four swin models, net1 to net7, and a swin_visformer_tiny_v2 for 448 x 448 without
position embedding, where the windows are smaller than the grid and shift. The V2 models have the scale that their
training command gives by flag (`--qk-scale-factor=-0.5`). TRAINING lists those written in the layout of the authors'
training script; the others are bare state dicts.

Nothing of theirs is changed but one class: `LayerNorm` of models.py hands F.layer_norm a shape that PyTorch refuses
for any grid larger than 1 x 1, so that net1 to net3 fail as published. `ChannelNorm` stands in its place, with the same
parameters: normalised over the channels at each position, biased variance, eps 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from weights import image_batch, value

V1 = ("visformer_tiny", "visformer_small")
SWIN = ("swin_visformer_small", "swin_visformer_tiny_v2", "swin_visformer_small_v2", "swin_visformer_medium_v2")
NETS = tuple(f"net{number}" for number in range(1, 8))
SHIFTED = "swin_visformer_tiny_v2.448"
# Which go into the training layout; True: with an average of the weights as well, under the name in DeiT's script.
TRAINING = {"visformer_tiny": True, "swin_visformer_tiny_v2": False, "net4": False}


class ChannelNorm(nn.LayerNorm):
    """(B, C, H, W), normalised over C; weight and bias (C, 1, 1), as in the authors' class."""

    def __init__(self, num_channels: int) -> None:
        super().__init__([num_channels, 1, 1])

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


def main(checkout: Path, out: Path) -> None:
    sys.path.insert(0, str(checkout))
    models, swin = importlib.import_module("models"), importlib.import_module("swin_models")
    vars(models)["LayerNorm"] = ChannelNorm  # the builders of net1 to net3 look the name up when they are called
    out.mkdir(parents=True, exist_ok=True)
    for name in (*V1, *NETS):
        write(name, getattr(models, name)(), out)
    for name in SWIN:
        write(name, getattr(swin, name)(qk_scale=-0.5 if name.endswith("v2") else None), out)
    write(SHIFTED, shifted(swin), out, size=448)


def shifted(swin: ModuleType) -> nn.Module:
    """swin_visformer_tiny_v2 at 448: its builder fixes the size, so the class is called with the builder's values."""
    return swin.SwinVisformer(
        img_size=448, init_channels=24, embed_dim=192, depth=[1, 4, 6, 3], num_heads=[1, 3, 6, 12], mlp_ratio=4.0,
        group=8, attn_stage="0011", spatial_conv="1100", norm_layer=swin.BatchNorm, conv_init=True,
        embedding_norm=swin.BatchNorm, pos_embed=False, qk_scale=-0.5,
    )  # fmt: skip


def write(name: str, model: nn.Module, out: Path, size: int = 224) -> None:
    """OUT/authors.NAME.pth and .npz of `model` with the weights of `weights.value`."""
    fill(model)
    images = torch.from_numpy(image_batch(size))
    arrays: dict[str, Any] = {"input": images.numpy(), "logits": logits_of(model, images)}
    document: dict[str, Any] = model.state_dict()
    if name in TRAINING:
        document = training_document(name, model)
    if TRAINING.get(name):
        average = fill(copy.deepcopy(model), variant=1)
        document["model_ema"] = average.state_dict()
        arrays["logits_ema"] = logits_of(average, images)
    torch.save(document, out / f"authors.{name}.pth")
    arrays["logits_f64"] = logits_of(copy.deepcopy(model).double(), images.double())
    np.savez_compressed(out / f"authors.{name}.npz", **arrays)
    error = np.abs(arrays["logits"] - arrays["logits_f64"]).max()
    print(f"authors.{name}: standard deviation {arrays['logits'].std():.3f}, float32 against float64 {error:.1e}")


def fill(model: nn.Module, variant: int = 0) -> nn.Module:
    """Give every parameter and running statistic its value; tables of indices, masks and counters keep theirs."""
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(375_000)
        elif not name.endswith(("relative_position_index", "attn_mask")):
            tensor.copy_(torch.from_numpy(value(name, tuple(tensor.shape), variant)))
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> np.ndarray:
    return model(images).numpy()


def training_document(name: str, model: nn.Module) -> dict[str, Any]:
    """What the authors' main.py saves after an epoch; the optimizer has taken one step on small gradients."""
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-4, weight_decay=0.05)
    for parameter in trained.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    args = argparse.Namespace(
        model=name, batch_size=256, epochs=300, input_size=224, drop=0.0, drop_path=0.03, opt="adamw", lr=5e-4,
        qk_scale_factor=-0.5 if name.endswith("v2") else None, amp=True, opt_betas=None, clip_grad=None,
        weight_decay=0.05, sched="cosine", data_set="IMNET", nb_classes=1000, distributed=True, gpu=0,
    )  # fmt: skip
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [5e-4, 5e-4], "t_initial": 300, "warmup_t": 5, "metric": None},
        "epoch": 299,
        "scaler": scaler | {"_growth_tracker": 17},
        "args": args,
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: write_authors.py CHECKOUT OUT")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*meshgrid.*")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
