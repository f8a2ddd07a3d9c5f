"""Run by test_tritonclient.py: `python triton_calls.py http|grpc HOST:PORT IMAGE` makes every call there is."""

import asyncio
import importlib
import queue
import sys

import numpy as np
from tritonclient.utils import InferenceServerException

PROTOCOL, URL, IMAGE = sys.argv[1:]
TRITON = importlib.import_module(f"tritonclient.{PROTOCOL}")
AIO = importlib.import_module(f"tritonclient.{PROTOCOL}.aio")
MODEL = "pets"


def refused(call, word: str) -> None:
    try:
        call()
    except InferenceServerException as error:
        assert word in str(error), error
    else:
        raise AssertionError(f"should have been refused: {word}")


def image_input(*files: bytes):
    given = TRITON.InferInput("image", [len(files), 1], "BYTES")
    given.set_data_from_numpy(np.array([[one] for one in files], dtype=object))
    return given


def about(client) -> None:
    more = {"as_json": True} if PROTOCOL == "grpc" else {}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready(MODEL, "5")
    assert client.get_server_metadata(**more)["name"] == "visformer"
    metadata = client.get_model_metadata(MODEL, **more)
    assert [one["name"] for one in metadata["inputs"]] == ["image", "images"]
    config = client.get_model_config(MODEL, "1", **more)
    config = config["config"] if PROTOCOL == "grpc" else config
    assert config["name"] == MODEL
    assert client.get_inference_statistics(MODEL, **more)["model_stats"][0]["name"] == MODEL
    index = client.get_model_repository_index(**more)
    (row,) = index["models"] if PROTOCOL == "grpc" else index
    assert (row["name"], row["version"], row["state"]) == (MODEL, "1", "READY")


def infer(client, image: bytes) -> None:
    given = image_input(image, image)
    logits = client.infer(MODEL, [given]).as_numpy("logits")
    assert logits.shape == (2, 5)
    if PROTOCOL == "http":
        ways = [
            {"request_compression_algorithm": asked, "response_compression_algorithm": answered}
            for asked in (None, "gzip", "deflate")
            for answered in (None, "gzip", "deflate")
        ]
        outputs = [TRITON.InferRequestedOutput("logits", binary_data=binary) for binary in (True, False)]
        ways += [{"outputs": [output]} for output in outputs]
    else:
        ways = [{"compression_algorithm": way} for way in (None, "gzip", "deflate")]
    for way in ways:
        np.testing.assert_array_equal(client.infer(MODEL, [given], **way).as_numpy("logits"), logits)

    wanted = [TRITON.InferRequestedOutput("probabilities", class_count=2)]
    wanted += [
        TRITON.InferRequestedOutput(name) for name in ("top_labels", "top_indices", "top_probabilities", "error")
    ]
    answer = client.infer(MODEL, [given], outputs=wanted, request_id="seven", parameters={"top_k": 2})
    best = answer.as_numpy("top_labels")[0, 0]
    assert answer.as_numpy("probabilities")[0, 0].endswith(b":" + best)
    assert answer.as_numpy("top_indices").shape == answer.as_numpy("top_probabilities").shape == (2, 2)
    assert list(answer.as_numpy("error")) == [b"", b""]
    response = answer.get_response()
    assert (response["id"] if PROTOCOL == "http" else response.id) == "seven"
    mixed = client.infer(MODEL, [image_input(image, b"bad")], outputs=[TRITON.InferRequestedOutput("error")])
    assert [bool(one) for one in mixed.as_numpy("error")] == [False, True]


def tensors(client) -> None:
    given = TRITON.InferInput("images", [3, 3, 32, 32], "FP32")
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    given.set_data_from_numpy(pixels)
    logits = client.infer(MODEL, [given]).as_numpy("logits")
    assert logits.shape == (3, 5)
    if PROTOCOL == "http":
        given.set_data_from_numpy(pixels, binary_data=False)
        np.testing.assert_allclose(client.infer(MODEL, [given]).as_numpy("logits"), logits, rtol=1e-4, atol=1e-5)


def refusals(client, image: bytes) -> None:
    refused(lambda: client.infer("none", [image_input(image)]), "no model called none")
    refused(lambda: client.infer(MODEL, [image_input(b"bad")]), "can't be read")
    refused(lambda: client.infer(MODEL, [image_input(image)], timeout=1), "no result within")
    if PROTOCOL == "grpc":
        many = image_input(*[image] * 64)  # gRPC counts in milliseconds, in which one image may be done
        refused(lambda: client.infer(MODEL, [many], client_timeout=1e-5), "DEADLINE_EXCEEDED")


def later(client, image: bytes) -> None:
    if PROTOCOL == "http":
        assert client.async_infer(MODEL, [image_input(image)]).get_result().as_numpy("logits").shape == (1, 5)
        return
    answers = queue.Queue()
    client.async_infer(MODEL, [image_input(image)], lambda result, error: answers.put((result, error)))
    assert answers.get(timeout=20)[0].as_numpy("logits").shape == (1, 5)
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(MODEL, [image_input(image)], request_id="a")
    client.async_stream_infer(MODEL, [image_input(b"bad")], request_id="b")
    assert answers.get(timeout=20)[0].as_numpy("logits").shape == (1, 5)
    assert "can't be read" in str(answers.get(timeout=20)[1])
    client.stop_stream()


def control(client, image: bytes) -> None:
    client.unload_model(MODEL)
    assert not client.is_model_ready(MODEL)
    refused(lambda: client.infer(MODEL, [image_input(image)]), "not loaded")
    client.load_model(MODEL)
    assert client.is_model_ready(MODEL)
    client.infer(MODEL, [image_input(image)])


async def asynchronous(image: bytes) -> None:
    async with AIO.InferenceServerClient(URL) as client:
        assert await client.is_server_ready()
        answers = await asyncio.gather(*(client.infer(MODEL, [image_input(image)]) for _ in range(8)))
        assert all(answer.as_numpy("logits").shape == (1, 5) for answer in answers)


def main() -> None:
    with open(IMAGE, "rb") as file:
        image = file.read()
    client = TRITON.InferenceServerClient(URL)
    about(client)
    infer(client, image)
    tensors(client)
    refusals(client, image)
    later(client, image)
    control(client, image)
    client.close()
    asyncio.run(asynchronous(image))
    print("all calls answered")


if __name__ == "__main__":
    main()
