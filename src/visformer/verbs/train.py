"""`visformer train`: data, model and options become a run folder with a checkpoint that every other verb takes.

    visformer train --data_dir photos --model visformer_tiny --image_resize 224 --epoch_size 30

Set up, then fit: a loop over epochs of `Trainer.train_batch`, validation and saving. A run that ends early, by Ctrl-C,
SIGTERM or a kill, goes on with `--resume auto` and gives the weights it would have given undisturbed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from visformer import console
from visformer.atomic import atomic_text
from visformer.checkpoint import Checkpoint, load_state, match_head, read_checkpoint
from visformer.config import TrainConfig
from visformer.data import (
    Data,
    Preprocessing,
    class_mapping,
    make_eval_loader,
    make_train_loader,
    open_data,
)
from visformer.distributed import autocast, describe, select_device, versions, world_size
from visformer.errors import Interrupted, RunError, UsageError
from visformer.metrics import Metrics
from visformer.models import Visformer, change, variant
from visformer.options import to_yaml
from visformer.pretrained import load_checkpoint, published_weights
from visformer.run_folder import RunFolder
from visformer.verbs.evaluation import evaluate
from visformer.verbs.progress import Progress
from visformer.verbs.resuming import compare_options
from visformer.verbs.signals import StopRequest
from visformer.verbs.trainer import Trainer


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
    console.note(f"done: {result.last}" + (f", best {result.best}" if result.best else ""))
    if result.best_top1 is not None:
        console.note(f"best top-1 {result.best_top1:.2f} %; next: visformer predict IMAGE --ckpt_path {result.best}")
    return 0


def train(config: TrainConfig) -> TrainResult:
    """Run `config` to its end and return what came of it.

    Raises `UsageError` for data, checkpoints or options that do not fit, `RunError` when the loss diverges or the disk
    refuses, `Interrupted` after saving when a signal asks to stop.
    """
    if world_size() > 1:
        raise UsageError(f"started as one of {world_size()} processes: training runs on one device; start it once")
    for name, why in config.without_effect().items():
        console.warn(f"{name} has no effect: {why}", once=True)
    folder = RunFolder(config.ckpt_save_dir, keep_max=config.keep_checkpoint_max, policy=config.ckpt_save_policy)
    return Fit(config, folder).run()


class Fit:
    """One run from its set-up to its end."""

    def __init__(self, config: TrainConfig, folder: RunFolder):
        self.config = config
        self.folder = folder
        self.device = select_device(config.device_target)
        state = self._resumed_state()
        self.data = open_data(config, folder.recorded_split())
        self.class_names = _class_names(self.data, config, state)
        torch.manual_seed(config.seed)
        checkpoint = self._first_checkpoint(state)
        self.model = _build_model(config, len(self.class_names), checkpoint)
        self.preprocessing = Preprocessing.from_config(config)
        if state is None and checkpoint is not None:
            self._start_from(checkpoint)
        pinned = self.device.type == "cuda"
        self.loader = make_train_loader(self.data.train, config, pin_memory=pinned)
        self.trainer = Trainer(self.model, config, self.device, len(self.loader))
        self.epoch, self.batch, self.best_top1, self.skipped = 0, 0, None, {}
        if state is not None:
            self._restore(state)
        self._open_validation()
        self.progress = Progress(config, folder, self.trainer)

    def _resumed_state(self) -> dict[str, Any] | None:
        """The state to go on from: the run folder's own, else that beside `ckpt_path`; None begins anew."""
        config, folder = self.config, self.folder
        source = RunFolder(Path(config.ckpt_path).parent) if config.resume_opt else folder
        here = source.path.resolve() == folder.path.resolve()
        state = folder.open(resume=config.resume == "auto" or (config.resume_opt and here))
        if state is None and config.resume == "auto":
            console.note(f"{folder.path}: no run to resume; beginning anew")
        if state is None and config.resume_opt:
            if not source.state.exists():
                raise UsageError(
                    f"ckpt_path: beside {config.ckpt_path} there is no {source.state.name} to continue from"
                )
            state = load_state(source.state) | {"best_top1": None, "kept": []}  # those files stay where they are
        return state

    def _first_checkpoint(self, state: dict[str, Any] | None) -> Checkpoint | None:
        """What the model's architecture is taken from: the run that is resumed, or the weights to fine-tune."""
        config = self.config
        if state is not None:
            last = Path(config.ckpt_path) if config.resume_opt and not self.folder.last.exists() else self.folder.last
            return read_checkpoint(last) if last.exists() else None
        source = config.ckpt_path or config.pretrained
        if not source:
            return None
        return load_checkpoint(published_weights(config.model) if source is True else str(source))

    def _start_from(self, checkpoint: Checkpoint) -> None:
        source = self.config.ckpt_path or self.config.pretrained
        source = published_weights(self.config.model) if source is True else source
        try:
            kept, new = match_head(self.model, checkpoint, self.class_names)
        except UsageError as error:
            raise UsageError(f"{source}: {error}; name the model it holds with --model") from error
        console.note(
            f"fine-tuning from {source} ({checkpoint.model_name}): "
            f"head rows kept for {_names(kept)}, new for {_names(new)}"
        )

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
                val, self.preprocessing, batch_size=config.batch_size, num_workers=min(config.num_parallel_workers, 4)
            )

    def run(self) -> TrainResult:
        """Train from where the state says to the last epoch."""
        config, trainer = self.config, self.trainer
        atomic_text(self.folder.path / "config.yaml", to_yaml(config))
        self.folder.write_split(self.data.split)
        self._announce()
        metrics = None
        try:
            with StopRequest() as stop:
                for epoch in range(self.epoch, config.epoch_size):
                    self._train_epoch(epoch, stop)
                    metrics = self._end_epoch(epoch)
                    if stop.requested and epoch + 1 < config.epoch_size:
                        self._interrupted(stop)
        finally:
            self.progress.close()
            self.loader.close()
            if self.val_loader is not None:
                self.val_loader.close()
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
        self.model.train()
        self.loader.set_epoch(epoch, self.batch)
        self.progress.begin_epoch(epoch, self.batch)
        for batch in self.loader:
            self._count_skipped(batch.failures)
            self.trainer.train_batch(batch, self.batch)
            self.batch += 1
            if self.progress.advance(epoch, self.batch, len(batch)):
                self._check_finite()
            # Gradients of a half-full accumulation are not saved, so a stop waits for the optimizer's step.
            if stop.requested and self.batch % self.trainer.accumulation == 0 and self.batch < len(self.loader):
                self._interrupted(stop)
        self._check_finite()

    def _end_epoch(self, epoch: int) -> Metrics | None:
        """Validate if it is due, record, save."""
        config, trainer = self.config, self.trainer
        train_loss = trainer.loss_sum.item() / len(self.loader)
        due = (epoch + 1) % config.val_interval == 0 or epoch + 1 == config.epoch_size
        metrics = self._validate() if self.val_loader is not None and due else None
        self.progress.end_epoch(epoch, train_loss, metrics)
        trainer.loss_sum.zero_()
        self.epoch, self.batch = epoch + 1, 0
        checkpoint = self._checkpoint(train_loss, metrics)
        if metrics is not None and (self.best_top1 is None or metrics.top1 > self.best_top1):
            self.best_top1 = metrics.top1
            self.folder.save_best(checkpoint)
        if (epoch + 1) % config.ckpt_save_interval == 0:
            self.folder.keep(checkpoint, epoch + 1, metrics.top1 if metrics else -math.inf)
        self.folder.save_last(checkpoint, self._state())
        return metrics

    def _validate(self) -> Metrics:
        config, model = self.config, self.trainer.evaluated
        model.eval()
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
            self.trainer.evaluated.state_dict(),
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
        }

    def _interrupted(self, stop: StopRequest) -> None:
        self._check_finite()
        if self.batch:  # at the end of an epoch everything is saved already
            self.folder.save_last(self._checkpoint(self.trainer.loss_sum.item() / self.batch, None), self._state())
        raise Interrupted(
            f"stopped by {stop.name} and saved at epoch {self.epoch + 1}, batch {self.batch}; continue with "
            f"visformer train -c {self.folder.path / 'config.yaml'} --resume auto"
        )

    def _check_finite(self) -> None:
        step = int(self.trainer.bad_step.item())
        if step >= 0:
            saved = (
                f"the last good checkpoint is {self.folder.last}"
                if self.folder.last.exists()
                else "nothing was saved yet"
            )
            raise RunError(
                f"the loss is not finite since step {step + 1} (epoch {step // self.trainer.steps_per_epoch + 1}); "
                f"{saved}. Try a lower lr, more warmup_epochs, clip_grad, or amp_dtype bf16 instead of fp16"
            )

    def _count_skipped(self, failures: list[tuple[str, str]]) -> None:
        for name, reason in failures:
            if name not in self.skipped:
                self.skipped[name] = reason
                console.warn(f"skipping {name}: {reason}")

    def _announce(self) -> None:
        config, data = self.config, self.data
        held_out = f", {len(data.val):,} to validate on" if data.val is not None and self.val_loader else ""
        precision = config.amp_level if config.amp_level == "O0" else f"{config.amp_level} {config.amp_dtype}"
        console.note(
            f"{config.model}: {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters, "
            f"{len(self.class_names)} classes, {config.image_size[0]}x{config.image_size[1]} pixels, "
            f"on {describe(self.device)}, {precision}"
        )
        console.note(
            f"{len(data.train):,} images to train on{held_out}; {config.epoch_size} epochs of "
            f"{len(self.loader):,} batches of {config.batch_size}; writing to {self.folder.path}"
        )


def _build_model(config: TrainConfig, num_classes: int, checkpoint: Checkpoint | None) -> Visformer:
    """The model that the options name; one that begins with weights has their form of GELU and scale of q and k."""
    same = checkpoint is not None and checkpoint.model_name == config.model
    base = checkpoint.architecture if checkpoint is not None and same else variant(config.model).architecture
    architecture = change(
        base,
        num_classes=num_classes,
        image_size=config.image_size,
        in_channels=config.in_channels,
        drop_rate=config.drop_rate,
        drop_path_rate=config.drop_path_rate,
        attn_drop_rate=config.attn_drop_rate,
        gelu=config.gelu,
    )
    return Visformer(architecture)


def _class_names(data: Data, config: TrainConfig, state: dict[str, Any] | None) -> list[str]:
    names, wanted = list(data.class_names), config.num_classes
    if state is not None and state["class_names"][: len(names)] != names:
        raise UsageError("the classes of the data are not those of the run to resume; use the same data_dir")
    if wanted is not None and wanted < len(names):
        raise UsageError(f"num_classes: {wanted} is too few; the data has {len(names)} classes")
    return names + [f"unused_{i}" for i in range(len(names), wanted or 0)]


def _names(names: list[str]) -> str:
    if not names:
        return "no class"
    return f"{len(names)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
