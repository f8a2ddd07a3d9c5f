"""Visformer-tiny, V1 and V2, beside ResNet-18 and DeiT-tiny (timm's), under one recipe on Fashion-MNIST.

    python benchmarks/compare_fashion.py --data_dir /usr/share/datasets/fashion-mnist --output fashion.json

The recipe is visformer_tiny_v2_fashion_mnist's with fewer epochs and a lower lr; every network has the same batches
in the same order, the same augmentation, optimizer, schedule, stochastic depth and moving average. All are made for
224 pixels; here they take 32. DeiT-tiny comes twice: with its own patches of 16 pixels, which leaves it 4 tokens, and
with patches of 8, which gives it 16 tokens and about four times the multiplications of the others. The figure is the
accuracy of the averaged weights after the last epoch, so nothing is chosen on the test set. A network that `--output`
already has a result for is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visformer import create_model
from visformer.atomic import atomic_text
from visformer.config import TrainConfig
from visformer.data import Data, Preprocessing, make_eval_loader, make_train_loader, open_data
from visformer.distributed import autocast, describe, select_device, versions
from visformer.options import from_keywords
from visformer.verbs.evaluation import evaluate
from visformer.verbs.trainer import Trainer

DEIT = "deit_tiny_patch16_224"
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet-18": ("resnet18", {}),
    "DeiT-tiny, patches of 16": (DEIT, {"img_size": 32}),
    "DeiT-tiny, patches of 8": (DEIT, {"img_size": 32, "patch_size": 8}),
}
OURS = {"Visformer-tiny": "visformer_tiny", "Visformer-tiny V2": "visformer_tiny_v2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data_dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--num_samples", type=int, help="training images; all unless given")
    parser.add_argument("--amp_level", default="O0", help="O2: bf16")
    parser.add_argument("--models", nargs="*", default=[*OURS, *PEERS])
    parser.add_argument("--output", type=Path, default=Path("fashion.json"))
    options = parser.parse_args()
    config: TrainConfig = from_keywords(
        TrainConfig,
        {
            "data_dir": options.data_dir, "model": "visformer_tiny", "epoch_size": options.epochs, "warmup_epochs": 1,
            "decay_epochs": options.epochs - 1, "lr": options.lr, "num_samples": options.num_samples,
            "amp_level": options.amp_level, "val_amp_level": options.amp_level,
        },
        config="visformer_tiny_v2_fashion_mnist",
    )  # fmt: skip
    device = select_device("auto")
    data = open_data(config)
    document = json.loads(options.output.read_text()) if options.output.exists() else {"results": {}}
    document |= {
        "data": "Fashion-MNIST", "train_images": config.num_samples or len(data.train), "epochs": options.epochs,
        "lr": options.lr, "amp_level": options.amp_level, "device": describe(device), "versions": versions(),
    }  # fmt: skip
    for name in options.models:
        if name not in document["results"]:
            document["results"][name] = measure(name, config, data, device)
            atomic_text(options.output, json.dumps(document, indent=2) + "\n")
    for name, result in document["results"].items():
        print(f"{name:26} {result['params_m']:6.2f} M {result['gmacs']:6.3f} GMACs  top-1 {result['top1']:.2f} %")


def build(name: str, config: TrainConfig) -> Any:
    """The network with random weights that are a function of the seed."""
    torch.manual_seed(config.seed)
    if name in OURS:
        return create_model(
            OURS[name], num_classes=10, image_size=32, in_channels=1, drop_path_rate=config.drop_path_rate
        )
    timm_name, changes = PEERS[name]
    return timm.create_model(timm_name, num_classes=10, in_chans=1, drop_path_rate=config.drop_path_rate, **changes)


def measure(name: str, config: TrainConfig, data: Data, device: torch.device) -> dict[str, Any]:
    """Train one network and evaluate it after each epoch."""
    model = build(name, config)
    result: dict[str, Any] = {
        "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "gmacs": multiplications(model) / 1e9,
        "epochs": [],
    }
    loader = make_train_loader(data.train, config)
    trainer = Trainer(model, config, device, len(loader))
    seconds = 0.0
    for epoch in range(config.epoch_size):
        began = time.perf_counter()
        trainer.model.train()
        loader.set_epoch(epoch)
        for index, batch in enumerate(loader):
            trainer.train_batch(batch, index)
        loss = trainer.loss_sum.item() / len(loader)
        trainer.loss_sum.zero_()
        seconds += time.perf_counter() - began
        top1, top5 = accuracy(trainer.evaluated, config, data, device)
        result["epochs"].append({"train_loss": loss, "top1": top1, "top5": top5})
        print(f"{name}: epoch {epoch + 1}, loss {loss:.4f}, top-1 {top1:.2f} %", flush=True)
    loader.close()
    last = result["epochs"][-1]
    rate = len(loader) * config.batch_size * config.epoch_size / seconds
    return result | {"top1": last["top1"], "top5": last["top5"], "images_per_s": rate}


def accuracy(model: nn.Module, config: TrainConfig, data: Data, device: torch.device) -> tuple[float, float]:
    """Top-1 and top-5 on the test set, in percent."""
    assert data.val is not None
    preprocessing = Preprocessing.from_config(config)
    loader = make_eval_loader(data.val, preprocessing, batch_size=config.batch_size, num_workers=0)
    metrics = evaluate(
        model.eval(),
        loader,
        device,
        list(range(10)),
        num_classes=10,
        normalize=preprocessing.normalize,
        precision=lambda: autocast(device, config.val_amp_level, config.amp_dtype),
    ).metrics
    loader.close()
    assert metrics.top5 is not None
    return metrics.top1, metrics.top5


def multiplications(model: nn.Module) -> int:
    """Multiply-accumulates of one image, as PyTorch counts those of convolutions, products and attention."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 32, 32))
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    main()
