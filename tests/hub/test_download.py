"""Downloads against a server on this machine: whole and verified, or nothing and a line that says what to do."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hub.server import serving
from visformer.errors import RunError, UsageError
from visformer.hub import cache_folder, download

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
MODULE = sys.modules["visformer.hub.download"]
HTTPS = sys.modules["visformer.hub.https"]


def leftovers(folder: Path) -> list[str]:
    """Everything in a folder but locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_arrives_whole_verified_and_alone(cache, capsys):
    with serving(CONTENT) as server:
        path = download(server.url, cache / "model.bin", sha256=server.sha256[:8].upper())
        assert path.read_bytes() == CONTENT and leftovers(cache) == ["model.bin"]
    assert download(server.url, path, sha256=server.sha256) == path  # the server is gone
    said = capsys.readouterr()
    assert said.out == "" and "downloading model.bin (0.5 MB)" in said.err and f"saved as {path}" in said.err
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_dropped_connection_goes_on_where_it_stopped(cache, capsys):
    with serving(CONTENT, drops=[100_000, 0, 50_000]) as server:
        path = download(server.url, cache / "model.bin", sha256=server.sha256)
        assert path.read_bytes() == CONTENT
        assert server.ranges_asked == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]
        assert server.requests[1]["If-Range"] == '"v1"'
    said = capsys.readouterr().err
    assert "after 100,000 of 512,000 bytes; trying again" in said and "0.1 MB of it here already" in said


@settings(max_examples=10, deadline=None)
@given(drops=st.lists(st.integers(1, 200_000), max_size=6), by_date=st.booleans(), length=st.booleans())
def test_any_drops_give_the_very_file(tmp_path_factory, drops, by_date, length):
    folder = tmp_path_factory.mktemp("downloads")
    version = {"etag": None, "modified": "Mon, 23 Nov 2026 04:18:02 GMT"} if by_date else {}
    drops = drops if length else []  # without a length the end of the connection is the end of the file
    with serving(CONTENT, drops=list(drops), length=length, **version) as server:
        assert download(server.url, folder / "x", sha256=server.sha256).read_bytes() == CONTENT
        assert len(server.requests) <= len(drops) + 1
    assert leftovers(folder) == ["x"]


def test_a_later_process_goes_on_with_the_part(cache, monkeypatch):
    with serving(CONTENT, drops=[100_000, 0, 0]) as server:
        monkeypatch.setattr(MODULE, "ATTEMPTS", 1)
        for _ in range(3):
            with pytest.raises(RunError, match="connection ended"):
                download(server.url, cache / "model.bin", sha256=server.sha256)
        assert (cache / "model.bin.part").stat().st_size == 100_000 and not (cache / "model.bin").exists()
        download(server.url, cache / "model.bin", sha256=server.sha256)
        assert server.ranges_asked[-1] == "bytes=100000-" and leftovers(cache) == ["model.bin"]


@pytest.mark.parametrize(
    "behaviour, why",
    [
        ({"ranges": False}, "the server knows no ranges"),
        ({"etag": '"v2"'}, "the file has changed there"),
        ({"etag": 'W/"v1"'}, "a weak tag is no promise"),
        ({"etag": None}, "nothing names the version"),
    ],
)
def test_what_cannot_be_gone_on_with_begins_again(cache, behaviour, why):
    cache.mkdir()
    with serving(CONTENT, **behaviour) as server:
        (cache / "model.bin.part").write_bytes(b"of an older version" * 1000)
        record = {"url": server.url, "validator": '"v1"'}
        (cache / "model.bin.part.json").write_text(json.dumps(record))
        assert download(server.url, cache / "model.bin", sha256=None).read_bytes() == CONTENT, why


@pytest.mark.parametrize("record", ["{", "[]", '{"url": "https://elsewhere/x", "validator": "\\"v1\\""}', None])
def test_a_part_of_unknown_origin_is_not_used(cache, record):
    cache.mkdir()
    (cache / "model.bin.part").write_bytes(b"x" * 1000)
    if record is not None:
        (cache / "model.bin.part.json").write_text(record)
    with serving(CONTENT) as server:
        assert download(server.url, cache / "model.bin", sha256=server.sha256).read_bytes() == CONTENT
        assert server.ranges_asked == [None]


@pytest.mark.parametrize("extra", [0, 10])
def test_a_part_that_is_whole_or_too_long(cache, extra):
    cache.mkdir()
    with serving(CONTENT) as server:
        (cache / "model.bin.part").write_bytes(CONTENT + b"x" * extra)
        (cache / "model.bin.part.json").write_text(json.dumps({"url": server.url, "validator": '"v1"'}))
        assert download(server.url, cache / "model.bin", sha256=server.sha256).read_bytes() == CONTENT
        assert server.ranges_asked[0] == f"bytes={len(CONTENT) + extra}-"
        assert len(server.requests) == (2 if extra else 1)


def test_another_file_than_meant_is_thrown_away(cache):
    with serving(CONTENT) as server, pytest.raises(RunError) as error:
        download(server.url, cache / "model.bin", sha256="0123abcd")
    assert server.sha256 in str(error.value) and "0123abcd" in str(error.value)
    assert "\n" not in str(error.value) and leftovers(cache) == []


def test_a_file_that_is_there_is_verified(cache):
    cache.mkdir()
    (cache / "model.bin").write_bytes(b"damaged")
    found = hashlib.sha256(b"damaged").hexdigest()
    with pytest.raises(RunError, match=f"{found}, which should begin with 0123abcd; delete it"):
        download("https://127.0.0.1:9/model.bin", cache / "model.bin", sha256="0123abcd")
    assert (cache / "model.bin").read_bytes() == b"damaged"


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_one_line_with_the_way_out(cache, status):
    with serving(CONTENT, statuses=[status] * 9) as server:
        with pytest.raises(RunError) as error:
            download(f"{server.url}?signature=secret", cache / "model.bin", sha256=None)
        assert len(server.requests) == 1
    message = str(error.value)
    assert f"cannot download {server.url}: the server says {status}" in message and "secret" not in message
    assert f"download it with a browser and save it as {cache / 'model.bin'}" in message and "\n" not in message


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(cache, status, capsys):
    with serving(CONTENT, statuses=[status, status]) as server:
        assert download(server.url, cache / "model.bin", sha256=server.sha256).read_bytes() == CONTENT
        assert len(server.requests) == 3
    assert f"the server says {status}" in capsys.readouterr().err


def test_a_server_that_stays_busy_is_given_up(cache):
    with serving(CONTENT, statuses=[503] * 99) as server:
        with pytest.raises(RunError, match=r"503 Service Unavailable, 5 times in a row"):
            download(server.url, cache / "model.bin", sha256=None)
        assert len(server.requests) == 5


def test_a_silent_server_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(HTTPS, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(MODULE, "ATTEMPTS", 2)
    began = time.monotonic()
    given_up = pytest.raises(RunError, match=r"no answer within 0\.1 s, 2 times in a row")
    with serving(CONTENT, silence_s=1.0) as server, given_up:
        download(server.url, cache / "model.bin", sha256=None)
    assert time.monotonic() - began < 5


def test_nobody_there_is_told_at_once(cache):
    began = time.monotonic()
    with pytest.raises(RunError, match=r"no connection \(Connection refused\)"):
        download("http://127.0.0.1:9/model.bin", cache / "model.bin", sha256=None)
    assert time.monotonic() - began < 2 and leftovers(cache) == []


@pytest.mark.parametrize(
    "url, words",
    [
        ("http://example.com/x.bin", "only https"),
        ("ftp://example.com/x.bin", "only https"),
        ("file:///etc/passwd", "only https"),
        ("http://127.0.0.1.example.com/x.bin", "only https"),
        ("https://me:secret@example.com/x.bin", "user name or password"),
        ("https:///x.bin", "only https"),
        ("https://[::1/x.bin", "not an address"),
    ],
)
def test_addresses_that_are_not_allowed(cache, url, words):
    with pytest.raises(UsageError, match=words) as error:
        download(url, cache / "x.bin", sha256=None)
    assert "secret" not in str(error.value) and not cache.exists()


@pytest.mark.parametrize("target", ["http://example.com/x.bin?key=secret", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirect_away_from_https_is_refused(cache, target):
    refused = pytest.raises(RunError, match=r"it redirects to .*, which is not https|not allowed")
    with serving(CONTENT, redirect=target) as server, refused as error:
        download(server.url, cache / "model.bin", sha256=None)
    assert "secret" not in str(error.value) and leftovers(cache) == []


def test_a_redirect_in_a_circle_is_one_line(cache):
    with serving(CONTENT, redirect="/model.bin") as server, pytest.raises(RunError, match="infinite loop") as error:
        download(server.url, cache / "model.bin", sha256=None)
    assert "\n" not in str(error.value)


def test_a_redirect_on_this_machine_is_followed(cache):
    with serving(CONTENT, redirect="/other", drops=[1000]) as server:
        assert download(server.url, cache / "model.bin", sha256=server.sha256).read_bytes() == CONTENT
        assert server.ranges_asked[-1] == "bytes=1000-"


@pytest.mark.parametrize(
    "headers, words",
    [
        ({"Content-Encoding": "gzip"}, r"packed \(gzip\)"),
        ({"Content-Type": "text/html; charset=utf-8"}, "a web page in its place"),
    ],
)
def test_something_else_than_the_file_is_refused(cache, headers, words):
    with serving(CONTENT, headers=headers) as server, pytest.raises(RunError, match=words):
        download(server.url, cache / "model.bin", sha256=None)
    assert leftovers(cache) == []


@pytest.mark.parametrize("length", [True, False])
def test_size_is_bounded(cache, monkeypatch, length):
    monkeypatch.setattr(MODULE, "MAX_BYTES", 100_000)
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 10_000)
    with serving(CONTENT, length=length) as server, pytest.raises(RunError, match=r"more than 100,000"):
        download(server.url, cache / "model.bin", sha256=server.sha256)
    part = cache / "model.bin.part"
    assert not part.exists() or part.stat().st_size <= 100_000


def test_a_file_of_unknown_size_and_hash_is_refused(cache):
    with serving(CONTENT, length=False) as server, pytest.raises(RunError, match="neither its size nor its SHA-256"):
        download(server.url, cache / "model.bin", sha256=None)


def test_an_empty_file_is_no_file(cache):
    with serving(b"", length=False) as server, pytest.raises(RunError, match="ended after 0 bytes, 5 times in a row"):
        download(server.url, cache / "model.bin", sha256=server.sha256)


def test_a_disk_without_room_is_told_before_anything_is_written(cache, monkeypatch):
    monkeypatch.setattr(MODULE, "SPARE_BYTES", 2**60)
    refused = pytest.raises(RunError, match=r"it needs 512,000 bytes and .* free; free some space")
    with serving(CONTENT) as server, refused:
        download(server.url, cache / "model.bin", sha256=None)
    assert leftovers(cache) == []


def test_a_disk_that_fills_up_is_one_line(cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MODULE.os, "fsync", full)
    with serving(CONTENT) as server, pytest.raises(RunError, match=r"cannot write .*No space left"):
        download(server.url, cache / "model.bin", sha256=None)
    assert not (cache / "model.bin").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(cache):
    cache.mkdir(mode=0o500)
    with pytest.raises(RunError, match=f"cannot write to {cache}"):
        download("http://127.0.0.1:9/model.bin", cache / "model.bin", sha256=None)


def test_a_file_in_the_place_of_the_folder_is_one_line(cache):
    cache.write_text("")
    with pytest.raises(RunError, match="cannot write to"):
        download("http://127.0.0.1:9/model.bin", cache / "model.bin", sha256=None)


def test_two_processes_at_once_share_one_download(cache):
    program = (
        "import sys\nfrom visformer.hub.download import download\n"
        "print(download(sys.argv[1], sys.argv[2], sha256=sys.argv[3]).stat().st_size)"
    )
    with serving(CONTENT, silence_s=0.7) as server:
        words = [sys.executable, "-c", program, server.url, str(cache / "model.bin"), server.sha256]
        both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        results = [process.communicate(timeout=30) for process in both]
        assert [out for out, _ in results] == ["512000\n"] * 2, results
        assert len(server.requests) == 1
    said = [err for _, err in results]
    assert sum("downloading model.bin" in err for err in said) == 1
    assert leftovers(cache) == ["model.bin"]


def test_a_killed_process_leaves_a_part_that_the_next_one_finishes(cache):
    program = "import sys\nfrom visformer.hub.download import download\ndownload(sys.argv[1], sys.argv[2], sha256=None)"
    with serving(CONTENT, drops=[100_000, 0], statuses=[200, 429, 429, 429]) as server:
        process = subprocess.Popen([sys.executable, "-c", program, server.url, str(cache / "model.bin")])
        while len(server.requests) < 2:
            time.sleep(0.02)
        process.kill()
        process.wait()
        server.statuses.clear()
        assert (cache / "model.bin.part").stat().st_size == 100_000
        assert download(server.url, cache / "model.bin", sha256=server.sha256).read_bytes() == CONTENT


def test_a_terminal_gets_a_bar(cache, monkeypatch):
    shown = []
    monkeypatch.setattr("visformer.console.is_terminal", lambda: True)

    class Bar:
        console = type("Console", (), {"print": lambda self, line, markup: shown.append(line)})()
        start = stop = lambda self: shown.append("")
        remove_task = lambda self, task: None  # noqa: E731
        add_task = lambda self, name, **options: shown.append((name, options["total"]))  # noqa: E731
        update = lambda self, task, **options: shown.append(options["completed"])  # noqa: E731

    monkeypatch.setattr("visformer.console.progress", Bar)
    with serving(CONTENT * 4, drops=[1_000_000]) as server:
        download(server.url, cache / "model.bin", sha256=server.sha256)
    assert ("model.bin", 2) in shown and shown[0] == shown[-1] == "" and 1 in shown and 2 in shown


def test_where_downloads_are_kept(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("VISFORMER_CACHE", "~/weights")
    assert cache_folder() == Path("/home/someone/weights")
    monkeypatch.setenv("VISFORMER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/someone")
    assert cache_folder() == Path("/var/cache/someone/visformer")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path("/home/someone/.cache/visformer")
