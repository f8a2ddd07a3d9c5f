"""`visformer serve`: checkpoints and bundles behind HTTP and gRPC.

    visformer serve runs/photos/best.safetensors --port 8000
    curl --data-binary @cat.jpg http://127.0.0.1:8000/predict

One process loads the models, decodes in threads, and batches what comes in; docs/serving.md has the protocols, the
limits and what the signals do. With `--engine ray` the same runs on a Ray cluster: docs/cluster.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from visformer.config import option
from visformer.errors import UsageError
from visformer.machine import available_cores

if TYPE_CHECKING:
    from visformer.serving.settings import Settings

_LEAST = {
    "replicas": 1,
    "max_replicas": 1,
    "gpus_per_replica": 0,
    "batch_size": 1,
    "model_workers": 1,
    "model_threads": 1,
    "num_parallel_workers": 1,
    "max_in_flight": 1,
    "max_bytes": 1,
    "max_pixels": 1,
    "max_images": 1,
    "top_k": 1,
    "drain_s": 0,
    "shutdown_s": 1,
}
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass
class ServeOptions:
    """Options of `visformer serve`; see each field's help."""

    models: list[str] = option(
        [],
        "what to serve: a checkpoint, a bundle, a run's folder, a folder name/ with versions name/1/, name/2/, or a "
        "folder of such folders; NAME=WHAT gives it another name",
        group="Models",
        positional=True,
    )
    versions: Literal["latest", "all"] = option("latest", "which versions of a model to load")
    device_target: Literal["auto", "CPU", "GPU", "Ascend", "cuda", "npu", "xpu", "mps", "cpu"] = option(
        "auto", "device for checkpoints; auto: the accelerator that is there, else the CPU. Bundles run on the CPU"
    )
    amp_level: Literal["O0", "O1", "O2", "O3"] = option("O0", "of checkpoints: O0: fp32; O1 to O3: half precision")
    amp_dtype: Literal["bf16", "fp16"] = option("bf16", "the half precision of amp_level")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: every one of this machine", group="Network")
    port: int = option(8000, "port for HTTP; 0: one that is free, which the log names")
    grpc_port: int | None = option(None, "port for gRPC; None: no gRPC")
    tls_cert: str = option("", "file with the certificate chain (PEM); HTTP and gRPC are then encrypted")
    tls_key: str = option("", "file with the certificate's private key (PEM)")
    api_keys: str = option(
        "", "file with API keys, one a line, of which requests must carry one; empty: none is needed"
    )
    cors_origins: list[str] = option(
        [], "web pages of these origins may use the server, as https://example.org; *: any"
    )
    model_control: bool | None = option(
        None, "allow load and unload from outside; None: on a loopback address or with API keys, and without replicas"
    )
    batch_size: int = option(16, "images that a model takes at once, at most", group="Speed")
    num_parallel_workers: int | None = option(None, "threads that decode; None: one for each core, 8 at most")
    model_threads: int | None = option(None, "threads that compute one batch; None: the engine decides")
    model_workers: int = option(1, "batches of one model that are computed at the same time")
    replicas: int = option(1, "server processes that share the port; one that dies is started again")
    cache_dir: str = option("", "folder where OpenVINO keeps what it compiles, for a quicker start; empty: nowhere")
    max_in_flight: int = option(256, "requests worked on at a time; more are told 503 and Retry-After", group="Limits")
    timeout_s: float = option(30.0, "seconds a request may take; clients can ask for less")
    body_timeout_s: float = option(10.0, "seconds in which a request's body must come")
    max_bytes: int = option(32 * 2**20, "bytes of one request's body, and of what it unpacks to")
    max_pixels: int = option(25_000_000, "pixels of one image, as it is stored")
    max_images: int = option(256, "images of one request")
    top_k: int = option(5, "labels for each image, where a request does not say", group="Answers")
    access_log: bool = option(True, "a JSON line on stderr for each request")
    tracing: bool = option(False, "OpenTelemetry spans, sent where OTEL_EXPORTER_OTLP_ENDPOINT says")
    drain_s: float = option(
        0.5,
        "seconds to go on answering after SIGTERM before the port is closed, and again before connections are",
        group="Stopping",
    )
    shutdown_s: float = option(30.0, "seconds that requests under way have to finish once the port is closed")
    engine: Literal["local", "ray"] = option(
        "local", "ray: replicas on a Ray cluster, behind Ray Serve's proxy on each of its machines", group="Cluster"
    )
    max_replicas: int | None = option(None, "replicas under load, at most, with engine ray; None: always replicas")
    gpus_per_replica: float | None = option(
        None, "GPUs of a replica, such as 0.5; None: 1 for checkpoints where the cluster has some"
    )
    ray_address: str = option(
        "",
        "auto, or HOST:PORT, of the cluster to deploy to: the command ends when the replicas are ready, and again "
        "replaces them one by one; empty: Ray is started on this machine, and ends with the command",
    )
    ha_proxy: bool | None = option(
        None, "HAProxy in the place of Serve's own proxy, in a Ray that is started here; None: if it is installed"
    )
    print_config: bool = option(False, "print the Serve config file, for `serve deploy` and KubeRay, and do no more")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"{name}: {value} is out of range; it must be at least {least}")
        for name in ("timeout_s", "body_timeout_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise UsageError(
                    f"{name}: {getattr(self, name)} is out of range; it must be above 0, and 86,400 at most"
                )
        for name in ("port", "grpc_port"):
            if not 0 <= (getattr(self, name) or 0) < 65_536:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range; it must be from 0 to 65,535")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise UsageError("tls_cert, tls_key: give both, or neither")
        if self.engine != "ray":
            for name in ("max_replicas", "gpus_per_replica", "ray_address", "ha_proxy", "print_config"):
                if getattr(self, name) not in (None, "", False):
                    raise UsageError(f"{name}: is for --engine ray")
        elif self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UsageError(f"max_replicas: {self.max_replicas} is below replicas, which is {self.replicas}")

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16: what checkpoints are computed in."""
        return "fp32" if self.amp_level == "O0" else self.amp_dtype


def run(options: ServeOptions) -> int:
    """Serve until SIGTERM or Ctrl-C, and return 0."""
    serve(options)
    return 0


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C; blocks, and handles signals, so it belongs into the main thread.

    Raises `UsageError` for what can't be served, and `RunError` when it fails.
    """
    settings = _settings(options)
    if options.engine == "ray":
        _serve_on_ray(options, settings)
    elif settings.replicas > 1:
        from visformer.serving.replicas import serve_replicas

        serve_replicas(options.models, settings)
    else:
        from visformer.serving.server import serve_here

        serve_here(options.models, settings)


def _serve_on_ray(options: ServeOptions, settings: Settings) -> None:
    from visformer.cluster.document import Deployment, serve_document, to_yaml

    deployment = Deployment(options.models, settings, options.max_replicas, options.gpus_per_replica)
    if options.print_config:
        print(to_yaml(serve_document(deployment)), end="")
        return
    from visformer.cluster.run import deploy, serve_here

    if options.ray_address:
        deploy(deployment, options.ray_address)
    else:
        serve_here(deployment, options.ha_proxy)


def _settings(options: ServeOptions) -> Settings:
    """The options in the server's terms, after the checks that need files or packages."""
    if not options.models:
        raise UsageError("models: nothing to serve; name a checkpoint or a bundle, as in visformer serve BUNDLE")
    _check_packages(options)
    from visformer.serving.settings import Settings

    for name in ("tls_cert", "tls_key"):
        if getattr(options, name) and not Path(getattr(options, name)).is_file():
            raise UsageError(f"{name}: {getattr(options, name)}: no such file")
    keys = _api_keys(options.api_keys)
    return Settings(
        host=options.host,
        port=options.port,
        grpc_port=options.grpc_port,
        replicas=options.replicas,
        versions=options.versions,
        batch_size=options.batch_size,
        model_workers=options.model_workers,
        model_threads=options.model_threads,
        decode_threads=options.num_parallel_workers or min(8, available_cores()),
        device=options.device_target,
        precision=options.precision,
        cache_dir=options.cache_dir or None,
        max_in_flight=options.max_in_flight,
        timeout_s=options.timeout_s,
        body_timeout_s=options.body_timeout_s,
        max_bytes=options.max_bytes,
        max_pixels=options.max_pixels,
        max_images=options.max_images,
        top_k=options.top_k,
        api_keys=keys,
        model_control=_model_control(options, bool(keys)),
        tls_cert=options.tls_cert or None,
        tls_key=options.tls_key or None,
        cors_origins=tuple(options.cors_origins),
        access_log=options.access_log,
        tracing=options.tracing,
        drain_s=options.drain_s,
        shutdown_s=options.shutdown_s,
    )


def _model_control(options: ServeOptions, has_keys: bool) -> bool:
    """Whether models may be loaded and unloaded from outside; with replicas one of them alone would hear of it."""
    if options.replicas > 1 or (options.max_replicas or 1) > 1:
        if options.model_control:
            how = "deploy again" if options.engine == "ray" else "send SIGHUP"
            raise UsageError(f"model_control: with replicas, change the models' folders and {how}")
        return False
    if options.model_control is not None:
        return options.model_control
    return has_keys or options.host in _LOOPBACK


def _check_packages(options: ServeOptions) -> None:
    import importlib.util

    needed = ["fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client"]
    for package in needed + (["grpc", "google.protobuf"] if options.grpc_port is not None else []):
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            raise UsageError(f"serve needs {package}, which is not there: pip install 'visformer[serve]'")


def _api_keys(path: str) -> tuple[str, ...]:
    """SHA-256 of each key of a file, in which empty lines and those that begin with # mean nothing."""
    import hashlib

    if not path:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"api_keys: {path}: can't be read ({reason})") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UsageError(f"api_keys: {path}: has no key in it; write one a line")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)
