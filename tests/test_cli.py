"""The command line from outside: help, exit codes, one line for each failure, and no torch before it is needed."""

import errno
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from visformer import cli
from visformer.config import TrainConfig, option
from visformer.errors import Interrupted, RunError, UsageError
from visformer.options import parse, to_yaml

ROOT = Path(__file__).parents[1]


@dataclass
class EchoOptions:
    text: str = option("hello", "what to print")
    times: int = option(1, "how often")


@pytest.fixture
def echo(monkeypatch):
    """A verb `echo` whose run can be replaced; the list collects the options that it was called with."""
    calls = []
    module = SimpleNamespace(EchoOptions=EchoOptions, run=lambda options: calls.append(options) or 0, calls=calls)
    module.echo = lambda options: options.text * options.times
    monkeypatch.setitem(sys.modules, "visformer.verbs.echo", module)
    verb = cli.Verb("Print a text.", ("visformer echo --text hi",), "visformer.verbs.echo:EchoOptions")
    monkeypatch.setitem(cli.VERBS, "echo", verb)
    return module


def run_python(*arguments: str, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False, **settings
    )


def options_class(name: str) -> type:
    module, _, attribute = cli.VERBS[name].options.partition(":")
    return getattr(pytest.importorskip(module), attribute)


# ---- help


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_every_verb(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert f"  {name} " in out
        assert verb.summary in out
    assert "examples:" in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("visformer ")


def test_the_help_of_train_shows_groups_sentences_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    first, *_ = out.split("General:")
    for example in cli.VERBS["train"].examples:
        assert example in first
    for expected in (
        "Learning rate:",
        "peak learning rate, for the recipe's global batch (default: 0.001)",
        "probability of a horizontal flip (default: 0.5)",
        "--scale A,B",
        "(default: 0.08,1.0)",
        "latest_k|top_k",
        "visformer_tiny_v2",
    ):
        assert expected in " ".join(out.split()), expected
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_has_help_and_examples_that_parse(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.yaml").write_text(to_yaml(TrainConfig()))
    cls = options_class(name)
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    for example in cli.VERBS[name].examples:
        assert f"  {example}\n" in out
        verb, *words = shlex.split(example.split("visformer ")[1])
        assert verb == name
        assert isinstance(parse(cls, words, prog=name), cls)


def test_the_help_of_a_verb_wins_over_mistakes_beside_it(echo, capsys):
    assert cli.main(["echo", "--nonsense", "--help"]) == 0
    assert "what to print (default: hello)" in capsys.readouterr().out


# ---- running a verb


def test_options_reach_the_verb_and_its_code_comes_back(echo):
    assert cli.main(["echo", "--times", "3"]) == 0
    assert echo.calls == [EchoOptions(times=3)]
    echo.run = lambda options: 1
    assert cli.main(["echo"]) == 1


def test_a_verb_as_a_python_function(echo):
    function = cli.verb_function("echo")
    assert function(text="ab", times=2) == "abab"
    assert function.__name__ == "echo"
    assert "visformer echo --help" in function.__doc__
    with pytest.raises(UsageError, match="tims: no such option; did you mean times"):
        function(tims=2)


# ---- failures


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("x: no such file"), 2, "visformer: error: x: no such file"),
        (RunError("the loss\n is not a number"), 1, "visformer: error: the loss is not a number"),
        (Interrupted("interrupted at step 3; saved"), 130, "visformer: interrupted at step 3; saved"),
        (KeyboardInterrupt(), 130, "visformer: interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/x"),
            1,
            "visformer: error: run/x: No space left on device",
        ),
        (OSError(errno.EMFILE, "Too many open files"), 1, "visformer: error: Too many open files"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(echo, capsys, error, code, line):
    def fail(options):
        raise error

    echo.run = fail
    assert cli.main(["echo"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{line}\n")


def test_a_bug_of_ours_keeps_its_traceback(echo):
    def fail(options):
        raise ZeroDivisionError

    echo.run = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["echo"])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "visformer: error: trian: no such verb; visformer --help lists them; did you mean train?\n"),
        (["--lr", "1"], "visformer: error: --lr: no such verb; visformer --help lists them\n"),
        (["train", "--epochs", "3"], "visformer: error: --epochs: no such option of visformer train; did you mean --"),
    ],
)
def test_wrong_usage_is_code_2(argv, line, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from visformer.cli import main; sys.exit(main(['train', '--help']))"
    writer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert writer.stdout and writer.stderr
    writer.stdout.close()
    with writer.stderr as stderr:
        assert stderr.read() == b""
    assert writer.wait() == 1


# ---- speed and the ways in


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], *([name, "--help"] for name in cli.VERBS), ["train", "--no_such"]]
)
def test_help_and_mistakes_load_no_torch(argv):
    if argv[0] in cli.VERBS:
        options_class(argv[0])
    code = (
        f"import sys; from visformer.cli import main; code = main({argv!r}); "
        "print([m for m in ('torch', 'timm', 'numpy', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    assert run_python("-c", code).stderr.endswith("[]\n")


def test_help_is_quick():
    def seconds() -> float:
        start = time.perf_counter()
        assert run_python("-m", "visformer", "--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.3


@pytest.mark.parametrize(
    ("script", "verb"), [("train.py", "train"), ("validate.py", "validate"), ("infer.py", "predict")]
)
def test_the_scripts_at_the_root_are_the_verbs(script, verb):
    options_class(verb)
    result = run_python(script, "--no_such_option", cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.startswith(f"visformer: error: --no_such_option: no such option of visformer {verb}")


def test_the_commands_of_the_scripts_parse():
    options = parse(
        options_class("train"),
        ["--config", "configs/visformer/visformer_tiny.yaml", "--data_dir", "D", "--distribute", "False"],
        prog="train.py",
    )
    assert (options.model, options.data_dir, options.distribute) == ("visformer_tiny", "D", False)
    options = parse(
        options_class("validate"), ["-c", "visformer_tiny", "--data_dir", "D", "--ckpt_path", "C"], prog="validate.py"
    )
    assert (options.data_dir, options.ckpt_path) == ("D", "C")
    words = ["--image_path", "I", "--model", "visformer_tiny", "--ckpt_path", "C"]
    options = parse(options_class("predict"), words, prog="infer.py")
    assert (options.inputs, options.model, options.ckpt_path) == (["I"], "visformer_tiny", "C")


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys):
    """As where bundles are served without torch."""

    def without_torch(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli, "_module", without_torch)
    assert cli.main(["predict", "cat.jpg", "--ckpt_path", "run.safetensors"]) == 1
    assert "error: torch is not installed here, and this needs it; pip install torch" in capsys.readouterr().err
