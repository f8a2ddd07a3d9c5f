"""`predict --engine ray`: rows as they should be, and the same rows after a kill in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray", reason="ray is not installed: pip install 'visformer[cluster]'")
pytest.importorskip("pyarrow")

import pyarrow.parquet as parquet

import visformer
from visformer import cli
from visformer.cluster.connect import connected
from visformer.errors import UsageError

IMAGES = 48


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this process, which others join by its address."""
    with connected("", num_cpus=2, object_store_memory=100 * 2**20) as ray:
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    (folder / "7.jpg").write_text("no picture")
    return folder


def options(photos: Path, checkpoint: Path, output: Path) -> dict:
    return {
        "inputs": [str(photos)],
        "ckpt_path": str(checkpoint),
        "output": str(output),
        "engine": "ray",
        "chunk_images": 4,
        "top_k": 2,
        "batch_size": 4,
        "workers": 1,
    }


@pytest.fixture(scope="module")
def undisturbed(cluster, photos, checkpoint, tmp_path_factory) -> tuple[Path, list]:
    output = tmp_path_factory.mktemp("out") / "labels"
    return output, visformer.predict(**options(photos, checkpoint, output))


@pytest.mark.slow
def test_the_rows_are_the_records_of_the_local_engine(undisturbed, photos, checkpoint):
    output, found = undisturbed
    local = visformer.predict(inputs=[str(photos)], ckpt_path=str(checkpoint), top_k=2, num_parallel_workers=0)
    assert [record["path"] for record in found] == [record["path"] for record in local]
    assert [record["path"] for record in found if "error" in record] == [str(photos / "7.jpg")]
    for one, other in zip(found, local, strict=True):
        best, expected = one.get("predictions", []), other.get("predictions", [])
        assert [p["label"] for p in best] == [p["label"] for p in expected]
        np.testing.assert_allclose(
            [p["probability"] for p in best], [p["probability"] for p in expected], rtol=1e-5, atol=1e-6
        )
    assert len(list(output.glob("part-*.parquet"))) == IMAGES // 4
    assert parquet.read_table(output).num_rows == IMAGES


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_where_it_was(undisturbed, cluster, photos, checkpoint, tmp_path, capsys):
    whole, _ = undisturbed
    given = options(photos, checkpoint, tmp_path / "labels")
    words = [
        given.pop("inputs")[0],
        *(f"--{name}={value}" for name, value in given.items()),
        f"--ray_address={cluster}",
    ]
    started = subprocess.Popen(
        [sys.executable, "-m", "visformer", "predict", *words], stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while len(list((tmp_path / "labels").glob("part-*.parquet"))) < 3:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "labels").glob("part-*.parquet")}
    assert len(done) < IMAGES // 4

    assert cli.main(["predict", *words]) == 0
    assert f"{len(done)} of {IMAGES // 4} pieces were done before" in capsys.readouterr().err
    parts = sorted((tmp_path / "labels").glob("part-*.parquet"))
    assert [path.name for path in parts] == [path.name for path in sorted(whole.glob("part-*.parquet"))]
    assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in parts)
    assert all(path.stat().st_mtime_ns == done[path.name] for path in parts if path.name in done)

    assert cli.main(["predict", *words]) == 0
    assert "nothing left to do" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_folder_was_begun_with_can_not_be_changed(undisturbed, photos, checkpoint):
    output, _ = undisturbed
    given = options(photos, checkpoint, output)
    with pytest.raises(UsageError, match=r"begun with other settings \(top_k: 2 then, 3 now"):
        visformer.predict(**given | {"top_k": 3})
    with pytest.raises(UsageError, match="inputs: "):
        visformer.predict(**given | {"inputs": [str(photos / "1.jpg")]})


def test_options_that_do_not_go_together(photos, checkpoint, tmp_path, capsys):
    common = ["predict", str(photos), f"--ckpt_path={checkpoint}", "--engine=ray"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for words, message in (
        ([], "output: with --engine ray give the folder"),
        (["--output=a", "--format=csv"], "format: csv is not for --engine ray"),
        ([f"--output={photos / '1.jpg'}"], "is a file"),
        ([f"--output={tmp_path / 'full'}"], "has files that are not of such a run"),
        (["--output=a", "--chunk_images=0"], "chunk_images: 0 is out of range"),
    ):
        assert cli.main([*common, *words]) == 2
        assert message in capsys.readouterr().err
