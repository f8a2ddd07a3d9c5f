"""Files of repositories on the Hugging Face hub, through `huggingface_hub` and its cache.

Tokens, mirrors, the cache's place and working offline are that library's affair: `hf auth login`, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE. Here it is chosen which file of a repository holds the weights, and failures become one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from visformer.errors import RunError, UsageError, VisformerError

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
FORMS = "hf-hub:owner/name or hf-hub:owner/name@revision"


class RepositoryName(NamedTuple):
    """owner/name, and a branch, tag or commit (None: the main branch)."""

    repo_id: str
    revision: str | None

    def __str__(self) -> str:
        return f"hf-hub:{self.repo_id}" + (f"@{self.revision}" if self.revision else "")


def parse_repository(text: str) -> RepositoryName:
    """owner/name[@revision] in its parts. Raises `UsageError` for anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id, at, revision = text.partition("@")
    if repo_id.count("/") != 1 or (at and not revision):
        raise UsageError(f"hf-hub:{text}: not a repository's name; write {FORMS}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"hf-hub:{text}: not a repository's name ({_line(error)}); write {FORMS}") from error
    return RepositoryName(repo_id, revision or None)


def fetch_from_hub(name: RepositoryName, filename: str | None = None, **options: Any) -> Path:
    """The file with a repository's weights, in the library's cache; `filename` where it is known.

    `options` go to `hf_hub_download`: token, cache_dir, force_download, local_files_only. Raises `UsageError` for a
    repository, revision or file that is not there, and `RunError` when the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(filename: str) -> Path:
        return Path(hf_hub_download(name.repo_id, filename, revision=name.revision, **options)).resolve()

    with hub_errors(str(name)):
        try:
            return get(filename or SAFETENSORS)
        except LocalEntryNotFoundError as error:
            cached = _snapshot(name, options)
            if cached is None:
                raise
            try:
                return choose_weights(cached, str(name)).resolve()
            except UsageError:
                raise error from None
        except EntryNotFoundError:
            return get(_choose(_list_files(name, options), str(name)))


def choose_weights(folder: Path, name: str | None = None) -> Path:
    """The file of a folder that holds the weights. Raises `UsageError` when there is none, or no telling which."""
    return folder / _choose(sorted(path.name for path in folder.iterdir() if path.is_file()), name or str(folder))


def _choose(files: Iterable[str], name: str) -> str:
    """model.safetensors, else the only .safetensors, pytorch_model.bin, the only .pth, the only .ckpt."""
    files = [file for file in files if "/" not in file]
    for wanted in (SAFETENSORS, ".safetensors", PICKLE, ".pth", ".ckpt"):
        found = [file for file in files if (file.endswith(wanted) if wanted.startswith(".") else file == wanted)]
        if len(found) > 1:
            raise UsageError(
                f"{name}: it has several files of weights ({', '.join(found[:5])}); download the one you mean, and "
                "give its path"
            )
        if found:
            return found[0]
    has = f"it has {', '.join(files[:5])}" if files else "it is empty"
    raise UsageError(f"{name}: there are no weights in it (.safetensors, .bin, .pth or .ckpt); {has}")


def _list_files(name: RepositoryName, options: dict[str, Any]) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi(token=options.get("token")).list_repo_files(name.repo_id, revision=name.revision)


def _snapshot(name: RepositoryName, options: dict[str, Any]) -> Path | None:
    """The folder in which the cache has files of that revision, if it has any."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name.repo_id, revision=name.revision, cache_dir=options.get("cache_dir"), local_files_only=True
        )
    except LocalEntryNotFoundError as error:
        folder = getattr(error, "snapshot_path", None)
    return Path(folder) if folder else None


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Whatever the hub's library raises about the repository `name`, as one line of ours."""
    from huggingface_hub import errors

    try:
        yield
    except VisformerError:
        raise
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{name}: its owner grants access to it one by one; ask for it on its page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{name}: there is no such repository, or it is private and you are not logged in; `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{name}: the repository has no such revision; name a branch, a tag or a commit") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise RunError(
            f"{name}: it is not in the hub's cache, and the hub cannot be reached or is not to be (HF_HUB_OFFLINE); "
            "download its files on a machine that can, and give their path"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise UsageError(f"{name}: you are not logged in to the hub; `hf auth login`") from error
    except Exception as error:  # each release of the library raises the errors of another HTTP client
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UsageError(
                f"{name}: the hub refuses it (status {status}); `hf auth login` with a token that may do this"
            ) from error
        raise RunError(f"{name}: the hub cannot be used: {_line(error)}") from error


def _line(error: Exception) -> str:
    """An error's own words on one line, without what follows them."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return words or type(error).__name__
