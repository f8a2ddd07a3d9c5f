"""`visformer train`: data, model and options become a run folder with a checkpoint that every other verb takes.

    visformer train --data_dir photos --model visformer_tiny --image_resize 224 --epoch_size 30

Set up, then fit: a loop over epochs of `Trainer.train_batch`, validation and saving. A run that ends early, by Ctrl-C,
SIGTERM or a kill, goes on with `--resume auto` and gives the weights it would have given undisturbed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from visformer import console
from visformer.atomic import atomic_text
from visformer.background import Background
from visformer.checkpoint import Checkpoint, load_state, snapshot
from visformer.config import TrainConfig
from visformer.data import (
    Preprocessing,
    class_mapping,
    make_eval_loader,
    make_train_loader,
    open_data,
)
from visformer.distributed import autocast, describe, select_device, versions
from visformer.errors import Interrupted, RunError, UsageError
from visformer.metrics import Metrics
from visformer.options import to_yaml
from visformer.processes import Place, add_up, anywhere, joined, on_first, share_buffers
from visformer.run_folder import RunFolder
from visformer.verbs.beginning import announce, build_model, class_weights, first_checkpoint, name_classes, start_from
from visformer.verbs.evaluation import evaluate
from visformer.verbs.fine_tuning import adopt, choose
from visformer.verbs.launch import devices_to_start, hand_back, is_helper, restarted, scaled, start_processes
from visformer.verbs.memory import kept_memory
from visformer.verbs.patience import Patience
from visformer.verbs.precision import settle_precision
from visformer.verbs.progress import Progress
from visformer.verbs.resuming import compare_options
from visformer.verbs.signals import StopRequest
from visformer.verbs.teacher import load_teacher
from visformer.verbs.trainer import Trainer

ASK_STEPS = 10  # optimizer steps after which several processes ask one another whether to stop


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run is and how good it got; accuracies in percent, None without a validation set."""

    run_folder: Path
    last: Path
    best: Path | None
    epochs: int
    top1: float | None
    top5: float | None
    best_top1: float | None
    images_per_s: float


def run(config: TrainConfig) -> int:
    """Train and say where the result is."""
    result = train(config)
    if is_helper():
        return 0
    console.note(f"done: {result.last}" + (f", best {result.best}" if result.best else ""))
    if result.best_top1 is not None:
        console.note(f"best top-1 {result.best_top1:.2f} %; next: visformer predict IMAGE --ckpt_path {result.best}")
    return 0


def train(config: TrainConfig) -> TrainResult:
    """Run `config` to its end and return what came of it.

    Raises `UsageError` for data, checkpoints or options that do not fit, `RunError` when the loss diverges or the disk
    refuses, `Interrupted` after saving when a signal asks to stop.
    """
    if (count := devices_to_start(config)) > 1:
        return TrainResult(**start_processes(config, count))
    device = select_device(config.device_target)
    with kept_memory(device, config.speed != "off"), joined(device, config.distribute) as here:
        for name, why in config.without_effect().items():
            console.warn(f"{name} has no effect: {why}", once=True)
        folder = RunFolder(config.ckpt_save_dir, keep_max=config.keep_checkpoint_max, policy=config.ckpt_save_policy)
        result = Fit(config, folder, device, here).run()
        if here.is_first:
            hand_back(asdict(result))
        return result


class Fit:
    """One run from its set-up to its end."""

    def __init__(self, config: TrainConfig, folder: RunFolder, device: torch.device, here: Place):
        self.config = config
        self.folder = folder
        self.device = device
        self.here = here
        state = on_first(self._resumed_state)
        checkpoint = on_first(partial(first_checkpoint, config, folder, state))
        config = adopt(config, checkpoint)
        self.data = open_data(config, on_first(folder.recorded_split))
        self.config = config = choose(config, len(self.data.train), here.size, device.type == "cuda", state)
        self.class_names = name_classes(self.data, config, state)
        torch.manual_seed(config.seed)
        self.model = build_model(config, len(self.class_names), checkpoint)
        self.preprocessing = Preprocessing.from_config(config)
        if state is None and checkpoint is not None:
            start_from(self.model, checkpoint, config, self.class_names)
        self.config = config = settle_precision(config, self.model, device, state)
        pinned = self.device.type == "cuda"
        self.loader = make_train_loader(
            self.data.train, config, rank=here.rank, world_size=here.size, pin_memory=pinned, device=device
        )
        self.trainer = Trainer(
            self.model,
            scaled(config, here.size),
            self.device,
            len(self.loader),
            here,
            class_weights=class_weights(self.data, config, self.class_names),
            distill=load_teacher(config, self.class_names, device),
            ways=None if state is None else state.get("ways", {}),
        )
        self.epoch, self.batch, self.best_top1, self.skipped = 0, 0, None, {}
        self.bad_steps = 0
        self.patience = Patience(config.early_stop_epochs)
        self.saving = Background("training goes on, and saves again at the next chance")
        if state is not None:
            self._restore(state)
        self._open_validation()
        self.progress = Progress(
            config, folder, self.trainer, figures=self.trainer.figures, processes=here.size, quiet=not here.is_first
        )

    def _resumed_state(self) -> dict[str, Any] | None:
        """The state to go on from: the run folder's own, else that beside `ckpt_path`; None begins anew."""
        config, folder = self.config, self.folder
        source = RunFolder(Path(config.ckpt_path).parent) if config.resume_opt else folder
        here = source.path.resolve() == folder.path.resolve()
        again = config.resume == "auto" or restarted()
        state = folder.open(resume=again or (config.resume_opt and here))
        if state is None and config.resume == "auto":
            console.note(f"{folder.path}: no run to resume; beginning anew")
        if state is None and config.resume_opt:
            if not source.state.exists():
                raise UsageError(
                    f"ckpt_path: beside {config.ckpt_path} there is no {source.state.name} to continue from"
                )
            state = load_state(source.state) | {"best_top1": None, "kept": []}  # those files stay where they are
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        compare_options(state["config"], to_yaml(self.config))
        if state["batches_per_epoch"] != len(self.loader):
            raise UsageError(
                f"the run to resume has {state['batches_per_epoch']} batches an epoch, the data now gives "
                f"{len(self.loader)}; resume with the data it began with"
            )
        self.trainer.load_state_dict(state)
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.best_top1, self.folder.kept = state["best_top1"], state["kept"]
        self.skipped = dict(state["skipped"])
        self.patience = Patience(self.config.early_stop_epochs, *state.get("patience", ()))
        self.folder.rewind(self.trainer.step)
        console.note(f"resuming {self.folder.path} at epoch {self.epoch + 1}, batch {self.batch + 1}")

    def _open_validation(self) -> None:
        config, val = self.config, self.data.val
        if config.val_while_train and val is None:
            raise UsageError(f"val_while_train: {config.data_dir} has no validation set ({config.val_split})")
        self.val_loader = None
        if val is not None and config.val_while_train is not False:
            self.mapping = class_mapping(val.class_names, self.class_names)
            self.val_loader = make_eval_loader(
                val,
                self.preprocessing,
                batch_size=config.batch_size,
                num_workers=min(config.num_parallel_workers, 4),
                rank=self.here.rank,
                world_size=self.here.size,
            )

    def run(self) -> TrainResult:
        """Train from where the state says to the last epoch."""
        config, trainer = self.config, self.trainer
        if self.here.is_first:
            atomic_text(self.folder.path / "config.yaml", to_yaml(config))
            self.folder.write_split(self.data.split)
        announce(self.model, config, self.data, self.device, len(self.loader), validates=self.val_loader is not None)
        metrics = None
        try:
            with StopRequest() as stop:
                for epoch in range(self.epoch, config.epoch_size):
                    if self.patience.is_over:
                        console.note(
                            f"ending after epoch {epoch}: {self.patience.epochs} epochs without a better result"
                        )
                        break
                    self._train_epoch(epoch, stop)
                    metrics = self._end_epoch(epoch)
                    if anywhere(stop.requested) and epoch + 1 < config.epoch_size:
                        self._interrupted(stop)
            on_first(self.saving.finish)
        finally:
            self.saving.wait()
            self.progress.close()
            self.loader.close()
            if self.val_loader is not None:
                self.val_loader.close()
            if self.here.is_first:
                self.folder.draw_curves(config.model)
        best = self.folder.best if self.folder.best.exists() else None
        top1, top5 = (metrics.top1, metrics.top5) if metrics else (None, None)
        rate = self.progress.images_per_s
        return TrainResult(
            self.folder.path,
            self.folder.last,
            best,
            trainer.step // trainer.steps_per_epoch,
            top1,
            top5,
            self.best_top1,
            rate,
        )

    def _train_epoch(self, epoch: int, stop: StopRequest) -> None:
        """The batches of one epoch that are still to be done."""
        self.epoch = epoch
        self.trainer.begin_epoch(epoch)
        self.loader.set_epoch(epoch, self.batch)
        self.progress.begin_epoch(epoch, self.batch)
        for batch in self.progress.batches(self.loader):
            self._count_skipped(batch.failures)
            self.trainer.train_batch(batch, self.batch)
            self.batch += 1
            if self.progress.advance(epoch, self.batch, len(batch)):
                self._check_finite()
            # Gradients of a half-full accumulation are not saved, so a stop waits for the optimizer's step.
            if self.batch % self.trainer.accumulation == 0 and self.batch < len(self.loader):
                self._between_steps(stop)
        self._check_finite()

    def _between_steps(self, stop: StopRequest) -> None:
        """Save if it is due, and stop if that is asked of any process; several ask one another every few steps."""
        step = self.trainer.step
        if (self.here.size == 1 or step % ASK_STEPS == 0) and anywhere(stop.requested):
            self._interrupted(stop)
        if self.config.ckpt_save_steps and step % self.config.ckpt_save_steps == 0:
            self._check_finite()
            self._save_last(self._mean_loss(self.batch), None)

    def _mean_loss(self, batches: int) -> float:
        """The epoch's loss so far, over all processes, which are told the same."""
        mean = self.trainer.loss_sum / self.here.size
        add_up(mean)
        self.trainer.loss_sum.copy_(mean)
        return mean.item() / batches

    def _save_last(self, train_loss: float, metrics: Metrics | None) -> None:
        if self.here.is_first:
            checkpoint, state = self._checkpoint(train_loss, metrics), snapshot(self._state())
            self.saving.start(partial(self.folder.save_last, checkpoint, state))

    def _end_epoch(self, epoch: int) -> Metrics | None:
        """Validate if it is due, record, save."""
        config, trainer = self.config, self.trainer
        train_loss = self._mean_loss(len(self.loader))
        due = (epoch + 1) % config.val_interval == 0 or epoch + 1 == config.epoch_size
        metrics = self._validate() if self.val_loader is not None and due else None
        self.progress.end_epoch(epoch, train_loss, metrics)
        trainer.loss_sum.zero_()
        self.epoch, self.batch = epoch + 1, 0
        self.patience.count(metrics, config.val_interval)
        best = metrics is not None and (self.best_top1 is None or metrics.top1 > self.best_top1)
        if best and metrics is not None:
            self.best_top1 = metrics.top1
        if self.here.is_first:
            checkpoint, state = self._checkpoint(train_loss, metrics), snapshot(self._state())
            keep = (epoch + 1) % config.ckpt_save_interval == 0
            score = metrics.top1 if metrics else -math.inf
            kept = (epoch + 1, score) if keep else None
            self.saving.start(partial(self.folder.save_epoch, checkpoint, state, bool(best), kept))
        return metrics

    def _validate(self) -> Metrics:
        config, model = self.config, self.trainer.evaluated
        model.eval()
        share_buffers(model)
        measured = evaluate(
            model,
            self.val_loader,  # type: ignore[arg-type]
            self.device,
            self.mapping,
            num_classes=len(self.class_names),
            normalize=self.preprocessing.normalize,
            precision=partial(autocast, self.device, config.val_amp_level, config.amp_dtype),
        )
        self._count_skipped(measured.skipped)
        return measured.metrics

    def _checkpoint(self, train_loss: float, metrics: Metrics | None) -> Checkpoint:
        config = self.config
        summary = {
            "epoch": self.epoch,
            "epochs": config.epoch_size,
            "step": self.trainer.step,
            "train_loss": train_loss,
            "val_loss": metrics.loss if metrics else None,
            "top1": metrics.top1 if metrics else None,
            "top5": metrics.top5 if metrics else None,
            "dataset": config.dataset,
            "train_images": len(self.data.train),
            "val_images": len(self.data.val) if self.data.val else 0,
            "skipped_images": len(self.skipped),
            "skipped_steps": self.bad_steps,
            "processes": self.here.size,
            "seed": config.seed,
            "ema": config.ema,
            "device": describe(self.device),
            "versions": versions(),
        }
        return Checkpoint(
            config.model,
            self.trainer.evaluated.config,
            self.class_names,
            self.preprocessing,
            snapshot(self.trainer.evaluated.state_dict()),
            training=summary,
            source={"kind": "trained", "from": str(config.ckpt_path or config.pretrained or "scratch")},
        )

    def _state(self) -> dict[str, Any]:
        return self.trainer.state_dict() | {
            "format_version": 1,
            "model_name": self.config.model,
            "class_names": self.class_names,
            "config": to_yaml(self.config),
            "batches_per_epoch": len(self.loader),
            "epoch": self.epoch,
            "batch": self.batch,
            "best_top1": self.best_top1,
            "skipped": self.skipped,
            "patience": (self.patience.top1, self.patience.loss, self.patience.epochs),
        }

    def _interrupted(self, stop: StopRequest) -> None:
        self._check_finite()
        if self.batch:  # at the end of an epoch everything is saved already
            self._save_last(self._mean_loss(self.batch), None)
        on_first(self.saving.finish)
        stopped = Interrupted(
            f"stopped by {stop.name or 'another process'} and saved at epoch {self.epoch + 1}, batch {self.batch}; "
            f"continue with visformer train -c {self.folder.path / 'config.yaml'} --resume auto"
        )
        stopped.told = not self.here.is_first
        raise stopped

    def _check_finite(self) -> None:
        try:
            bad = self.trainer.check()
        except RunError as error:
            saved = (
                f"the last good checkpoint is {self.folder.last}"
                if self.folder.last.exists()
                else "nothing was saved yet"
            )
            raise RunError(
                f"{error} (epoch {self.epoch + 1}); {saved}. Try a lower lr, more warmup_epochs, clip_grad, or "
                "amp_dtype bf16 instead of fp16"
            ) from None
        if bad > self.bad_steps:
            console.warn(f"{bad - self.bad_steps} steps skipped without a finite gradient, {bad} in all")
            self.bad_steps = bad

    def _count_skipped(self, failures: list[tuple[str, str]]) -> None:
        for name, reason in failures:
            if name not in self.skipped:
                self.skipped[name] = reason
                console.warn(f"skipping {name}: {reason}")
