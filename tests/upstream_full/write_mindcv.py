"""MindCV's four Visformers at full size, written by MindCV's own code: checkpoints, an input, and the logits it gives.

    python -m venv ENV
    ENV/bin/pip install mindspore "numpy<2" pyyaml tqdm
    ENV/bin/pip install --no-deps mindcv
    ENV/bin/python tests/upstream_full/write_mindcv.py OUT

writes OUT/mindcv.NAME.ckpt and OUT/mindcv.NAME.npz (`input`, `logits`) for each model, and of visformer_tiny also
    .training      what MindCV's training saves: the weights with AdamW's moments, step counts and the learning rate
    .training_ema  the same with an exponential moving average of the weights (`logits_ema`)
    .float16       every tensor in half precision
    .crc           with MindSpore's check sum
Tested with MindSpore 2.10.0 on a CPU and MindCV 0.3.0, on Python 3.11.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mindcv
import mindspore
import numpy as np
from mindcv.utils.train_step import TrainStep
from weights import image_batch, value

NAMES = ("visformer_tiny", "visformer_tiny_v2", "visformer_small", "visformer_small_v2")


def build(name: str, variant: int = 0) -> mindspore.nn.Cell:
    """MindCV's model in evaluation mode with the weights of `weights.value`, another set for another `variant`."""
    model = mindcv.create_model(name)
    for parameter in model.get_parameters():
        parameter.set_data(mindspore.Tensor(value(parameter.name, parameter.shape, variant)))
    model.set_train(False)
    return model


def logits_of(model: mindspore.nn.Cell) -> np.ndarray:
    """float32 (2, 1000): the model's output on `image_batch()`."""
    model.set_train(False)
    return model(mindspore.Tensor(image_batch())).asnumpy()


def record(out: Path, stem: str, **arrays: Any) -> None:
    """Write OUT/mindcv.STEM.npz and say so."""
    np.savez_compressed(out / f"mindcv.{stem}.npz", input=image_batch(), **arrays)
    spread = ", ".join(f"{key} {array.std():.3f}" for key, array in arrays.items())
    print(f"mindcv.{stem}: standard deviation of {spread}", flush=True)


def training_network(model: mindspore.nn.Cell, ema: bool) -> mindspore.nn.Cell:
    """The cell that MindCV's trainer saves at the end of an epoch: weights, optimizer and step counts in one."""
    optimizer = mindcv.create_optimizer(
        model.trainable_params(), opt="adamw", lr=5e-4, weight_decay=0.05, weight_decay_filter="auto"
    )
    loss = mindspore.nn.WithLossCell(model, mindcv.create_loss("CE", label_smoothing=0.1))
    step = TrainStep(loss, optimizer, scale_sense=mindspore.Tensor(1024.0), ema=ema)
    for parameter in step.get_parameters():
        if parameter.name.startswith(("adam_m.", "adam_v.")):
            moments = np.abs(value(parameter.name, parameter.shape)) * 1e-3
            parameter.set_data(mindspore.Tensor(moments.astype(np.float32)))
    return step


def write_training(out: Path) -> None:
    """The training layout without and with an average of the weights."""
    model = build("visformer_tiny")
    more = {"epoch_num": 37, "step_num": 46250}
    step = training_network(model, ema=False)
    mindspore.save_checkpoint(step, str(out / "mindcv.visformer_tiny.training.ckpt"), append_dict=more)
    record(out, "visformer_tiny.training", logits=logits_of(model))

    model, average = build("visformer_tiny"), build("visformer_tiny", variant=1)
    step = training_network(model, ema=True)
    values = {parameter.name: parameter.asnumpy() for parameter in average.get_parameters()}
    for parameter in step.ema_weight:
        parameter.set_data(mindspore.Tensor(values[parameter.name.removeprefix("ema.")]))
    mindspore.save_checkpoint(step, str(out / "mindcv.visformer_tiny.training_ema.ckpt"), append_dict=more)
    record(out, "visformer_tiny.training_ema", logits=logits_of(model), logits_ema=logits_of(average))


def write_float16(out: Path) -> None:
    """Half precision in the file; the logits are those of the rounded weights, computed in float32."""
    model = build("visformer_tiny")
    halves = [
        {"name": parameter.name, "data": mindspore.Tensor(parameter.asnumpy().astype(np.float16))}
        for parameter in model.get_parameters()
    ]
    mindspore.save_checkpoint(halves, str(out / "mindcv.visformer_tiny.float16.ckpt"))
    for parameter, half in zip(model.get_parameters(), halves, strict=True):
        parameter.set_data(mindspore.Tensor(half["data"].asnumpy().astype(np.float32)))
    record(out, "visformer_tiny.float16", logits=logits_of(model))


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        model = build(name)
        mindspore.save_checkpoint(model, str(out / f"mindcv.{name}.ckpt"))
        record(out, name, logits=logits_of(model))
    model = build("visformer_tiny")
    mindspore.save_checkpoint(model, str(out / "mindcv.visformer_tiny.crc.ckpt"), crc_check=True)
    record(out, "visformer_tiny.crc", logits=logits_of(model))
    write_training(out)
    write_float16(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: write_mindcv.py OUT")
    main(Path(sys.argv[1]))
