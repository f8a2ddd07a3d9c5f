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
}


@pytest.fixture(scope="module")
def rows():
    return models(ModelsOptions())


def test_every_model_is_listed_in_order(rows):
    assert [row["name"] for row in rows] == list_models()
    assert set(FIGURES) <= {row["name"] for row in rows}


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
        figures = [f"{params:,}", f"{with_stats:,}", f"{gmacs:.2f}", "224x224", f"{top1:.2f}", f"{top5:.2f}", source]
        assert [name, "v2" if name.endswith("v2") else "v1", *figures] in lines
    assert ["78.60", "-", "authors"] in lines
