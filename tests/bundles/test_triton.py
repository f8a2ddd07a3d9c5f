"""`visformer export --format triton`: what Triton would read, held against the ONNX file beside it.

config.pbtxt is parsed as Triton parses it, with the protobuf description in tritonclient. With a `tritonserver`
at hand (the variable VISFORMER_TRITONSERVER names the program, VISFORMER_TRITON_PYTHON an interpreter with tritonclient
and onnxruntime) the repository is also loaded and asked. The wheel nvidia-pytriton has the program, with the Python
backend alone; there the same configuration is run with a model.py that calls onnxruntime, see `with_python_backend`.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from visformer import cli
from visformer.bundles import Bundle
from visformer.bundles.triton_files import MAX_BATCH, config
from visformer.verbs.export import ExportOptions

SERVER = os.environ.get("VISFORMER_TRITONSERVER", "")
PYTHON = os.environ.get("VISFORMER_TRITON_PYTHON", sys.executable)
CALLS = Path(__file__).with_name("triton_calls.py")


def say(*words) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def repository(checkpoint, tmp_path_factory) -> Path:
    """Two models: `pets` for batches, `pets_image` for an image."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    for name, more in (("pets", ()), ("pets_image", ("--input", "image"))):
        words = ("export", "--ckpt_path", checkpoint, "--format", "triton", "--output", folder, "--name", name)
        assert say(*words, *more) == 0
    return folder


@pytest.fixture(scope="module")
def model_config():
    """Triton's `ModelConfig`, from the serialized description in tritonclient. Its own module would not load beside a
    protobuf of another release, and register its names for the whole process."""
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("tritonclient is not installed")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    (serialized,) = [c.args[0].value for c in calls if getattr(c.func, "attr", "") == "AddSerializedFile"]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(serialized))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def parsed(folder: Path, model_config):
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config())


def typed(value: onnx.ValueInfoProto) -> tuple[str, str, list[int]]:
    """(name, type in Triton's words, shape with -1 for any number) of a graph's input or output."""
    tensor = value.type.tensor_type
    kind = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.UINT8: "TYPE_UINT8"}[tensor.elem_type]
    return value.name, kind, [side.dim_value if side.HasField("dim_value") else -1 for side in tensor.shape.dim]


def declared(entry, leading: list[int]) -> tuple[str, str, list[int]]:
    kind = type(entry).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[entry.data_type].name
    return entry.name, kind, [*leading, *entry.dims]


@pytest.mark.parametrize(("name", "batched"), [("pets", True), ("pets_image", False)])
def test_the_configuration_says_what_the_graph_has(name, batched, repository, model_config):
    folder = repository / name
    assert {path.name for path in folder.iterdir()} == {"config.pbtxt", "labels.txt", "1"}
    read = parsed(folder, model_config)
    assert (read.name, read.backend, read.default_model_filename) == (name, "onnxruntime", "model.onnx")
    assert read.max_batch_size == (MAX_BATCH if batched else 0)
    assert read.HasField("dynamic_batching") == batched
    graph = onnx.load(folder / "1" / "model.onnx").graph
    leading = [-1] if batched else []
    assert [declared(one, leading) for one in read.input] == [typed(one) for one in graph.input]
    (output,) = read.output
    name_and_kind, shape = declared(output, leading)[:2], declared(output, leading)[2]
    assert name_and_kind == typed(graph.output[0])[:2]
    assert shape == ([-1, 5] if batched else [1, 5])
    assert all(side in (-1, said) for side, said in zip(typed(graph.output[0])[2], shape, strict=True))
    assert (folder / output.label_filename).read_text().splitlines() == ["bird", "cat", "dog", "frog", "horse"]
    bundle = Bundle.open(folder / "1")
    assert json.loads(read.parameters["preprocessing"].string_value) == bundle.document["preprocessing"]


def test_version_one_is_a_bundle_and_the_repository_can_be_served(repository, capfd):
    assert say("validate", repository / "pets" / "1", "--self-test") == 0
    assert "self-test passed" in capfd.readouterr().out
    pytest.importorskip("fastapi")
    from visformer.serving.sources import scan

    assert {name: list(found.versions) for name, found in scan([str(repository)]).items()} == {
        "pets": [1],
        "pets_image": [1],
    }


def test_any_label_and_any_size_are_written(bundles, model_config):
    bundle = bundles("onnx", "fp32", "tensor")
    bundle.document["inputs"][0]["shape"] = ["batch", 3, "height", "width"]
    object.__setattr__(bundle, "model_name", 'a "b" \\ ü \n')
    read = text_format.Parse(config(bundle, "x"), model_config())
    assert list(read.input[0].dims) == [3, -1, -1]
    assert read.parameters["model"].string_value == 'a "b" \\ ü \n'


def test_a_model_is_replaced_only_when_that_is_asked(repository, checkpoint, tmp_path, capfd):
    folder = tmp_path / "repository"
    shutil.copytree(repository / "pets", folder / "pets")
    words = ("export", "--ckpt_path", checkpoint, "--format", "triton", "--output", folder, "--name")
    assert say(*words, "pets") == 2
    assert "pets holds a model for Triton already; --overwrite True" in capfd.readouterr().err
    (folder / "pets" / "1" / "stale").touch()
    assert say(*words, "pets", "--overwrite", "True") == 0
    assert not (folder / "pets" / "1" / "stale").exists()
    (folder / "pets" / "2").mkdir()
    assert say(*words, "pets", "--overwrite", "True") == 2
    assert "holds something that is no model for Triton" in capfd.readouterr().err
    assert say(*words, "../pets") == 2
    assert "can't name a model" in capfd.readouterr().err
    assert say(*words[:-2], folder / "pets" / "1") == 2
    assert "is no folder of models" in capfd.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["pets"]
    assert ExportOptions(format="triton").input == "tensor" and ExportOptions().input == "image"
    assert say("export", "--ckpt_path", checkpoint, "--output", tmp_path / "bundle", "--name", "pets") == 2
    assert "goes with --format triton" in capfd.readouterr().err


# ---- under Triton itself

RUNNER = """
import onnxruntime, os
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (self.given,) = self.session.get_inputs()

    def execute(self, requests):
        answers = []
        for request in requests:
            array = pb_utils.get_input_tensor_by_name(request, self.given.name).as_numpy()
            (logits,) = self.session.run(["logits"], {self.given.name: array})
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)]))
        return answers
"""


def with_python_backend(repository: Path, folder: Path) -> Path:
    """The same models with the line for the backend changed, for a tritonserver that has no other."""
    shutil.copytree(repository, folder)
    for config_file in folder.glob("*/config.pbtxt"):
        text = config_file.read_text()
        assert text.count('backend: "onnxruntime"\ndefault_model_filename: "model.onnx"\n') == 1
        text = re.sub(r'backend: "onnxruntime"\ndefault_model_filename: .*\n', 'backend: "python"\n', text)
        config_file.write_text(text)
        (config_file.parent / "1" / "model.py").write_text(RUNNER)
    return folder


def backends(folder: Path) -> Path:
    """Where Triton finds its backends. pytriton's wheel keeps the Python backend's stubs apart, one for each Python."""
    given = Path(SERVER).parent.parent / "backends"
    stub = given.with_name("python_backend_stubs") / f"{sys.version_info.major}.{sys.version_info.minor}"
    if not stub.is_dir():
        return given
    shutil.copytree(given, folder)
    shutil.copy2(stub / "triton_python_backend_stub", folder / "python")
    return folder


@contextmanager
def triton(repository: Path, backend_folder: Path):
    """A tritonserver, ready; yields the port for HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        SERVER, "--model-repository", repository, "--http-address", "127.0.0.1", "--http-port", port,
        "--allow-grpc", "false", "--allow-metrics", "false", "--disable-auto-complete-config",
        "--backend-directory", backend_folder,
    ]  # fmt: skip
    log = repository.with_name("triton.log")
    environment = {
        **os.environ,
        "PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}",  # of its python3 the Python backend runs
        "LD_LIBRARY_PATH": str(Path(SERVER).parents[3] / "nvidia_pytriton.libs"),
    }
    with open(log, "w") as file:
        process = subprocess.Popen([str(word) for word in words], stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not SERVER, reason="VISFORMER_TRITONSERVER names no program")
def test_triton_loads_it_and_gives_the_logits(repository, tmp_path, model):
    has_onnx = (Path(SERVER).parent.parent / "backends" / "onnxruntime").is_dir()
    served = (
        shutil.copytree(repository, tmp_path / "repository")
        if has_onnx
        else with_python_backend(repository, tmp_path / "repository")
    )
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "given.npz",
        images=rng.normal(size=(3, 3, 64, 64)).astype(np.float32),
        image=rng.integers(0, 256, (70, 90, 3), dtype=np.uint8),
    )
    with triton(served, backends(tmp_path / "backends")) as port:
        words = [PYTHON, CALLS, f"127.0.0.1:{port}", tmp_path / "given.npz", tmp_path / "got.npz"]
        subprocess.run([str(word) for word in words], check=True, timeout=120)
    given, got = np.load(tmp_path / "given.npz"), np.load(tmp_path / "got.npz")
    batch = Bundle.open(repository / "pets" / "1").engine().run(given["images"])
    image = Bundle.open(repository / "pets_image" / "1").engine().run_image(given["image"])
    np.testing.assert_allclose(got["batch"], batch, atol=1e-4)
    np.testing.assert_allclose(got["image"], image[None], atol=1e-4)
    labels = ["bird", "cat", "dog", "frog", "horse"]
    best = [f"{index}:{labels[index]}" for index in batch.argmax(1)]
    assert [top[0].decode().partition(":")[2] for top in got["classes"]] == best
    assert got["batches"].sum() == 32 and got["batches"].max() > 1, "single requests were put together"
