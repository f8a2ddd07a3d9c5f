"""`visformer models`: the figures that MindCV and the authors publish, counted on our models."""

import json

import pytest

from visformer.cli import main
from visformer.models import list_models
from visformer.verbs.models import ModelsOptions, models

FIGURES = {  # params, with BatchNorm statistics, GMACs, top-1, top-5, source
    "visformer_tiny": (10_321_368, 10_334_072, 1.268, 78.28, 94.15, "MindCV"),
    "visformer_tiny_v2": (9_371_056, 9_383_392, 1.284, 78.82, 94.41, "MindCV"),
    "visformer_small": (40_219_592, 40_245_000, 4.879, 81.73, 95.88, "MindCV"),
    "visformer_small_v2": (23_492_168, 23_518_344, 4.266, 82.17, 95.90, "MindCV"),
    "swin_visformer_tiny_v2": (9_403_384, 9_415_720, 1.284, 79.60, None, "authors"),
    "swin_visformer_small": (40_530_200, 40_555_800, 4.899, 82.34, None, "authors"),
    "swin_visformer_small_v2": (23_581_928, 23_608_104, 4.266, 83.00, None, "authors"),
    "swin_visformer_medium_v2": (44_536_120, 44_571_512, 8.452, 83.62, None, "authors"),
}


@pytest.fixture(scope="module")
def rows():
    return models(ModelsOptions())


def test_every_model_is_listed_in_order(rows):
    assert [row["name"] for row in rows] == list_models()
    assert set(FIGURES) <= {row["name"] for row in rows} and len(rows) == 15
    assert [row["name"] for row in rows if row["top1"] is None] == [f"net{i}" for i in range(1, 8)]


@pytest.mark.parametrize("name", list(FIGURES))
def test_the_figures_are_those_published(rows, name):
    row = next(row for row in rows if row["name"] == name)
    params, with_stats, gmacs, top1, top5, source = FIGURES[name]
    assert (row["params"], row["params_with_stats"]) == (params, with_stats)
    assert row["gmacs"] == pytest.approx(gmacs, rel=1e-3)
    assert row["image_size"] == 224
    assert (row["top1"], row["top5"], row["source"]) == (top1, top5, source)
    assert row["published"][0] == {"top1": top1, "top5": top5, "source": source}


def test_json_is_one_document_and_nothing_else(capsys, rows):
    assert main(["models", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == rows
    assert captured.err == ""


def test_the_table_has_every_publication_on_a_line_of_its_own(capsys):
    assert main(["models"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, (params, with_stats, gmacs, top1, top5, source) in FIGURES.items():
        percent = [f"{top1:.2f}", "-" if top5 is None else f"{top5:.2f}"]
        figures = [f"{params:,}", f"{with_stats:,}", f"{gmacs:.2f}", "224x224", *percent, source]
        family = "swin" if name.startswith("swin") else "v2" if name.endswith("v2") else "v1"
        assert [name, family, *figures] in lines
    assert ["78.60", "-", "authors"] in lines
    assert any(line[:2] == ["swin_visformer_medium_v2", "swin"] for line in lines)
    assert ["net4", "ladder", "39,498,440", "39,521,544", "4.79", "224x224", "-", "-", "-"] in lines
