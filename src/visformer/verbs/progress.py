"""How training is watched: a bar on a terminal, plain lines elsewhere, metrics.jsonl and TensorBoard always the same.

Reading the loss waits for the device, so it is read only where something is shown.
"""

from __future__ import annotations

import time
from typing import Any

from visformer import console
from visformer.config import TrainConfig
from visformer.errors import UsageError
from visformer.metrics import Metrics
from visformer.run_folder import RunFolder
from visformer.verbs.trainer import Trainer

_REFRESH_S = 1.0  # between updates of the bar's figures


class Progress:
    """Shows and records one run. Times are seconds of training, validation not counted."""

    def __init__(self, config: TrainConfig, folder: RunFolder, trainer: Trainer):
        self.config, self.folder, self.trainer = config, folder, trainer
        self.bar = console.progress() if console.is_terminal() else None
        self.writer = _tensorboard(folder) if config.tensorboard else None
        self.task: Any = None
        self.images = self.seconds = 0.0
        self.began = time.perf_counter()
        self.done = 0.0  # epochs finished since this process began, for the time left
        if self.bar:
            self.bar.start()

    @property
    def images_per_s(self) -> float:
        """Training rate of the current epoch."""
        return self.images / max(self.seconds, 1e-9)

    def begin_epoch(self, epoch: int, batch: int) -> None:
        """Start the clock and the bar of an epoch, whose first `batch` batches are done already."""
        self.images = self.seconds = 0.0
        self.epoch_began, self.refreshed, self.first_batch = time.perf_counter(), 0.0, batch
        if self.bar:
            if self.task is not None:
                self.bar.remove_task(self.task)
            title = f"epoch {epoch + 1}/{self.config.epoch_size}"
            self.task = self.bar.add_task(title, total=self.trainer.batches_per_epoch, completed=batch, status="")

    def advance(self, epoch: int, batch: int, images: int) -> bool:
        """Count one batch. Returns True when figures were read, a good moment to check them."""
        now = time.perf_counter()
        self.images += images
        self.seconds = now - self.epoch_began
        due = batch % self.config.log_interval == 0
        fresh = self.bar is not None and now - self.refreshed > _REFRESH_S
        if due or fresh:
            self._show(epoch, batch, now, due)
        if self.bar:
            self.bar.update(self.task, completed=batch)
        return due or fresh

    def _show(self, epoch: int, batch: int, now: float, due: bool) -> None:
        self.refreshed = now
        loss, lr = self.trainer.loss_sum.item() / batch, self.trainer.learning_rate(max(self.trainer.step - 1, 0))
        part = (batch - self.first_batch) / self.trainer.batches_per_epoch
        text = f"loss {loss:.4f}  lr {lr:.2e}  {self.images_per_s:,.0f} images/s  {self._left(part)}"
        if self.bar:
            self.bar.update(self.task, status=text)
        elif due:
            console.note(
                f"epoch {epoch + 1}/{self.config.epoch_size}  batch {batch}/{self.trainer.batches_per_epoch}  {text}"
            )
        if due:
            self._record({"kind": "step", "epoch": epoch + 1, "train_loss": loss, "lr": lr})

    def _left(self, part: float) -> str:
        """The time left, from that taken by the epochs done and `part` of the current one, validation included."""
        elapsed = time.perf_counter() - self.began
        remaining = self.config.epoch_size - self.trainer.step / self.trainer.steps_per_epoch
        return f"{console.duration(elapsed / max(self.done + part, 1e-9) * remaining)} left"

    def end_epoch(self, epoch: int, train_loss: float, metrics: Metrics | None) -> None:
        """Record an epoch's figures and print its line."""
        self.done += 1 - self.first_batch / self.trainer.batches_per_epoch
        lr = self.trainer.learning_rate(max(self.trainer.step - 1, 0))
        record: dict[str, Any] = {"kind": "epoch", "epoch": epoch + 1, "train_loss": train_loss, "lr": lr}
        line = f"epoch {epoch + 1}/{self.config.epoch_size}  loss {train_loss:.4f}"
        if metrics is not None:
            record |= {"val_loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}
            line += f"  val loss {metrics.loss:.4f}  top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %"
        self._record(record)
        line += f"  {self.images_per_s:,.0f} images/s  {self._left(0)}"
        console.note(line) if not self.bar else self.bar.console.print(line, markup=False)

    def _record(self, record: dict[str, Any]) -> None:
        record |= {"step": self.trainer.step, "images_per_s": self.images_per_s, "time": time.time()}
        self.folder.append(record)
        if self.writer:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name not in ("step", "time"):
                    self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        """Take the bar away and flush the writers."""
        if self.bar:
            self.bar.stop()
        if self.writer:
            self.writer.close()


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("tensorboard: it is not installed; pip install 'visformer[tensorboard]'") from error
    return SummaryWriter(str(folder.path / "tensorboard"))
