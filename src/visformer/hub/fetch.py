"""From what a person gives as weights to a file on this machine.

    run/best.safetensors                                  a file; or a folder that `save_pretrained` wrote
    https://host/visformer_small-6c83b6db.ckpt            a URL whose file name ends in the beginning of its SHA-256
    https://host/model.pth#sha256=6c83b6db                or which has it behind
    hf-hub:owner/name, hf-hub:owner/name@revision         a repository on the Hugging Face hub (also hf://owner/name)
    visformer_small.timm                                  a published name, a row of the table

What is downloaded is kept (`machine.cache_folder`, and the hub's own cache), verified again, and used without a
network from then on.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from visformer import console
from visformer.errors import UsageError, nearest
from visformer.hub.download import download, file_sha256
from visformer.hub.https import check_url, redacted
from visformer.hub.published import HUB, PUBLISHED, Weights, row_of_url
from visformer.hub.repository import FORMS, RepositoryName, choose_weights, fetch_from_hub, parse_repository
from visformer.machine import cache_folder

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
HUB_PREFIX = re.compile(r"(?:hf[-_]hub:|hf://)", re.IGNORECASE)
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.", re.IGNORECASE)  # as torch.hub writes it
_HASH_IN_FRAGMENT = re.compile(r"sha256=([0-9a-f]{8,64})", re.IGNORECASE)


@dataclass(frozen=True)
class Fetched:
    """A file with weights. `name` is what was asked for; `model` and `source` (mindcv, authors, timm) if that tells."""

    path: Path
    name: str
    model: str | None = None
    source: str | None = None


def fetch(source: str | Path) -> Fetched:
    """The file that `source` stands for, downloaded and verified if it is not here.

    Raises `UsageError` for a source that is none, that does not exist or that says no SHA-256, and `RunError` when a
    download fails.
    """
    name = str(source)
    if isinstance(source, Path) or os.path.isfile(name):
        return Fetched(_local(Path(source)), name)
    if re.match(r"https?://", name, re.IGNORECASE):
        return _from_url(name)
    prefix = HUB_PREFIX.match(name)
    if prefix:
        return fetch_repository(parse_repository(name[prefix.end() :]), name)
    if name in PUBLISHED:
        return _from_table(name, PUBLISHED[name])
    if os.path.isdir(name) or _looks_like_path(name):
        return Fetched(_local(Path(name)), name)
    raise UsageError(
        f"there are no weights {name!r}{nearest(name, PUBLISHED)}; give a file, a URL with its SHA-256, {FORMS}, or a "
        f"published name: {', '.join(PUBLISHED)}"
    )


def _local(path: Path) -> Path:
    if os.path.isdir(path):
        return choose_weights(path)
    if not os.path.isfile(path):
        raise UsageError(f"{path}: there is no such file{_neighbours(path)}")
    return path


def _from_table(name: str, weights: Weights) -> Fetched:
    if weights.on_hub:
        repository = parse_repository(weights.url.removeprefix(HUB))
        return Fetched(fetch_from_hub(repository, weights.filename), name, weights.model, weights.source)
    return Fetched(_downloaded(weights.url, weights.filename, weights.sha256), name, weights.model, weights.source)


def fetch_repository(repository: RepositoryName, name: str, **options: Any) -> Fetched:
    """The weights of a repository on the hub, called `name`; `options` as in `fetch_from_hub`."""
    weights = row_of_url(HUB + repository.repo_id)
    timms = repository.repo_id.startswith("timm/")
    path = fetch_from_hub(repository, **options)
    return Fetched(path, name, weights.model if weights else None, "timm" if timms else None)


def _from_url(name: str) -> Fetched:
    url, _, fragment = name.partition("#")
    check_url(url)
    filename = unquote(urlsplit(url).path).rpartition("/")[2]
    if not re.fullmatch(r"[\w][\w .+@=,-]{0,199}", filename):
        raise UsageError(f"{redacted(url)}: its last part, {filename!r}, cannot name a file here; download it by hand")
    weights = row_of_url(url)
    sha256 = _stated_hash(url, filename, fragment) or (weights.sha256 if weights else None)
    if sha256 is None and weights is None:
        raise UsageError(
            f"{redacted(url)}: without its SHA-256 nobody can tell whether the file is the right one; put at least "
            f"eight of its hex digits behind the address, as in {redacted(url)}#sha256=0123abcd, or download the file "
            "by hand and give its path"
        )
    if sha256 and sha256.lower() not in filename.lower():
        stem, dot, suffix = filename.rpartition(".")
        filename = f"{stem}-{sha256.lower()[:16]}{dot}{suffix}" if dot else f"{filename}-{sha256.lower()[:16]}"
    path = _downloaded(url, filename, sha256)
    return Fetched(path, name, weights.model if weights else None, weights.source if weights else None)


def _stated_hash(url: str, filename: str, fragment: str) -> str | None:
    """The SHA-256's beginning as the fragment says, else as the file's name does."""
    if fragment:
        stated = _HASH_IN_FRAGMENT.fullmatch(fragment)
        if not stated:
            raise UsageError(f"{redacted(url)}#{fragment}: write #sha256= and 8 to 64 hex digits behind an address")
        return stated[1]
    in_name = _HASH_IN_NAME.findall(filename)
    return in_name[-1] if in_name else None


def _downloaded(url: str, filename: str, sha256: str | None) -> Path:
    path = cache_folder() / filename
    new = not path.exists()
    download(url, path, sha256=sha256)
    if new and sha256 is None:
        console.note(
            f"its publishers state no SHA-256; it came over https, and to have just this file always, give "
            f"{url}#sha256={file_sha256(path)}"
        )
    return path


def _looks_like_path(name: str) -> bool:
    return "/" in name or "\\" in name or name.lower().endswith(SUFFIXES)


def _neighbours(path: Path) -> str:
    """What checkpoints there are beside a file that is not there."""
    if not os.path.isdir(path.parent):
        return f", and no folder {path.parent}"
    found = sorted(p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES)
    return f"; in {path.parent} there are {', '.join(found[:5])}" if found else ""
