"""The training step, and the state around it.

One code path serves fp32, bf16 and fp16, accumulation or none, one loss or another: what is off is an object that does
nothing. Randomness on the device (dropout, stochastic depth, erasing, mixing) is a function of the seed and the step's
number, so the state that a resume needs is the weights, the optimizer's moments and three counters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from visformer.config import TrainConfig
from visformer.data import Batch, DeviceTransform, mix_seed
from visformer.distributed import autocast
from visformer.losses import build_loss
from visformer.models import Visformer
from visformer.optim import build_optimizer, set_learning_rate
from visformer.schedule import learning_rates

_MODEL_STREAM, _MIX_STREAM = 1, 2  # keep the random numbers of the model and of mixing apart


class Trainer:
    """A model in training on `device`.

    `batch` counts batches since the run began, `step` optimizer steps; `steps_per_epoch` counts the latter.
    """

    def __init__(self, model: Visformer, config: TrainConfig, device: torch.device, batches_per_epoch: int):
        self.config = config
        self.device = device
        self.accumulation = config.gradient_accumulation_steps
        self.batches_per_epoch = batches_per_epoch
        self.steps_per_epoch = -(-batches_per_epoch // self.accumulation)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = build_optimizer(self.model, config, device)
        self.learning_rate = learning_rates(config, self.steps_per_epoch)
        self.loss = build_loss(config)
        self.prepare = DeviceTransform(config, model.num_classes)
        self.precision = partial(autocast, device, config.amp_level, config.amp_dtype)
        self.scaler = _grad_scaler(config, device)
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema else None
        self.max_norm = config.clip_value if config.clip_grad else float("inf")
        self.step = 0
        self.loss_sum = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, device=device)  # the first step whose loss was not finite

    def train_batch(self, batch: Batch, index: int) -> None:
        """Learn from one batch, number `index` of its epoch; the optimizer steps when the accumulation is full."""
        config, last = self.config, min((index // self.accumulation + 1) * self.accumulation, self.batches_per_epoch)
        group = last - index // self.accumulation * self.accumulation  # batches in this accumulation
        torch.manual_seed(mix_seed(config.seed, _MODEL_STREAM, self.step, index))
        images = batch.images.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        images, targets = self.prepare(images, targets, seed=mix_seed(config.seed, _MIX_STREAM, self.step, index))
        with self.precision():
            loss = self.loss(self.forward(images), targets)
        self.scaler.scale(loss / group).backward()
        self._watch(loss.detach())
        if index + 1 == last:
            self._optimizer_step()

    def _optimizer_step(self) -> None:
        set_learning_rate(self.optimizer, self.learning_rate(self.step))
        if self.max_norm != float("inf"):
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def _watch(self, loss: Tensor) -> None:
        """Sum the loss and remember the first step where it was not finite, without waiting for the device."""
        self.loss_sum += loss
        first = (self.bad_step < 0) & ~torch.isfinite(loss)
        self.bad_step = torch.where(first, self.step, self.bad_step)

    @property
    def evaluated(self) -> Visformer:
        """The weights that are validated and saved: the moving average when there is one."""
        return self.model if self.ema is None else self.ema.module  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from, tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s form."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.loss_sum = state["loss_sum"].to(self.device)


def _grad_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """Loss scaling for fp16; off for bf16 and fp32, whose range is fp32's. A fixed scale never grows or shrinks."""
    enabled = config.amp_level != "O0" and config.amp_dtype == "fp16"
    fixed = {"growth_factor": 1.0 + 1e-12, "backoff_factor": 1.0 - 1e-12} if config.loss_scale_type == "fixed" else {}
    scale = config.loss_scale if config.loss_scale > 1 or config.loss_scale_type == "fixed" else 2.0**16
    return torch.amp.GradScaler(device.type, init_scale=scale, enabled=enabled, **fixed)  # type: ignore[attr-defined]
