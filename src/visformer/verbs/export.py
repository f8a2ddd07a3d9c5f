"""`visformer export`: a checkpoint as a bundle that runs without torch, and was run before it is called done.

    visformer export --ckpt_path run/best.safetensors --output bundle
    visformer export --ckpt_path run/best.safetensors --format openvino --precision int8 \\
        --calib_dir photos/train --data_dir photos --output bundle-int8
    visformer export --ckpt_path run/best.safetensors --format triton --output repository --name pets

The exported model takes one decoded image of any size and preprocesses it in its graph, or with `--input tensor` the
preprocessed batch. Its logits are compared with the checkpoint's; with labelled images its accuracy is measured beside
the checkpoint's, and a bundle that loses too much is not written. docs/export.md describes what lies in a bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visformer import console
from visformer.bundles.needs import INSTALL, missing
from visformer.config import option
from visformer.errors import RunError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from visformer.bundles.build import Images
    from visformer.bundles.bundle import Bundle
    from visformer.bundles.engines import Engine
    from visformer.data.sources import ImageSource

PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8"),
    "triton": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "torch": ("fp32", "fp16", "bf16"),
}
_INSTEAD = {
    (
        "onnx",
        "bf16",
    ): "ONNX Runtime's CPU engine computes no bf16; take --format openvino or torch, or --precision fp16",
    ("triton", "bf16"): "ONNX Runtime computes no bf16 on a CPU; take --precision fp16",
    ("torch", "int8"): "quantising is by OpenVINO or ONNX Runtime; take --format openvino or onnx",
}


@dataclass
class ExportOptions:
    """Options of `visformer export`; see each field's help."""

    ckpt_path: str = option(
        "",
        "checkpoint to export: a file that training wrote, or any that `visformer convert` reads, a URL, "
        "hf-hub:owner/name, or a published weight's name",
        group="Model",
    )
    model: str = option(
        "", "name that the checkpoint's model must have; empty: any. With .mindcv, .authors or .timm: whose conventions"
    )
    format: Literal["onnx", "openvino", "torch", "triton"] = option(
        "onnx",
        "onnx: fp32, fp16, int8, for ONNX Runtime; openvino: fp32, fp16, bf16, int8; torch: fp32, fp16, bf16, an "
        "AOTInductor package for this processor, which takes a C++ compiler and minutes; triton: as onnx, in a model "
        "repository for NVIDIA Triton",
        group="Bundle",
    )
    precision: Literal["fp32", "fp16", "bf16", "int8"] = option(
        "fp32",
        "what it computes in. int8 needs calib_dir and labelled images. fp16 halves the file; ONNX Runtime computes it "
        "on a CPU in fp32, with conversions that cost time",
    )
    input: Literal["image", "tensor"] | None = option(
        None,
        "image: one decoded uint8 image, height x width x channels, of any size, which Triton can't batch; tensor: a "
        "preprocessed batch. None: image, for triton tensor",
    )
    gelu: Literal["exact", "fitted"] | None = option(
        None,
        "fitted: in int8, a hard swish fitted to each channel on the images of calib_dir, in less time; exact: "
        "GELU. None: fitted for openvino's int8, otherwise exact",
    )
    dynamic_image_size: bool = option(
        False, "take batches of any size whose sides are multiples of 32; with --input tensor, not with torch"
    )
    output: str = option(
        "",
        "folder of the bundle, or for triton the repository, beside its other models; it appears whole or not at all",
    )
    name: str = option("", "triton: the model's name and folder in the repository; empty: the architecture's")
    overwrite: bool = option(False, "replace the bundle that is in output, or the repository's model of that name")
    json: bool = option(False, "print bundle.json, without labels and samples, on stdout")
    calib_dir: str = option(
        "", "folder of images, searched at every depth, that int8 takes its ranges from", group="Data"
    )
    calib_images: int = option(300, "images of calib_dir to take, spread over all of them")
    dataset: str = option("imagenet", "labelled images to measure accuracy on, as validate takes them: kind or name")
    data_dir: str = option("", "labelled images to measure accuracy on; empty: none, except for a dataset by name")
    val_split: str = option("val", "name of the split or folder; all: every image of a folder of class folders")
    split_file: str = option("", "record of the images to take, as validate has it")
    parity_images: int = option(1000, "labelled images, spread over all, whose logits are compared one by one")
    min_agreement: float = option(
        99.5,
        "fp16 and bf16: percentage of the compared images, of 200 or more, whose best class must be the checkpoint's; "
        "less, and the bundle is not written",
    )
    max_drop: float = option(0.5, "percentage points of top-1 that the bundle may lose; more, and it is not written")
    batch_size: int = option(64, "images per batch while accuracy is measured")
    num_parallel_workers: int = option(8, "processes that decode; at most the cores there are; 0: none")

    def __post_init__(self) -> None:
        for name in ("calib_images", "parity_images", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range; it must be at least 1")
        for name in ("num_parallel_workers", "max_drop"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range; it must be at least 0")
        if not 0 <= self.min_agreement <= 100:
            raise UsageError(f"min_agreement: {self.min_agreement:g} is out of range; it is a percentage, 0 to 100")
        if self.precision not in PRECISIONS[self.format]:
            raise UsageError(f"precision: {self.precision} with {self.format}: {_INSTEAD[self.format, self.precision]}")
        if self.input is None:
            self.input = "tensor" if self.format == "triton" else "image"
        if self.gelu == "fitted" and self.precision != "int8":
            raise UsageError(
                f"gelu: fitted goes with --precision int8, which has images to fit it on, not {self.precision}"
            )
        if self.dynamic_image_size and (self.input != "tensor" or self.format == "torch"):
            raise UsageError("dynamic_image_size: goes with --input tensor and --format onnx, openvino or triton")
        if self.name and self.format != "triton":
            raise UsageError(f"name: {self.name} goes with --format triton; a bundle is called as its folder is")

    @property
    def is_measured(self) -> bool:
        """True when labelled images were named."""
        return bool(self.data_dir) or self.dataset not in ("imagenet", "folder", "")


def run(options: ExportOptions) -> int:
    """Export, say what was measured, and return the exit code."""
    bundle = export(options)
    if options.json:
        left_out = ("labels", "samples")
        console.print_json({key: value for key, value in bundle.document.items() if key not in left_out})
    else:
        print("\n".join(_report(bundle)))
    return 0


def export(options: ExportOptions) -> Bundle:
    """Export a checkpoint to the folder `output`, and open the bundle; prints nothing on stdout. With triton, the
    bundle is version 1 of the model in the repository `output`.

    Raises `UsageError` for what can't be exported so, and `RunError` when the result differs or loses too much.
    """
    _check(options)
    from visformer.bundles.build import Request, build
    from visformer.verbs.validate import load_named

    model = load_named(options.ckpt_path, options.model)
    labelled = _Labelled(options, model) if options.is_measured else None
    request = Request(
        format=options.format,
        precision=options.precision,
        input=options.input or "image",  # never None: see ExportOptions
        fit_gelu=None if options.gelu is None else options.gelu == "fitted",
        dynamic_image_size=options.dynamic_image_size,
        checkpoint=options.ckpt_path,
        calibration=_calibration(options, model.preprocessing.in_channels),
        real_images=labelled.images(options.parity_images) if labelled else (),
        min_agreement=options.min_agreement,
        measure=labelled.measure if labelled else None,
        note=console.note,
    )
    if options.format == "triton":
        from visformer.bundles.triton_files import write_repository

        folder = Path(options.output) / (options.name or model.model_name)
        return write_repository(model, request, folder, overwrite=options.overwrite)
    return build(model, request, Path(options.output), overwrite=options.overwrite)


def _check(options: ExportOptions) -> None:
    """What can be told to be wrong before the checkpoint is read."""
    if not options.output:
        raise UsageError("output: no folder given; name one with --output BUNDLE")
    if not options.ckpt_path:
        raise UsageError("ckpt_path: no checkpoint given; name one with --ckpt_path RUN/best.safetensors")
    package = missing(options.format, options.precision)
    if package:
        raise UsageError(f"format: {options.format} needs {package}, which is not there: {INSTALL}")
    if options.precision == "int8" and not (options.calib_dir and options.is_measured):
        raise UsageError(
            "precision: int8 needs real images: --calib_dir FOLDER to take ranges from, and labelled ones, --data_dir "
            "FOLDER or --dataset NAME, to measure what it loses"
        )
    if options.precision == "int8" and not Path(options.calib_dir).is_dir():
        raise UsageError(f"calib_dir: {options.calib_dir} is no folder")
    from visformer.bundles.bundle import is_bundle

    _check_destination(options)
    if is_bundle(options.ckpt_path):
        raise UsageError(f"ckpt_path: {options.ckpt_path} is a bundle already; give the checkpoint it came from")
    if options.format == "torch":
        from visformer.bundles.torch_files import check_compiler

        check_compiler()


def _check_destination(options: ExportOptions) -> None:
    """Raise `UsageError` when it may not be written to; of a repository as much as is known before the model is."""
    from visformer.bundles.build import check_destination
    from visformer.bundles.triton_files import check_repository

    if options.format == "triton":
        check_repository(Path(options.output), options.name, options.overwrite)
    else:
        check_destination(Path(options.output), options.overwrite)


def _calibration(options: ExportOptions, channels: int) -> Images:
    """The images of calib_dir, spread evenly; each is read when it is asked for."""
    if options.precision != "int8":
        return ()
    from visformer.bundles.samples import as_channels
    from visformer.data.decode import open_image
    from visformer.verbs.inputs import images_below

    paths = list(images_below(options.calib_dir))
    if not paths:
        raise UsageError(f"calib_dir: no image in {options.calib_dir} or below")
    if len(paths) < options.calib_images:
        console.warn(f"calib_dir: {len(paths):,} images in {options.calib_dir}, fewer than calib_images asks")
    taken = [paths[i] for i in _spread(len(paths), options.calib_images)]
    return [lambda path=path: as_channels(open_image(path, channels), channels) for path in taken]


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices below `count`, evenly spread."""
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))


class _Labelled:
    """The labelled images on which source and bundle are measured."""

    def __init__(self, options: ExportOptions, model: Any):
        from visformer.data.datasets import class_mapping
        from visformer.verbs.validate import ValidateOptions, open_labelled

        self.options, self.model = options, model
        names = ("ckpt_path", "dataset", "data_dir", "val_split", "split_file")
        asked = ValidateOptions(**{name: getattr(options, name) for name in names})
        self.source: ImageSource
        self.source, self.split = open_labelled(asked, model.preprocessing.in_channels)
        self.mapping = class_mapping(self.source.class_names, model.class_names)

    def images(self, count: int) -> list[Callable[[], np.ndarray]]:
        """At most `count` of the images that can be read, as functions that give uint8 (H, W, channels)."""
        from visformer.bundles.samples import as_channels
        from visformer.data.decode import ImageError

        channels = self.model.preprocessing.in_channels
        readable = []
        for index in _spread(len(self.source), count):
            try:
                self.source.load(index)
            except ImageError:
                continue
            readable.append(lambda index=index: as_channels(self.source.load(index), channels))
        return readable

    def measure(self, bundle: Bundle, engine: Engine) -> dict[str, Any]:
        """Top-1 and top-5 of source and bundle, percent. Raises `RunError` when the bundle loses more than max_drop."""
        from visformer.bundles.adapter import BundleModel

        console.note(f"measuring {len(self.source):,} images with the source and with the bundle")
        before, after = self._top(self.model), self._top(BundleModel(bundle, engine).eval())
        drop = before["top1"] - after["top1"]
        if drop > self.options.max_drop:
            exact = "--gelu exact, " if bundle.document["fit_gelu"] else ""
            raise RunError(
                f"precision: {self.options.precision} loses {drop:.2f} points of top-1 ({before['top1']:.2f} % to "
                f"{after['top1']:.2f} %), more than max_drop {self.options.max_drop:g}; nothing was written. More "
                f"images in calib_dir, {exact}another --format, or fp16 may do better"
            )
        return {
            "dataset": self.options.dataset,
            "split": self.split,
            "num_images": before["num_images"],
            "source": {"top1": before["top1"], "top5": before["top5"]},
            "bundle": {"top1": after["top1"], "top5": after["top5"]},
            "drop": drop,
        }

    def _top(self, model: Any) -> dict[str, Any]:
        import torch

        from visformer.data.loader import make_eval_loader
        from visformer.verbs.evaluation import evaluate

        workers = self.options.num_parallel_workers
        loader = make_eval_loader(
            self.source,
            self.model.preprocessing,
            batch_size=self.options.batch_size,
            num_workers=workers,
            pin_memory=False,
        )
        try:
            measured = evaluate(
                model,
                loader,
                torch.device("cpu"),
                self.mapping,
                num_classes=len(self.model.class_names),
                normalize=self.model.preprocessing.normalize,
                title="measure",
            )
        finally:
            loader.close()
        metrics = measured.metrics
        return {"top1": metrics.top1, "top5": metrics.top5, "num_images": metrics.num_images}


def _report(bundle: Bundle) -> list[str]:
    """What a person wants to know, in lines."""
    document, parity, accuracy = bundle.document, bundle.document["parity"], bundle.document["accuracy"]
    size = sum(entry["bytes"] for entry in document["files"].values())
    takes = "one image of any size" if bundle.input == "image" else "preprocessed batches"
    lines = [
        f"{bundle.path}: {bundle.model_name}, {bundle.engine_name}, {bundle.precision}, takes {takes} "
        f"({size / 1e6:,.1f} MB)",
        f"  parity    largest logit difference {document['largest_logit_difference']:.2g} on {parity['num_images']:,} "
        f"{parity['images']} images, where the largest logit is {parity['largest_logit']:.3g}; "
        f"same best class for {100 * parity['batch_agreement']:.2f} %",
    ]
    if accuracy:
        before, after = accuracy["source"]["top1"], accuracy["bundle"]["top1"]
        lines.append(
            f"  accuracy  top-1 {after:.2f} %, the checkpoint's {before:.2f} %, {accuracy['num_images']:,} images"
        )
    return [*lines, f"  check it anywhere: visformer validate {bundle.path} --self-test"]
