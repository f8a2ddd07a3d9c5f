"""The training step, and the state around it.

One code path serves fp32, bf16 and fp16, accumulation or none, one loss or another: what is off is an object that does
nothing. Randomness on the device (dropout, stochastic depth, erasing, mixing) is a function of the seed and the step's
number, so the state that a resume needs is the weights, the optimizer's moments and three counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from visformer.config import TrainConfig
from visformer.data import Batch, DeviceTransform, mix_seed
from visformer.distributed import HALF, autocast
from visformer.errors import RunError
from visformer.freezing import frozen_parts, set_frozen
from visformer.fusion.training import accelerate, ways_to_train
from visformer.losses import build_loss
from visformer.models import Visformer
from visformer.optim import build_optimizer, set_learning_rate
from visformer.processes import Place, on_first, several
from visformer.schedule import learning_rates
from visformer.sync_norm import synchronize

ALONE = Place()
_MODEL_STREAM, _MIX_STREAM = 1, 2  # keep the random numbers of the model and of mixing apart


class Trainer:
    """A model in training on `device`, in this process and those that train with it.

    `step` counts optimizer steps since the run began; `steps_per_epoch` is how many an epoch has. `class_weights` (K,)
    go into the loss; `distill` turns the labels' loss, the logits and the images into the whole loss (see teacher.py).
    `ways` is how the run to resume computed its grouped convolutions; None: chosen as `speed` says.
    """

    def __init__(
        self,
        model: Visformer,
        config: TrainConfig,
        device: torch.device,
        batches_per_epoch: int,
        here: Place = ALONE,
        *,
        class_weights: Tensor | None = None,
        distill: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        ways: dict[str, str] | None = None,
    ):
        self.config = config
        self.here = here
        self.device = device
        self.accumulation = config.gradient_accumulation_steps
        self.batches_per_epoch = batches_per_epoch
        self.steps_per_epoch = -(-batches_per_epoch // self.accumulation)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.set_grad_checkpointing(config.grad_checkpointing)
        if config.sync_bn and several():
            synchronize(self.model, device)
        self.ways = self._accelerate(ways)
        self._build_forward()
        self.optimizer = build_optimizer(self.model, config, device)
        self.learning_rate = learning_rates(config, self.steps_per_epoch)
        self.loss = build_loss(config, None if class_weights is None else class_weights.to(device))
        self.distill = distill or _labels_alone
        self.parts = frozen_parts(model, config.freeze)
        self.frozen = False
        self.prepare = DeviceTransform(config, model.num_classes)
        self.precision = partial(autocast, device, config.amp_level, config.amp_dtype)
        self.scaler = _grad_scaler(config, device)
        self.ema = _averaged(self.model, config.ema_decay) if config.ema else None
        self.max_norm = config.clip_value if config.clip_grad else float("inf")
        self.step = 0
        self.loss_sum = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)  # of the latest step, before clipping
        self.bad_steps = torch.zeros(3, dtype=torch.int64, device=device)  # in a row now, at most, in all
        self._norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._statistics = self._copy_statistics()

    def begin_epoch(self, epoch: int) -> None:
        """Set the model to training, with the parts frozen that are in epoch `epoch`."""
        self.model.train()
        frozen = bool(self.parts) and (self.config.freeze_epochs is None or epoch < self.config.freeze_epochs)
        set_frozen(self.parts, frozen)
        if frozen != self.frozen:
            self.frozen = frozen
            self._build_forward()

    def _build_forward(self) -> None:
        """What the images go through: the model, wrapped for several processes and compiled if that is asked for."""
        self.parallel, self.forward = None, self.model  # let go of the old one: two would wait for the same gradients
        self.parallel = self._parallel() if several() else None
        forward: nn.Module = self.parallel or self.model
        self.forward = torch.compile(forward) if self.config.compile else forward

    def _accelerate(self, recorded: dict[str, str] | None) -> dict[str, str]:
        """Make the model faster as `speed` says, and give the ways its grouped convolutions are computed in."""
        config, ways = self.config, {}
        if config.speed == "off":
            return ways
        if config.speed == "measure" or self.device.type != "cpu":
            dtype = torch.float32 if config.amp_level == "O0" else HALF[config.amp_dtype]
            measure = partial(ways_to_train, self.model, config.batch_size, dtype=dtype)
            ways = on_first(measure) if recorded is None else recorded
        accelerate(self.model, ways)
        return ways

    def train_batch(self, batch: Batch, index: int) -> None:
        """Learn from one batch, number `index` of its epoch; the optimizer steps when the accumulation is full."""
        config, last = self.config, min((index // self.accumulation + 1) * self.accumulation, self.batches_per_epoch)
        group = last - index // self.accumulation * self.accumulation  # batches in this accumulation
        number = index * self.here.size + self.here.rank  # of this batch among all processes' in the epoch
        torch.manual_seed(mix_seed(config.seed, _MODEL_STREAM, self.step, number))
        images = batch.images.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        images, targets = self.prepare(images, targets, seed=mix_seed(config.seed, _MIX_STREAM, self.step, number))
        with self._exchange(index + 1 == last):
            with self.precision():
                logits = self.forward(images)
                loss = self.distill(self.loss(logits, targets), logits, images)
            self.scaler.scale(loss / group).backward()
        self.loss_sum += torch.nan_to_num(loss.detach(), posinf=0.0, neginf=0.0)
        if index + 1 == last:
            self._optimizer_step(loss.detach())

    def _parallel(self) -> DistributedDataParallel:
        """The model with its gradients averaged over the processes while they are computed."""
        for parameter in self.model.parameters():
            if parameter.dim() == 4 and parameter.shape[2:] == (1, 1):
                # channels_last and contiguous are one for a 1x1 kernel, and its gradient has the strides of the latter
                parameter.data = parameter.data.flatten().view(parameter.shape)
        return DistributedDataParallel(
            self.model,
            device_ids=None if self.device.type == "cpu" else [self.device],
            gradient_as_bucket_view=True,
            static_graph=self.accumulation == 1,  # which goes on the first backward pass, and no_sync has none there
        )

    def _exchange(self, last: bool) -> AbstractContextManager:
        """The processes exchange gradients in the backward pass of an accumulation's last batch alone."""
        return nullcontext() if last or self.parallel is None else self.parallel.no_sync()

    def _optimizer_step(self, loss: Tensor) -> None:
        """Move the weights, unless the gradient is not finite: then they stay, and the step is counted as bad."""
        set_learning_rate(self.optimizer, self.learning_rate(self.step))
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.grad_norm = norm.detach()
        if self.max_norm != float("inf"):
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_norm, norm)
        # With fp16 an overflow of the gradient is the scaler's business, and no fault.
        bad = ~torch.isfinite(loss if self.scaler.is_enabled() else norm)
        self._move(bad)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._count(bad)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def _move(self, bad: Tensor) -> None:
        """The optimizer's step, left out where `bad`; fused optimizers look at it without waiting for the device."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()

    def _count(self, bad: Tensor) -> None:
        row = torch.where(bad, self.bad_steps[0] + 1, 0)
        self.bad_steps = torch.stack([row, torch.maximum(row, self.bad_steps[1]), self.bad_steps[2] + bad])

    def check(self) -> int:
        """How many steps were skipped so far; waits for the device. Statistics that such a step spoilt are put back.

        Raises `RunError` when `max_bad_steps` came in a row.
        """
        _, row, total = self.bad_steps.tolist()
        if total:
            for norm, kept in zip(self._norms, self._statistics, strict=True):
                for buffer, value in zip((norm.running_mean, norm.running_var), kept, strict=True):
                    buffer.copy_(torch.where(buffer.isfinite().all(), buffer, value))  # type: ignore[union-attr]
        self._statistics = self._copy_statistics()
        if row >= self.config.max_bad_steps:
            raise RunError(f"{row} steps in a row had no finite loss or gradient, up to step {self.step}")
        return total

    def _copy_statistics(self) -> list[tuple[Tensor, Tensor]]:
        return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in self._norms]  # type: ignore[union-attr]

    def figures(self) -> dict[str, float]:
        """What a record holds beside the loss; waits for the device. A norm that is not finite has no word in JSON."""
        norm = self.grad_norm.item()
        return {"grad_norm": norm} if math.isfinite(norm) else {}

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
            "bad_steps": self.bad_steps,
            "ways": self.ways,
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
        self.bad_steps = state.get("bad_steps", self.bad_steps).to(self.device)
        self._statistics = self._copy_statistics()


def _labels_alone(loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
    """A distillation without a teacher."""
    return loss


def _averaged(model: Visformer, decay: float) -> Any:
    """timm's running average of the weights, which takes a while to import and few runs want."""
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def _grad_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """Loss scaling for fp16; off for bf16 and fp32, whose range is fp32's. A fixed scale never grows or shrinks."""
    enabled = config.amp_level != "O0" and config.amp_dtype == "fp16"
    fixed = {"growth_factor": 1.0 + 1e-12, "backoff_factor": 1.0 - 1e-12} if config.loss_scale_type == "fixed" else {}
    scale = config.loss_scale if config.loss_scale > 1 or config.loss_scale_type == "fixed" else 2.0**16
    return torch.amp.GradScaler(device.type, init_scale=scale, enabled=enabled, **fixed)  # type: ignore[attr-defined]
