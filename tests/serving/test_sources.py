"""Which models and versions a name on the command line stands for."""

from pathlib import Path

import pytest

from tests.serving.fakes import write_version
from visformer.errors import UsageError
from visformer.serving.sources import scan


def checkpoint(path: Path, text: str = "0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def bundle(folder: Path) -> Path:
    checkpoint(folder / "bundle.json", "{}")
    return folder


def names(*targets: Path | str) -> dict[str, list[int]]:
    return {name: sorted(found.versions) for name, found in scan([str(target) for target in targets]).items()}


def test_files_and_folders_have_names_of_their_own(tmp_path):
    run = checkpoint(tmp_path / "runs" / "photos" / "best.safetensors")
    other = checkpoint(tmp_path / "tiny v2.ckpt")
    made = bundle(tmp_path / "birds")
    assert names(run, other, made) == {"photos": [1], "tiny-v2": [1], "birds": [1]}
    assert names(run.parent) == {"photos": [1]}
    assert names(made / "bundle.json") == {"birds": [1]}
    assert names(f"pets={made}") == {"pets": [1]}
    assert scan([str(run.parent)])["photos"].versions[1].path == str(run)
    assert scan(["visformer_tiny.mindcv"])["visformer_tiny.mindcv"].versions[1].path == "visformer_tiny.mindcv"


def test_folders_of_versions_and_of_models(tmp_path):
    for number in (1, 2, 10):
        write_version(tmp_path / "models" / "pets", number, "0")
    bundle(tmp_path / "models" / "birds" / "3")
    (tmp_path / "models" / "birds" / "notes").mkdir()
    (tmp_path / "models" / ".git").mkdir()
    assert names(tmp_path / "models") == {"birds": [3], "pets": [1, 2, 10]}
    assert names(tmp_path / "models" / "pets") == {"pets": [1, 2, 10]}
    assert names(f"dogs={tmp_path / 'models' / 'pets'}") == {"dogs": [1, 2, 10]}


def test_a_broken_version_is_a_problem_and_not_the_end(tmp_path):
    write_version(tmp_path / "pets", 1, "0")
    (tmp_path / "pets" / "2").mkdir()
    found = scan([str(tmp_path / "pets")])["pets"]
    assert list(found.versions) == [1]
    assert "must hold a bundle, or one checkpoint; it has 0" in found.problems[2]


def test_content_that_changes_is_seen(tmp_path):
    path = checkpoint(tmp_path / "best.safetensors")
    before = scan([f"x={path}"])
    path.write_text("something else")
    assert scan([f"x={path}"]) != before
    assert scan([f"x={path}"]) == scan([f"x={path}"])


def test_what_can_not_be_served_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: no bundle .* no folder of versions"):
        scan([str(tmp_path / "empty")])
    one, two = checkpoint(tmp_path / "a" / "x.ckpt"), checkpoint(tmp_path / "b" / "x.ckpt")
    with pytest.raises(UsageError, match=r"a second model called x; name it otherwise, as in other="):
        scan([str(one), str(two)])
