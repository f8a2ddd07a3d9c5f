"""`visformer report`: a run folder, or several side by side, as one HTML page that needs nothing but itself.

    visformer report ckpt
    visformer report runs/small runs/tiny --output comparison.html

The page has the key figures, the curves of all runs in one chart each, the options in which the runs differ, and for
each run the confusion of its classes and its worst mistakes as pictures, where the validation images are at hand. It
opens from a disk, in a mail or in CI's artifacts: no network, no server, no script needed. A run may be going on, or
have been cut short; the page shows what there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visformer import console
from visformer.config import option
from visformer.errors import RunError, UsageError

if TYPE_CHECKING:
    from visformer.verbs.report_measure import Mistake
    from visformer.verbs.report_runs import Run


@dataclass
class ReportOptions:
    """Options of `visformer report`; see each field's help."""

    runs: list[str] = option(
        [], "run folders, as --ckpt_save_dir of `visformer train` names them", group="Runs", positional=True
    )
    output: str = option(
        "",
        "HTML file to write; empty: report.html in the run's folder, or, for several runs, in this one",
        group="Page",
    )
    title: str = option("", "the page's heading; empty: model and data")
    measure: bool | None = option(
        None,
        "run each best checkpoint over the validation images, for the confusion of the classes and the worst mistakes; "
        "None: where the images are at hand",
        group="Measuring",
    )
    data_dir: str = option("", "folder of the validation images; empty: where each run read its own")
    worst: int = option(24, "the worst mistakes to show of each run; 0: none")
    batch_size: int = option(128, "images per batch; the figures do not depend on it")
    num_parallel_workers: int = option(8, "processes that decode; at most the cores there are; 0: none")
    device_target: Literal["auto", "CPU", "GPU", "Ascend", "cuda", "npu", "xpu", "mps", "cpu"] = option(
        "auto", "device to measure on; auto: the accelerator that is there, else the CPU"
    )

    def __post_init__(self) -> None:
        for name, lowest in (("worst", 0), ("batch_size", 1), ("num_parallel_workers", 0)):
            if getattr(self, name) < lowest:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range; it must be at least {lowest}")
        if self.output and Path(self.output).is_dir():
            raise UsageError(f"output: {self.output} is a folder; name a file, such as {self.output}/report.html")
        if self.measure is False and self.data_dir:
            raise UsageError(
                "data_dir: it names images to measure, which measure False leaves out; drop one of the two"
            )


def run(options: ReportOptions) -> int:
    """Write the page and say where it is."""
    print(report(options))
    return 0


def report(options: ReportOptions) -> Path:
    """Write the page and return its path.

    Raises `UsageError` for a folder that is no run, and for images that `data_dir` names and that do not fit; images
    that were not asked for by name and are not at hand leave a sentence on the page.
    """
    from importlib.metadata import version

    from visformer.atomic import atomic_text
    from visformer.verbs.report_page import page
    from visformer.verbs.report_runs import read_runs

    runs = read_runs(list(dict.fromkeys(options.runs)))
    output = Path(options.output or (runs[0].folder / "report.html" if len(runs) == 1 else "report.html"))
    mistakes = {run.mark: found for run in runs if (found := _measured(run, options)) is not None}
    atomic_text(output, page(runs, mistakes, options.title, version("visformer")))
    return output


def _measured(run: Run, options: ReportOptions) -> list[Mistake] | None:
    """The worst mistakes of a run, whose `validation` becomes what was measured; None where nothing was."""
    from visformer.verbs.report_measure import measure, measure_options

    if options.measure is False:
        return None
    try:
        asked = measure_options(
            run,
            options.data_dir,
            batch_size=options.batch_size,
            num_parallel_workers=options.num_parallel_workers,
            device_target=options.device_target,
        )
        run.validation, mistakes = measure(run, asked, options.worst)
    except (UsageError, RunError) as error:
        if options.data_dir or options.measure:
            raise type(error)(f"{run.folder}: {error}") from error
        run.problems.append(f"Not measured: {error}.")
        console.note(f"{run.folder}: not measured: {error}")
        return None
    return mistakes if options.worst else None
