"""What runs a bundle: one interface, whoever computes; `checkpoint_engine.py` has it for a checkpoint.

`run` takes a preprocessed batch and `run_image` one decoded image; both give logits. They may be called from several
threads at once. An engine is imported when it is opened; only that of AOTInductor needs torch.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from visformer.errors import RunError, UsageError

if TYPE_CHECKING:
    from visformer.bundles.bundle import Bundle

_INSTALL = {"onnxruntime": "visformer[export]", "openvino": "visformer[export]", "torch": "visformer"}


class Engine(Protocol):
    """A model that is loaded."""

    def run(self, batch: np.ndarray) -> np.ndarray:
        """float32 (B, C, H, W), preprocessed -> logits, float32 (B, classes)"""
        ...

    def run_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, channels) of any size, RGB order -> logits, float32 (classes,)"""
        ...


def open_engine(bundle: Bundle, threads: int | None, cache_dir: Path | None) -> BundleEngine:
    """See `Bundle.engine`."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads: {threads} is out of range; it must be at least 1")
    opened = {"onnxruntime": _OnnxModels, "openvino": _OpenVinoModels, "torch": _TorchModels}[bundle.engine_name]
    return BundleEngine(bundle, opened(bundle, threads, cache_dir))


class BundleEngine:
    """The engine of a bundle. The graph for batches is loaded at once, that for images when it is first asked for."""

    def __init__(self, bundle: Bundle, models: _Models) -> None:
        self.bundle = bundle
        self._models = models
        self._lock = threading.Lock()
        self._run_batch = self._load("batch")
        self._run_one: Callable[[np.ndarray], np.ndarray] | None = None

    def run(self, batch: np.ndarray) -> np.ndarray:
        """float32 (B, C, H, W), preprocessed -> logits, float32 (B, classes). Raises `UsageError` for another shape."""
        channels = self.bundle.preprocessing.in_channels
        height, width = self.bundle.preprocessing.image_size
        fits = batch.ndim == 4 and batch.shape[1] == channels and len(batch)
        if not self.bundle.document["dynamic_image_size"]:
            fits = fits and batch.shape[2:] == (height, width)
        elif fits:
            fits = all(side > 0 and side % 32 == 0 for side in batch.shape[2:])
        if not fits or batch.dtype != np.float32:
            raise UsageError(
                f"batch: {batch.dtype} {batch.shape} does not fit; give float32 (B, {channels}, {height}, {width})"
            )
        return self._run_batch(np.ascontiguousarray(batch))

    def run_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, channels) of any size, RGB order -> logits, float32 (classes,).

        A bundle with `input` image does it in its graph; for the others it is preprocessed here.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or not image.size or image.shape[2] > 4:
            raise UsageError(
                f"image: {image.dtype} {image.shape} does not fit; give uint8 (height, width, 1 to 4 channels)"
            )
        if self.bundle.input == "tensor":
            return self._run_batch(self.bundle.preprocessing([to_picture(image)]))[0]
        with self._lock:
            self._run_one = self._run_one or self._load("image")
        return self._run_one(np.ascontiguousarray(image))[0]

    def warm(self, batch_size: int) -> None:
        """Prepare for batches of up to `batch_size`, so that the first of them is computed as quickly as any."""
        if isinstance(self._run_batch, InPieces):
            self._run_batch.warm(batch_size)

    def _load(self, which: str) -> Callable[[np.ndarray], np.ndarray]:
        try:
            return getattr(self._models, which)()
        except ImportError as error:
            package = _INSTALL[self.bundle.engine_name]
            raise UsageError(
                f"{self.bundle.path}: needs {self.bundle.engine_name} ({error}): pip install '{package}'"
            ) from None
        except Exception as error:  # each engine has its own kinds
            reason = " ".join(str(error).split())[:300]
            raise RunError(f"{self.bundle.path}: {self.bundle.engine_name} can't load the model: {reason}") from error


def to_picture(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, 1 to 4) -> a PIL image: grey, grey and alpha, RGB, RGB and alpha."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


# ---- the engines: what loads a graph and gives a function from its input to its logits


class _Models(Protocol):
    def batch(self) -> Callable[[np.ndarray], np.ndarray]: ...

    def image(self) -> Callable[[np.ndarray], np.ndarray]: ...


class _Files:
    """What every kind of bundle has: a file for the graph of its input, and one for batches."""

    def __init__(self, bundle: Bundle, threads: int | None, cache_dir: Path | None) -> None:
        self.bundle, self.threads, self.cache_dir = bundle, threads, cache_dir
        document = bundle.document
        self.model_file = str(bundle.path / document["model_file"])
        self.batch_file = str(bundle.path / (document.get("batch_file") or document["model_file"]))


class _OnnxModels(_Files):
    def batch(self) -> Callable[[np.ndarray], np.ndarray]:
        return self._session(self.batch_file)

    def image(self) -> Callable[[np.ndarray], np.ndarray]:
        return self._session(self.model_file)

    def _session(self, file: str) -> Callable[[np.ndarray], np.ndarray]:
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        return lambda array: session.run(["logits"], {given.name: array})[0]


class _OpenVinoModels(_Files):
    def batch(self) -> Callable[[np.ndarray], np.ndarray]:
        preprocessing = self.bundle.preprocessing
        shape = [preprocessing.in_channels, *preprocessing.image_size]

        def compiled(size: int) -> Callable[[np.ndarray], np.ndarray]:
            model = self._model.clone()
            if self.bundle.input == "image":
                model = _from_images(model, [size, *shape])
            elif size > 0:
                model.reshape([size, *shape])
            return self._compiled(model)

        return compiled(-1) if self.bundle.document["dynamic_image_size"] else InPieces(compiled)

    def image(self) -> Callable[[np.ndarray], np.ndarray]:
        return self._compiled(self._model)

    @functools.cached_property
    def _model(self) -> Any:
        return openvino_core().read_model(self.model_file)  # its weights stay in the file, which may be deleted

    def _compiled(self, model: Any) -> Callable[[np.ndarray], np.ndarray]:
        settings: dict[str, Any] = dict(self.bundle.document["engine_options"])
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        if self.cache_dir is not None:
            settings["CACHE_DIR"] = str(self.cache_dir)
        compiled = openvino_core().compile_model(model, "CPU", settings)
        requests = threading.local()  # a request serves one thread at a time

        def run(array: np.ndarray) -> np.ndarray:
            if not hasattr(requests, "own"):
                requests.own = compiled.create_infer_request()
            return np.array(requests.own.infer({0: array}, share_inputs=True, share_outputs=True)[0])

        return run


class InPieces:
    """Computes a batch in pieces of fixed sizes, each with a graph of its own.

    OpenVINO computes a graph whose batch is known faster than one that takes any batch: the places of its maps are
    planned, and in int8 no map changes its layout around attention. An image costs a little more in a smaller piece.

    The graph of one image is compiled at once, each of the others by `warm` or by the first thread that has a piece of
    its size; threads that come meanwhile use the graphs that are there.
    """

    SIZES = (16, 4, 1)

    def __init__(self, compiled: Callable[[int], Callable[[np.ndarray], np.ndarray]]) -> None:
        self._compiled = compiled
        self._ready = {1: compiled(1)}
        self._compiling = {size: threading.Lock() for size in self.SIZES}

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """float32 (B, C, H, W) -> logits, float32 (B, classes)"""
        logits: list[np.ndarray] = []
        while len(batch):
            size = next(size for size in self.SIZES if size <= len(batch) and self._is_ready(size))
            logits.append(self._ready[size](batch[:size]))
            batch = batch[size:]
        return np.concatenate(logits)

    def warm(self, batch_size: int) -> None:
        """Compile what batches of up to `batch_size` need."""
        for size in reversed(self.SIZES):
            if size <= batch_size:
                self._is_ready(size)

    def _is_ready(self, size: int) -> bool:
        """Compile the graph for `size` unless it is there; False while another thread does."""
        if size not in self._ready and self._compiling[size].acquire(blocking=False):
            try:
                self._ready[size] = self._ready.get(size) or self._compiled(size)
            finally:
                self._compiling[size].release()
        return size in self._ready


@functools.cache
def openvino_core() -> Any:
    """What compiles OpenVINO's models: one for the process, kept to its end.

    Each `Core` gives the thread that first compiles with it a stack for signals, and takes it back when it goes, which
    goes wrong when several go in another order than they came: then the next Ctrl-C ends the process with SIGSEGV.
    """
    return importlib.import_module("openvino").Core()


def _from_images(model: Any, shape: list[int]) -> Any:
    """The part of an OpenVINO model behind the preprocessing, whose result is named `images`."""
    ov = importlib.import_module("openvino")
    cut = next(out for node in model.get_ops() for out in node.outputs() if "images" in out.names)
    images = ov.opset13.parameter(ov.PartialShape(shape), ov.Type.f32, "images")
    for target in cut.get_target_inputs():
        target.replace_source_output(images.output(0))
    return ov.Model(model.get_results(), [images], "visformer")


class _TorchModels(_Files):
    def batch(self) -> Callable[[np.ndarray], np.ndarray]:
        return self._package(self.batch_file)

    def image(self) -> Callable[[np.ndarray], np.ndarray]:
        return self._package(self.model_file)

    def _package(self, file: str) -> Callable[[np.ndarray], np.ndarray]:
        torch = importlib.import_module("torch")
        inductor = importlib.import_module("torch._inductor")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        package = inductor.aoti_load_package(file)

        def run(array: np.ndarray) -> np.ndarray:
            # A copy, in order: an axis of one element may have any stride, by which torch takes a grey batch for
            # channels_last, and what was compiled for the other order then reads maps in the wrong one.
            with torch.no_grad():
                return package(torch.tensor(array.reshape(-1)).view(array.shape)).numpy()

        return run
