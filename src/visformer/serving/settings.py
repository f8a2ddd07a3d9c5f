"""What the server was told, in one value that never changes while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """Limits and choices; `visformer serve --help` explains those that are options. Sizes are bytes, times seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    replicas: int = 1
    versions: Literal["latest", "all"] = "latest"
    batch_size: int = 16  # images that a model takes at once, at most
    model_workers: int = 1  # batches of one model that are computed at the same time
    model_threads: int | None = None  # of one batch; None: the engine decides
    decode_threads: int = 2
    device: str = "auto"
    precision: str = "fp32"
    cache_dir: str | None = None
    max_in_flight: int = 256
    timeout_s: float = 30.0
    body_timeout_s: float = 10.0
    max_bytes: int = 32 * 2**20  # of one request's body, and of what it unpacks to
    max_bytes_in_flight: int = 2**30  # of the bodies of all requests together
    max_pixels: int = 25_000_000  # of one image, before it is resized
    max_images: int = 256  # of one request
    top_k: int = 5
    api_keys: tuple[str, ...] = ()  # SHA-256 of each, in hexadecimal; empty: none is asked for
    model_control: bool = True
    tls_cert: str | None = None
    tls_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True
    tracing: bool = False
    drain_s: float = 0.5  # answering on, with `Connection: close`, before the ports are closed
    shutdown_s: float = 30.0  # for what is under way, once they are closed
