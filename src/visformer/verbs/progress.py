"""How training is watched: a bar on a terminal, a plain line now and then elsewhere, and the same records either way.

    epoch 3/30  batch 200/391  loss 0.8412  top-1 71.20 %  lr 5.0e-04  5,210 images/s  12 min 30 s left  data wait 4 %

top-1 is the latest validation's. The data wait is the share of the training time in which the loop stood still because
the loader had no batch ready: near 0 the model sets the pace, well above it the data does. Reading the loss waits for
the device, so it is read only where something is shown or recorded.

metrics.jsonl gets a line every `log_interval` batches and one an epoch, and what tracks the run gets the same figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from visformer import console
from visformer.config import TrainConfig
from visformer.metrics import Metrics
from visformer.run_folder import RunFolder
from visformer.tracking import open_tracking
from visformer.verbs.trainer import Trainer

T = TypeVar("T")

REFRESH_S = 1.0  # between updates of the bar's figures
BAR_CELLS = 16
WIDE = 110  # columns of a terminal that has room for the bar beside the figures
LAST = "validating and saving"  # what is done when the batches are
SELDOM_S, OFTEN_S = 60.0, 5.0  # plain lines come at least once in the one and at most once in the other


class Progress:
    """Shows and records one run. Times are seconds of training, validation not counted unless it is said.

    `figures` gives more numbers by name for each record, such as grad_norm; it is called only when a record is due.
    With several `processes` that train alike, the rate is that of all; a `quiet` one shows and records nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        trainer: Trainer,
        *,
        figures: Callable[[], dict[str, float]] = dict,
        processes: int = 1,
        quiet: bool = False,
    ):
        self.config, self.folder, self.trainer = config, folder, trainer
        self.figures, self.processes, self.quiet = figures, processes, quiet
        self.bar = _bar() if console.is_terminal() and not quiet else None
        self.tracking = open_tracking(TrainConfig() if quiet else config, folder.path, resumed=trainer.step > 0)
        self.task: Any = None
        self.images = self.seconds = self.waited = 0.0
        self.watched = False  # whether the loader's batches came through `batches`
        self.top1, self.best_top1 = _accuracies(folder)
        self.began = self.printed = time.perf_counter()
        self.done = 0.0  # epochs finished since this process began, for the time left
        if self.bar:
            self.bar.start()

    @property
    def images_per_s(self) -> float:
        """Training rate of the current epoch, all processes together."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def data_wait(self) -> float | None:
        """Percent of the current epoch's training time spent waiting for the loader; None when it isn't watched."""
        return 100 * min(self.waited / max(self.seconds, 1e-9), 1.0) if self.watched else None

    def begin_epoch(self, epoch: int, batch: int) -> None:
        """Start the clock and the bar of an epoch, whose first `batch` batches are done already."""
        self.images = self.seconds = self.waited = 0.0
        self.epoch_began, self.refreshed, self.first_batch = time.perf_counter(), 0.0, batch
        if self.bar:
            if self.task is not None:
                self.bar.remove_task(self.task)
            title = f"epoch {epoch + 1}/{self.config.epoch_size}"
            self.task = self.bar.add_task(title, total=self.trainer.batches_per_epoch, completed=batch, status="")

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's batches, with the time that each was waited for added up."""
        self.watched = True
        asked = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def advance(self, epoch: int, batch: int, images: int) -> bool:
        """Count one batch. Returns True when figures were read, a good moment to check them."""
        now = time.perf_counter()
        self.images += images * self.processes
        self.seconds = now - self.epoch_began
        due = batch % self.config.log_interval == 0
        if self.bar:
            self.bar.update(self.task, completed=batch)
            if batch == self.trainer.batches_per_epoch:
                self.bar.update(self.task, status=LAST)
            shown = now - self.refreshed > REFRESH_S
        else:
            shown = not self.quiet and now - self.printed > (OFTEN_S if due else SELDOM_S)
        if due or shown:
            self._show(epoch, batch, now, due, shown)
        return due or shown

    def _show(self, epoch: int, batch: int, now: float, due: bool, shown: bool) -> None:
        loss, lr = self.trainer.loss_sum.item() / batch, self._learning_rate()
        figures = [f"loss {loss:.4f}", *_percent("top-1", self.top1), f"lr {lr:.1e}"]
        figures += self._pace(batch - self.first_batch)
        whole = self.trainer.batches_per_epoch
        if self.bar:
            self.refreshed = now
            taken = len(f"epoch {epoch + 1}/{self.config.epoch_size} {whole}/{whole} ")
            width = self.bar.console.width
            status = "  ".join(_fitting(figures, width - taken - (BAR_CELLS + 1 if width >= WIDE else 0)))
            self.bar.update(self.task, status=status if batch < whole else LAST)
        elif shown:
            self.printed = now
            line = [f"epoch {epoch + 1}/{self.config.epoch_size}", f"batch {batch:,}/{whole:,}", *figures]
            console.note("  ".join(line))
        if due:
            done = round(epoch + batch / whole, 4)
            self._record({"kind": "step", "epoch": epoch + 1, "epochs_done": done, "train_loss": loss, "lr": lr})

    def _pace(self, batches: int) -> list[str]:
        """Rate, time left and data wait, after `batches` of the current epoch; validations count in the time left."""
        elapsed = time.perf_counter() - self.began
        done = self.done + batches / self.trainer.batches_per_epoch
        remaining = self.config.epoch_size - self.trainer.step / self.trainer.steps_per_epoch
        left = f"{console.duration(elapsed / max(done, 1e-9) * remaining)} left"
        left = left if remaining > 0 else f"took {console.duration(elapsed)}"
        return [f"{self.images_per_s:,.0f} images/s", left, *_percent("data wait", self.data_wait, 0)]

    def end_epoch(self, epoch: int, train_loss: float, metrics: Metrics | None) -> None:
        """Record an epoch's figures and print its line."""
        self.done += 1 - self.first_batch / self.trainer.batches_per_epoch
        record: dict[str, Any] = {"kind": "epoch", "epoch": epoch + 1, "train_loss": train_loss}
        record |= {"lr": self._learning_rate(), "seconds": time.perf_counter() - self.epoch_began}
        line = [f"epoch {epoch + 1}/{self.config.epoch_size}", f"loss {train_loss:.4f}"]
        if metrics is not None:
            record |= {"val_loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}
            line += [f"val loss {metrics.loss:.4f}", f"top-1 {metrics.top1:.2f} %{self._against_best(metrics.top1)}"]
            line += _percent("top-5", metrics.top5)
        self._record(record)
        if self.quiet:
            return
        self.printed = time.perf_counter()
        text = "  ".join(line + self._pace(0))
        console.note(text) if not self.bar else self.bar.console.print(text, markup=False)

    def _against_best(self, top1: float) -> str:
        """Take note of an accuracy; says whether it is the best, or what is."""
        self.top1 = top1
        if self.best_top1 is None or top1 > self.best_top1:
            self.best_top1 = top1
            return " (best)"
        return f" (best {self.best_top1:.2f} %)"

    def _learning_rate(self) -> float:
        return self.trainer.learning_rate(max(self.trainer.step - 1, 0))

    def _record(self, record: dict[str, Any]) -> None:
        if self.quiet:
            return
        wait = {} if self.data_wait is None else {"data_wait": self.data_wait}
        record |= wait | self.figures()
        record |= {"step": self.trainer.step, "images_per_s": self.images_per_s, "time": time.time()}
        try:
            self.folder.append(record)
        except OSError as error:
            console.warn(f"{self.folder.metrics} takes no more lines ({error.strerror}); training goes on", once=True)
        self.tracking.log(record["kind"], record)

    def close(self) -> None:
        """Take the bar away and write what the trackers hold back."""
        if self.bar:
            self.bar.stop()
        self.tracking.close()


def _bar() -> Any:
    """The bar of an epoch: title, bar, batches and figures; a narrow terminal has room for all but the bar itself."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    terminal = Console(stderr=True, highlight=False, soft_wrap=True)
    drawn = [BarColumn(bar_width=BAR_CELLS)] if terminal.width >= WIDE else []
    columns = [TextColumn("{task.description}"), *drawn, MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
    return Progress(*columns, console=terminal, transient=True)


def _fitting(figures: list[str], width: int) -> list[str]:
    """`figures` without those that a narrow terminal can do without, if they take more than `width` columns."""
    for name in ("lr", "data wait", "top-1"):
        if len("  ".join(figures)) > width:
            figures = [figure for figure in figures if not figure.startswith(name)]
    return figures


def _percent(name: str, value: float | None, digits: int = 2) -> list[str]:
    return [] if value is None else [f"{name} {value:.{digits}f} %"]


def _accuracies(folder: RunFolder) -> tuple[float | None, float | None]:
    """The latest and the best top-1 that the run has recorded already."""
    records = folder.records() if folder.metrics.exists() else []
    recorded = [top1 for record in records if isinstance(top1 := record.get("top1"), (int, float))]
    return (recorded[-1], max(recorded)) if recorded else (None, None)
