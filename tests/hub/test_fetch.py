"""What may be given as weights, where each comes from, and what is said when it does not come."""

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hub.fake_hub import COMMIT, TOKEN
from tests.hub.server import serving
from visformer.errors import RunError, UsageError
from visformer.hub import PUBLISHED, Fetched, fetch, find_weights, list_pretrained
from visformer.hub.published import row_of_url
from visformer.hub.repository import RepositoryName, parse_repository
from visformer.models import VARIANTS

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()

# ---- the table


def test_the_table_is_what_the_publishers_say():
    stated = {  # digits of the SHA-256 in the file's name, and its address
        "visformer_tiny.mindcv": ("daee0322", "visformer_tiny-daee0322.ckpt"),
        "visformer_tiny_v2.mindcv": ("6711a758", "visformer_tiny_v2-6711a758.ckpt"),
        "visformer_small.mindcv": ("6c83b6db", "visformer_small-6c83b6db.ckpt"),
        "visformer_small_v2.mindcv": ("63674ade", "visformer_small_v2-63674ade.ckpt"),
        "visformer_tiny.mindcv_910v2": ("df995ba4", "visformer_tiny-df995ba4-910v2.ckpt"),
        "visformer_small.authors": (None, "visformer_small.pth"),
        "swin_visformer_small.authors": (None, "swin_visformer_small.pth"),
        "swin_visformer_small_v2.authors": (None, "swin_visformer_small_v2.pth"),
        "swin_visformer_medium_v2.authors": (None, "swin_visofrmer_medium.pth"),
        "visformer_tiny.timm": (None, "model.safetensors"),
        "visformer_small.timm": (None, "model.safetensors"),
    }
    assert {name: (row.sha256, row.filename) for name, row in PUBLISHED.items()} == stated
    hosts = {
        "mindcv": r"https://download[.-]mindspore\.(cn|osinfra\.cn)/toolkits/mindcv/visformer/",
        "authors": "https://github.com/danczs/Visformer/releases/download/v1.0.0/",
    }
    for name, row in PUBLISHED.items():
        assert name.startswith(f"{row.model}.{row.source}") and row.model in VARIANTS
        if row.source == "timm":
            assert row.url == f"hf-hub:timm/{row.model}.in1k" and row.on_hub
        else:
            assert re.fullmatch(hosts[row.source] + re.escape(row.filename), row.url)
            assert (row.sha256 or "") in row.filename
        assert row_of_url(row.url) is row


def test_accuracies_are_those_of_the_models_table():
    for name, row in PUBLISHED.items():
        publisher = {"mindcv": "MindCV", "authors": "authors", "timm": None}[row.source]
        figures = [(p.top1, p.top5) for p in VARIANTS[row.model].published if p.source == publisher]
        if name.endswith(("_910v2", ".timm")):
            assert row.top1 is None and row.top5 is None
        else:
            assert figures == [(row.top1, row.top5)]


def test_names_are_listed_and_a_typo_offers_the_nearest():
    assert list_pretrained() == list(PUBLISHED) and "visformer_tiny.timm" in list_pretrained("visformer_tiny")
    assert list_pretrained("net1") == []
    assert find_weights("visformer_small.timm").model == "visformer_small"
    for call in (find_weights, fetch):
        with pytest.raises(UsageError, match=r"weights 'visformer_smal\.timm'; did you mean visformer_small\.timm"):
            call("visformer_smal.timm")


# ---- files and folders


@pytest.mark.parametrize("form", [Path, str])
def test_a_file_is_taken_as_it_is(tmp_path, form):
    path = tmp_path / "visformer_tiny.timm"  # though it has a published name
    path.write_bytes(CONTENT)
    assert fetch(form(path)) == Fetched(path, str(path))


def test_a_file_beats_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("visformer_tiny.mindcv").write_bytes(CONTENT)
    assert fetch("visformer_tiny.mindcv") == Fetched(Path("visformer_tiny.mindcv"), "visformer_tiny.mindcv")


@pytest.mark.parametrize(
    "files, chosen",
    [
        (["model.safetensors", "other.safetensors", "x.pth"], "model.safetensors"),
        (["README.md", "best.safetensors", "pytorch_model.bin"], "best.safetensors"),
        (["pytorch_model.bin", "a.pth", "b.pth"], "pytorch_model.bin"),
        (["a.pth", "training_args.bin", "b.ckpt"], "a.pth"),
        (["a.ckpt", "config.json"], "a.ckpt"),
        (["best.safetensors", "last.safetensors"], "several files of weights (best.safetensors, last.safetensors)"),
        (["config.json"], "there are no weights in it (.safetensors, .bin, .pth or .ckpt); it has config.json"),
        ([], "it is empty"),
    ],
)
def test_the_weights_in_a_folder(tmp_path, files, chosen):
    for name in files:
        (tmp_path / name).write_bytes(CONTENT)
    if chosen in files:
        assert fetch(tmp_path).path == tmp_path / chosen
    else:
        with pytest.raises(UsageError, match=re.escape(chosen)):
            fetch(str(tmp_path))


@pytest.mark.parametrize("name", ["runs/best.safetensors", "best.safetensors", "../best.ckpt", "nowhere/x.pth", "a/b"])
def test_a_path_that_is_not_there_offers_its_neighbours(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for path in ("runs/last.safetensors", "last.safetensors", "../other.ckpt"):
        Path(path).write_bytes(b"")
    with pytest.raises(UsageError, match=r"there is no such file") as error:
        fetch(name)
    neighbours = {
        "runs": "last.safetensors",
        "": "last.safetensors",
        "..": "other.ckpt",
        "nowhere": "no folder nowhere",
    }
    assert neighbours.get(os.path.dirname(name), "no folder a") in str(error.value)


@given(st.text(max_size=300))
def test_any_text_gives_one_plain_line(text):
    if not os.path.exists(text) and not text.lower().startswith(("http", "hf")):
        with pytest.raises(UsageError) as error:
            fetch(text)
        assert len(repr(str(error.value))) < 2000


# ---- URLs


@pytest.mark.parametrize("form", ["{url}/model-{digits}.ckpt", "{url}/model.ckpt#sha256={digits}"])
def test_a_url_with_its_hash_is_verified_and_kept(cache, form):
    with serving(CONTENT) as server:
        source = form.format(url=server.url.rpartition("/")[0], digits=SHA256[:8])
        first = fetch(source)
        assert first.path.read_bytes() == CONTENT and first.path.parent == cache and first.name == source
        assert first.path.name == f"model-{SHA256[:8]}.ckpt"
        assert fetch(source) == first and len(server.requests) == 1
    assert fetch(source) == first  # without the server


def test_a_fragment_goes_before_the_name_and_other_hashes_are_other_files(cache):
    with serving(CONTENT) as server:
        folder = server.url.rpartition("/")[0]
        dated = f"{folder}/model-20260101.pth"
        with pytest.raises(RunError, match="should begin with 20260101"):
            fetch(dated)
        assert fetch(f"{dated}#sha256={SHA256}").path.name == f"model-20260101-{SHA256[:16]}.pth"
        assert fetch(f"{folder}/model.pth?key=1#sha256={SHA256[:9].upper()}").path.name == f"model-{SHA256[:9]}.pth"
        with pytest.raises(RunError, match="should begin with 00000000"):
            fetch(f"{folder}/model.pth#sha256=00000000")


@pytest.mark.parametrize(
    "url, words",
    [
        ("https://example.com/model.pth", r"#sha256=0123abcd"),
        ("https://example.com/model-0123abc.pth", "at least eight"),
        ("https://example.com/model.pth#sha256=0123abc", "8 to 64 hex digits"),
        ("https://example.com/model.pth#sha256=0123abcx", "8 to 64 hex digits"),
        ("https://example.com/model.pth#md5=0123abcd", "#sha256="),
        ("http://example.com/model-0123abcd.pth", "only https"),
        ("HTTP://EXAMPLE.COM/model-0123abcd.pth", "only https"),
        ("https://example.com/#sha256=0123abcd", "cannot name a file"),
        ("https://example.com/..%2F..%2Fx#sha256=0123abcd", None),
        ("https://example.com/..#sha256=0123abcd", "cannot name a file"),
        ("https://example.com/a%00b#sha256=0123abcd", "cannot name a file"),
        ("https://example.com/.bashrc#sha256=0123abcd", "cannot name a file"),
        (f"https://example.com/{'x' * 300}#sha256=0123abcd", "cannot name a file"),
    ],
)
def test_urls_that_are_refused(cache, url, words):
    with pytest.raises(UsageError if words else RunError, match=words or r"save it as .*/cache/x-0123abcd$"):
        fetch(url)
    assert not cache.exists() or not [path for path in cache.iterdir() if path.suffix != ".lock"]


# ---- published names


def test_a_published_name_is_downloaded_from_its_row(cache, monkeypatch, capsys):
    with serving(CONTENT) as server:
        row = replace(PUBLISHED["visformer_small.mindcv"], url=server.url, sha256=SHA256[:8])
        monkeypatch.setitem(PUBLISHED, "visformer_small.mindcv", row)
        path = cache / "visformer_small-6c83b6db.ckpt"
        expected = Fetched(path, "visformer_small.mindcv", "visformer_small", "mindcv")
        assert fetch("visformer_small.mindcv") == expected and path.read_bytes() == CONTENT
        assert "state no SHA-256" not in capsys.readouterr().err
        by_address = fetch(server.url)  # the table knows the hash of the bare address
        assert (by_address.model, by_address.source) == ("visformer_small", "mindcv")
    path.write_bytes(b"damaged")
    with pytest.raises(RunError, match="delete it"):
        fetch("visformer_small.mindcv")


def test_without_a_published_hash_it_is_told_once(cache, monkeypatch, capsys):
    with serving(CONTENT) as server:
        row = replace(PUBLISHED["swin_visformer_medium_v2.authors"], url=server.url)
        monkeypatch.setitem(PUBLISHED, "swin_visformer_medium_v2.authors", row)
        fetched = fetch("swin_visformer_medium_v2.authors")
        assert fetched.path == cache / "swin_visofrmer_medium.pth" and fetched.source == "authors"
        assert f"{server.url}#sha256={SHA256}" in capsys.readouterr().err
        assert fetch("swin_visformer_medium_v2.authors") == fetched and len(server.requests) == 1
        assert SHA256 not in capsys.readouterr().err
        pinned = fetch(f"{server.url}#sha256={SHA256}")
        assert pinned.model == "swin_visformer_medium_v2" and pinned.source == "authors"


def test_without_a_network_it_says_where_to_put_the_file(cache):
    with pytest.raises(RunError) as error:  # the fixture's proxy answers nobody
        fetch("visformer_tiny.mindcv")
    url = "https://download.mindspore.cn/toolkits/mindcv/visformer/visformer_tiny-daee0322.ckpt"
    assert str(error.value) == (
        f"cannot download {url}: no connection (Connection refused); download it with a browser and save it as "
        f"{cache / 'visformer_tiny-daee0322.ckpt'}"
    )


# ---- the hub


@pytest.mark.parametrize("form", ["hf-hub:{}", "hf_hub:{}", "hf://{}", "HF-HUB:{}", "hf-hub:{}@main"])
def test_a_repository_gives_its_weights(hub, tmp_path, form):
    hub.add("someone/net", {"model.safetensors": CONTENT, "README.md": b""})
    source = form.format("someone/net")
    fetched = fetch(source)
    assert fetched == Fetched(fetched.path, source) and fetched.path.read_bytes() == CONTENT
    assert not fetched.path.is_symlink() and tmp_path / "hub" in fetched.path.parents


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", COMMIT])
def test_a_revision_is_taken(hub, revision):
    hub.add("someone/net", {"model.safetensors": b"old"})
    hub.add("someone/net", {"model.safetensors": CONTENT}, revision="main" if revision == COMMIT else revision)
    assert fetch(f"hf-hub:someone/net@{revision}").path.read_bytes() == CONTENT


@pytest.mark.parametrize("files", [["x.safetensors", "y.pth"], ["pytorch_model.bin", "y.pth"], ["y.pth"], ["y.ckpt"]])
def test_other_names_are_looked_for(hub, files):
    hub.add("someone/net", {files[0]: CONTENT} | dict.fromkeys(files[1:], b"") | {"config.json": b"{}"})
    assert fetch("hf-hub:someone/net").path.read_bytes() == CONTENT


def test_timms_repositories_tell_their_source(hub):
    hub.add("timm/visformer_tiny.in1k", {"model.safetensors": CONTENT})
    hub.add("timm/other", {"model.safetensors": CONTENT})
    named, by_id = fetch("visformer_tiny.timm"), fetch("hf-hub:timm/visformer_tiny.in1k")
    assert (named.model, named.source, named.path) == ("visformer_tiny", "timm", by_id.path)
    assert (by_id.model, by_id.source) == ("visformer_tiny", "timm")
    other = fetch("hf-hub:timm/other")
    assert (other.model, other.source) == (None, "timm")


@pytest.mark.parametrize("filename", ["model.safetensors", "only.pth"])
def test_the_hubs_cache_serves_offline(hub, monkeypatch, filename):
    hub.add("someone/net", {filename: CONTENT})
    online = fetch("hf-hub:someone/net")
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch("hf-hub:someone/net").path.read_bytes() == online.path.read_bytes() == CONTENT
    with pytest.raises(RunError, match=r"hf-hub:someone/other: it is not in the hub's cache"):
        fetch("hf-hub:someone/other")
    assert len(hub.requests) == asked


def test_what_the_hub_refuses_is_one_line(hub):
    hub.add("someone/net", {"config.json": b"{}"})
    hub.gated.add("someone/gated")
    for source, kind, words in [
        ("hf-hub:someone/private", UsageError, "no such repository, or it is private and you are not logged in"),
        ("hf-hub:someone/gated", UsageError, "grants access to it one by one"),
        ("hf-hub:someone/net@v9", UsageError, "no such revision"),
        ("hf-hub:someone/net", UsageError, r"no weights in it .*; it has config\.json"),
        ("hf-hub:net", UsageError, r"write hf-hub:owner/name or hf-hub:owner/name@revision"),
        ("hf-hub:someone/net@", UsageError, "not a repository's name"),
        ("hf-hub:some--one/net", UsageError, "Cannot have -- or .."),
        ("hf-hub:a/b/c", UsageError, "not a repository's name"),
        ("hf-hub:", UsageError, "not a repository's name"),
    ]:
        with pytest.raises(kind, match=words) as error:
            fetch(source)
        assert "\n" not in str(error.value) and str(error.value).startswith("hf-hub:"), source


def test_a_hub_that_is_not_there_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    with pytest.raises(RunError, match=r"hf-hub:someone/net: it is not in the hub's cache, and the hub") as error:
        fetch("hf-hub:someone/net")
    assert "\n" not in str(error.value)


def test_a_token_is_sent_and_never_said(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UsageError) as error:
        fetch("hf-hub:someone/private")
    assert TOKEN not in str(error.value)


@given(st.from_regex(r"[a-z]{1,9}/[a-z0-9]{1,9}", fullmatch=True), st.from_regex(r"[a-z0-9/.@]{1,9}", fullmatch=True))
def test_repository_names_come_back(repo_id, revision):
    assert parse_repository(f"{repo_id}@{revision}") == RepositoryName(repo_id, revision)
    assert parse_repository(repo_id) == RepositoryName(repo_id, None)
    assert str(RepositoryName(repo_id, revision)) == f"hf-hub:{repo_id}@{revision}"
