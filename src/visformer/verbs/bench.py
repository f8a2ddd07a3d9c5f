"""`visformer bench`: how fast a model trains or infers, or images load, beside timm's own, in one run.

    visformer bench --what train --models visformer_tiny,visformer_small --batch_sizes 32,128
    visformer bench --what data --workers 2
    visformer bench --what end_to_end --workers 2
    visformer bench --what serve

Loading is in bench_data.py, training from files in bench_feed.py, serving in bench_serve.py. For the rest, all
contenders work on the same synthetic batch in the same process and take turns; nothing is read from disk.
They must first prove that they compute the same thing: with equal weights, equal logits. A training step is forward,
label-smoothed cross entropy, backward and AdamW; an inference step is a forward pass on normalised images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visformer import console
from visformer.config import option
from visformer.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass
class BenchOptions:
    """Options of `visformer bench`; see each field's help."""

    what: Literal["train", "infer", "data", "end_to_end", "serve"] = option(
        "train",
        "training steps, forward passes, images loaded and augmented, training from image files, or requests served",
        group="Work",
    )
    against: list[str] = option(
        ["timm"],
        "whose models and loader to measure against: timm, always; with infer on a CPU also onnxruntime and openvino, "
        "for which our model is exported; serving is held against its own engine without the server",
    )
    models: list[str] | None = option(
        None,
        "models that both have, measured one after the other (None: visformer_tiny); with data, models of ours whose "
        "training rate to hold the loader against (None: none)",
    )
    batch_sizes: list[int] = option([64], "images per step; each is measured in turn")
    image_size: int | None = option(
        None,
        "side of the images in pixels, a multiple of 32; None: 224 on an accelerator and with data and serve, else 64",
    )
    repeats: int | None = option(
        None,
        "turns of each contender that count: a step, or as many as take 50 ms; with data and end_to_end a pass over "
        "the images, with serve seconds of load; None: 20, with those three 5",
    )
    warmup: int | None = option(
        None, "turns of each contender before those that count; None: 3, with data, end_to_end and serve 1"
    )
    data_dir: str = option("", "folder of class folders to read; empty: JPEGs made on the spot", group="Data")
    num_images: int | None = option(
        None,
        "images to make, or to take of the folder's; with end_to_end, images of a pass, which may come again; None: "
        "1024, with serve 128",
    )
    workers: int = option(2, "worker processes of each loader; at most the cores there are")
    auto_augment: str | None = option("autoaug", "augmentation policy of both loaders, or none")
    amp_level: Literal["auto", "O0", "O1", "O2", "O3"] = option(
        "auto",
        "ours, and timm's as ours: O0: fp32; O1 to O3: bf16; auto: with train whichever is faster here, else bf16. The "
        "baseline is timm's in fp32 at any",
        group="Device",
    )
    compile: bool = option(
        False,
        "end_to_end: torch.compile the models of all contenders; train: ours, and timm's once more; infer: timm's once "
        "more",
    )
    device_target: Literal["auto", "CPU", "GPU", "Ascend", "cuda", "npu", "xpu", "mps", "cpu"] = option(
        "auto", "device to run on; auto: the accelerator that is there, else the CPU"
    )
    ckpt_path: str = option(
        "",
        "bundle or checkpoint to serve; empty: an int8 bundle for OpenVINO is made of each of models",
        group="Serving",
    )
    clients: list[int] = option([1, 16, 64, 512], "clients at a time, each with a connection of its own; in turn")
    seconds: float = option(3.0, "length of a turn, of the server's and of the loop's")
    json: bool = option(False, "print the result as one JSON document on stdout", group="Output")
    output: str = option("", "file for the JSON document, beside what is printed")

    def __post_init__(self) -> None:
        self._fill_in()
        for name, least in (("repeats", 2), ("warmup", 0), ("workers", 0), ("num_images", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range; it must be at least {least}")
        if self.image_size is not None and self.image_size < 32:
            raise UsageError(f"image_size: {self.image_size} is too small; the model needs at least 32 pixels a side")
        if not 0.1 <= self.seconds <= 3600 or min(self.clients, default=1) < 1:
            raise UsageError("clients, seconds: out of range; clients must be at least 1, seconds from 0.1 to 3,600")
        for name in ("models", "batch_sizes", "clients"):
            if not getattr(self, name) and not (name == "models" and self.what == "data"):
                raise UsageError(f"{name}: the list is empty; give at least one")
        if min(self.batch_sizes) < 2 and self.what in ("train", "end_to_end"):
            raise UsageError(
                f"batch_sizes: {min(self.batch_sizes)} is too small; BatchNorm trains on at least 2 images"
            )
        if min(self.batch_sizes) < 1:
            raise UsageError(f"batch_sizes: {min(self.batch_sizes)} is out of range; it must be at least 1")
        for name in self.against:
            if name not in ("timm", "onnxruntime", "openvino"):
                raise UsageError(f"against: {name!r} is not one of timm, onnxruntime, openvino")
        if self.output and Path(self.output).is_dir():
            raise UsageError(f"output: {self.output} is a folder; give a file")

    def _fill_in(self) -> None:
        """What depends on `what`."""
        data, serve = self.what == "data", self.what == "serve"
        passes = self.what in ("data", "end_to_end", "serve")
        if self.amp_level == "auto" and self.what != "train":
            self.amp_level = "O2"
        if self.repeats is None:
            self.repeats = 5 if passes else 20
        if self.warmup is None:
            self.warmup = 1 if passes else 3
        if self.models is None:
            self.models = [] if data else ["visformer_tiny"]
        if self.image_size is None and (data or serve):
            self.image_size = 224
        if self.num_images is None:
            self.num_images = 128 if serve else 1024


def run(options: BenchOptions) -> int:
    """Measure, print the table or the document, and return the exit code."""
    document = bench(options)
    if options.json:
        console.print_json(document)
    elif options.what == "data":
        from visformer.verbs.bench_data import print_tables

        print_tables(document)
    elif options.what == "end_to_end":
        from visformer.verbs.bench_feed import print_tables

        print_tables(document)
    elif options.what == "serve":
        from visformer.verbs.bench_serve import print_tables

        print_tables(document)
    else:
        _print_table(document)
    if options.output:
        console.note(f"written to {options.output}")
    return 0


def bench(options: BenchOptions) -> dict[str, Any]:
    """Measure, write `output` if given, and return the document; prints nothing on stdout.

    The document: what, against, device, processor, cores, threads, versions, image_size (pixels a side), repeats,
    warmup, and `results`, one for each model and batch size: model, batch_size, logit_difference (largest, float64, as
    a share of the largest logit) and `contenders`, each with name, precision, memory_format, images_per_s, ratio
    (speed over that of the contender `timm`: fp32, eager, contiguous), both medians and both with `_quartiles`,
    seconds_per_step and finite. With data and end_to_end: workers, auto_augment, data_dir, with end_to_end compile, and
    results as the `measure` of bench_data.py and bench_feed.py gives them. With serve: clients, seconds and the results
    of bench_serve.py. Raises `UsageError` for a model that timm lacks or a size that it refuses, `RunError` when logits
    differ.
    """
    from visformer.distributed import select_device

    device = select_device(options.device_target)
    image_size = options.image_size or (64 if device.type == "cpu" else 224)
    document = {
        "what": options.what,
        "against": options.against,
        **_circumstances(device),
        "image_size": image_size,
        "repeats": options.repeats,
        "warmup": options.warmup,
    } | _results(options, image_size, device)
    if options.output:
        from visformer.atomic import atomic_text

        atomic_text(options.output, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return document


def _results(options: BenchOptions, image_size: int, device: torch.device) -> dict[str, Any]:
    """The results, and what those of data and end_to_end depend on besides."""
    if options.what == "data":
        return _data(options, device)
    if options.what == "end_to_end":
        return _end_to_end(options, image_size, device)
    if options.what == "serve":
        return _serve(options, image_size)
    return _models(options, image_size, device)


def _models(options: BenchOptions, image_size: int, device: torch.device) -> dict[str, Any]:
    """The results of training or inference."""
    import torch

    from visformer.verbs.bench_timm import check_peer

    models = options.models or []
    for name in models:
        check_peer(name, image_size)
    if options.what == "infer":
        from visformer.verbs.bench_infer import check_engines

        check_engines(options.against)
    torch.manual_seed(0)
    cases = [(name, batch_size) for name in models for batch_size in options.batch_sizes]
    return {"results": [_measure(*case, image_size, device, options) for case in cases]}


def _data(options: BenchOptions, device: torch.device) -> dict[str, Any]:
    """The results of loading."""
    from visformer.models import variant
    from visformer.verbs import bench_data

    for name in options.models or []:
        variant(name)
    return _loading(options) | {"results": bench_data.measure(options, device)}


def _end_to_end(options: BenchOptions, image_size: int, device: torch.device) -> dict[str, Any]:
    """The results of training from files."""
    from visformer.verbs import bench_feed

    return (
        _loading(options) | {"compile": options.compile} | {"results": bench_feed.measure(options, image_size, device)}
    )


def _serve(options: BenchOptions, image_size: int) -> dict[str, Any]:
    """The results of serving."""
    import importlib.metadata

    from visformer.distributed import versions
    from visformer.models import variant
    from visformer.verbs import bench_serve

    for name in options.models or []:
        variant(name)
    present = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    served = {name: present[name] for name in bench_serve.PACKAGES if name in present}
    return {
        "against": "loop",
        "clients": options.clients,
        "seconds": options.seconds,
        "versions": versions() | served,
        "results": bench_serve.measure(options, image_size),
    }


def _loading(options: BenchOptions) -> dict[str, Any]:
    """What loading depends on besides."""
    from visformer.data import available_cores
    from visformer.distributed import versions
    from visformer.verbs import bench_data

    options.workers = min(options.workers, available_cores())
    return {
        "workers": options.workers,
        "auto_augment": options.auto_augment,
        "data_dir": options.data_dir,
        "versions": versions() | bench_data.versions(),
    }


def _circumstances(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the options."""
    import torch

    from visformer.data import available_cores
    from visformer.distributed import describe, versions

    return {
        "device": describe(device),
        "processor": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _processor() -> str:
    """The CPU's name and the widest instructions that torch uses on it."""
    import torch

    from visformer.machine import processor_name

    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"


def _measure(
    name: str, batch_size: int, image_size: int, device: torch.device, options: BenchOptions
) -> dict[str, Any]:
    """Prove that the contenders agree, then time them."""
    from visformer.verbs import bench_timm
    from visformer.verbs.bench_timing import TURN_S, summarize, take_turns
    from visformer.verbs.memory import kept_memory
    from visformer.verbs.precision import settle_precision

    pair = bench_timm.build_pair(name, image_size)
    title = f"{name}, batch {batch_size}"
    config = bench_timm.training_config(name, batch_size, image_size, options.amp_level)
    if options.what == "train":
        config = settle_precision(config.change(compile=options.compile), pair.ours, device, None)
    contenders = bench_timm.contenders(pair, config, device, options.what)
    extra: dict[str, Any] = {}
    if options.what == "infer":
        from visformer.verbs import bench_infer

        more, extra = bench_infer.entrants(name, pair, bench_timm.synthetic_images(config, device), options)
        contenders += more
    console.note(f"{title}: same logits as timm's (to {pair.difference:.0e}); timing {options.repeats} turns of each")
    repeats, warmup = options.repeats or 0, options.warmup or 0  # never None: see BenchOptions
    with kept_memory(device, options.what == "train"):  # as `visformer train` does; timm's steps gain by it too
        timed = take_turns(contenders, device, warmup=warmup, repeats=repeats, title=title, turn_s=TURN_S)
    baseline = next(t for t in timed if t.contender.name == bench_timm.BASELINE)
    for t in timed:
        if not t.finite:
            console.warn(f"{title}: {t.contender.name} in {t.contender.precision} gave numbers that are not finite")
    records = [summarize(t, baseline, batch_size) for t in timed]
    if options.what == "infer":
        extra |= bench_infer.against_roofline(pair.ours, records, batch_size, device)
    return {
        "model": name,
        "batch_size": batch_size,
        "logit_difference": pair.difference,
        "contenders": records,
    } | extra


def _share(record: dict[str, Any]) -> list[str]:
    """A contender's share of the roofline as a cell, where that was asked for."""
    if "roofline_share" not in record:
        return []
    return ["-" if record["roofline_share"] is None else f"{100 * record['roofline_share']:.0f}"]


def _print_table(document: dict[str, Any]) -> None:
    from visformer.verbs.bench_timing import cells

    side, versions = document["image_size"], document["versions"]
    work = {"train": "training step", "infer": "forward pass"}[document["what"]]
    share = ["% of roofline"] if document["what"] == "infer" else []
    for result in document["results"]:
        console.table(
            f"{work} of {result['model']}, batch {result['batch_size']}, {side}x{side} pixels; "
            f"medians and quartiles of {document['repeats']}",
            ["contender", "images/s", "quartiles", "x timm fp32", "quartiles", *share],
            [
                [f"{c['name']} ({c['precision']}, {c['memory_format']})", *cells(c, decimals=1), *_share(c)]
                for c in result["contenders"]
            ],
        )
        for precision, limit in result.get("roofline", {}).items():
            print(
                f"roofline in {precision}: {limit['images_per_s']:,.1f} images/s, at "
                f"{limit['flops_per_s'] / 1e12:,.2f} TFLOP/s and {limit['bytes_per_s'] / 1e9:,.1f} GB/s, measured here"
            )
        for name, mib in result.get("peak_memory_mib", {}).items():
            print(f"{name}: {mib:,.0f} MiB of memory at most, in a process that only infers such a batch")
    difference = max(result["logit_difference"] for result in document["results"])
    print(
        f"{document['device']}; {document['processor']}, {document['cores']} cores; torch {versions['torch']}, "
        f"timm {versions['timm']}\n"
        f"With equal weights, logits equal timm's to {difference:.0e} of the largest, in float64."
    )
