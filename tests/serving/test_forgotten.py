"""What a request brought is let go with its answer, refused or not: nothing waits for Python to look for cycles."""

import asyncio
import base64
import gc
import http.client
import json
import socket
import time
from contextlib import contextmanager, suppress

import pytest

from tests.serving.fakes import picture
from tests.serving.test_grpc import grpc, images, messages
from tests.serving.test_http import INFER, infer_body
from visformer.serving.door import Call
from visformer.serving.refusals import Refusal

CUT = picture(9)[:50]
BOUNDARY = {"content-type": "multipart/form-data; boundary=B"}


def form(*files: bytes) -> bytes:
    parts = [b'--B\r\ncontent-disposition: form-data; name="image"\r\n\r\n' + file + b"\r\n" for file in files]
    return b"".join(parts) + b"--B--\r\n"


def as_json(*files: bytes) -> bytes:
    data = [base64.b64encode(file).decode() for file in files]
    return json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}]}).encode()


REQUESTS = {
    "good": ("/predict", picture(), {}, 200),
    "good by the described route": ("/predict?version=", picture(), {}, 200),
    "cut short": ("/predict", CUT, {}, 400),
    "cut short by the described route": ("/predict?version=", CUT, {}, 400),
    "one of a form": ("/predict", form(picture(), CUT), BOUNDARY, 200),
    "all of a form": ("/predict", form(CUT, CUT), BOUNDARY, 400),
    "half a form": ("/predict", form(picture())[:-9], BOUNDARY, 400),
    "no model": ("/predict?model=none", picture(), {}, 404),
    "wrong query": ("/predict?top_k=x", picture(), {}, 400),
    "too large": ("/predict", bytes(3000), {}, 413),
    "too late": ("/predict?timeout_s=0.05", picture(), {}, 503),
    "infer in JSON": (INFER, as_json(CUT), {}, 400),
    "infer, one of two": (INFER, *infer_body([picture(), CUT]), 400),
    "not JSON": (INFER, b'{"inputs": [', {}, 400),
    "explain": ("/explain", CUT, {}, 400),
    "fault": ("/predict", picture(77), {}, 500),
}


def left() -> list[object]:
    return [one for one in gc.get_objects() if type(one) in (Refusal, Call)]


@contextmanager
def no_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def settled() -> list[object]:
    """What is left once tasks that have been cancelled are through."""
    for _ in range(100):
        if not left():
            break
        await asyncio.sleep(0.01)
    return left()


@pytest.mark.parametrize("name", REQUESTS)
def test_nothing_is_left_of_a_request_over_http(serving, fake, name, capfd):
    path, body, headers, status = REQUESTS[name]
    if name == "fault":
        fake.fail = ValueError("no one foresaw")

    async def main():
        async with serving(max_bytes=2000) as (client, _):
            await client.post("/predict", content=picture())
            with no_collection():
                if name == "too late":
                    fake.open.clear()
                answer = await client.post(path, content=body, headers=headers)
                fake.open.set()
                assert answer.status_code == status, answer.text
                del answer
                return [repr(one) for one in await settled()]

    assert asyncio.run(main()) == []


def test_nothing_is_left_of_a_request_over_grpc(calling, fake, capfd):
    async def main():
        async with calling() as (call, _):
            await call("ModelInfer", **images(picture()))
            with no_collection():
                for files in ([picture()], [CUT], [picture(), CUT]):
                    with suppress(grpc.RpcError):
                        await call("ModelInfer", **images(*files))
                stream = call.channel.stream_stream(
                    f"/{messages.SERVICE}/ModelStreamInfer",
                    messages.message("ModelInferRequest").SerializeToString,
                    messages.message("ModelStreamInferResponse").FromString,
                )
                requests = [messages.message("ModelInferRequest")(**images(file)) for file in (CUT, picture())]
                answers = [answer async for answer in stream(iter(requests))]
                assert [bool(answer.error_message) for answer in answers] == [True, False]
                fake.fail = ValueError("no one foresaw")
                with pytest.raises(grpc.RpcError) as fault:
                    await call("ModelInfer", **images(picture()))
                assert fault.value.code() is grpc.StatusCode.INTERNAL
                del fault
                return [repr(one) for one in await settled()]

    assert asyncio.run(main()) == []


def test_nothing_is_left_of_a_client_that_has_gone(listening, fake):
    """One goes in the middle of its body, one while its image waits."""

    def client(port: int) -> list[str]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/predict", picture())
        assert connection.getresponse().read()
        connection.close()
        with no_collection():
            for body, open_ in ((picture()[:40], True), (picture(), False)):
                fake.open.set() if open_ else fake.open.clear()
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(picture())}\r\n\r\n"
                    connection.sendall(head.encode() + body)
                    time.sleep(0.2)
            fake.open.set()
            deadline = time.monotonic() + 20
            while left() and time.monotonic() < deadline:
                time.sleep(0.05)
            return [repr(one) for one in left()]

    assert listening(client) == []
