"""The formats of predictions: each reads back, and none is broken by odd names."""

from __future__ import annotations

import csv
import itertools
import json

import pytest

from visformer.verbs.records import FORMATS, as_csv, as_json, as_text

RECORDS = [
    {
        "path": 'a, "b".jpg',
        "predictions": [
            {"label": "T-shirt/top", "index": 0, "probability": 0.8765432},
            {"label": "犬", "index": 7, "probability": 0.1234},
            {"label": "bag", "index": 2, "probability": 0.00001},
        ],
    },
    {"path": "new\nline\x1b[2J.jpg", "error": "not an image"},
    {"path": "犬.jpg", "predictions": [{"label": "犬", "index": 7, "probability": 1.0}]},
]


def test_json_is_one_array_that_reads_back():
    assert json.loads("".join(as_json(RECORDS))) == RECORDS
    assert json.loads("".join(as_json([]))) == []
    assert len(list(as_json(RECORDS))) == len(RECORDS) + 1  # a piece each, then the bracket


def test_a_name_in_broken_bytes_reads_back_from_json():
    record = {"path": b"\xff.jpg".decode("utf-8", "surrogateescape"), "error": "no such file"}
    written = "".join(as_json([record])).encode("utf-8", "backslashreplace")
    assert json.loads(written) == [record]


def test_csv_has_a_row_for_each_prediction():
    rows = list(csv.DictReader("".join(as_csv(RECORDS)).splitlines(keepends=True)))
    assert [(row["path"], row["rank"], row["label"]) for row in rows[:3]] == [
        ('a, "b".jpg', "1", "T-shirt/top"),
        ('a, "b".jpg', "2", "犬"),
        ('a, "b".jpg', "3", "bag"),
    ]
    assert float(rows[0]["probability"]) == 0.8765432
    assert (rows[3]["path"], rows[3]["error"], rows[3]["rank"]) == ("new\nline\x1b[2J.jpg", "not an image", "")


def test_text_is_one_aligned_line_an_image():
    lines = "".join(as_text(RECORDS)).splitlines()
    assert len(lines) == 3
    assert lines[0].split("  ")[0] == 'a, "b".jpg' and "87.65 %" in lines[0]
    assert lines[0].endswith("犬 12.34 %")  # what would read as 0.00 % is left out
    assert "\\n" in lines[1] and "\x1b" not in lines[1] and lines[1].endswith("error: not an image")
    # The Chinese characters take two cells each: three fewer characters, the same column.
    assert lines[0].index("87.65 %") == lines[2].index("100.00 %") + 1 + 1 + 1


@pytest.mark.parametrize("name", FORMATS)
def test_records_are_taken_as_they_are_needed(name):
    endless = ({"path": f"{i}.jpg", "error": "x"} for i in itertools.count())
    assert len(list(itertools.islice(FORMATS[name](endless), 5))) == 5
