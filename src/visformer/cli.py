"""The command `visformer`: a table from verb to module, and what happens to errors on the way out.

`visformer VERB --help` explains a verb. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. A verb's module
is imported when that verb runs, so that help and usage errors are instant: nothing here imports torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from visformer.errors import Interrupted, UsageError, VisformerError, nearest


@dataclass(frozen=True)
class Verb:
    """One line of help, example commands, and where the options dataclass is (`module:class`).

    The module `visformer.verbs.NAME` has the function NAME(options) -> result for Python, and run(options) -> exit code
    for the command line.
    """

    summary: str
    examples: tuple[str, ...]
    options: str


VERBS = {
    "models": Verb(
        "List the models: parameters, GMACs, published accuracy and its source.",
        ("visformer models", "visformer models --json"),
        "visformer.verbs.models:ModelsOptions",
    ),
    "train": Verb(
        "Train or fine-tune a model on folders of images or a named dataset.",
        (
            "visformer train --data_dir photos --model visformer_tiny --epoch_size 30",
            "visformer train -c visformer_tiny --data_dir /path/to/imagenet",
            "visformer train --data_dir photos --pretrained best.safetensors --lr 1e-4",
            "visformer train -c ckpt/config.yaml --resume auto",
        ),
        "visformer.config:TrainConfig",
    ),
    "validate": Verb(
        "Measure top-1, top-5 and the loss of a checkpoint on a labelled set.",
        (
            "visformer validate --ckpt_path ckpt/best.safetensors --data_dir photos",
            "visformer validate --ckpt_path ckpt/best.safetensors --data_dir photos --json",
            "visformer validate --ckpt_path ckpt/best.safetensors --data_dir photos --output report",
            "visformer validate bundle --self-test",
        ),
        "visformer.verbs.validate:ValidateOptions",
    ),
    "predict": Verb(
        "Label image files, folders or a list on stdin.",
        (
            "visformer predict cat.jpg --ckpt_path ckpt/best.safetensors",
            "visformer predict photos --ckpt_path ckpt/best.safetensors --format csv --output labels.csv",
            "find . -name '*.jpg' | visformer predict - --ckpt_path ckpt/best.safetensors --format json",
        ),
        "visformer.verbs.predict:PredictOptions",
    ),
    "convert": Verb(
        "Turn any published checkpoint into ours, or ours into MindCV's, the authors' or timm's.",
        (
            "visformer convert visformer_small-6c83b6db.ckpt visformer_small.safetensors",
            "visformer convert checkpoint.pth mine.safetensors --class_names names.txt",
            "visformer convert ckpt/best.safetensors best.ckpt --to mindcv",
        ),
        "visformer.verbs.convert:ConvertOptions",
    ),
    "pack": Verb(
        "Pack a dataset into a few large files, to be trained on again and again.",
        (
            "visformer pack photos packed",
            "visformer pack photos packed --format uint8 --size 256",
            "visformer pack cifar packed --dataset cifar10",
        ),
        "visformer.verbs.pack:PackOptions",
    ),
    "export": Verb(
        "Write a deployment bundle, an ONNX, OpenVINO or AOTInductor model that was checked against its checkpoint.",
        (
            "visformer export --ckpt_path ckpt/best.safetensors --output bundle",
            "visformer export --ckpt_path ckpt/best.safetensors --format openvino --input tensor --output bundle",
            "visformer export --ckpt_path ckpt/best.safetensors --precision int8 --calib_dir photos --data_dir photos "
            "--output bundle",
        ),
        "visformer.verbs.export:ExportOptions",
    ),
    "serve": Verb(
        "Answer requests over HTTP and gRPC: checkpoints and bundles, with batching and hot reload.",
        (
            "visformer serve ckpt/best.safetensors --port 8000",
            "visformer serve bundle --grpc_port 8001",
            "visformer serve models --versions all --host 0.0.0.0 --api_keys keys.txt",
        ),
        "visformer.verbs.serve:ServeOptions",
    ),
    "report": Verb(
        "Turn a run folder, or several side by side, into one self-contained HTML page.",
        ("visformer report ckpt", "visformer report runs/a runs/b --output comparison.html"),
        "visformer.verbs.report:ReportOptions",
    ),
    "bench": Verb(
        "Measure speed beside timm's own model, in one run.",
        ("visformer bench --what train", "visformer bench --what infer --json"),
        "visformer.verbs.bench:BenchOptions",
    ),
    "quickstart": Verb(
        "Go the whole way in minutes, on handwritten digits that come with the package.",
        ("visformer quickstart",),
        "visformer.verbs.quickstart:QuickstartOptions",
    ),
}

_EXAMPLES = """\
examples:
  visformer quickstart
  visformer train --data_dir photos --model visformer_tiny
  visformer predict cat.jpg --ckpt_path ckpt/best.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every foreseen failure is one line on stderr."""
    try:
        code = _dispatch(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return code
    except Interrupted as error:
        return error.exit_code if error.told else _end(str(error), error.exit_code)
    except VisformerError as error:
        return error.exit_code if error.told else _end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        return _end("interrupted", Interrupted.exit_code)
    except BrokenPipeError:
        # The reader has left, as `| head` does. Python flushes stdout again on its way out, which must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "visformer").partition(".")[0]
        if package == "visformer":
            raise
        return _end(f"error: {package} is not installed here, and this needs it; pip install {package}", 1)
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return _end(f"error: {where}{error.strerror}", 1)


def verb_function(name: str) -> Callable[..., Any]:
    """The verb as a Python function of its options as keywords, and `config=` for a YAML file or recipe."""

    def call(*, config: str | os.PathLike | None = None, **options: Any) -> Any:
        from visformer.options import from_keywords

        return getattr(_module(name), name)(from_keywords(_options_class(name), options, config=config))

    call.__name__ = call.__qualname__ = name
    call.__doc__ = (
        f"{VERBS[name].summary}\n\nTakes the options of `visformer {name} --help` as keywords, and `config` for a YAML "
        "file or recipe.\nRaises UsageError for an unknown option or a wrong value, RunError when the work fails."
    )
    return call


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        import visformer

        print(f"visformer {visformer.__version__}")
        return 0
    name, *words = argv
    if name not in VERBS:
        raise UsageError(f"{name}: no such verb; visformer --help lists them{nearest(name, VERBS)}")
    options, prog = _options_class(name), f"visformer {name}"
    if {"-h", "--help"} & set(words):
        from visformer.helptext import help_text

        print(help_text(options, prog=prog, summary=VERBS[name].summary, examples=VERBS[name].examples))
        return 0
    from visformer.options import parse

    parsed = parse(options, words, prog=prog)  # before the verb's import: a wrong option is told at once
    return _module(name).run(parsed)


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"usage: visformer VERB [options]\n\nVisformer image classifiers, from training to use.\n\nverbs:\n{verbs}\n\n"
        f"{_EXAMPLES}\nvisformer VERB --help explains a verb and its options; visformer --version prints the version."
    )


def _options_class(name: str) -> type:
    module, _, attribute = VERBS[name].options.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _module(name: str) -> Any:
    return importlib.import_module(f"visformer.verbs.{name}")


def _end(message: str, code: int) -> int:
    print(f"visformer: {' '.join(message.split())}", file=sys.stderr)
    return code
