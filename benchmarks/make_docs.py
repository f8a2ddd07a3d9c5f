"""docs/benchmarks.md from benchmarks/results: the measured tables are made, the text around them stays.

    python benchmarks/make_docs.py            # writes the page
    python benchmarks/make_docs.py --check    # exit code 1 if it would

What stands between `<!-- results: KIND -->` and `<!-- end -->` is replaced by the tables of the documents of that kind.
A document is a file `<date>-<rest>.json` in benchmarks/results; of those with the same rest the newest counts. Its
kind is its `what`, as `visformer bench --output` and `gpu_suite.py` write it, or else the last word of its name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- results: ([a-z_-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DATE = re.compile(r"^\d{4}-\d{2}-\d{2}-")
_FINE_TUNING = {  # what compare's document calls a training -> the options that give it
    "weights and no other option": "`--pretrained`, and no other option",
    "the same, the head alone": "the same with `--freeze backbone`",
    "MindCV's defaults": "`--pretrained --fine_tune off`: MindCV's defaults, batch 32, 50 epochs",
    "from scratch": "from scratch, AdamW, 50 epochs",
}


def main() -> int:
    """Write or check the page; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not up to date")
    options = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, documents(RESULTS))
    if options.check:
        print("up to date" if after == before else "docs/benchmarks.md: run python benchmarks/make_docs.py")
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    return 0


def documents(folder: Path) -> dict[str, list[tuple[str, Any]]]:
    """Kind -> (file name, document), by name."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        newest[_DATE.sub("", path.name)] = path
    found: dict[str, list[tuple[str, Any]]] = {}
    for rest in sorted(newest):
        document = json.loads(newest[rest].read_text(encoding="utf-8"))
        kind = document.get("what") or next((k for k in RENDERERS if rest.endswith(f"{k}.json")), "")
        found.setdefault(kind, []).append((newest[rest].name, document))
    return found


def filled(page: str, found: dict[str, list[tuple[str, Any]]]) -> str:
    """The page with every block made anew. Raises `ValueError` for a block of no known kind."""

    def block(match: re.Match[str]) -> str:
        kind = match[2]
        if kind not in RENDERERS:
            raise ValueError(f"results: {kind} is none of {', '.join(RENDERERS)}")
        parts = [RENDERERS[kind](document) + f"\n\n{_source(name)}" for name, document in found.get(kind, ())]
        text = "\n\n".join(parts) or "No document of this kind is in [benchmarks/results](../benchmarks/results) yet."
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return _BLOCK.sub(block, page)


def _source(name: str) -> str:
    return f"From [{name}](../benchmarks/results/{name})."


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, decimals: int = 0) -> str:
    """With commas; a dash for what was not measured."""
    return "-" if value is None else f"{value:,.{decimals}f}"


def machine(document: dict[str, Any]) -> str:
    """What the figures depend on, in a sentence."""
    versions = document.get("versions", {})
    names = ("torch", "triton", "timm", "cuda", "openvino", "onnxruntime", "simplejpeg", "uvicorn")
    shown = [f"{name} {versions[name]}" for name in names if name in versions]
    parts = [document.get("device"), document.get("processor"), f"{document.get('cores')} cores", *shown]
    return ", ".join(str(part) for part in parts if part)


def rates(record: dict[str, Any]) -> list[str]:
    """images/s, its quartiles, the ratio, its quartiles."""
    decimals = 1 if record["images_per_s"] < 100 else 0
    low, high = record["images_per_s_quartiles"]
    first, third = record["ratio_quartiles"]
    return [
        number(record["images_per_s"], decimals),
        f"{number(low, decimals)} to {number(high, decimals)}",
        number(record["ratio"], 2),
        f"{number(first, 2)} to {number(third, 2)}",
    ]


def named(record: dict[str, Any]) -> str:
    """A contender with its precision and memory format."""
    return f"{record['name']} ({record['precision']}, {record['memory_format']})"


def share(record: dict[str, Any]) -> str:
    """Per cent of the roofline."""
    reached = record.get("roofline_share")
    return "-" if reached is None else f"{100 * reached:.0f} %"


# ---- one renderer for each kind


def steps(document: dict[str, Any]) -> str:
    """Of `bench --what train` and `--what infer`."""
    side = document["image_size"]
    parts = []
    for result in document["results"]:
        parts.append(f"`{result['model']}`, batch {result['batch_size']}, {side} x {side} pixels:")
        parts.append(contenders(result["contenders"], "timm fp32"))
        parts += limits(result)
        if "peak_memory_mib" in result:
            memory = [[name, number(mib)] for name, mib in result["peak_memory_mib"].items()]
            parts.append(table(["a process that infers such a batch", "MiB of memory at most"], memory))
    parts.append(f"Medians and quartiles of {document['repeats']} steps each. {machine(document)}.")
    return "\n\n".join(parts)


def contenders(records: list[dict[str, Any]], baseline: str) -> str:
    """The table of a run's contenders, with the share of the roofline where it was measured."""
    heads = ["contender", "images/s", "quartiles", f"x {baseline}", "quartiles"]
    measured = any("roofline_share" in record for record in records)
    rows = [[named(r), *rates(r), *([share(r)] if measured else [])] for r in records]
    return table([*heads, *(["of the roofline"] if measured else [])], rows)


def limits(result: dict[str, Any]) -> list[str]:
    """What the shares are of, a sentence for each precision."""
    return [
        f"Roofline in {precision}: {number(limit['images_per_s'])} images/s; "
        f"{limit['flops'] / result['batch_size'] / 1e9:.2f} GFLOP and "
        f"{limit['bytes'] / result['batch_size'] / 1e6:.1f} MB an image, measured peaks "
        f"{limit['flops_per_s'] / 1e12:,.2f} TFLOP/s and {limit['bytes_per_s'] / 1e9:,.0f} GB/s."
        for precision, limit in result.get("roofline", {}).items()
    ]


def loading(document: dict[str, Any]) -> str:
    """Of `bench --what data`."""
    meaning = {"loaded": "pixels from the workers", "ready": "normalised, erased and mixed on the device"}
    heads = ["contender", "images/s", "quartiles", "x timm", "quartiles", "CPU ms/image"]
    parts = []
    for result in document["results"]:
        for stage in result["stages"]:
            parts.append(f"{meaning[stage['stage']].capitalize()}, batch {result['batch_size']}:")
            rows = [[c["name"], *rates(c), number(c["processor_ms_per_image"], 2)] for c in stage["contenders"]]
            parts.append(table(heads, rows))
    parts.append(
        f"{document['workers']} workers, {document['image_size']} pixels, {document['auto_augment']}; medians and "
        f"quartiles of {document['repeats']} passes. {machine(document)}."
    )
    return "\n\n".join(parts)


def feeding(document: dict[str, Any]) -> str:
    """Of `bench --what end_to_end`."""
    heads = ["contender", "images/s", "quartiles", "x timm", "quartiles"]
    parts = []
    for result in document["results"]:
        parts.append(f"`{result['model']}` from JPEG files, batch {result['batch_size']}:")
        rows = [[f"{c['name']} ({c['precision']})", *rates(c)] for c in result["contenders"]]
        parts.append(table(heads, rows))
    compiled = ", compiled" if document["compile"] else ""
    parts.append(
        f"{document['workers']} workers, {document['image_size']} pixels, {document['auto_augment']}{compiled}; "
        f"medians and quartiles of {document['repeats']} passes. {machine(document)}."
    )
    return "\n\n".join(parts)


def serving(document: dict[str, Any]) -> str:
    """Of `bench --what serve`."""
    heads = ["", "images/s", "quartiles", "x loop", "quartiles", "p50 ms", "p90 ms", "p99 ms"]
    parts = []
    for result in document["results"]:
        parts.append(f"`{result['model']}`, {result['engine']} {result['precision']}:")
        rows = [[one["name"], *rates(one), "", "", ""] for one in result["loops"]]
        for one in result["clients"]:
            latency = [number(one["latency_ms"][f"p{percent}"], 1) for percent in (50, 90, 99)]
            rows.append([one["name"], *rates(one), *latency])
        parts.append(table(heads, rows))
    parts.append(
        f"The loop is the same engine without the server. Medians and quartiles of {document['repeats']} turns of "
        f"{document['seconds']:g} s. {machine(document)}."
    )
    return "\n\n".join(parts)


_TIMED = {
    "infer": "Inference",
    "autotune": "Beside the longest search",
    "fp8": "Products in eight bits",
    "train": "Training step",
}


def gpu(document: dict[str, Any]) -> str:
    """Of `gpu_suite.py`."""
    found, parts = document["parts"], []
    for name, result in found.get("kernels", {}).items():
        verdict = _kernels(result) if "off_by" in result else f"The check of the kernels ({name}): {result['failed']}"
        parts.append(verdict)
    for part, title in (
        ("infer", "Inference"),
        ("autotune", "Beside the longest search"),
        ("fp8", "Products in eight bits"),
        ("train", "Training step"),
    ):
        for name, result in found.get(part, {}).items():
            model, _, batch = name.partition(" ")
            parts.append(f"{title}, `{model}`, batch {batch}, {document['image_size']} pixels:")
            if "failed" in result:
                parts.append(f"It failed: {result['failed']}")
            if "contenders" not in result:
                continue
            if "unfinished" in result:
                parts.append("Cut off before all contenders were there; of few turns:")
            parts.append(contenders(result["contenders"], _baseline(result["contenders"])))
            parts += limits(result)
            parts += [f"Left out: {peer}: {reason}." for peer, reason in result.get("left_out", {}).items()]
    parts += _layers(found.get("infer", {}))
    rows = [
        [name, kind, number(mib)]
        for name, result in found.get("memory", {}).items()
        for kind, mib in result.get("peak_memory_mib", {}).items()
    ]
    if rows:
        parts.append(table(["model and batch", "contender", "MiB at most"], rows))
    parts += [f"`{name}`: {r.get('summary') or r.get('failed')}" for name, r in found.get("tests", {}).items()]
    if document["left_out"]:
        missing = "; ".join(f"{e['part']} {e['name']} ({e['reason']})" for e in document["left_out"])
        parts.append(f"Not measured: {missing}.")
    parts.append(f"{document['date']}. {machine(document)}.")
    return "\n\n".join(parts)


def _kernels(result: dict[str, Any]) -> str:
    rows = []
    for key, off_by in result["off_by"].items():
        name, _, dtype = key.rpartition(" ")
        rows.append([name, dtype, f"{off_by:.1e}", f"{result['limits'][dtype]:.0e}"])
    return table(["kernel", "dtype", "off by, of the largest value", "allowed"], rows)


def _baseline(records: list[dict[str, Any]]) -> str:
    return next((r["name"] for r in records if r["ratio"] == 1 and r["ratio_quartiles"] == [1, 1]), "the first")


def _layers(results: dict[str, Any]) -> list[str]:
    """Each layer's microseconds by the library, by the best kernel of ours and as chosen, beside the roofline's."""
    parts = []
    for name, result in results.items():
        if not result.get("layers"):
            continue
        parts.append(f"Layers of {name}, microseconds of one:")
        rows = [
            [
                layer["layer"],
                str(layer["count"]),
                *(number(layer[key], 1) for key in ("library_us", "kernel_us", "chosen_us", "roofline_us")),
                f"{layer['chosen'] or 'library'}",
            ]
            for layer in result["layers"]
        ]
        parts.append(table(["layer", "times", "library", "best kernel", "chosen", "roofline", "which"], rows))
    return parts


def fashion(document: dict[str, Any]) -> str:
    """Of `compare_fashion.py`."""
    rows = [
        [name, number(r["params_m"], 2), number(r["gmacs"], 3), number(r["top1"], 2)]
        for name, r in document["results"].items()
    ]
    return table(["network", "parameters, M", "GMACs", "top-1, %"], rows)


def fine_tuning(document: dict[str, Any]) -> str:
    """Of `fine_tuning.py`: images -> training -> top-1."""
    heads = ["training", *(f"{count} images" for count in document)]
    trainings = dict.fromkeys(name for column in document.values() for name in column)
    rows = [
        [_FINE_TUNING.get(name, name), *(number(column.get(name), 1) for column in document.values())]
        for name in trainings
    ]
    return table(heads, rows)


def convert(document: dict[str, Any]) -> str:
    """Of `convert_cost.py`."""
    names = {"mindcv": "MindCV's `.ckpt`", "authors": "the authors' `.pth`", "timm": "timm's `.safetensors`"}
    rows = [
        [
            names.get(row["format"], row["format"]),
            number(row["added_s"], 2),
            number(row["added_mb"], 1),
            number(row["added_sizes"], 2),
        ]
        for row in document["rows"]
    ]
    text = table(["file", "seconds added", "memory added, MB", "of the file's size"], rows)
    return f"{text}\n\nMedians of {document['repeats']} runs; torch {document['torch']}, {document['cpu']}."


def _export_accuracy(document: Any) -> str:
    rows = [
        (
            f"{row['format']} {row['precision']}",
            f"{100 * row['agreement']:.1f}",
            f"{row['difference']:.1e}",
            f"{row['top1']:.2f}",
            f"{row['top1'] - row['source_top1']:+.2f}",
        )
        for row in document["rows"]
    ]
    return table(["bundle", "same class, % of 1,000", "logits off by at most", "top-1, %", "points"], rows)


def _export_family(document: Any) -> str:
    forms = list(document["rows"][0]["bundles"])
    rows = [
        [f"`{row['model']}`", f"{row['top1']:.1f}"]
        + [f"{100 * b['agreement']:.1f}, {b['points']:+.1f}" for b in map(row["bundles"].__getitem__, forms)]
        for row in document["rows"]
    ]
    return table(["model", "top-1, %", *forms], rows)


def _fp8_accuracy(document: Any) -> str:
    rows = [
        [f"`{row['model']}`", *(f"{row['top1'][name]:.2f}" for name in ("fp32", "bf16", "fp8"))]
        + [f"{100 * row['agreement'][name]:.2f}" for name in ("bf16", "fp8")]
        for row in document["rows"]
    ]
    return table(["model", "fp32 top-1, %", "bf16", "fp8", "bf16 same class, %", "fp8 same class, %"], rows)


def _large_photographs(document: Any) -> str:
    heads = ["pixels", "torchvision, ms", "all decoded, ms", "ours, ms", "x torchvision", "levels apart", "at most"]
    digits = {"torchvision_ms": 1, "whole_ms": 1, "reduced_ms": 1, "ratio": 2, "mean_levels": 2, "most_levels": 0}
    rows = [
        [f"{row['width']}x{row['height']}", *(number(row[key], decimals) for key, decimals in digits.items())]
        for row in document["rows"]
    ]
    return table(heads, rows)


def _export_parity(document: Any) -> str:
    engines = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "AOTInductor"}
    rows = [
        (f"`{row['model']}`", f"{row['largest_logit']:.1f}", *(f"{row[key]:.1e}" for key in engines))
        for row in document["rows"]
    ]
    return table(["model", "largest logit", *(f"{name} off by" for name in engines.values())], rows)


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "train": steps,
    "infer": steps,
    "data": loading,
    "end_to_end": feeding,
    "serve": serving,
    "gpu_suite": gpu,
    "fashion": fashion,
    "fine-tuning": fine_tuning,
    "convert": convert,
    "export_accuracy": _export_accuracy,
    "export_family": _export_family,
    "export_parity": _export_parity,
    "fp8_accuracy": _fp8_accuracy,
    "large_photographs": _large_photographs,
}

if __name__ == "__main__":
    sys.exit(main())
