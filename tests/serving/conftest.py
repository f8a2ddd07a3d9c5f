"""A service of one fake model called `pets` with clients that need no port, and a small real model for processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from tests.serving.fakes import Fake, write_version
from tests.serving.models import write_small_bundle, write_small_checkpoint
from visformer.serving.app import Service, make_app
from visformer.serving.server import Server, listen
from visformer.serving.settings import Settings


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def models(tmp_path):
    """A folder of models: `pets` with version 1."""
    write_version(tmp_path / "models" / "pets", 1, "0")
    return tmp_path / "models"


@pytest.fixture
def serving(fake, models) -> Callable[..., Any]:
    """`async with serving(**settings) as (client, service)`: loaded and ready."""

    @asynccontextmanager
    async def started(**settings: Any):
        service = Service([str(models)], Settings(access_log=False, **settings), loader=fake)
        await service.repository.start()
        transport = httpx2.ASGITransport(app=make_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client, service
        fake.open.set()
        await service.close()

    return started


@pytest.fixture
def calling(serving):
    """`async with calling(**settings) as (call, service)`; `call(method, metadata=..., timeout=..., **fields)`."""

    grpc, messages = pytest.importorskip("grpc"), pytest.importorskip("visformer.serving.messages")
    from visformer.serving.grpc_server import start_grpc

    @asynccontextmanager
    async def started(**settings):
        async with serving(grpc_port=0, **settings) as (_, service):
            server, port = await start_grpc(service)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

                def call(method, *, timeout=20, metadata=(), **fields):
                    name, request, response, _ = next(one for one in messages.methods() if one[0] == method)
                    sent = channel.unary_unary(
                        f"/{messages.SERVICE}/{name}", request.SerializeToString, response.FromString
                    )
                    return sent(request(**fields), timeout=timeout, metadata=metadata)

                call.channel = channel
                yield call, service
            await server.stop(1)

    return started


@pytest.fixture
def listening(fake, models) -> Callable[..., Any]:
    """`listening(client, **settings)`: what `client(port)` returns, called in a thread while the server listens."""

    def run(client: Callable[[int], Any], **settings: Any) -> Any:
        made = listen("127.0.0.1", 0)
        service = Service([str(models)], Settings(access_log=False, drain_s=0, **settings), loader=fake)
        server = Server(service, [made], load_first=True)

        def call() -> Any:
            try:
                return client(made.getsockname()[1])
            finally:
                server.should_exit = True

        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(call)
            server.run()
            return result.result()

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small Visformer of five classes, with random weights."""
    return write_small_checkpoint(tmp_path_factory.mktemp("run") / "best.safetensors")


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory) -> Path:
    """A bundle of it, called `pets`."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return write_small_bundle(checkpoint, tmp_path_factory.mktemp("bundles") / "pets")
