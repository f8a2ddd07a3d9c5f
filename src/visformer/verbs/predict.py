"""`visformer predict`: labels for files, folders and globs, or for a list of paths on standard input.

    visformer predict photos --ckpt_path run/best.safetensors --format csv --output labels.csv
    find . -name '*.jpg' | visformer predict - --ckpt_path run/best.safetensors --format json

One record for each image, in order; what can't be read is a record with an error. Records stream: memory does not
grow with their number. The exit code is 1 only when not a single image was labelled. With `--engine ray` millions are
labelled on a cluster: predict_ray.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from visformer import console
from visformer.config import option
from visformer.errors import UsageError
from visformer.verbs.records import FORMATS, Record

_FORMAT_OF_SUFFIX = {".json": "json", ".csv": "csv"}


@dataclass
class PredictOptions:
    """Options of `visformer predict`; see each field's help."""

    inputs: list[str] = option(
        [],
        "image files, folders (searched at every depth), globs, or - for a list of paths on standard input",
        group="Images",
        positional=True,
        alias="image_path",
    )
    ckpt_path: str = option(
        "",
        "checkpoint to label with: a file that training wrote, or any that `visformer convert` reads, a URL, "
        "hf-hub:owner/name, or a published weight's name; or an exported bundle's folder",
        group="Model",
    )
    model: str = option(
        "", "name that the checkpoint's model must have; empty: any. With .mindcv, .authors or .timm: whose conventions"
    )
    top_k: int = option(5, "labels for each image, best first; at most as many as there are classes", group="Output")
    format: Literal["text", "json", "csv"] | None = option(None, "None: by the suffix of output, else text")
    output: str = option("", "file to write to instead of stdout; it appears, or replaces another, when complete")
    batch_size: int = option(64, "images that the model takes at once", group="Speed")
    num_parallel_workers: int = option(8, "threads that decode; at most the cores there are; 0: none")
    device_target: Literal["auto", "CPU", "GPU", "Ascend", "cuda", "npu", "xpu", "mps", "cpu"] = option(
        "auto", "device to run on; auto: the accelerator that is there, else the CPU"
    )
    amp_level: Literal["O0", "O1", "O2", "O3"] = option("O0", "O0: fp32; O1 to O3: half precision")
    amp_dtype: Literal["bf16", "fp16"] = option("bf16", "the half precision of amp_level")
    engine: Literal["local", "ray"] = option(
        "local",
        "ray: on a Ray cluster; inputs may then also be tar and Parquet files, packed sets, lists (.txt) and addresses "
        "such as s3://bucket/photos, and output is a folder of Parquet files; what is done there is not done again",
        group="Cluster",
    )
    ray_address: str = option("", "auto, or HOST:PORT, of the cluster to join; empty: Ray is started on this machine")
    chunk_images: int = option(1000, "images of one piece of work, which is one Parquet file")
    image_column: str = option("image", "column of Parquet inputs that has the images: files' bytes, or paths")
    key_column: str = option("", "column of Parquet inputs that has the images' keys; empty: the path, or FILE#ROW")
    workers: int | None = option(None, "workers at most; None: as many as the cluster holds")
    cpus_per_worker: int | None = option(None, "cores of a worker; None: 1, or a GPU's share of them, 8 at most")
    gpus_per_worker: float | None = option(None, "GPUs of a worker, such as 0.5; None: 1 where the cluster has some")

    def __post_init__(self) -> None:
        least_of = {"top_k": 1, "batch_size": 1, "num_parallel_workers": 0, "chunk_images": 1}
        least_of |= {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"{name}: {value} is out of range; it must be at least {least}")
        if self.engine == "ray":
            self._check_ray()
        elif self.output and Path(self.output).is_dir():
            raise UsageError(f"output: {self.output} is a folder; give a file")

    def _check_ray(self) -> None:
        if not self.output:
            raise UsageError("output: with --engine ray give the folder that the Parquet files go to")
        if self.format is not None:
            raise UsageError(f"format: {self.format} is not for --engine ray, which writes Parquet; leave it out")

    @property
    def output_format(self) -> str:
        """The format, `None` resolved."""
        return self.format or _FORMAT_OF_SUFFIX.get(Path(self.output).suffix.lower(), "text")


class Tally:
    """Counts the records that pass through `watch`."""

    def __init__(self) -> None:
        self.labelled = 0
        self.failed = 0

    def watch(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            if "error" in record:
                self.failed += 1
            else:
                self.labelled += 1
            yield record


def run(options: PredictOptions) -> int:
    """Predict, print or write the records as they come, and return 0 if any image was labelled, else 1."""
    if options.engine == "ray":
        from visformer.verbs.predict_ray import run_on_ray

        return run_on_ray(options)
    tally = Tally()
    started = time.perf_counter()
    records = tally.watch(_stream(options))
    if options.output:
        _write(options, _with_progress(records))
    else:
        for piece in FORMATS[options.output_format](records):
            _print(piece)
    total = tally.labelled + tally.failed
    if total == 0:
        raise UsageError("inputs: the list of paths is empty; nothing to label")
    if options.output or tally.failed:
        seconds = time.perf_counter() - started
        failed = f", {tally.failed:,} could not be read" if tally.failed else ""
        where = f"; written to {options.output}" if options.output else ""
        console.note(f"{tally.labelled:,} images labelled{failed} ({total / seconds:,.0f} images/s){where}")
    return 0 if tally.labelled else 1


def predict(options: PredictOptions) -> list[Record]:
    """Label the images; one record for each, in order. Writes `output` if given, prints nothing on stdout."""
    if options.engine == "ray":
        from visformer.verbs.predict_ray import predict_on_ray

        return predict_on_ray(options)
    records = list(_stream(options))
    if options.output:
        _write(options, records)
    return records


def _stream(options: PredictOptions) -> Iterator[Record]:
    """The records, lazily; what is wrong with the options is raised before the first."""
    from visformer.bundles.bundle import Bundle, is_bundle
    from visformer.machine import available_cores
    from visformer.verbs.inputs import check_inputs, expand
    from visformer.verbs.predictor import Predictor
    from visformer.verbs.validate import load_named, refuse_half

    check_inputs(options.inputs)
    refuse_half(options.ckpt_path, "amp_level", options.amp_level)
    bundled = bool(options.ckpt_path) and is_bundle(options.ckpt_path)
    model = (Bundle.open if bundled else load_named)(options.ckpt_path, options.model)

    predictor = Predictor(
        model,
        device=options.device_target,
        top_k=options.top_k,
        batch_size=options.batch_size,
        num_workers=min(options.num_parallel_workers, available_cores()),
        amp_level=options.amp_level,
        amp_dtype=options.amp_dtype,
    )
    return predictor.stream(expand(options.inputs))


def _write(options: PredictOptions, records: Iterable[Record]) -> None:
    from visformer.atomic import atomic_write

    def write(file: BinaryIO) -> None:
        for piece in FORMATS[options.output_format](records):
            # Bytes of a file name that are no UTF-8 come as escapes, which in JSON are the string's own.
            file.write(piece.encode("utf-8", "backslashreplace"))

    atomic_write(options.output, write)


def _print(piece: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(piece.encode(encoding, "backslashreplace").decode(encoding))


def _with_progress(records: Iterable[Record]) -> Iterator[Record]:
    """The records, with a count on the terminal while they go into a file."""
    with console.progress() as bar:
        task = bar.add_task("predict", total=None, status="images")
        for record in records:
            yield record
            bar.advance(task)
