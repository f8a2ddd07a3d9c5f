"""The same protocol over gRPC, spoken with our own messages; and the messages are what their source says."""

import asyncio

import numpy as np
import pytest

from tests.serving.fakes import picture
from tests.serving.test_http import until
from visformer.errors import UsageError

grpc = pytest.importorskip("grpc")
messages = pytest.importorskip("visformer.serving.messages")
start_grpc = pytest.importorskip("visformer.serving.grpc_server").start_grpc


def images(*files: bytes, **more) -> dict:
    """The fields of an infer request."""
    entry = {"name": "image", "datatype": "BYTES", "shape": [len(files)], "contents": {"bytes_contents": files}}
    return {"model_name": "pets", "inputs": [entry], **more}


def test_every_method_answers(calling):
    async def main():
        async with calling() as (call, _):
            assert (await call("ServerLive")).live
            assert (await call("ServerReady")).ready
            assert (await call("ServerMetadata")).name == "visformer"
            assert (await call("ModelReady", name="pets", version="1")).ready
            assert not (await call("ModelReady", name="pets", version="7")).ready
            metadata = await call("ModelMetadata", name="pets")
            assert {one.name: list(one.shape) for one in metadata.inputs} == {"image": [-1, 1], "images": [-1, 3, 8, 8]}
            config = (await call("ModelConfig", name="pets")).config
            assert config.parameters["labels"].string_value == "bird\ncat\ndog"
            await call("ModelInfer", **images(picture()))
            (counted,) = (await call("ModelStatistics")).model_stats
            assert (counted.inference_count, counted.inference_stats.success.count) == (1, 1)
            await call("RepositoryModelUnload", model_name="pets")
            (row,) = (await call("RepositoryIndex")).models
            assert row.state in ("UNLOADING", "UNAVAILABLE")
            await call("RepositoryModelLoad", model_name="pets")
            assert (await call("ModelReady", name="pets")).ready

    asyncio.run(main())


def test_infer_with_contents_and_with_raw_bytes(calling):
    async def main():
        async with calling() as (call, _):
            contents = await call("ModelInfer", **images(picture(0), picture(255), id="x"))
            pixels = np.full((1, 3, 8, 8), 0.5, dtype="<f4")
            entry = {"name": "images", "datatype": "FP32", "shape": pixels.shape}
            wanted = [{"name": "logits", "parameters": {"classification": {"int64_param": 1}}}]
            raw = await call(
                "ModelInfer",
                model_name="pets",
                inputs=[entry],
                outputs=wanted,
                raw_input_contents=[pixels.tobytes()],
            )
            return contents, raw

    contents, raw = asyncio.run(main())
    assert (contents.id, contents.model_name, contents.model_version) == ("x", "pets", "1")
    logits = np.frombuffer(contents.raw_output_contents[0], "<f4").reshape(list(contents.outputs[0].shape))
    assert logits == pytest.approx(np.array([[0, 1, 2], [1, 2, 3]]))
    assert raw.outputs[0].datatype == "BYTES"
    assert raw.raw_output_contents[0][4:] == b"2.500000:2:dog"


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        (images(b"nothing"), "INVALID_ARGUMENT", "the image can't be read"),
        (images(picture()) | {"model_name": "none"}, "NOT_FOUND", "no model called none"),
        (images(picture()) | {"model_version": "9"}, "NOT_FOUND", "no version 9"),
        (images(picture(), raw_input_contents=[b"", b""]), "INVALID_ARGUMENT", "raw_input_contents: 2"),
        (images(picture(), raw_input_contents=[b"\xff\0\0\0"]), "INVALID_ARGUMENT", "longer than the bytes"),
        (images(), "INVALID_ARGUMENT", "0 images in one request"),
        (images(picture(), parameters={"timeout": {"int64_param": -1}}), "INVALID_ARGUMENT", "timeout"),
    ],
)
def test_refusals_have_codes(calling, fields, code, reason):
    async def main():
        async with calling() as (call, _):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call("ModelInfer", **fields)
            return refused.value

    refused = asyncio.run(main())
    assert refused.code().name == code
    assert reason in refused.details()


def test_full_late_cancelled_and_faulty(calling, fake, capsys):
    async def main():
        async with calling(max_in_flight=1) as (call, service):
            fake.open.clear()
            held = asyncio.ensure_future(call("ModelInfer", **images(picture())))
            await until(lambda: service.door.in_flight == 1)
            with pytest.raises(grpc.aio.AioRpcError) as full:
                await call("ModelInfer", **images(picture()))
            held.cancel()
            await until(lambda: service.door.in_flight == 0)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await call("ModelInfer", timeout=0.1, **images(picture()))
            await until(lambda: service.door.in_flight == 0)
            fake.open.set()
            fake.fail = ValueError("secret")
            with pytest.raises(grpc.aio.AioRpcError) as fault:
                await call("ModelInfer", **images(picture()))
            return full.value, late.value, fault.value

    full, late, fault = asyncio.run(main())
    assert full.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(full.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert fault.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in fault.details()
    assert "secret" in capsys.readouterr().err


def test_a_stream_answers_each_request_in_its_turn(calling):
    async def main():
        async with calling() as (call, _):
            name, request, response, _ = next(one for one in messages.methods() if one[3])
            path = f"/{messages.SERVICE}/{name}"
            stream = call.channel.stream_stream(path, request.SerializeToString, response.FromString)
            bodies = [images(picture(), id="1"), images(b"bad", id="2"), images(picture(), id="3")]
            return [answer async for answer in stream(iter([request(**body) for body in bodies]), timeout=20)]

    answers = asyncio.run(main())
    assert [answer.infer_response.id for answer in answers] == ["1", "2", "3"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]


def test_keys_are_asked_for(calling):
    import hashlib

    async def main():
        async with calling(api_keys=(hashlib.sha256(b"key").hexdigest(),)) as (call, _):
            assert (await call("ServerLive")).live
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call("ServerMetadata", metadata=(("authorization", "Bearer other"),))
            assert (await call("ServerMetadata", metadata=(("authorization", "Bearer key"),))).name
            return refused.value.code()

    assert asyncio.run(main()) is grpc.StatusCode.UNAUTHENTICATED


def test_a_server_that_stops_turns_away_before_it_hangs_up(calling):
    async def main():
        async with calling() as (call, service):
            service.door.draining = True
            assert (await call("ModelInfer", **images(picture()))).model_name == "pets"
            assert not (await call("ServerReady")).ready
            service.door.closing = True
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call("ModelInfer", **images(picture()))
            return refused.value

    refused = asyncio.run(main())
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    assert "stopping" in refused.details()


def test_a_port_that_is_taken_is_said(serving):
    import socket

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            async with serving(grpc_port=taken.getsockname()[1]) as (_, service):
                await start_grpc(service)

    with pytest.raises(UsageError, match="grpc_port: can't listen on 127"):
        asyncio.run(main())


def test_the_messages_are_those_of_the_source(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    from google.protobuf import descriptor_pb2

    folder = messages._FILE.parent
    made = tmp_path / "made.binpb"
    assert protoc.main(["", f"-I{folder}", f"--descriptor_set_out={made}", "open_inference.proto"]) == 0
    read = descriptor_pb2.FileDescriptorSet.FromString
    assert read(made.read_bytes()) == read(messages._FILE.read_bytes())
