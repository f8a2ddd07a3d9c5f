"""What a training run leaves behind, and how the next one finds it.

    last.safetensors     the model after the latest epoch, or where the run was interrupted
    best.safetensors     the model with the best top-1 so far
    epoch_0012.safetensors   kept checkpoints, by ckpt_save_policy
    last.state.pt        everything that an exact resume needs, weights included, in one file
    last.state.before.pt   the same of the save before, for when that file is damaged
    config.yaml          the options; `visformer train -c RUN/config.yaml` runs them again
    split.json           which images were held out, when the data had no validation set
    metrics.jsonl        one JSON object a line: steps, epochs
    curves.png           the epochs' figures drawn

Only last.state.pt decides where a resumed run goes on, so it is written after the files it speaks of; whatever was
written later than it is written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visformer import console
from visformer.atomic import atomic_text, remove_leftovers, replaced
from visformer.checkpoint import Checkpoint, load_state, read_checkpoint, save_state, write_checkpoint
from visformer.errors import RunError, UsageError
from visformer.figures import curves_figure


class RunFolder:
    """One run's files under `path`; `keep_max` and `policy` say which checkpoints beside last and best stay."""

    def __init__(self, path: str | Path, *, keep_max: int = 10, policy: str = "latest_k"):
        self.path = Path(path)
        self.keep_max = keep_max
        self.policy = policy
        self.kept: list[list[float]] = []  # [epoch, score], oldest first
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.state = self.path / "last.state.pt"
        self.state_before = self.path / "last.state.before.pt"
        self.metrics = self.path / "metrics.jsonl"
        self.split = self.path / "split.json"

    def open(self, *, resume: bool) -> dict[str, Any] | None:
        """Make the folder ready. Returns the state to resume from; None begins anew.

        Raises `UsageError` when there is a run already and `resume` is off, or the place is not a folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"ckpt_save_dir: {self.path} is a file; give a folder")
        holds_run = self.state.exists() or self.last.exists()
        if holds_run and not resume:
            raise UsageError(
                f"ckpt_save_dir: {self.path} holds a run already; continue it with --resume auto, "
                "or choose another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run folder {self.path}: {error.strerror}") from error
        remove_leftovers(self.path)
        if self.state.exists() or self.state_before.exists():
            return self._latest_state()
        if self.last.exists() and read_checkpoint(self.last).training.get("epoch", 0) > 1:
            raise UsageError(
                f"{self.last}: beside it there is no {self.state.name} to continue from; start from its weights with "
                f"--ckpt_path {self.last} and another --ckpt_save_dir"
            )
        self.metrics.unlink(missing_ok=True)  # of a start that was killed before its first save
        return None

    def recorded_split(self) -> dict[str, Any] | None:
        """The split that an earlier start of this run made. Raises `RunError` when the file is damaged."""
        if not self.split.exists():
            return None
        try:
            return json.loads(self.split.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{self.split}: not readable ({error}); delete it to split anew") from error

    def write_split(self, split: dict[str, Any] | None) -> None:
        """Record which images are held out."""
        if split is not None:
            atomic_text(self.split, json.dumps(split, indent=1, ensure_ascii=False))

    def rewind(self, step: int) -> None:
        """Forget lines of metrics.jsonl that a resumed run will write again: those after `step`."""
        if self.metrics.exists():
            lines = [json.dumps(record) for record in self.records() if record["step"] <= step]
            atomic_text(self.metrics, "".join(f"{line}\n" for line in lines))

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a kill cut short is left out."""
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def _latest_state(self) -> dict[str, Any]:
        """The latest state that can be read; one that can't be is passed over for the one before, with a warning."""
        try:
            return load_state(self.state)
        except RunError as error:
            if not self.state_before.exists():
                raise
            if self.state.exists():
                console.warn(f"{error}; going on from the save before, {self.state_before.name}")
            return load_state(self.state_before)

    def save_last(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Write last.safetensors, then the state that makes it official; the state before stays, under its own name."""
        write_checkpoint(self.last, checkpoint)
        with replaced(self.state, self.state_before):
            save_state(self.state, state | {"kept": self.kept})

    def save_epoch(
        self, checkpoint: Checkpoint, state: dict[str, Any], best: bool, kept: tuple[int, float] | None
    ) -> None:
        """Write the files of an epoch's end, first those of which the state speaks. `kept`: the epoch and its score, if
        it is one of those that may stay."""
        if best:
            self.save_best(checkpoint)
        if kept is not None:
            self.keep(checkpoint, *kept)
        self.save_last(checkpoint, state)

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Write best.safetensors."""
        write_checkpoint(self.best, checkpoint)

    def keep(self, checkpoint: Checkpoint, epoch: int, score: float) -> None:
        """Keep this epoch's checkpoint, and delete those that the policy no longer wants."""
        self.kept = [row for row in self.kept if row[0] < epoch] + [[epoch, score]]
        order = sorted(self.kept, key=lambda row: row[1] if self.policy == "top_k" else row[0], reverse=True)
        wanted = {row[0] for row in order[: self.keep_max]}
        if epoch in wanted:
            write_checkpoint(self._kept_path(epoch), checkpoint)
        for row in self.kept:
            if row[0] not in wanted:
                self._kept_path(int(row[0])).unlink(missing_ok=True)
        self.kept = [row for row in self.kept if row[0] in wanted]

    def draw_curves(self, title: str) -> None:
        """Draw curves.png from the epochs recorded so far, if there are any."""
        epochs = [r for r in self.records() if r.get("kind") == "epoch"] if self.metrics.exists() else []
        if epochs:
            curves_figure(epochs, self.path / "curves.png", title)

    def _kept_path(self, epoch: int) -> Path:
        return self.path / f"epoch_{int(epoch):04d}.safetensors"
