"""What the inputs of `predict` stand for: files, folders, globs, and a list on standard input."""

from __future__ import annotations

import io
import itertools
import os

import pytest

from visformer.errors import UsageError
from visformer.verbs.inputs import check_inputs, expand, natural


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A tree of files; only their names matter here."""
    for name in (
        "img10.jpg",
        "img9.JPG",
        "notes.txt",
        ".hidden.jpg",
        "sub/b.png",
        "sub/.cache/c.png",
        "odd[1].jpg",
        "z/d.webp",
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def paths(*inputs: str, stdin: bytes = b"") -> list[str]:
    return list(expand(inputs, io.BytesIO(stdin)))


def test_a_folder_is_searched_in_natural_order_without_hidden_files(photos):
    names = ["img9.JPG", "img10.jpg", "odd[1].jpg", "sub/b.png", "z/d.webp"]
    assert paths("photos") == [f"photos/{name}" for name in names]


def test_a_named_file_is_taken_whatever_it_is(photos):
    assert paths("photos/notes.txt", "missing.jpg", "photos/odd[1].jpg") == [
        "photos/notes.txt",
        "missing.jpg",
        "photos/odd[1].jpg",
    ]


def test_a_glob_takes_what_it_matches(photos):
    assert paths("photos/img*") == ["photos/img9.JPG", "photos/img10.jpg"]
    assert paths("photos/[sz]*") == ["photos/sub/b.png", "photos/z/d.webp"]
    assert paths("photos/**/*.png") == ["photos/sub/b.png"]


def test_standard_input_is_a_path_a_line(photos):
    assert paths("-", stdin=b"a.jpg\n\nphotos/sub\r\nb c.jpg") == ["a.jpg", "photos/sub/b.png", "b c.jpg"]
    assert paths("-", stdin=b"\xff.jpg\n") == [os.fsdecode(b"\xff.jpg")]


def test_the_order_is_that_of_the_inputs(photos):
    assert paths("z.jpg", "photos/sub", "a.jpg") == ["z.jpg", "photos/sub/b.png", "a.jpg"]


def test_standard_input_is_read_as_it_is_needed():
    endless = (b"%d.jpg\n" % i for i in itertools.count())
    assert list(itertools.islice(expand(["-"], endless), 3)) == ["0.jpg", "1.jpg", "2.jpg"]  # type: ignore[arg-type]


def test_links_in_a_circle_end(photos):
    (photos / "sub" / "up").symlink_to(photos)
    assert paths("photos/sub") == ["photos/sub/b.png", *(f"photos/sub/up/{n}" for n in ("img9.JPG", "img10.jpg")),
                                   "photos/sub/up/odd[1].jpg", "photos/sub/up/z/d.webp"]  # fmt: skip


def test_what_holds_no_image_is_a_usage_error(photos, tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for inputs, message in (
        ([], "no image given"),
        (["empty"], "no image in this folder"),
        (["*.tiff"], "no file matches"),
    ):
        with pytest.raises(UsageError, match=message):
            check_inputs(inputs)
    check_inputs(["-", "photos", "missing.jpg", "photos/*.jpg", "photos/odd[1].jpg"])


def test_natural_order():
    assert sorted(["b2", "a10", "a9", "A1", "10", "9", ""], key=natural) == ["", "9", "10", "A1", "a9", "a10", "b2"]
