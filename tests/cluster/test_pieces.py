"""Cutting inputs into pieces and reading them again, without a Ray: keys, order, what is wrong with one image."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow as arrow
import pyarrow.parquet as parquet

from tests.serving.fakes import picture
from visformer.cluster.offline import any_labelled, label_piece, records, to_parquet
from visformer.cluster.pieces import Piece, cut
from visformer.cluster.reading import Unreadable, read
from visformer.errors import RunError, UsageError
from visformer.verbs.inputs import expand


def pieces(*inputs: str, images: int = 2, column: str = "image") -> list[Piece]:
    return list(cut(inputs, lambda entry: expand([entry]), images, column))


def brightness(images):
    """A labeller that says how bright the first pixel is."""
    for image in images:
        if isinstance(image, bytes) and not image.startswith(b"\x89PNG"):
            yield {"path": "", "error": "no picture"}
            continue
        data = Path(image).read_bytes() if isinstance(image, str) else image
        yield {"path": "", "predictions": [{"label": str(len(data)), "index": 1, "probability": 0.5}]}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "deep" / "10.png").write_bytes(picture(10))
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def test_a_folder_is_cut_into_pieces_of_so_many_images(photos):
    found = pieces(str(photos), images=3)
    assert [piece.kind for piece in found] == ["images", "images"]
    paths = [path for piece in found for path in piece.paths]
    assert paths == [str(photos / name) for name in ("0.png", "1.png", "2.png", "deep/10.png")]
    assert [key for piece in found for key, _ in read(piece)] == paths


def test_lists_and_relative_paths_become_absolute(photos, monkeypatch):
    monkeypatch.chdir(photos)
    Path("list.txt").write_text("0.png\n\nmissing.png\r\n")
    (piece,) = pieces("list.txt")
    assert piece.paths == [str(photos / "0.png"), str(photos / "missing.png")]
    with pytest.raises(UsageError, match="no such file"):
        pieces("other.txt")


def test_a_folder_of_shards_beside_images(photos):
    write_tar(photos / "b.tar", {"x/1.png": picture(1), "x/1.cls": b"1", "x/2.JPG": b"bad", "._3.png": b"?"})
    write_tar(photos / "c.tgz", {"4.png": picture(4)})
    found = pieces(str(photos), images=10)
    assert [piece.kind for piece in found] == ["images", "tar", "tar"]
    keys = [key for key, _ in read(found[1])]
    assert keys == [f"{photos}/b.tar/x/1.png", f"{photos}/b.tar/x/2.JPG"]
    assert [image for _, image in read(found[2])] == [picture(4)]


def test_a_tar_file_that_breaks_off_stops_the_run(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": picture(1) * 100, "2.png": picture(2) * 100})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:9000])
    (piece,) = pieces(str(tmp_path / "a.tar"))
    with pytest.raises(RunError, match="breaks off"):
        list(read(piece))


def test_parquet_is_cut_at_row_groups(tmp_path):
    images = [picture(n) for n in range(7)]
    table = arrow.table({"image": images, "id": [f"k{n}" for n in range(7)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = pieces(str(tmp_path / "*.parquet"), images=4)
    assert [(piece.start, piece.stop, piece.row) for piece in found] == [(0, 2, 0), (2, 4, 4)]
    read_back = [pair for piece in found for pair in read(piece, "image")]
    assert read_back == [(f"{tmp_path}/a.parquet#{n}", images[n]) for n in range(7)]
    assert [key for key, _ in read(found[1], "image", "id")] == ["k4", "k5", "k6"]
    with pytest.raises(UsageError, match="no column photo; it has image, id"):
        pieces(str(tmp_path / "a.parquet"), column="photo")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match="not a Parquet file"):
        pieces(str(tmp_path / "b.parquet"))


def test_parquet_of_paths_and_of_structs(photos):
    cells = [{"bytes": picture(1), "path": None}, {"bytes": None, "path": "0.png"}, None]
    parquet.write_table(arrow.table({"image": cells}), photos / "a.parquet")
    (piece,) = pieces(str(photos / "a.parquet"), images=10)
    (_, first), (key, second), (_, third) = read(piece, "image")
    assert (first, key, second) == (picture(1), str(photos / "0.png"), str(photos / "0.png"))
    assert isinstance(third, Unreadable)


def test_a_packed_set_keeps_its_keys(photos, tmp_path):
    import visformer

    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "set" / name / f"{number}.png").write_bytes(picture(number, (40, 40)))
    visformer.pack(data=str(tmp_path / "set"), out=str(tmp_path / "packed"))
    found = pieces(str(tmp_path / "packed"), images=4)
    assert {piece.kind for piece in found} == {"packed"}
    read_back = [pair for piece in found for pair in read(piece)]
    assert len(read_back) == 6
    assert all(isinstance(image, (bytes, np.ndarray)) for _, image in read_back)
    assert any(key.endswith("cat/0.png]") for key, _ in read_back)


def test_addresses(photos):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    try:
        for name in ("a/1.png", "a/2.png", "a/notes.md", "a/.hidden.png"):
            memory.pipe_file(f"/photos/{name}", picture(1))
        (piece,) = pieces("memory://photos")
        assert piece.paths == ["memory:///photos/a/1.png", "memory:///photos/a/2.png"]
        memory.rm("/photos/a/2.png")
        (_, first), (_, second) = read(piece)
        assert first == picture(1)
        assert isinstance(second, Unreadable)
        assert len(pieces("memory://photos/a/*.png")) == 1
        with pytest.raises(UsageError, match="no image, tar or Parquet file"):
            pieces("memory://elsewhere")
        with pytest.raises(UsageError, match="a user name, a password"):
            pieces("s3://me:secret@bucket/photos")
    finally:
        memory.rm("/photos", recursive=True)


def test_a_bad_image_is_a_row_and_the_others_are_not_disturbed(photos, tmp_path):
    os.remove(photos / "1.png")
    write_tar(tmp_path / "a.tar", {"1.png": picture(1), "2.png": b"bad", "3.png": picture(3)})
    found = label_piece(Piece("tar", [str(tmp_path / "a.tar")]), brightness)
    assert [("error" in record) for record in found] == [False, True, False]
    content = to_parquet(found, 2)
    table = parquet.read_table(io.BytesIO(content))
    assert table.column_names == ["path", "labels", "descriptions", "indices", "probabilities", "error"]
    assert table["error"].to_pylist() == [None, "no picture", None]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-0000000.parquet").write_bytes(content)
    assert any_labelled(str(tmp_path / "out"))
    assert [record["path"] for record in records(str(tmp_path / "out"))] == [record["path"] for record in found]


def test_a_name_that_is_no_text_and_a_part_without_a_label(tmp_path):
    content = to_parquet([{"path": "a\udcff.png", "error": "x"}], 0)
    (tmp_path / "part-0000000.parquet").write_bytes(content)
    assert not any_labelled(str(tmp_path))
    assert parquet.read_table(io.BytesIO(content))["path"].to_pylist() == ["a\\udcff.png"]
