"""The pass over a run's validation images that its page needs: figures by class, and the worst mistakes as pictures.

The pass is that of `validate`: the same images, the same preprocessing, the same figures. A `Recorder` stands between
the loader, the model and `evaluate`, and keeps what each image came to; a mistake's rank is its cross entropy.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visformer import console
from visformer.errors import RunError
from visformer.verbs.report_runs import Run, Validation
from visformer.verbs.validation_report import Report

if TYPE_CHECKING:
    from PIL import Image

    from visformer.data.sources import ImageSource
    from visformer.verbs.validate import ValidateOptions

THUMBNAIL = 160  # pixels of the longer side
TINY = 64  # an image up to this side is shown as it is, its pixels large


@dataclass(frozen=True)
class Mistake:
    """An image that was given the wrong class. Probabilities are percentages, None where the output is not finite."""

    name: str
    true: str
    predicted: str
    confidence: float | None  # of the predicted class
    of_true: float | None  # of the true class
    loss: float | None
    picture: str  # data: address of a small picture; empty where it can't be read any more
    tiny: bool


class Recorder:
    """The model and the loader as `evaluate` sees them, keeping for each image its loss and its best class."""

    def __init__(self, model: Any, loader: Any, mapping: Sequence[int]):
        self.model, self.loader, self.mapping = model, loader, mapping
        self.batch: Any = None
        self.kept: list[
            tuple[list[int], Any]
        ] = []  # indices, and (4, B): loss, best class, its and the true one's share

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.batch = batch
            yield batch

    def __call__(self, inputs: Any) -> Any:
        """The model's logits (B, C) for its inputs (B, C, H, W)."""
        import torch

        logits = self.model(inputs)
        targets = torch.tensor([self.mapping[target] for target in self.batch.targets.tolist()], device=logits.device)
        shares = logits.float().log_softmax(dim=1)
        confidence, best = shares.max(dim=1)
        own = shares.gather(1, targets[:, None])[:, 0]
        self.kept.append((list(self.batch.indices), torch.stack([-own, best.float(), confidence.exp(), own.exp()])))
        return logits

    def worst(self, source: ImageSource, class_names: Sequence[str], count: int) -> list[Mistake]:
        """The `count` mistakes with the highest loss, worst first; those without a finite output come before all."""
        rows = [
            (index, *figures)
            for indices, kept in self.kept
            for index, figures in zip(indices, kept.T.tolist(), strict=True)
        ]
        # A loss that is not a number is unequal to itself.
        wrong = [row for row in rows if row[1] != row[1] or int(row[2]) != self.mapping[source.target(row[0])]]
        wrong.sort(key=lambda row: (-row[1] if row[1] == row[1] else float("-inf"), row[0]))
        return [self._mistake(source, class_names, row) for row in wrong[:count]]

    def _mistake(self, source: ImageSource, class_names: Sequence[str], row: Sequence[Any]) -> Mistake:
        from visformer.data.decode import ImageError

        index, loss, best, confidence, of_true = row
        finite = loss == loss
        try:
            picture, tiny = thumbnail(source.load(index))
        except ImageError:  # it was there a moment ago
            picture, tiny = "", False
        return Mistake(
            source.name(index),
            class_names[self.mapping[source.target(index)]],
            class_names[int(best)] if finite else "nothing",
            100 * confidence if finite else None,
            100 * of_true if finite else None,
            loss if finite else None,
            picture,
            tiny,
        )


def measure(run: Run, options: ValidateOptions, count: int) -> tuple[Validation, list[Mistake]]:
    """Measure the checkpoint that `options` name on its images; the figures, and the `count` worst mistakes.

    Raises `UsageError` and `RunError` as `validate` does.
    """
    import torch

    from visformer.data.datasets import class_mapping
    from visformer.data.loader import make_eval_loader
    from visformer.distributed import select_device
    from visformer.verbs.evaluation import evaluate
    from visformer.verbs.validate import load_named, open_labelled

    model: Any = load_named(options.ckpt_path, options.model)
    device = select_device(options.device_target)
    source, split = open_labelled(options, model.preprocessing.in_channels)
    mapping = class_mapping(source.class_names, model.class_names)
    loader = make_eval_loader(
        source, model.preprocessing, batch_size=options.batch_size, num_workers=options.num_parallel_workers
    )
    console.note(f"measuring {options.ckpt_path} on {len(source):,} images; --measure False leaves that out")
    recorder = Recorder(model.to(device, memory_format=torch.channels_last).eval(), loader, mapping)
    try:
        measured = evaluate(
            recorder,
            recorder,
            device,
            mapping,
            num_classes=len(model.class_names),
            normalize=model.preprocessing.normalize,
            title=f"measuring {run.name}",
        )
    finally:
        loader.close()
    report = Report.of(measured, model, options, split, device)
    return _validation(report), recorder.worst(source, model.class_names, count)


def measure_options(run: Run, data_dir: str, **speed: Any) -> ValidateOptions:
    """What `validate` would be asked for this run: its best checkpoint, on `data_dir` or where it trained.

    Raises `RunError` where the run has no checkpoint, or says of no data.
    """
    from visformer.verbs.validate import SPLIT_RECORD, ValidateOptions

    checkpoint = next((p for name in ("best", "last") if (p := run.folder / f"{name}.safetensors").is_file()), None)
    if checkpoint is None:
        raise RunError("there is no checkpoint to measure")
    trained = run.options
    if not data_dir and (not trained or trained.get("val_while_train") is False):
        raise RunError("the run held out no images to measure on; --data_dir names some")
    given = {name: str(trained[name]) for name in ("dataset", "data_dir", "val_split") if name in trained}
    record = run.folder / SPLIT_RECORD
    moved = data_dir and record.is_file() and Path(data_dir).resolve() != Path(given.get("data_dir", "")).resolve()
    if data_dir:
        given["data_dir"] = data_dir
    if moved and not any((Path(data_dir) / name).is_dir() for name in ("val", given.get("val_split", "val"))):
        given["split_file"] = str(record)
    return ValidateOptions(ckpt_path=str(checkpoint), **given, **speed)


def thumbnail(image: Image.Image) -> tuple[str, bool]:
    """A small picture as a data: address, and whether it is the image itself, being tiny."""
    from PIL.Image import Resampling

    tiny = max(image.size) <= TINY
    image = image.convert("L" if image.mode == "L" else "RGB")
    if not tiny:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Resampling.LANCZOS)
    written = io.BytesIO()
    image.save(written, "PNG") if tiny else image.save(written, "JPEG", quality=82)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}", tiny


def _validation(report: Report) -> Validation:
    confusion = report.metrics.confusion
    true, given = (axis.tolist() for axis in confusion.nonzero())
    names = report.class_names
    cells = {(names[t], names[p]): int(confusion[t, p]) for t, p in zip(true, given, strict=True)}
    origin = f"of {report.ckpt_path} on {report.split}, measured for this page"
    return Validation(report.to_dict(), cells, names, origin)
