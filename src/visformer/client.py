"""A client of `visformer serve` that waits its turn.

    with visformer.Client("http://127.0.0.1:8000") as client:
        print(client.predict(["cat.jpg", "dog.jpg"], top_k=3))

    async with visformer.AsyncClient("http://127.0.0.1:8000") as client:
        records = await client.predict(paths)

What is sent is the file as it is, so that the server's preprocessing is the only one. A server that is busy says when
to come back (503 with Retry-After), and one that is starting refuses connections for a moment; in both cases the
request is tried again. The two clients only send and sleep: what is asked and what follows from an answer is in
`_Server` and `_Attempts`, which know of no network.
"""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from visformer.errors import RunError, UsageError

if TYPE_CHECKING:
    import httpx2
    import numpy as np
    from PIL import Image

    Picture: TypeAlias = str | Path | bytes | Image.Image | np.ndarray

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 30.0
AT_ONCE = 16  # images of one AsyncClient that are on their way together
_AGAIN = (429, 502, 503, 504)  # what a server or a proxy before it says when it could not look at the image


class Client:
    """Labels images over HTTP.

    Args:
        url: where the server is, such as http://127.0.0.1:8000.
        model, version: which of several; empty: the server's only model, its newest version.
        api_key: sent as `Authorization: Bearer`.
        timeout_s: for one answer, connecting included.
        retries: further attempts of a request that the server was too busy for, or that did not reach it.

    Raises `UsageError` for a request that the server refuses (an unknown model, a wrong key), `RunError` when it does
    not answer, or answers with a fault of its own.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        model: str = "",
        version: str = "",
        api_key: str = "",
        timeout_s: float = 60.0,
        retries: int = 8,
    ) -> None:
        self._server = _Server(url, model, version)
        self._retries = retries
        self._http: httpx2.Client = _httpx2().Client(**_settings(url, api_key, timeout_s))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def predict(self, images: Picture | Iterable[Picture], *, top_k: int = 5) -> list[dict[str, Any]]:
        """One record for each image, in order, as `Predictor.predict` gives: `path` and `predictions`, best first, each
        with label, index and probability; or `path` and `error` for an image that can't be labelled.

        An image is a path, the bytes of a file, a Pillow image or a uint8 array (H, W, C) or (H, W).
        """
        records = []
        for name, picture in _named(images):
            data = _encoded(picture)
            records.append(self._server.record(name, self._send(self._server.predict(data, top_k))))
        return records

    def models(self) -> list[dict[str, Any]]:
        """The models that are served: name, version, state and reason."""
        return self._server.content(self._send(self._server.index()))

    def ready(self) -> bool:
        """True when the server answers and its models are loaded; asks once."""
        try:
            return self._http.get(_READY).status_code == 200
        except _httpx2().TransportError:
            return False

    def _send(self, request: dict[str, Any]) -> httpx2.Response:
        attempts = _Attempts(self._server.url, self._retries)
        while True:
            try:
                response = self._http.request(**request)
            except _httpx2().TransportError as error:
                time.sleep(attempts.wait_after(error))
            else:
                if not _try_again(response):
                    return response
                time.sleep(attempts.wait_until(response))


class AsyncClient:
    """`Client` for asyncio: the same arguments and methods, awaited; images are sent together."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        model: str = "",
        version: str = "",
        api_key: str = "",
        timeout_s: float = 60.0,
        retries: int = 8,
    ) -> None:
        self._server = _Server(url, model, version)
        self._retries = retries
        self._http: httpx2.AsyncClient = _httpx2().AsyncClient(**_settings(url, api_key, timeout_s))
        self._room = asyncio.Semaphore(AT_ONCE)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def predict(self, images: Picture | Iterable[Picture], *, top_k: int = 5) -> list[dict[str, Any]]:
        """As `Client.predict`; at most `AT_ONCE` images are on their way."""
        return list(await asyncio.gather(*(self._predict(*pair, top_k) for pair in _named(images))))

    async def _predict(self, name: str, picture: Picture, top_k: int) -> dict[str, Any]:
        async with self._room:
            data = await asyncio.to_thread(_encoded, picture)
            return self._server.record(name, await self._send(self._server.predict(data, top_k)))

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return self._server.content(await self._send(self._server.index()))

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            return (await self._http.get(_READY)).status_code == 200
        except _httpx2().TransportError:
            return False

    async def _send(self, request: dict[str, Any]) -> httpx2.Response:
        attempts = _Attempts(self._server.url, self._retries)
        while True:
            try:
                response = await self._http.request(**request)
            except _httpx2().TransportError as error:
                await asyncio.sleep(attempts.wait_after(error))
            else:
                if not _try_again(response):
                    return response
                await asyncio.sleep(attempts.wait_until(response))


_READY = "/v2/health/ready"


class _Server:
    """Requests to a server, as keywords of httpx's `request`, and what its answers mean."""

    def __init__(self, url: str, model: str, version: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"url: {url!r} is no address of a server; give one such as http://127.0.0.1:8000")
        self.url = url
        self.place = {name: value for name, value in (("model", model), ("version", version)) if value}

    def predict(self, data: bytes, top_k: int) -> dict[str, Any]:
        headers = {"content-type": "application/octet-stream"}
        params = {"top_k": top_k, **self.place}
        return {"method": "POST", "url": "/predict", "params": params, "content": data, "headers": headers}

    def index(self) -> dict[str, Any]:
        return {"method": "POST", "url": "/v2/repository/index", "json": {}}

    def record(self, name: str, response: httpx2.Response) -> dict[str, Any]:
        """The record of an image called `name`; one that the server can't read is a record too."""
        if response.status_code in (400, 413) and not self._is_about_us(response):
            return {"path": name, "error": _reason(response)}
        [record] = self.content(response)["images"]
        return record | {"path": name}

    def content(self, response: httpx2.Response) -> Any:
        """The document of an answer. Raises what the client's docstring says."""
        if response.is_success:
            return response.json()
        if response.status_code < 500:
            raise UsageError(f"{self.url}: {_reason(response)}")
        raise RunError(f"{self.url}: the server failed ({response.status_code}): {_reason(response)}")

    @staticmethod
    def _is_about_us(response: httpx2.Response) -> bool:
        """True when a 400 is about a parameter, as every image would get."""
        return "detail" in _json(response)


class _Attempts:
    """How long to wait before a request is tried again; raises `RunError` when that was often enough."""

    def __init__(self, url: str, retries: int) -> None:
        self.url = url
        self.left = retries
        self.wait_s = FIRST_WAIT_S

    def wait_after(self, error: Exception) -> float:
        """Seconds to wait after the request did not come through."""
        return self._next(0.0, f"does not answer ({str(error) or type(error).__name__}); is it running?", error)

    def wait_until(self, response: httpx2.Response) -> float:
        """Seconds to wait after the server was too busy, at least those that it asks for."""
        asked = response.headers.get("retry-after", "")
        seconds = min(float(asked), LONGEST_WAIT_S) if asked.isdecimal() else 0.0
        what = "is too busy" if response.status_code in _AGAIN else "is not reached by what stands before it"
        return self._next(seconds, f"{what} ({response.status_code}): {_reason(response)}", None)

    def _next(self, least_s: float, what: str, error: Exception | None) -> float:
        if not self.left:
            raise RunError(f"{self.url}: the server {what}") from error
        self.left -= 1
        wait_s, self.wait_s = self.wait_s, min(2 * self.wait_s, LONGEST_WAIT_S)
        return max(least_s, wait_s) * random.uniform(1.0, 1.5)  # or all who were sent away come back together


def _try_again(response: httpx2.Response) -> bool:
    """True for what may go better in a moment: a server that was busy, and a 500 that is not in the server's words but
    a proxy's, whose way to it broke."""
    return response.status_code in _AGAIN or (response.status_code == 500 and "error" not in _json(response))


def _named(images: Picture | Iterable[Picture]) -> Iterator[tuple[str, Picture]]:
    """Each image with what its record calls it: its path, or nothing."""
    single = isinstance(images, (str, bytes, Path)) or hasattr(images, "__array_interface__")
    for picture in [images] if single else images:  # type: ignore[union-attr]
        yield (str(picture) if isinstance(picture, (str, Path)) else ""), picture  # type: ignore[misc]


def _encoded(picture: Picture) -> bytes:
    """The bytes of an image's file; pixels become a PNG, which keeps them as they are."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, (str, Path)):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise UsageError(f"{picture}: can't be read: {error.strerror}") from error
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _settings(url: str, api_key: str, timeout_s: float) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": url, "headers": headers, "timeout": timeout_s}


def _json(response: httpx2.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _reason(response: httpx2.Response) -> str:
    """The server's own words, in one line."""
    document = _json(response)
    text = document.get("error") or document.get("detail") or response.text or response.reason_phrase
    return " ".join(str(text).split())[:300]


def _httpx2() -> Any:
    try:
        import httpx2
    except ImportError:
        raise UsageError("visformer.Client needs httpx2; pip install 'visformer[client]'") from None
    return httpx2
