"""A Ray to work with: the one that this process has, one at an address, or one on this machine for as long as it takes.

What is started here asks for a token that only its own processes know (Ray listens on every address of the machine, and
runs what it is sent), and sends its makers no report of its usage.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from visformer.errors import RunError, UsageError


def need_ray() -> Any:
    """The package `ray`. Raises `UsageError` when it, or a part of it, is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what 2.60 warns to become the default
    try:
        import ray
        import ray.data
        import ray.serve
    except ImportError as error:
        raise UsageError(
            f"engine ray needs a package that is not there ({error.name}): pip install 'visformer[cluster]'"
        ) from None
    return ray


@contextmanager
def connected(address: str, **options: Any) -> Iterator[Any]:
    """Ray, connected; what was started or joined here is left at the end. `address` empty: a Ray of our own.

    Raises `UsageError` for an address of the wrong kind, `RunError` when nothing answers there.
    """
    if address.startswith("ray://"):
        raise UsageError(f"ray_address: {address}: run the command on a node of the cluster, with --ray_address auto")
    if not address and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:  # ray reads it once
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    ray = need_ray()
    for name in ("ray.serve", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
        else:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"ray_address: {address or 'this machine'}: no Ray to be had ({reason})") from None
    try:
        yield ray
    finally:
        ray.shutdown()
