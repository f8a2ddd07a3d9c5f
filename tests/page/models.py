"""A small Visformer with a last map of 4 x 4 places, as a checkpoint, and a server of it in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.data.preprocessing import Preprocessing
from visformer.models import Architecture, StageConfig, Visformer

SIDE = 64
LONG = "a class with a name that goes on for so long that it can't stand in one line of a phone"
CLASSES = ["n02099601", "cat", LONG, "horse_chestnut_seed_without_a_space_to_break_the_line_at", "<b>bold</b>"]


def small_model(windows: bool = False, attention: bool = True, image_size: tuple[int, int] = (SIDE, SIDE)) -> Visformer:
    """Its norms have statistics of their own, and its head is strong enough to have opinions."""
    torch.manual_seed(1)
    last = {"num_heads": 4, "attention": True, "window": 3 if windows else None} if attention else {"spatial_mlp": True}
    stages = (
        StageConfig(width=16, depth=1, patch_size=4, spatial_mlp=True),
        StageConfig(width=32, depth=2, patch_size=2, **last),
    )
    model = Visformer(Architecture(8, stages, num_classes=len(CLASSES), image_size=image_size, groups=2))
    model.head.weight.data *= 40
    torch.nn.init.normal_(model.head.bias)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.2)
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, *image_size))
    return model.eval()


def write_model(path: Path, crop_pct: float = 0.875) -> Path:
    """The model as a checkpoint."""
    model = small_model()
    preprocessing = Preprocessing((SIDE, SIDE), crop_pct=crop_pct)
    write_checkpoint(path, Checkpoint("visformer_tiny", model.config, CLASSES, preprocessing, model.state_dict()))
    return path


def photo(path: Path, size: tuple[int, int] = (300, 200), seed: int = 0) -> Path:
    """A picture of soft blobs, (width, height) pixels; the suffix says the format."""
    random = np.random.default_rng(seed)
    blobs = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    blobs.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@contextmanager
def served(targets: list[str], **settings: Any) -> Iterator[str]:
    """The URL of a server that is ready, on a port of its own."""
    from visformer.serving.app import Service
    from visformer.serving.server import Server, listen
    from visformer.serving.settings import Settings

    service = Service(targets, Settings(access_log=False, drain_s=0, **settings))
    socket = listen("127.0.0.1", 0)
    server = Server(service, [socket])
    ready = threading.Event()

    async def serve() -> None:
        await service.repository.start()
        ready.set()
        await super(Server, server).serve([socket])

    async def startup(sockets: Any = None) -> None:  # signals are the main thread's
        await super(Server, server).startup(sockets)

    server.startup = startup
    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
