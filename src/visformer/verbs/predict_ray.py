"""`visformer predict --engine ray`: labels for millions of images, as Parquet, on one machine or many.

    visformer predict photos 'shards/*.tar' --ckpt_path run/best.safetensors --engine ray --output labels

The model goes to the workers from here, so nodes need the package and the images, not the checkpoint. What comes out,
and how a stopped run goes on, is in cluster/output.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visformer import console
from visformer.cluster.offline import Job, Progress, Resources, any_labelled, label, records
from visformer.cluster.output import open_output
from visformer.cluster.pieces import cut
from visformer.errors import UsageError
from visformer.verbs.records import Record

if TYPE_CHECKING:
    from visformer.verbs.predict import PredictOptions

_LINE_EVERY_S = 10.0


def run_on_ray(options: PredictOptions) -> int:
    """Label, write the parts, and return 0 if any image was labelled, else 1."""
    started = time.perf_counter()
    with _Watch() as watch:
        progress = label(_job(options), options.output, watch)
    total = progress.labelled + progress.failed
    if not total:
        console.note(f"nothing left to do: all {progress.pieces:,} pieces are in {options.output}")
        return 0 if any_labelled(options.output) else 1
    seconds = time.perf_counter() - started
    failed = f", {progress.failed:,} could not be read" if progress.failed else ""
    console.note(
        f"{progress.labelled:,} images labelled{failed} ({total / seconds:,.0f} images/s); written to {options.output}"
    )
    return 0 if progress.labelled or any_labelled(options.output) else 1


def predict_on_ray(options: PredictOptions) -> list[Record]:
    """Label, write the parts, and return what is in them, in order."""
    label(_job(options), options.output)
    return list(records(options.output))


def _job(options: PredictOptions) -> Job:
    from visformer.verbs.inputs import check_inputs, expand
    from visformer.verbs.validate import load_named, refuse_half

    local = [entry for entry in options.inputs if "://" not in entry and not _has_shards(entry)]
    if local or not options.inputs:
        check_inputs(local)
    open_output(options.output)
    refuse_half(options.ckpt_path, "amp_level", options.amp_level)
    model = load_named(options.ckpt_path, options.model)
    content = _Content.of(model, options.ckpt_path)
    inputs = [entry if "://" in entry or entry == "-" else os.path.abspath(entry) for entry in options.inputs]
    return Job(
        pieces=lambda: cut(options.inputs, lambda entry: expand([entry]), options.chunk_images, options.image_column),
        make_labeller=_Labeller(
            content,
            {
                "device": options.device_target,
                "top_k": options.top_k,
                "batch_size": options.batch_size,
                "amp_level": options.amp_level,
                "amp_dtype": options.amp_dtype,
            },
            options.num_parallel_workers,
        ),
        settings={
            "inputs": inputs,
            "image_column": options.image_column,
            "key_column": options.key_column,
            "chunk_images": options.chunk_images,
            "model": f"{model.model_name} {content.fingerprint[:16]}",
            "top_k": options.top_k,
            "precision": "fp32" if options.amp_level == "O0" else options.amp_dtype,
        },
        column=options.image_column,
        key_column=options.key_column,
        resources=lambda ray: _resources(options, ray.cluster_resources()),
        address=options.ray_address,
    )


def _has_shards(entry: str) -> bool:
    """True for a local folder that is a packed set, or holds tar or Parquet files and perhaps no image."""
    from visformer.cluster.pieces import PARQUET_SUFFIXES, TAR_SUFFIXES
    from visformer.data.packed_index import MARKER

    if not os.path.isdir(entry):
        return False
    if (Path(entry) / MARKER).is_file():
        return True
    wanted = TAR_SUFFIXES + PARQUET_SUFFIXES
    return any(name.lower().endswith(wanted) for _, _, names in os.walk(entry) for name in names)


def _resources(options: PredictOptions, cluster: dict[str, float]) -> Resources:
    """A GPU and its share of the cores for each worker where there are GPUs, else a core."""
    on_cpu = options.device_target in ("CPU", "cpu")
    there = cluster.get("GPU", 0)
    if options.gpus_per_worker is not None and options.gpus_per_worker > there:
        raise UsageError(f"gpus_per_worker: {options.gpus_per_worker:g} is more than the cluster's {there:g}")
    gpus = 0.0 if on_cpu else 1.0 if there and options.gpus_per_worker is None else options.gpus_per_worker or 0.0
    share = int(cluster.get("CPU", 1) * gpus / there) if gpus else 1
    cpus = options.cpus_per_worker or max(1, min(8, share))
    if cpus > cluster.get("CPU", 0):
        raise UsageError(f"cpus_per_worker: {cpus:g} is more than the cluster's {cluster.get('CPU', 0):g}")
    return Resources(cpus=cpus, gpus=gpus, workers=options.workers)


@dataclass(frozen=True)
class _Content:
    """A model that can be sent: a module, or the files of a bundle by name. `fingerprint` is SHA-256 of it."""

    module: Any
    files: dict[str, bytes]
    fingerprint: str

    @classmethod
    def of(cls, model: Any, path: str) -> _Content:
        from visformer.bundles.adapter import BundleModel

        digest = hashlib.sha256()
        if isinstance(model, BundleModel):
            folder = model.bundle.path
            names = ["bundle.json", *model.bundle.document["files"]]
            files = {name: (folder / name).read_bytes() for name in sorted(set(names))}
            for name, content in files.items():
                digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
            return cls(None, files, digest.hexdigest())
        about = [model.model_name, list(model.class_names), str(model.preprocessing), str(model.config)]
        digest.update(json.dumps(about).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + b"\0" + tensor.contiguous().view(-1).numpy().tobytes())
        return cls(model, {}, digest.hexdigest())

    def open(self) -> Any:
        """The module, in a worker."""
        if not self.files:
            return self.module
        from visformer.bundles.adapter import bundle_model

        with tempfile.TemporaryDirectory(prefix="visformer-bundle-") as folder:
            for name, content in self.files.items():
                place = Path(folder, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            return bundle_model(folder)


@dataclass(frozen=True)
class _Labeller:
    """Makes a predictor in a worker, which is as wide as the cores that the worker has been given."""

    content: _Content
    options: dict[str, Any]
    most_threads: int

    def __call__(self) -> Any:
        import torch

        from visformer.verbs.predictor import Predictor

        cores = int(os.environ.get("OMP_NUM_THREADS") or 1)  # Ray sets it to what the worker has
        torch.set_num_threads(cores)
        return Predictor(self.content.open(), num_workers=min(self.most_threads, cores), **self.options).stream


class _Watch:
    """How far it is: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        self.bar = console.progress()
        self.task: Any = None
        self.began = self.told = time.monotonic()

    def __enter__(self) -> _Watch:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        images = progress.labelled + progress.failed
        status = f"pieces, {images:,} images ({images / max(now - self.began, 1e-9):,.0f}/s)"
        if self.task is None:
            self.task = self.bar.add_task("predict", total=progress.pieces, status=status)
            if progress.done:
                console.note(f"{progress.done:,} of {progress.pieces:,} pieces were done before; going on")
        self.bar.update(self.task, completed=progress.done, status=status)
        if not console.is_terminal() and now - self.told > _LINE_EVERY_S:
            self.told = now
            console.note(f"{progress.done:,} of {progress.pieces:,} {status}")
