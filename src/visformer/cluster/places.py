"""Files in folders and behind addresses (s3://bucket/folder), through fsspec, with errors that a person can read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from visformer.data.streams import ATTEMPTS, BACKOFF_S, check_address, without_secrets
from visformer.errors import RunError, UsageError

T = TypeVar("T")
_FOR_GOOD = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it.

    Raises `UsageError` for an address that carries a secret, is plain http to another machine, or names no file system.
    """
    try:
        check_address(address)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("data_dir: ")) from None
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(address)
    except ImportError as error:
        raise UsageError(
            f"{address}: needs a package that is not installed ({without_secrets(error)}); "
            "pip install 'visformer[stream]' has https"
        ) from None
    except ValueError as error:
        raise UsageError(f"{address}: no address that fsspec can read ({without_secrets(error)})") from None
    return system, path


def with_patience(what: str, work: Callable[[], T]) -> T:
    """What `work` gives, after as many attempts as it takes, 1, 2, 4 and 8 seconds apart.

    `FileNotFoundError` and its like come at once, as they are. Raises `RunError` when the last attempt has failed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except _FOR_GOOD:
            raise
        except Exception as error:  # each of fsspec's packages has errors of its own
            if attempt == ATTEMPTS:
                raise RunError(
                    f"{what}: can't be read or written, {attempt} times ({without_secrets(error)})"
                ) from None
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
    raise AssertionError
