"""`visformer validate`: the accuracy of a checkpoint on a labelled set, in total and class by class.

    visformer validate --ckpt_path run/best.safetensors --data_dir photos --output report
    visformer validate bundle --self-test

Classes are matched by name, never by folder order. A folder that was split on the spot for training is measured on
the part that the run held out, which it recorded in split.json beside its checkpoints; `--val_split all` takes every
image. An exported bundle is measured like a checkpoint; its self-test runs the sample images that it carries.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visformer import console
from visformer.config import option
from visformer.errors import RunError, UsageError
from visformer.verbs.validation_report import Report, print_report

if TYPE_CHECKING:
    from visformer.data.sources import ImageSource

SPLIT_RECORD = "split.json"
EVERY_IMAGE = "all"


@dataclass
class ValidateOptions:
    """Options of `visformer validate`; see each field's help."""

    ckpt_path: str = option(
        "",
        "checkpoint to measure: a file that training wrote, or any that `visformer convert` reads, a URL, "
        "hf-hub:owner/name, or a published weight's name; or an exported bundle's folder",
        group="Model",
        positional=True,
    )
    self_test: bool = option(
        False, "of a bundle: run its sample images and compare the logits with those recorded; needs no other data"
    )
    model: str = option(
        "", "name that the checkpoint's model must have; empty: any. With .mindcv, .authors or .timm: whose conventions"
    )
    dataset: str = option(
        "imagenet",
        "imagenet (class folders), cifar10, cifar100, mnist, fashion_mnist, digits, or a timm name such as torch/NAME, "
        "hfds/NAME, wds/NAME",
        group="Dataset",
    )
    data_dir: str = option("./", "folder with val/ of class folders, or class folders alone")
    val_split: str = option("val", "name of the split or folder; all: every image of a folder of class folders")
    split_file: str = option(
        "", "record of the images to take; empty: split.json beside the checkpoint, for its own data_dir"
    )
    dataset_download: bool = option(
        False, "fetch the dataset if it is not there (cifar10, cifar100, mnist, fashion_mnist)"
    )
    batch_size: int = option(128, "images per batch; the figures do not depend on it", group="Speed")
    num_parallel_workers: int = option(8, "processes that decode; at most the cores there are; 0: none")
    device_target: Literal["auto", "CPU", "GPU", "Ascend", "cuda", "npu", "xpu", "mps", "cpu"] = option(
        "auto", "device to run on; auto: the accelerator that is there, else the CPU"
    )
    val_amp_level: Literal["O0", "O1", "O2", "O3"] = option("O0", "O0: fp32; O1 to O3: half precision")
    amp_dtype: Literal["bf16", "fp16"] = option("bf16", "the half precision of val_amp_level")
    json: bool = option(False, "print the report as one JSON document on stdout", group="Output")
    output: str = option("", "folder for report.json, per_class.csv, confusion.csv and confusion.png")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size: {self.batch_size} is out of range; it must be at least 1")
        if self.num_parallel_workers < 0:
            raise UsageError(
                f"num_parallel_workers: {self.num_parallel_workers} is out of range; it must be at least 0"
            )
        if self.self_test and self.output:
            raise UsageError("output: the self-test writes no files; leave it out, or take --json")
        if self.output and Path(self.output).exists() and not Path(self.output).is_dir():
            raise UsageError(f"output: {self.output} is a file; give a folder for the report's files")


def run(options: ValidateOptions) -> int:
    """Validate, print the report, and return the exit code."""
    if options.self_test:
        return _self_test(options)
    report = validate(options)
    if options.json:
        if report.skipped:
            (name, reason), more = report.skipped[0], len(report.skipped) - 1
            others = f" (and {more:,} more)" if more else ""
            console.warn(f"{name}{others} skipped: {reason}")
        console.print_json(report.to_dict())
    else:
        print_report(report)
    if options.output:
        console.note(f"report written to {options.output}")
    return 0


def validate(options: ValidateOptions) -> Report:
    """Measure a checkpoint on a labelled set; writes the files of `output` if given, and prints nothing on stdout.

    Raises `UsageError` for a class that the model does not know, and `RunError` when no image gives a usable result.
    """

    from visformer.data.datasets import class_mapping
    from visformer.data.loader import make_eval_loader
    from visformer.distributed import select_device
    from visformer.fusion.fused import for_inference
    from visformer.verbs.evaluation import evaluate

    model: Any = load_named(options.ckpt_path, options.model)
    refuse_half(options.ckpt_path, "val_amp_level", options.val_amp_level)
    device = select_device(options.device_target)
    source, split = open_labelled(options, model.preprocessing.in_channels)
    mapping = class_mapping(source.class_names, model.class_names)
    loader = make_eval_loader(
        source,
        model.preprocessing,
        batch_size=options.batch_size,
        num_workers=options.num_parallel_workers,
        pin_memory=device.type == "cuda",
    )
    try:
        measured = evaluate(
            for_inference(model, device, options.val_amp_level, options.amp_dtype),
            loader,
            device,
            mapping,
            num_classes=len(model.class_names),
            normalize=model.preprocessing.normalize,
            title="validate",
        )
    finally:
        loader.close()
    _check_finite(measured.metrics.non_finite, measured.metrics.num_images, options)
    report = Report.of(measured, model, options, split, device)
    if options.output:
        report.write(options.output)
    return report


def _self_test(options: ValidateOptions) -> int:
    """Run a bundle's samples, say what came of it, and return 0 if all are as recorded, else 1."""
    from visformer.bundles.bundle import Bundle
    from visformer.bundles.self_test import self_test

    if not options.ckpt_path:
        raise UsageError("ckpt_path: no bundle given; name its folder, as in visformer validate BUNDLE --self-test")
    result = self_test(Bundle.open(options.ckpt_path))
    if options.json:
        console.print_json(result.to_dict())
        return 0 if result.passed else 1
    for sample in result.samples:
        verdict = "ok" if sample["passed"] else "WRONG"
        print(f"{sample['file']}  {verdict}  {sample['label']}, largest difference {sample['largest_difference']}")
    for name in result.changed_files:
        print(f"{name}  CHANGED  its content is not what was exported")
    print(
        f"{options.ckpt_path}: self-test {'passed' if result.passed else 'FAILED'} with {result.bundle.engine_name}, "
        f"{result.bundle.precision}; a logit may differ by {result.bundle.tolerance:.3g}"
    )
    return 0 if result.passed else 1


def load_named(ckpt_path: str, name: str) -> Any:
    """Load the model of a checkpoint or bundle; with a `name`, raise `UsageError` if it is another model's."""
    from visformer.bundles.bundle import is_bundle
    from visformer.pretrained import load

    if not ckpt_path:
        raise UsageError("ckpt_path: no checkpoint given; name one with --ckpt_path RUN/best.safetensors")
    if is_bundle(ckpt_path):
        from visformer.bundles.adapter import bundle_model

        return bundle_model(ckpt_path, name)
    model: Any = load(ckpt_path, model=name or None)
    if not model.class_names:
        raise UsageError(f"{ckpt_path}: its model has no classes, so it gives features and not labels")
    return model


def refuse_half(ckpt_path: str, name: str, amp_level: str) -> None:
    """Raise `UsageError` when half precision is asked of a bundle, whose precision was decided by its export."""
    from visformer.bundles.bundle import is_bundle

    if amp_level != "O0" and is_bundle(ckpt_path):
        raise UsageError(
            f"{name}: {amp_level} is for checkpoints; a bundle computes in the precision it was exported in"
        )


def open_labelled(options: ValidateOptions, channels: int) -> tuple[ImageSource, str]:
    """The images to measure on, and the name of the split for the report. Says on stderr when a record is used."""
    from visformer.data.arrays import NAMED_ARRAYS
    from visformer.data.datasets import open_evaluation
    from visformer.data.sources import Subset

    beside = Path(options.ckpt_path).parent / SPLIT_RECORD
    own = _read_record(beside) if not options.split_file and beside.is_file() else None
    same_data = own is not None and os.path.realpath(own["data_dir"]) == os.path.realpath(options.data_dir)
    record = _read_record(Path(options.split_file)) if options.split_file else own if same_data else None
    if options.val_split == EVERY_IMAGE:
        if options.dataset in NAMED_ARRAYS:
            raise UsageError(f"val_split: all is for class folders; {options.dataset} has train and val")
        record = own = None
    source = open_evaluation(
        options.dataset, options.data_dir, options.val_split, channels, options.dataset_download, record
    )
    if record is not None and isinstance(source, Subset) and options.dataset not in NAMED_ARRAYS:
        where = options.split_file or str(beside)
        console.note(
            f"measuring the {len(source):,} images that {where} lists as {options.val_split}; all: --val_split all"
        )
        return source, f"{options.val_split} ({where})"
    if options.split_file:
        raise UsageError(f"split_file: {options.data_dir} has its own {options.val_split}; leave --split_file out")
    if own is not None and not same_data and _contains(source, own):
        console.warn(
            f"{options.data_dir} has the very images that this model was trained on; "
            f"--split_file {beside} measures those that were held out"
        )
    return source, options.val_split


def _read_record(path: Path) -> dict[str, Any]:
    """The record of a split. Raises `UsageError` if `path` is missing or something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise UsageError(f"split_file: {path} can't be read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"split_file: {path} is not JSON ({error})") from None
    lists = [record.get(key) for key in ("train", "val")] if isinstance(record, dict) else [None]
    if not all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in lists):
        raise UsageError(f'split_file: {path} is no record of a split; it must have "train" and "val", lists of names')
    return {"data_dir": "", **record}


def _contains(source: ImageSource, record: dict[str, Any], probe: int = 50) -> bool:
    """True when the first training images of a record are all in `source`: the same data, lying elsewhere."""
    wanted = set(record["train"][:probe])
    return bool(wanted) and wanted <= {source.key(i) for i in range(len(source))}


def _check_finite(non_finite: int, num_images: int, options: ValidateOptions) -> None:
    if not non_finite:
        return
    way_out = "its weights are not finite" if options.val_amp_level == "O0" else "try --val_amp_level O0"
    if non_finite == num_images:
        raise RunError(f"{options.ckpt_path}: no image gives finite logits; {way_out}")
    console.warn(
        f"{non_finite:,} of {num_images:,} images give logits that are not finite and count as wrong; {way_out}"
    )
