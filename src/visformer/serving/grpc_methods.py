"""Each method of the gRPC service, under its own name: from the protocol's messages to ours, and back."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from visformer.serving import documents
from visformer.serving.door import Call
from visformer.serving.infer import answer
from visformer.serving.messages import message
from visformer.serving.model import ServedModel
from visformer.serving.refusals import Refusal, bad
from visformer.serving.request import InferRequest, Output, Tensor, check_shape, the_input, timeout_of, wanted_outputs
from visformer.serving.wire import raw_bytes, split_bytes

if TYPE_CHECKING:
    from visformer.serving.app import Service


async def ServerLive(service: Service, call: Call, request: Any) -> Any:  # noqa: N802 (the protocol's name)
    return message("ServerLiveResponse")(live=True)


async def ServerReady(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    return message("ServerReadyResponse")(ready=service.ready)


async def ServerMetadata(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    return _filled("ServerMetadataResponse", documents.server_metadata(service.release))


async def ModelReady(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    try:
        service.repository.lease(request.name, request.version)
    except Refusal as refusal:
        if refusal.status == 404 and request.name not in service.repository.names():
            raise
        return message("ModelReadyResponse")(ready=False)
    return message("ModelReadyResponse")(ready=not service.door.draining)


async def ModelMetadata(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    model = service.repository.lease(request.name, request.version)
    return _filled("ModelMetadataResponse", documents.model_metadata(model, service.repository.versions(model.name)))


async def ModelConfig(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    model = service.repository.lease(request.name, request.version)
    return _filled("ModelConfigResponse", {"config": documents.model_config(model, service.settings)})


async def ModelStatistics(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    repository = service.repository
    models = [repository.lease(request.name, request.version)] if request.name else repository.models()
    counted = [model.statistics.to_dict(model.name, model.version) for model in models]
    return _filled("ModelStatisticsResponse", {"model_stats": counted})


async def ModelInfer(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    with service.repository.lease(request.model_name, request.model_version) as model:

        async def work() -> Any:
            asked = await service.decoder.call(_asked, request)
            return await answer(service, call, model, asked, functools.partial(_written, model, request.id))

        return await service.door.work(call, work())


async def RepositoryIndex(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    return _filled("RepositoryIndexResponse", {"models": service.repository.index(request.ready)})


async def RepositoryModelLoad(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    service.check_control(request.parameters)
    await service.repository.load(request.model_name)
    return message("RepositoryModelLoadResponse")()


async def RepositoryModelUnload(service: Service, call: Call, request: Any) -> Any:  # noqa: N802
    service.check_control({})
    await service.repository.unload(request.model_name)
    return message("RepositoryModelUnloadResponse")()


def stream_answer(response: Any) -> Any:
    """An answer of `ModelInfer` as one of `ModelStreamInfer`."""
    return message("ModelStreamInferResponse")(infer_response=response)


def stream_error(request_id: str, error: str) -> Any:
    """A refusal as an answer of `ModelStreamInfer`."""
    answer = message("ModelInferResponse")(id=request_id)
    return message("ModelStreamInferResponse")(error_message=error, infer_response=answer)


def _written(model: ServedModel, request_id: str, outputs: list[Output]) -> Any:
    response = message("ModelInferResponse")(model_name=model.name, model_version=model.version, id=request_id)
    for output in outputs:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.data.shape)
        response.raw_output_contents.append(raw_bytes(output))
    return response


def _filled(name: str, document: dict[str, Any]) -> Any:
    return json_format.ParseDict(document, message(name)())


def _asked(request: Any) -> InferRequest:
    """The message in our terms. Raises `Refusal` 400."""
    parameters = _parameters(request.parameters)
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise bad(f"raw_input_contents: {len(raw)} of them, for {len(request.inputs)} inputs")
    inputs = []
    for index, entry in enumerate(request.inputs):
        if "shared_memory_region" in entry.parameters:
            raise bad("shared memory is not supported")
        if raw:
            data: Any = split_bytes(raw[index]) if entry.datatype == "BYTES" else raw[index]
        elif entry.datatype == "BYTES":
            data = list(entry.contents.bytes_contents)
        else:
            data = list(entry.contents.fp32_contents)
        inputs.append(Tensor(entry.name, entry.datatype, check_shape(entry.name[:80], list(entry.shape)), data))
    images, tensor = the_input(inputs)
    asked = [(output.name, _parameters(output.parameters)) for output in request.outputs]
    return InferRequest(request.id, images, tensor, wanted_outputs(asked, parameters), timeout_of(parameters))


def _parameters(given: Any) -> dict[str, Any]:
    return {key: getattr(value, value.WhichOneof("parameter_choice") or "string_param") for key, value in given.items()}
