"""The server as a Serve config file, which `serve deploy FILE` and KubeRay's RayService take; imports no ray.

    visformer serve bundle --engine ray --replicas 2 --max_replicas 8 --print_config > serve.yaml

The application is `visformer.cluster.deploy:build` with the models and the settings as its arguments, so that nodes
need the package and the models' files, at the same paths.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visformer.errors import UsageError
from visformer.serving.settings import Settings
from visformer.serving.sources import scan

APPLICATION = "visformer"
DEPLOYMENT = "Replica"
BUILDER = "visformer.cluster.deploy:build"
SERVICER = "visformer.cluster.remote_calls:add_to_server"
_SERVE_KEEPS = 5.0  # seconds that Serve gives beyond our own limits, so that ours are the ones that are met
_BUSY = 0.25  # of max_in_flight: with more on their way for each replica, on average, one is added
# What Serve does itself, or decides for each node.
_NOT_SENT = ("host", "port", "grpc_port", "replicas", "tls_cert", "tls_key", "drain_s")


@dataclass(frozen=True)
class Deployment:
    """What to deploy: the models as the user named them, and how many replicas of what size."""

    models: list[str]
    settings: Settings
    max_replicas: int | None = None
    gpus: float | None = None  # of a replica; None: 1 for checkpoints where there are GPUs

    @property
    def most_replicas(self) -> int:
        """Under load."""
        return self.max_replicas or self.settings.replicas

    def __post_init__(self) -> None:
        if self.settings.tls_cert:
            raise UsageError("tls_cert: with --engine ray what stands before the cluster encrypts, such as an ingress")


def arguments(deployment: Deployment) -> dict[str, Any]:
    """What `build` gets: plain data. `content` changes when a model's files do, and with it the replicas."""
    settings = {key: _plain(value) for key, value in dataclasses.asdict(deployment.settings).items()}
    default = {key: _plain(value) for key, value in dataclasses.asdict(Settings()).items()}
    told = {key: value for key, value in settings.items() if key not in _NOT_SENT and value != default[key]}
    return {"models": [_absolute(model) for model in deployment.models], "settings": told}


def content(models: list[str]) -> list[str]:
    """What the models' files are at present, a text for each version. Raises `UsageError` for what can't be served."""
    return [
        f"{name} {number} {'.'.join(map(str, source.mark))}"
        for name, found in scan(models).items()
        for number, source in found.versions.items()
    ]


def replica_options(deployment: Deployment, gpus: float = 0) -> dict[str, Any]:
    """Serve's options of the deployment."""
    settings = deployment.settings
    options: dict[str, Any] = {
        "max_ongoing_requests": settings.max_in_flight,
        "graceful_shutdown_timeout_s": settings.shutdown_s,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": {"num_cpus": settings.model_threads or 1, **({"num_gpus": gpus} if gpus else {})},
    }
    if deployment.most_replicas > settings.replicas:
        options["autoscaling_config"] = {
            "min_replicas": settings.replicas,
            "max_replicas": deployment.most_replicas,
            "target_ongoing_requests": max(1, round(_BUSY * settings.max_in_flight)),
        }
    else:
        options["num_replicas"] = settings.replicas
    return options


def http_options(settings: Settings) -> dict[str, Any]:
    """Serve's options for HTTP on every node."""
    return {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": settings.timeout_s + settings.body_timeout_s + _SERVE_KEEPS,
        "keep_alive_timeout_s": 75,
    }


def grpc_options(settings: Settings) -> dict[str, Any]:
    """Serve's options for gRPC on every node; empty: there is none."""
    if settings.grpc_port is None:
        return {}
    return {
        "port": settings.grpc_port,
        "grpc_servicer_functions": [SERVICER],
        "request_timeout_s": settings.timeout_s + _SERVE_KEEPS,
    }


def serve_document(deployment: Deployment) -> dict[str, Any]:
    """The whole config file."""
    document: dict[str, Any] = {
        "proxy_location": "EveryNode",
        "http_options": http_options(deployment.settings),
        "grpc_options": grpc_options(deployment.settings),
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": arguments(deployment),
                "deployments": [{"name": DEPLOYMENT, **replica_options(deployment, deployment.gpus or 0)}],
            }
        ],
    }
    if not document["grpc_options"]:
        del document["grpc_options"]
    return document


def to_yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _absolute(model: str) -> str:
    """A target as every node can find it: paths that are here become absolute, whatever else is left as it is."""
    name, equals, path = model.partition("=")
    if Path(model).exists():
        return os.path.abspath(model)
    return f"{name}={os.path.abspath(path)}" if equals and Path(path).exists() else model
