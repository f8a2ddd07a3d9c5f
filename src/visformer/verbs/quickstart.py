"""`visformer quickstart`: the whole way in a minute or two, on real data that comes with a dependency.

scikit-learn carries 1,797 handwritten digits. This trains visformer_tiny on four fifths of them, measures it on the
rest, labels a few held-out images from PNG files, draws what happened, exports a bundle for ONNX Runtime, and ends with
the commands to try next.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visformer import console
from visformer.bundles.needs import missing
from visformer.config import TrainConfig, option

if TYPE_CHECKING:
    from visformer.bundles.bundle import Bundle

RECIPE = "visformer_tiny_digits"
_SHOWN = 12  # digits that are written as files, labelled and drawn


@dataclass
class QuickstartOptions:
    """Options of `visformer quickstart`."""

    output: str = option("quickstart", "folder for the run, the sample images and the pictures", group="Output")
    json: bool = option(False, "print the result as one JSON document on stdout")
    epoch_size: int | None = option(None, "epochs; None: the recipe's", group="Training")
    device_target: Literal["auto", "CPU", "GPU", "Ascend", "cuda", "npu", "xpu", "mps", "cpu"] = option(
        "auto", "device; auto: the accelerator that is there, else the CPU"
    )


def run(options: QuickstartOptions) -> int:
    """Go the whole way and print what came of it."""
    result = quickstart(options)
    if options.json:
        console.print_json(result)
        return 0
    for record in result["predictions"]:
        best = record["predictions"][0]
        print(f"{record['path']}  ->  {best['label']}  {100 * best['probability']:.1f} %")
    checkpoint, images = result["checkpoint"], result["images"]
    print(
        f"\ntop-1 {result['top1']:.2f} % on {result['num_images']} held-out digits, "
        f"after {console.duration(result['seconds'])} of training\n"
        f"pictures: {result['curves']}, {result['confusion']}, {result['pictures']}\n"
        f"{_exported(result)}\n\n"
        "What to try next:\n"
        f"  visformer predict {images} --ckpt_path {checkpoint} --top_k 3\n"
        f"  visformer validate --ckpt_path {checkpoint} --dataset digits\n"
        f"  visformer serve {result['bundle'] or checkpoint}\n"
        "  visformer train --data_dir FOLDER_OF_CLASS_FOLDERS --model visformer_tiny --ckpt_save_dir my_run"
    )
    return 0


def _exported(result: dict[str, Any]) -> str:
    if not result["bundle"]:
        return "no bundle was exported: that takes pip install 'visformer[export]'"
    return f"bundle: {result['bundle']}, whose logits are the checkpoint's to {result['largest_logit_difference']:.0e}"


def quickstart(options: QuickstartOptions) -> dict[str, Any]:
    """Train, validate, predict and export on the digits; an interrupted or finished run in the folder is gone on from.

    Returns top1 and top5 (percent), num_images, seconds (of training), predictions, largest_logit_difference of the
    bundle, and the paths of what was written; bundle is empty and the difference None where nothing can export.
    """
    from visformer.options import from_keywords
    from visformer.verbs.predictor import Predictor
    from visformer.verbs.train import train
    from visformer.verbs.validate import ValidateOptions, validate

    folder = Path(options.output)
    run_folder, report_folder = folder / "run", folder / "report"
    console.note("1/4 training visformer_tiny on scikit-learn's handwritten digits")
    given: dict[str, Any] = {"ckpt_save_dir": str(run_folder), "resume": "auto", "device_target": options.device_target}
    if options.epoch_size is not None:
        given |= {"epoch_size": options.epoch_size}
    began = time.perf_counter()
    best = train(from_keywords(TrainConfig, given, config=RECIPE)).best
    seconds = time.perf_counter() - began
    console.note("2/4 validating on the digits held out")
    report = validate(
        ValidateOptions(
            ckpt_path=str(best), dataset="digits", output=str(report_folder), device_target=options.device_target
        )
    )
    console.note("3/4 labelling images from files")
    paths, truth = write_samples(folder / "images")
    records = Predictor(str(best), device=options.device_target, top_k=3).predict(paths)
    draw(paths, records, truth, folder / "predictions.png")
    console.note("4/4 exporting a bundle that runs without torch")
    bundle = export_bundle(str(best), folder / "bundle")
    return {
        "top1": report.top1,
        "top5": report.top5,
        "num_images": report.metrics.num_images,
        "seconds": seconds,
        "checkpoint": str(best),
        "images": str(folder / "images"),
        "curves": str(run_folder / "curves.png"),
        "confusion": str(report_folder / "confusion.png"),
        "pictures": str(folder / "predictions.png"),
        "bundle": str(bundle.path) if bundle else "",
        "largest_logit_difference": bundle.document["largest_logit_difference"] if bundle else None,
        "predictions": records,
    }


def export_bundle(checkpoint: str, folder: Path) -> Bundle | None:
    """A bundle of `checkpoint` for ONNX Runtime, compared and measured on the digits; None where what exports is not
    installed."""
    if missing("onnx"):
        return None
    from visformer.verbs.export import ExportOptions, export

    return export(ExportOptions(ckpt_path=checkpoint, output=str(folder), dataset="digits", overwrite=True))


def write_samples(folder: Path) -> tuple[list[str], list[str]]:
    """Write a few held-out digits as PNG files named after what they show; their paths and true labels."""
    from visformer.atomic import atomic_write
    from visformer.data import open_evaluation

    digits = open_evaluation("digits", "", channels=1)
    paths, truth = [], []
    for index in range(_SHOWN):
        label = digits.class_names[digits.target(index)]
        path = folder / f"{index:02d}_shows_{label}.png"
        image = digits.load(index)
        atomic_write(path, lambda file, image=image: image.save(file, "PNG"))
        paths.append(str(path))
        truth.append(label)
    return paths, truth


def draw(paths: list[str], records: list[dict[str, Any]], truth: list[str], path: Path) -> None:
    """Draw the labelled samples into one picture."""
    from visformer.data import open_image
    from visformer.figures import predictions_figure

    predictions_figure([open_image(p, 1) for p in paths], records, path, true_labels=truth)
