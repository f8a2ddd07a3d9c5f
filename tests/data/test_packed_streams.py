"""Packed sets behind an address: fetched once, verified, kept within bounds, and the same images as on a disk."""

import http.server
import os
import threading
import time
from collections import Counter
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.data.test_packed import packed, write_photos
from visformer.config import TrainConfig
from visformer.data import make_eval_loader, make_train_loader, open_data, open_evaluation, streams
from visformer.data.packed import blocks_of
from visformer.data.preprocessing import Preprocessing
from visformer.data.sampler import BLOCK_SHARDS, EpochSampler
from visformer.errors import RunError, UsageError


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_photos(folder / "photos", {"rose": 14, "ash": 12, "lily": 6})
    return packed(folder / "photos", folder / "packed", shard_mb=0.003)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streams, "BACKOFF_S", 0.001)
    return tmp_path / "cache" / "shards"


class Flaky(MemoryFileSystem):
    """Memory that answers as its `faults` say: an exception to raise, bytes to give in a shard's place, or None."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    faults: ClassVar[list] = []
    fetched: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def get_file(self, rpath, lpath, **_):
        self.fetched.append(os.path.basename(rpath))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        with open(lpath, "wb") as file:
            file.write(self.cat_file(rpath) if fault is None else fault)


@pytest.fixture
def flaky(local):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.faults.clear()
    Flaky.fetched.clear()
    system = Flaky()
    for path in local.iterdir():
        system.pipe_file(f"/set/{path.name}", path.read_bytes())
    return "flaky://set"


def config(data_dir, workers=0, **options):
    return TrainConfig(
        data_dir=str(data_dir), image_resize=32, batch_size=4, num_parallel_workers=workers, auto_augment="autoaug",
        drop_remainder=False,  # a stream's order is another than a folder's, and would leave out others
        **options,
    )  # fmt: skip


def pixels_by_key(data, settings):
    """Of each sample of epoch 0, by its key, the augmented pixels."""
    loader = make_train_loader(data.train, settings)
    try:
        return {
            data.train.key(index): image.numpy().tobytes()
            for batch in loader
            for index, image in zip(batch.indices, batch.images, strict=True)
        }
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_an_address_gives_the_split_and_the_pixels_of_the_folder(local, kind, workers, monkeypatch):
    monkeypatch.setattr("visformer.data.loader.available_cores", lambda: 2)
    if kind == "memory":
        system = fsspec.filesystem("memory")
        for path in local.iterdir():
            system.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    url = f"file://{local}" if kind == "file" else "memory://bucket/set"
    streamed, there = open_data(config(url)), open_data(config(local))
    assert streamed.train.source.streamed and not there.train.source.streamed
    assert {**streamed.split, "data_dir": ""} == {**there.split, "data_dir": ""}
    ours, theirs = pixels_by_key(streamed, config(url, workers)), pixels_by_key(there, config(local, workers))
    assert len(ours) > 20 and ours == {key: theirs[key] for key in ours}
    assert sorted(keys_of(streamed.val)) == sorted(keys_of(there.val))
    for i, key in enumerate(keys_of(streamed.val)):
        other = keys_of(there.val).index(key)
        assert np.array_equal(np.asarray(streamed.val.load(i)), np.asarray(there.val.load(other)))


def keys_of(source):
    return [source.key(i) for i in range(len(source))]


def test_held_out_images_come_shard_by_shard(flaky):
    settings = config(flaky)
    val = open_data(settings).val
    shards = [val.source.index.shard[i] for i in val.indices]
    assert shards == sorted(shards)
    loader = make_eval_loader(val, Preprocessing((32, 32)), batch_size=3, num_workers=2)
    assert sum(len(batch) for batch in loader) == len(val) == 6
    loader.close()


def test_shards_are_fetched_once_and_then_read_from_the_cache(flaky, cache):
    everything = open_evaluation("imagenet", flaky, "all", 3)
    for i in range(len(everything)):
        everything.load(i)
    deadline = time.monotonic() + 10
    while len(set(Flaky.fetched)) < len(everything.source.split.shards) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(Flaky.fetched) == sorted({*Flaky.fetched}) and len(Flaky.fetched) > 5
    assert len([path for path in cache.glob("*/*") if not path.name.startswith(".")]) == len(Flaky.fetched)
    count = len(Flaky.fetched)
    again = open_evaluation("imagenet", flaky, "all", 3)
    for i in range(len(again)):
        again.load(i)
    assert len(Flaky.fetched) == count


def test_the_cache_is_bounded_and_the_oldest_go_first(flaky, cache, monkeypatch):
    source = open_data(config(flaky)).train.source
    shards = source.split.shards
    monkeypatch.setattr(source.store, "most", sum(piece.size for piece in shards[:4]))
    paths = [source.store.path(piece) for piece in shards[:3]]
    for age, path in zip((300, 100, 200), paths, strict=True):
        os.utime(path, (time.time() - age, time.time() - age))
    source.store.path(shards[0])  # used again
    for piece in shards[3:5]:
        source.store.path(piece)
    assert paths[0].exists() and not paths[2].exists()
    held = sum(path.stat().st_size for path in cache.glob("*/*") if not path.name.startswith("."))
    assert held <= source.store.most
    for i in range(len(source)):  # all of it is still read
        assert source.load(i).size == (60, 45)
    assert len(source._open) <= 2 * BLOCK_SHARDS < len(shards)  # those that are open take room on the disk


FAULTS = [OSError("reset by peer"), b"cut short", RuntimeError("busy"), TimeoutError()]


def test_a_fetch_that_fails_is_tried_again(flaky):
    source = open_data(config(flaky)).train.source
    Flaky.faults.extend(FAULTS)
    assert source.load(0).size == (60, 45)
    assert len(Flaky.fetched) == 5 == Flaky.fetched.count(Flaky.fetched[0])


@pytest.mark.parametrize(
    ("faults", "message", "attempts"),
    [
        ([*FAULTS, ConnectionError("https://me:secret@host/set?token=secret gone")], "gone", 5),
        ([b"other"] * 5, "5 bytes with CRC-32 .* came, not", 5),
        ([PermissionError("no access to s3://key@bucket/set")], "no access to s3://bucket/set", 1),
    ],
)
def test_a_fetch_that_keeps_failing_ends_the_run(flaky, faults, message, attempts, cache):
    source = open_data(config(flaky)).train.source
    Flaky.faults.extend(faults)
    with pytest.raises(RunError, match=message) as told:
        source.load(0)
    assert "flaky://set/train-0" in str(told.value) and "secret" not in str(told.value)
    assert len(Flaky.fetched) == attempts
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_workers_tell_a_fetch_that_fails(flaky, monkeypatch):
    monkeypatch.setattr("visformer.data.loader.available_cores", lambda: 2)
    settings = config(flaky, 2)
    data = open_data(settings)
    Flaky().rm_file(f"/set/{data.train.source.split.shards[1].name}")
    with pytest.raises(UsageError, match=r"flaky://set/train-000001.tar: not there"):
        pixels_by_key(data, settings)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Of each shard, says 503 first and ends the second answer in the middle."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self):
        shard = self.path.endswith(".tar")
        self.asked[self.path] += 1
        if shard and self.asked[self.path] == 1:
            self.send_error(503)
        elif shard and self.asked[self.path] == 2:
            self.send_response(200)
            self.send_header("Content-Length", "4096")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_):
        """Be quiet."""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_web_server_that_fails_now_and_then(local, workers, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("visformer.data.loader.available_cores", lambda: 2)

    _Handler.asked.clear()

    def handler(*arguments):
        return _Handler(*arguments, directory=str(local))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            ours = pixels_by_key(open_data(config(url)), config(url, workers))
        finally:
            server.shutdown()
    theirs = pixels_by_key(open_data(config(local)), config(local))
    assert ours == {key: theirs[key] for key in ours} and len(ours) > 20
    assert min(count for path, count in _Handler.asked.items() if path.endswith(".tar")) == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:secret@host/set", "data_dir: https://host/set: an address with a user name"),
        ("https://host/set?token=secret", "data_dir: https://host/set: an address with a user name"),
        ("http://example.org/set", "data_dir: http://example.org/set: plain http can be changed"),
        ("nosuch://host/set", "data_dir: nosuch://host/set: no address that fsspec can read"),
        ("memory://nothing/here", "memory://nothing/here/packed.json: not there; is this the address of a packed set"),
    ],
)
def test_addresses_that_cant_be_taken(url, message):
    with pytest.raises(UsageError, match=message) as told:
        open_data(config(url))
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/set", "s3fs"), ("gs://b/set", "gcsfs"), ("https://h/set", "'visformer.stream.'")]
)
def test_a_missing_package_is_named(url, package, monkeypatch):
    def missing(_):
        raise ImportError

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UsageError, match=f"needs a package that is not installed; pip install {package}"):
        open_data(config(url))


@pytest.mark.parametrize("text", ["zero", "0", "-3", "nan", "1e12"])
def test_a_wrong_bound_is_told(flaky, text, monkeypatch):
    monkeypatch.setenv("VISFORMER_SHARD_CACHE_GB", text)
    with pytest.raises(UsageError, match=f"VISFORMER_SHARD_CACHE_GB: '{text}' is not a number of gigabytes"):
        open_data(config(flaky))


def test_a_cache_that_does_not_hold_a_block_is_told(flaky, monkeypatch):
    monkeypatch.setenv("VISFORMER_SHARD_CACHE_GB", "0.00001")
    with pytest.raises(UsageError, match=r"of shards are read side by side, more than the 0.0 GB that are kept"):
        open_data(config(flaky))


# ---- the order of a stream


def test_a_block_is_fetched_before_it_is_read_and_the_next_one_meanwhile(flaky):
    data = open_data(config(flaky))
    blocks = blocks_of(data.train)
    assert blocks is not None and len(blocks.shard_of) == len(data.train)
    sampler = EpochSampler(len(data.train), seed=1, blocks=blocks)
    for item in sampler:
        assert data.train.load(item.index).size == (60, 45)
    used = {data.train.source.split.shards[shard].name for shard in blocks.shard_of}
    assert sorted(Flaky.fetched) == sorted(used) and len(used) > 2 * BLOCK_SHARDS


def test_data_that_is_here_is_shuffled_as_a_whole(local):
    assert blocks_of(open_data(config(local)).train) is None
