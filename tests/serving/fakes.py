"""A served model that is a few lines of numpy, so that tests choose how long it takes, when it fails and what it says.

Its logits for an image are the mean of the image's pixels, plus the class's number, plus what its file says. It
computes one batch at a time, and can be held up.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visformer.bundles.pixels import ImagePreprocessing
from visformer.errors import RunError
from visformer.serving.model import Loaded
from visformer.serving.settings import Settings
from visformer.serving.sources import Source

SIDE = 8
LABELS = ["bird", "cat", "dog"]
PREPROCESSING = ImagePreprocessing(
    image_size=(SIDE, SIDE),
    crop_pct=1.0,
    interpolation="bilinear",
    antialias=True,
    crop_rounding="floor",
    mean=(0.0, 0.0, 0.0),
    std=(255.0, 255.0, 255.0),
    in_channels=3,
)


class Fake:
    """A loader of such models. `sizes` are the batches computed so far; while `open` is clear, none is computed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.computing = threading.Event()
        self.fail: Exception | None = None

    def __call__(self, source: Source, settings: Settings) -> Loaded:
        text = Path(source.path).read_text()
        if text == "broken":
            raise RunError(f"{source.path}: broken")
        if text == "strange":
            raise KeyError("something that no one foresaw")
        shift = float(text)

        def run(batch: np.ndarray) -> np.ndarray:
            self.computing.set()
            assert self.open.wait(20)
            self.sizes.append(len(batch))
            if self.fail is not None:
                raise self.fail
            means = batch.reshape(len(batch), -1).mean(axis=1, dtype=np.float64)
            return (means[:, None] + np.arange(len(LABELS)) + shift).astype(np.float32)

        return Loaded(run, "fake", LABELS, PREPROCESSING, "fake", "fp32", any_size=False)


def write_version(folder: Path, number: int, content: str) -> None:
    """`folder/number/best.safetensors`, which appears whole."""
    hidden = folder / f".{number}"
    hidden.mkdir(parents=True)
    (hidden / "best.safetensors").write_text(content)
    hidden.rename(folder / str(number))


def picture(level: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """A PNG of one grey level, (width, height) pixels."""
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "PNG")
    return file.getvalue()


def enormous_picture(side: int = 30_000) -> bytes:
    """A PNG of some hundred bytes that says it has `side` x `side` pixels."""
    plain = picture()
    header = struct.pack(">II", side, side)
    chunk = b"IHDR" + header + plain[24:29]
    return plain[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]


async def ask(app: Any, scope: dict[str, Any], messages: list[dict[str, Any]], then: Any = None) -> list[dict]:
    """Speak ASGI by hand: give `messages`, then what the awaitable `then` gives. Returns what was sent."""
    sent: list[dict] = []
    waiting = iter(messages)

    async def receive() -> dict[str, Any]:
        for message in waiting:
            return message
        return await then()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    whole = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app({**whole, "raw_path": scope["path"].encode(), **scope}, receive, send)
    return sent
