"""Where a run's figures go besides metrics.jsonl: TensorBoard, trackio, both or nowhere.

A sink takes figures by name and the optimizer step they belong to. `Tracking` hands them to every sink that is on, and
with none on it does nothing. Watching never ends a run: a sink that fails is warned of once and then left alone. Only
what the user can mend before the run begins, a package that is not installed or a project's name that won't do, is a
`UsageError`.

The packages are extras, imported where they are used. Both keep their figures on this machine: TensorBoard in the run
folder, trackio in its own folder below the user's cache (or in $TRACKIO_DIR), which `trackio show` serves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from visformer import console
from visformer.config import TrainConfig
from visformer.errors import UsageError


class Sink(Protocol):
    """One place that figures are sent to; any of its methods may raise."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Take figures by name, such as epoch/top1, after `step` optimizer steps."""
        ...

    def close(self) -> None:
        """Write what is still held back."""
        ...


class Tracking:
    """Any number of sinks, by the names that warnings call them."""

    def __init__(self, sinks: dict[str, Sink] | None = None):
        self.sinks = dict(sinks or {})

    def log(self, kind: str, record: dict[str, Any]) -> None:
        """Send the numbers of a record of metrics.jsonl, each under its kind ("step", "epoch") and name."""
        if not self.sinks:
            return
        figures = {
            f"{kind}/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("step", "time")
        }
        self._each(lambda sink: sink.log(figures, record["step"]))

    def close(self) -> None:
        """Close every sink; nothing can be sent afterwards."""
        self._each(lambda sink: sink.close())
        self.sinks.clear()

    def _each(self, do: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                do(sink)
            except Exception as error:  # whatever a tracker raises, training goes on
                del self.sinks[name]
                console.warn(f"{name} takes no more figures ({_first_line(error)}); training goes on without it")


def open_tracking(config: TrainConfig, folder: Path, *, resumed: bool = False) -> Tracking:
    """The sinks that the options ask for; `resumed` says that the run in `folder` goes on rather than begins.

    Raises `UsageError` when a package is missing or the project's name is refused.
    """
    tracking = Tracking()
    if config.tensorboard:
        _add(tracking, "tensorboard", lambda: TensorBoard(folder / "tensorboard"))
    if config.trackio:
        options = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
        _add(tracking, "trackio", lambda: Trackio(config.trackio, run_name(folder), options, resumed=resumed))
    return tracking


def _add(tracking: Tracking, name: str, open_sink: Callable[[], Sink]) -> None:
    try:
        tracking.sinks[name] = open_sink()
    except ImportError as error:
        raise UsageError(f"{name}: it is not installed; pip install 'visformer[{name}]'") from error
    except ValueError as error:
        raise UsageError(f"{name}: {_first_line(error)}") from error
    except Exception as error:
        console.warn(f"{name} cannot be opened ({_first_line(error)}); training goes on without it")


def run_name(folder: Path) -> str:
    """What a tracker calls the run in `folder`: the folder's name, and a mark that tells it from others so named."""
    path = folder.resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode(errors='surrogateescape')).hexdigest()[:6]}"


class TensorBoard:
    """Event files in `folder`, which `tensorboard --logdir` shows."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A run of a trackio project. What trackio prints is held back: stdout is for results."""

    def __init__(self, project: str, name: str, options: dict[str, Any], *, resumed: bool):
        import trackio  # pyright: ignore[reportMissingImports]

        with contextlib.redirect_stdout(io.StringIO()):
            # "allow" goes on with the latest run of this name, and begins one where there is none.
            self.run = trackio.init(
                project=project, name=name, config=options, resume="allow" if resumed else "never", embed=False
            )
        console.note(f"trackio: run {self.run.name}; look at it with: trackio show --project {project}")

    def log(self, figures: dict[str, float], step: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.log(figures, step=step)

    def close(self) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # and not the run's own, which the package would call once more at exit


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
