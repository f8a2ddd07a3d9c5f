"""docs/benchmarks.md is what its command makes of benchmarks/results, and every kind of document has a table."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("make_docs", ROOT / "benchmarks" / "make_docs.py")
assert SPEC and SPEC.loader
make_docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_docs)

RECORD = {
    "name": "visformer",
    "precision": "bf16",
    "memory_format": "channels_last",
    "images_per_s": 1234.5,
    "images_per_s_quartiles": [1200.0, 1300.0],
    "ratio": 2.5,
    "ratio_quartiles": [2.4, 2.6],
    "processor_ms_per_image": 0.75,
}
MACHINE = {"device": "cpu, 2 threads", "processor": "A CPU", "cores": 2, "versions": {"torch": "2.15.0", "timm": "1.0"}}
RUN = MACHINE | {"image_size": 224, "repeats": 9, "workers": 3, "auto_augment": "autoaug", "compile": True}
CASE = {"model": "visformer_tiny", "batch_size": 64}
LIMIT = {"images_per_s": 5000.0, "flops": 64e9, "bytes": 64e7, "flops_per_s": 2e12, "bytes_per_s": 9e9}
DOCUMENTS = {
    "train": RUN | {"results": [CASE | {"contenders": [RECORD]}]},
    "infer": RUN
    | {
        "results": [
            CASE
            | {
                "contenders": [RECORD | {"roofline_share": 0.456}, RECORD | {"name": "other", "roofline_share": None}],
                "roofline": {"bf16": LIMIT},
                "peak_memory_mib": {"timm": 785.2},
            }
        ]
    },
    "data": RUN | {"results": [CASE | {"stages": [{"stage": "loaded", "contenders": [RECORD]}], "models": []}]},
    "end_to_end": RUN | {"results": [CASE | {"contenders": [RECORD]}]},
    "serve": RUN
    | {
        "seconds": 3.0,
        "results": [
            CASE
            | {
                "engine": "openvino",
                "precision": "int8",
                "loops": [RECORD],
                "clients": [RECORD | {"name": "16 clients", "latency_ms": {"p50": 1.25, "p90": 2.0, "p99": 3.0}}],
            }
        ],
    },
    "gpu_suite": MACHINE
    | {
        "date": "2026-11-24",
        "image_size": 224,
        "left_out": [{"part": "tests", "name": "tests/kernels", "reason": "no time left"}],
        "parts": {
            "kernels": {"all": {"off_by": {"attention in windows bfloat16": 5e-3}, "limits": {"bfloat16": 2e-2}}},
            "infer": {
                "visformer_tiny 256": CASE
                | {
                    "contenders": [
                        RECORD | {"roofline_share": 0.6},
                        RECORD | {"name": "timm eager", "ratio": 1.0, "ratio_quartiles": [1.0, 1.0]},
                    ],
                    "roofline": {"bf16": LIMIT},
                    "left_out": {"timm compiled": "RuntimeError: no"},
                    "layers": [
                        {
                            "layer": "stem 256x3x224x224",
                            "count": 1,
                            "chosen": "kernel 1,2",
                            "library_us": 400.0,
                            "kernel_us": 90.0,
                            "chosen_us": 90.0,
                            "roofline_us": 42.5,
                        }
                    ],
                },
                "visformer_small 256": {"failed": "RunError: wrong"},
            },
            "memory": {"visformer_tiny 256": {"peak_memory_mib": {"timm": 2000.4}}},
            "tests": {"tests/data/test_device_cuda.py": {"summary": "5 passed in 9 s"}},
        },
    },
    "fashion": {"results": {"Visformer-tiny": {"params_m": 9.81, "gmacs": 0.0241, "top1": 90.15}}},
    "fine-tuning": {"100": {"from scratch": 84.6}, "500": {"from scratch": 93.0}},
    "export_accuracy": {
        "what": "export_accuracy",
        "rows": [
            {
                "format": "onnx",
                "precision": "int8",
                "agreement": 0.996,
                "difference": 0.25,
                "source_top1": 87.83,
                "top1": 87.78,
            }
        ],
    },
    "export_family": {
        "what": "export_family",
        "rows": [
            {
                "model": "net6",
                "top1": 88.42,
                "bundles": {
                    "onnx fp16": {"agreement": 1.0, "points": 0.0},
                    "openvino int8": {"agreement": 0.991, "points": -0.12},
                },
            }
        ],
    },
    "export_parity": {
        "what": "export_parity",
        "rows": [{"model": "net6", "largest_logit": 2.71, "onnx": 1.9e-05, "openvino": 1.3e-05, "torch": 6e-06}],
    },
    "fp8_accuracy": {
        "what": "fp8_accuracy",
        "rows": [
            {
                "model": "net6",
                "top1": {"fp32": 88.42, "bf16": 88.4, "fp8": 88.31},
                "agreement": {"fp32": 1.0, "bf16": 0.9985, "fp8": 0.991},
            }
        ],
    },
    "large_photographs": {
        "what": "large_photographs",
        "rows": [
            {
                "width": 4032,
                "height": 3024,
                "torchvision_ms": 184.84,
                "whole_ms": 159.5,
                "reduced_ms": 54.4,
                "ratio": 3.378,
                "mean_levels": 0.361,
                "most_levels": 3,
            }
        ],
    },
    "convert": {
        "repeats": 5,
        "torch": "2.15.0",
        "cpu": "A CPU",
        "rows": [{"format": "timm", "added_s": 0.49, "added_mb": 55.5, "added_sizes": 0.34}],
    },
}
EXPECTED = {
    "train": ["| visformer (bf16, channels_last) | 1,234 | 1,200 to 1,300 | 2.50 | 2.40 to 2.60 |", "A CPU, 2 cores"],
    "infer": ["| 46 % |", "| other (bf16, channels_last) |", "| - |", "1.00 GFLOP and 10.0 MB", "| timm | 785 |"],
    "data": ["Pixels from the workers, batch 64:", "| 2.40 to 2.60 | 0.75 |", "3 workers"],
    "end_to_end": ["from JPEG files, batch 64:", "| visformer (bf16) | 1,234 |", "autoaug, compiled; medians"],
    "serve": ["openvino int8", "| 16 clients | 1,234 | 1,200 to 1,300 | 2.50 | 2.40 to 2.60 | 1.2 | 2.0 | 3.0 |"],
    "gpu_suite": [
        "| attention in windows | bfloat16 | 5.0e-03 | 2e-02 |",
        "x timm eager",
        "| 60 % |",
        "Left out: timm compiled: RuntimeError: no.",
        "| stem 256x3x224x224 | 1 | 400.0 | 90.0 | 90.0 | 42.5 | kernel 1,2 |",
        "It failed: RunError: wrong",
        "| visformer_tiny 256 | timm | 2,000 |",
        "`tests/data/test_device_cuda.py`: 5 passed in 9 s",
        "Not measured: tests tests/kernels (no time left).",
    ],
    "fashion": ["| Visformer-tiny | 9.81 | 0.024 | 90.15 |"],
    "fine-tuning": ["| training | 100 images | 500 images |", "| from scratch, AdamW, 50 epochs | 84.6 | 93.0 |"],
    "export_accuracy": ["| onnx int8 | 99.6 | 2.5e-01 | 87.78 | -0.05 |"],
    "export_family": [
        "| model | top-1, % | onnx fp16 | openvino int8 |",
        "| `net6` | 88.4 | 100.0, +0.0 | 99.1, -0.1 |",
    ],
    "export_parity": ["| `net6` | 2.7 | 1.9e-05 | 1.3e-05 | 6.0e-06 |"],
    "fp8_accuracy": ["| `net6` | 88.42 | 88.40 | 88.31 | 99.85 | 99.10 |"],
    "large_photographs": ["| 4032x3024 | 184.8 | 159.5 | 54.4 | 3.38 | 0.36 | 3 |"],
    "convert": ["| timm's `.safetensors` | 0.49 | 55.5 | 0.34 |", "Medians of 5 runs"],
}


def test_the_page_is_what_the_command_makes():
    page = make_docs.PAGE.read_text(encoding="utf-8")
    assert make_docs.filled(page, make_docs.documents(make_docs.RESULTS)) == page, "run python benchmarks/make_docs.py"


def test_every_kind_has_a_place_in_the_page():
    kinds = re.findall(r"<!-- results: (\S+) -->", make_docs.PAGE.read_text(encoding="utf-8"))
    assert sorted(kinds) == sorted(make_docs.RENDERERS) == sorted(DOCUMENTS) == sorted(EXPECTED)


def test_every_document_has_a_table():
    """But the record of conversions' parity, of which the text elsewhere speaks."""
    unknown = make_docs.documents(make_docs.RESULTS).get("", [])
    assert [name for name, _ in unknown if "parity" not in name] == []


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_the_tables_of_a_kind(kind):
    text = make_docs.RENDERERS[kind](DOCUMENTS[kind])
    for words in EXPECTED[kind]:
        assert words in text
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1  # as many cells in every row


def test_the_newest_of_documents_by_one_name_counts(tmp_path):
    for day, rate in (("2026-11-23", 1.0), ("2026-12-01", 2.0)):
        document = {"what": "train", "rate": rate}
        (tmp_path / f"{day}-card-train.json").write_text(json.dumps(document))
    (tmp_path / "2026-11-23-card-convert.json").write_text("{}")
    found = make_docs.documents(tmp_path)
    assert found["train"] == [("2026-12-01-card-train.json", {"what": "train", "rate": 2.0})]
    assert [name for name, _ in found["convert"]] == ["2026-11-23-card-convert.json"]


def test_only_what_is_between_the_marks_is_made():
    page = "before\n\n<!-- results: convert -->\nold\n<!-- end -->\n\nafter <!-- results: train --> stays\n"
    made = make_docs.filled(page, {"convert": [("a-convert.json", DOCUMENTS["convert"])]})
    assert made.startswith("before\n\n<!-- results: convert -->\n\n| file |")
    assert "old" not in made and made.endswith("<!-- end -->\n\nafter <!-- results: train --> stays\n")
    assert "From [a-convert.json](../benchmarks/results/a-convert.json)." in made
    assert make_docs.filled(made, {"convert": [("a-convert.json", DOCUMENTS["convert"])]}) == made
    assert "No document of this kind" in make_docs.filled(page, {})
    with pytest.raises(ValueError, match="results: speed is none of train, infer"):
        make_docs.filled("<!-- results: speed -->\n<!-- end -->", {})


def test_the_command_writes_and_checks(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- results: convert -->\n<!-- end -->\n")
    (tmp_path / "2026-11-23-card-convert.json").write_text(json.dumps(DOCUMENTS["convert"]))
    monkeypatch.setattr(make_docs, "PAGE", page)
    monkeypatch.setattr(make_docs, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_docs.py", "--check"])
    assert make_docs.main() == 1
    assert "run python benchmarks/make_docs.py" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["make_docs.py"])
    assert make_docs.main() == 0 and "| 0.49 |" in page.read_text()
    monkeypatch.setattr("sys.argv", ["make_docs.py", "--check"])
    assert make_docs.main() == 0
