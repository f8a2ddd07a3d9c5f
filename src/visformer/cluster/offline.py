"""Labels for more images than one machine takes: pieces go through workers of Ray Data, rows come back as Parquet.

A worker holds the whole of a predictor: it reads its piece, decodes in threads beside the model, and gives the piece's
Parquet file as bytes, some tens of bytes an image. This process writes them, each whole or not at all, so that workers
need nothing but to read the inputs, and a part that is there is done. Batches never span pieces: a piece gives the same
rows whichever worker does it, and however often the run was stopped.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from visformer.cluster.connect import connected
from visformer.cluster.output import INPUTS, RUN, OutputFolder, finished, open_output, part_name, parts, settings_differ
from visformer.cluster.pieces import Piece
from visformer.cluster.reading import Image, Unreadable, read
from visformer.errors import Interrupted, RunError, UsageError, VisformerError

VERSION = 1
WAVE = 1000  # pieces that Ray is given at a time: what it knows of them must not grow with the run
Record = dict[str, Any]
Labeller = Callable[[Iterable[Any]], Iterator[Record]]  # images -> records, in order, as Predictor.stream has them


@dataclass(frozen=True)
class Resources:
    """What a worker takes: cores and GPUs (a part of one, if need be), and how many of them there are at most."""

    cpus: float = 1
    gpus: float = 0
    workers: int | None = None


@dataclass(frozen=True)
class Job:
    """What to do. `make_labeller` is called once in each worker; `settings` are what a resumed run must share."""

    pieces: Callable[[], Iterator[Piece]]
    make_labeller: Callable[[], Labeller]
    settings: dict[str, Any]
    column: str = ""
    key_column: str = ""
    resources: Callable[[Any], Resources] = field(default=lambda ray: Resources())
    address: str = ""


@dataclass
class Progress:
    """How far it is: pieces in all and done, and the images of this run."""

    pieces: int = 0
    done: int = 0
    labelled: int = 0
    failed: int = 0


def label(job: Job, output: str, watch: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """Label what is not labelled yet, and return how far it is: all of it. `watch` hears of each piece.

    Raises `UsageError` for settings other than those that the folder was begun with, `RunError` when a piece can't be
    done, `Interrupted` on Ctrl-C; the parts that are there stay, and the same call goes on from them.
    """
    # Ray Data's actors make Ray's C++ part warn, on our stderr, of what can't happen while this process lives.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    folder = open_output(output)
    with folder.held():
        progress = Progress(pieces=_begin(folder, job, output))
        done = finished(folder)
        progress.done = len(done)
        watch(progress)
        if progress.done < progress.pieces:
            with connected(job.address) as ray:
                try:
                    _work(ray, job, folder, done, progress, watch)
                except KeyboardInterrupt:
                    raise Interrupted(
                        f"{progress.done:,} of {progress.pieces:,} pieces are done; the same command goes on"
                    ) from None
    return progress


def any_labelled(output: str) -> bool:
    """True when some image of a finished output has labels."""
    import pyarrow.parquet as parquet

    folder = open_output(output)
    for name in parts(folder):
        about = parquet.read_metadata(io.BytesIO(folder.read(name))).metadata or {}
        if int(about.get(b"labelled", 0)):
            return True
    return False


def records(output: str) -> Iterator[Record]:
    """What is in a finished output, as the records of `visformer predict`."""
    import pyarrow.parquet as parquet

    folder = open_output(output)
    for name in parts(folder):
        for row in parquet.read_table(io.BytesIO(folder.read(name))).to_pylist():
            if row["error"] is not None:
                yield {"path": row["path"], "error": row["error"]}
                continue
            words = row["descriptions"] or [None] * len(row["labels"])
            columns = zip(row["labels"], words, row["indices"], row["probabilities"], strict=True)
            yield {
                "path": row["path"],
                "predictions": [
                    {
                        "label": one,
                        **({"description": text} if text else {}),
                        "index": index,
                        "probability": probability,
                    }
                    for one, text, index, probability in columns
                ],
            }


def _begin(folder: OutputFolder, job: Job, output: str) -> int:
    """The number of pieces, as the first run cut them; that is written down before anything else is done."""
    names = folder.names()
    if RUN in names:
        try:
            known = json.loads(folder.read(RUN))
            then, pieces = dict(known["settings"]), int(known["pieces"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"output: {output}/{RUN} is damaged; give another folder") from None
        if differences := settings_differ(then, job.settings):
            raise UsageError(
                f"output: {output} was begun with other settings ({'; '.join(differences)[:600]}); "
                "give those again, or another folder"
            )
        return pieces
    if any(not name.startswith((".", "_")) for name in names):
        raise UsageError(f"output: {output} has files that are not of such a run; give an empty or a new folder")
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for piece in job.pieces():
            count += 1
            yield json.dumps(piece.to_dict()).encode() + b"\n"

    folder.write(INPUTS, lines())
    if not count:
        raise UsageError("inputs: no image there; nothing to label")
    document = {"version": VERSION, "pieces": count, "settings": job.settings}
    folder.write(RUN, [json.dumps(document, indent=1).encode()])
    return count


def _work(
    ray: Any, job: Job, folder: OutputFolder, done: set[int], progress: Progress, watch: Callable[[Progress], None]
) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    resources = job.resources(ray)
    labeller = ray.put(job.make_labeller)
    waiting = (
        {"number": number, "piece": line.decode()}
        for number, line in enumerate(folder.lines(INPUTS))
        if number not in done
    )
    while wave := list(itertools.islice(waiting, WAVE)):
        rows = ray.data.from_items(wave, override_num_blocks=len(wave)).map(
            _Worker,
            fn_constructor_args=(job.column, job.key_column),
            fn_args=([labeller],),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.workers),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
        )
        try:
            for row in rows.iter_rows():
                if row["failure"]:
                    raise RunError(f"{row['failure']} (the same command goes on from what is done)")
                folder.write(part_name(row["number"]), [row["part"]])
                progress.done += 1
                progress.labelled += row["labelled"]
                progress.failed += row["failed"]
                watch(progress)
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[-600:]
            raise RunError(f"a worker failed, and its piece with it; the same command goes on: {reason}") from error


class _Worker:
    """Pieces to parts; Ray Data makes some of these, each in a process of its own."""

    def __init__(self, column: str, key_column: str) -> None:
        self.column, self.key_column = column, key_column
        self.label: Labeller | None = None

    def __call__(self, row: dict[str, Any], labeller: list[Any]) -> dict[str, Any]:
        """`labeller` holds a reference to what makes one."""
        try:
            if self.label is None:
                import ray

                make: Any = ray.get(labeller[0])
                self.label = make()
            assert self.label is not None
            found = label_piece(Piece(**json.loads(row["piece"])), self.label, self.column, self.key_column)
            labelled = sum("error" not in record for record in found)
            part = to_parquet(found, labelled)
        except VisformerError as error:
            return {"number": row["number"], "failure": str(error), "labelled": 0, "failed": 0, "part": b""}
        failed = len(found) - labelled
        return {"number": row["number"], "failure": "", "labelled": labelled, "failed": failed, "part": part}


def label_piece(piece: Piece, label: Labeller, column: str = "", key_column: str = "") -> list[Record]:
    """A record of each image of a piece, in its order."""
    keys: list[str] = []
    reasons: dict[int, str] = {}

    def images() -> Iterator[Image]:
        for key, image in read(piece, column, key_column):
            if isinstance(image, Unreadable):
                reasons[len(keys)] = image.reason
                image = b""
            keys.append(key)
            yield image

    found = []
    for number, record in enumerate(label(images())):
        if number in reasons:
            record = {"error": reasons[number]}
        found.append({**record, "path": keys[number]})
    return found


def to_parquet(found: list[Record], labelled: int) -> bytes:
    """The Parquet file of a piece's records: path, labels, descriptions, indices, probabilities (best first), error."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    schema = arrow.schema(
        [
            ("path", arrow.string()),
            ("labels", arrow.list_(arrow.string())),
            ("descriptions", arrow.list_(arrow.string())),
            ("indices", arrow.list_(arrow.int32())),
            ("probabilities", arrow.list_(arrow.float32())),
            ("error", arrow.string()),
        ],
        metadata={"labelled": str(labelled)},
    )
    file = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist([_row(record) for record in found], schema), file, compression="zstd")
    return file.getvalue()


def _row(record: Record) -> dict[str, Any]:
    path = record["path"].encode("utf-8", "backslashreplace").decode()  # a file's name may be no text
    best = record.get("predictions")
    if best is None:
        return {"path": path, "error": record["error"]}
    described = any("description" in one for one in best)
    return {
        "path": path,
        "labels": [one["label"] for one in best],
        "descriptions": [one.get("description", "") for one in best] if described else None,
        "indices": [one["index"] for one in best],
        "probabilities": [one["probability"] for one in best],
    }
