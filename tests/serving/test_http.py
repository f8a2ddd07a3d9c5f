"""What clients see over HTTP, without a port: answers, refusals, and the end of work that nobody wants any more."""

import asyncio
import gzip
import json
import re

import numpy as np
import pytest
from httpx2 import AsyncClient

from tests.serving.fakes import LABELS, ask, enormous_picture, picture
from visformer.serving.app import make_app

INFER = "/v2/models/pets/infer"


def infer_body(images: list[bytes], **more) -> tuple[bytes, dict[str, str]]:
    """An infer request with binary data, and its headers."""
    raw = b"".join(len(one).to_bytes(4, "little") + one for one in images)
    entry = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(images)],
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [entry], **more}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


async def infer(client: AsyncClient, images: list[bytes], **more):
    body, headers = infer_body(images, **more)
    return await client.post(INFER, content=body, headers=headers)


async def until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")


@pytest.mark.parametrize(
    ("plain", "described"),
    [("", "?version="), ("?model=pets", "?version=&model=pets"), ("?top_k=2&model=pets", "?model=pets&top_k=2")],
)
def test_the_shortcut_answers_as_the_route_does(serving, plain, described):
    async def main():
        async with serving() as (client, service):
            answers = [await client.post(f"/predict{query}", content=picture(51)) for query in (plain, described)]
            refusals = [await client.post(f"/predict{query}", content=b"none") for query in (plain, described)]
            return answers, refusals, service.metrics.text().decode()

    (one, other), (no, neither), counted = asyncio.run(main())
    assert one.status_code == 200 and one.json() == other.json() and set(one.headers) == set(other.headers)
    assert no.status_code == 400 and no.json() == neither.json() and set(no.headers) == set(neither.headers)
    labels = 'endpoint="/predict",model="pets",status="{}",version="1"'
    assert all(f"visformer_requests_total{{{labels.format(status)}}} 2.0" in counted for status in (200, 400))


@pytest.mark.parametrize(
    ("query", "named"),
    [("top_k=0", "top_k"), ("top_k=x", "top_k"), ("model=pets&top_k=100001", "top_k"), ("timeout_s=-1", "timeout_s")],
)
def test_what_is_wrong_with_a_query_is_said(serving, query, named):
    async def main():
        async with serving() as (client, _):
            return await client.post(f"/predict?{query}", content=picture())

    answer = asyncio.run(main())
    assert answer.status_code == 400 and named in answer.json()["error"]


def test_predict_takes_a_body_or_a_form(serving):
    async def main():
        async with serving() as (client, _):
            one = await client.post("/predict?top_k=2", content=picture(51))
            files = [("image", ("a.png", picture(0))), ("image", ("b.png", b"nothing")), ("image", ("", picture(255)))]
            return one, await client.post("/predict", files=files)

    one, several = asyncio.run(main())
    (image,) = one.json()["images"]
    assert [record["label"] for record in image["predictions"]] == ["dog", "cat"]
    chances = np.exp([0.2, 1.2, 2.2]) / np.exp([0.2, 1.2, 2.2]).sum()
    assert [record["probability"] for record in image["predictions"]] == pytest.approx(chances[[2, 1]])
    assert (one.json()["model"], one.json()["version"]) == ("pets", "1")
    good, bad, unnamed = several.json()["images"]
    assert several.status_code == 200
    assert (good["path"], len(good["predictions"]), unnamed["path"]) == ("a.png", len(LABELS), "image")
    assert bad == {"path": "b.png", "error": "the image can't be read: not an image in a format that can be read"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b"GIF89a", "can't be read"),
        (picture()[:40], "cut short|damaged|format that can be read"),
        (enormous_picture(), "more pixels than the 25,000,000 allowed"),
        (enormous_picture(6_000), "more pixels than the 25,000,000 allowed"),
    ],
    ids=["empty", "header", "cut", "gigapixel", "large"],
)
def test_a_bad_image_is_the_clients_fault(serving, body, reason):
    async def main():
        async with serving() as (client, _):
            return await client.post("/predict", content=body)

    answer = asyncio.run(main())
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert re.search(reason, answer.json()["error"])


def test_one_bad_image_fails_alone_while_others_share_its_batch(serving, fake):
    async def main():
        async with serving() as (client, _):
            fake.open.clear()
            fake.sizes.clear()
            bodies = [picture(level) if level != 3 else b"broken" for level in range(6)]
            asked = [asyncio.ensure_future(client.post("/predict", content=body)) for body in bodies]
            await until(lambda: asked[3].done() and fake.computing.is_set())
            await asyncio.sleep(0.05)
            fake.open.set()
            return await asyncio.gather(*asked)

    answers = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [200, 200, 200, 400, 200, 200]
    assert fake.sizes == [1, 4]


def test_infer_with_raw_tensors_and_with_json(serving):
    async def main():
        async with serving() as (client, _):
            raw = await infer(client, [picture(0), picture(255)], id="seven", parameters={"binary_data_output": True})
            pixels = np.full((1, 3, 8, 8), 0.5, dtype=np.float32)
            entry = {"name": "images", "datatype": "FP32", "shape": list(pixels.shape), "data": pixels.tolist()}
            return raw, await client.post(INFER, json={"inputs": [entry], "outputs": [{"name": "logits"}]})

    raw, plain = asyncio.run(main())
    length = int(raw.headers["inference-header-content-length"])
    head = json.loads(raw.content[:length])
    assert (head["id"], head["model_name"], head["model_version"]) == ("seven", "pets", "1")
    assert [(one["name"], one["shape"]) for one in head["outputs"]] == [("logits", [2, 3]), ("probabilities", [2, 3])]
    numbers = np.frombuffer(raw.content[length:], dtype="<f4").reshape(2, 2, 3)
    assert numbers[0] == pytest.approx(np.array([[0, 1, 2], [1, 2, 3]]))
    assert numbers[1].sum(axis=1) == pytest.approx(1)
    (logits,) = plain.json()["outputs"]
    assert (logits["shape"], logits["data"]) == ([1, 3], [0.5, 1.5, 2.5])


def test_top_k_and_classification_and_a_list_of_errors(serving):
    wanted = [
        {"name": "logits", "parameters": {"classification": 2}},
        {"name": "top_labels"},
        {"name": "top_indices", "parameters": {"top_k": 1}},
        {"name": "error"},
    ]

    async def main():
        async with serving() as (client, _):
            mixed = await infer(client, [picture(), b"bad"], outputs=wanted, parameters={"top_k": 2})
            return mixed, await infer(client, [picture(), b"bad"])

    mixed, refused = asyncio.run(main())
    tensors = {one["name"]: (one["shape"], one["data"]) for one in mixed.json()["outputs"]}
    assert tensors["logits"] == ([2, 2], ["2.000000:2:dog", "1.000000:1:cat", "", ""])
    assert tensors["top_labels"] == ([2, 2], ["dog", "cat", "", ""])
    assert tensors["top_indices"] == ([2, 1], [2, 0])
    assert tensors["error"][1] == ["", "the image can't be read: not an image in a format that can be read"]
    assert refused.status_code == 400
    assert refused.json()["error"].startswith("image[1]: the image can't be read")


def test_compressed_bodies_and_answers(serving):
    async def main():
        async with serving(max_bytes=100_000) as (client, _):
            body, headers = infer_body([picture()] * 50)
            zipped = await client.post(
                INFER, content=gzip.compress(body), headers={**headers, "Content-Encoding": "gzip"}
            )
            bomb = gzip.compress(bytes(10_000_000))
            answers = [
                await client.post(INFER, content=content, headers={"Content-Encoding": "gzip"})
                for content in (bomb, gzip.compress(body)[:-9], b"not gzip")
            ]
            return zipped, [answer.status_code for answer in answers]

    zipped, statuses = asyncio.run(main())
    assert zipped.status_code == 200
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.json()["outputs"][0]["shape"] == [50, 3]
    assert statuses == [413, 400, 400]


def test_a_full_house_says_when_to_come_again(serving, fake):
    async def main():
        async with serving(max_in_flight=2) as (client, service):
            fake.open.clear()
            asked = [asyncio.ensure_future(client.post("/predict", content=picture())) for _ in range(2)]
            await until(lambda: service.door.in_flight == 2)
            refused = await client.post("/predict", content=picture())
            fake.open.set()
            answers = await asyncio.gather(*asked)
            return refused, answers, await client.post("/predict", content=picture()), service.door

    refused, answers, afterwards, door = asyncio.run(main())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert [answer.status_code for answer in [*answers, afterwards]] == [200, 200, 200]
    assert (door.in_flight, door.bytes_held) == (0, 0)


@pytest.mark.parametrize("way", ["predict", "infer"])
def test_a_deadline_is_kept_and_frees_the_place(serving, fake, way):
    async def main():
        async with serving() as (client, service):
            fake.open.clear()
            fake.sizes.clear()
            if way == "predict":
                late = await client.post("/predict?timeout_s=0.05", content=picture())
                again = await client.post("/predict?timeout_s=0.05", content=picture())
            else:
                late = await infer(client, [picture()], parameters={"timeout": 50_000})
                again = await infer(client, [picture()], parameters={"timeout": 50_000})
            in_flight = service.door.in_flight
            fake.open.set()
            await client.post("/predict", content=picture())
            return late, again, in_flight

    late, again, in_flight = asyncio.run(main())
    assert (late.status_code, late.headers["retry-after"]) == (503, "1")
    assert "no result within 0.05 s" in late.json()["error"]
    assert in_flight == 0
    assert again.status_code == 503
    assert sum(fake.sizes) == 2  # the first was under way; the second was given up before a batch took it


def test_a_client_that_leaves_costs_nothing_more(serving, fake):
    async def main():
        async with serving() as (client, service):
            fake.open.clear()
            fake.sizes.clear()
            first = asyncio.ensure_future(client.post("/predict", content=picture()))
            await until(fake.computing.is_set)
            leave = asyncio.Event()

            async def gone():
                await leave.wait()
                return {"type": "http.disconnect"}

            message = {"type": "http.request", "body": picture(), "more_body": False}
            second = asyncio.ensure_future(ask(make_app(service), {"path": "/predict"}, [message], gone))
            (model,) = service.repository.models()
            await until(lambda: model.batcher.waiting == 1)
            leave.set()
            await second
            in_flight = service.door.in_flight
            fake.open.set()
            await first
            return in_flight, (await client.get("/metrics")).text

    in_flight, metrics = asyncio.run(main())
    assert in_flight == 1
    assert fake.sizes == [1]
    assert 'visformer_rejected_total{reason="gone"} 1.0' in metrics


def test_bodies_that_are_too_large_too_slow_or_cut_off(serving):
    async def main():
        async with serving(max_bytes=1000, body_timeout_s=0.05) as (client, service):
            large = await client.post("/predict", content=bytes(1001))

            async def pieces():
                for _ in range(3):
                    yield bytes(500)

            chunked = await client.post("/predict", content=pieces())
            app = make_app(service)

            async def never():
                await asyncio.Event().wait()

            async def gone():
                return {"type": "http.disconnect"}

            begin = {"type": "http.request", "body": b"x", "more_body": True}
            slow = await ask(app, {"path": "/predict"}, [begin], never)
            await ask(app, {"path": "/predict"}, [begin], gone)
            return large, chunked, slow, service.door

    large, chunked, slow, door = asyncio.run(main())
    for answer in (large, chunked):
        assert answer.status_code == 413
        assert answer.json() == {"error": "the body is larger than 1,000 bytes"}
    assert slow[0]["status"] == 408
    assert (door.in_flight, door.bytes_held) == (0, 0)


def test_errors_are_json_and_tell_no_secrets(serving, fake, capsys):
    async def main():
        async with serving() as (client, _):
            fake.fail = ValueError("secret in /home/somebody")
            fault = await client.post("/predict", content=picture(), headers={"X-Request-Id": "mine"})
            return [
                fault,
                await client.get("/v2/nothing"),
                await client.get("/predict"),
                await client.get("/v2/models/none"),
                await client.get("/v2/models/pets/versions/7"),
                await client.post("/predict?top_k=many", content=picture()),
                await client.post(INFER, content=b"[" * 100_000),
                await client.post(INFER, content=b'{"inputs": 1e999}'),
            ]

    answers = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [500, 404, 405, 404, 404, 400, 400, 400]
    for answer in answers:
        assert list(answer.json()) == ["error"]
        assert "/home" not in answer.text
        assert answer.headers["x-request-id"]
    assert answers[0].json()["error"].endswith("request id mine")
    fault = next(json.loads(line) for line in capsys.readouterr().err.splitlines() if "fault" in line)
    assert "secret in /home/somebody" in fault["trace"]


def test_metadata_configuration_and_statistics(serving):
    async def main():
        async with serving() as (client, _):
            await infer(client, [picture(), picture()])
            await client.post("/predict", content=b"bad")
            paths = ["/v2", "/v2/models/pets", "/v2/models/pets/versions/1/config", "/v2/models/stats"]
            return [(await client.get(path)).json() for path in paths]

    server, model, config, statistics = asyncio.run(main())
    assert server["name"] == "visformer"
    assert "binary_tensor_data" in server["extensions"]
    assert model["versions"] == ["1"]
    assert {one["name"]: one["shape"] for one in model["inputs"]} == {"image": [-1, 1], "images": [-1, 3, 8, 8]}
    assert config["parameters"]["labels"]["string_value"].split("\n") == LABELS
    (counted,) = statistics["model_stats"]
    assert (counted["inference_count"], counted["inference_stats"]["success"]["count"]) == (2, 1)
    assert counted["inference_stats"]["fail"]["count"] == 1
    assert counted["inference_stats"]["compute_infer"]["ns"] > 0
    assert sum(one["batch_size"] * one["compute_infer"]["count"] for one in counted["batch_stats"]) == 2
