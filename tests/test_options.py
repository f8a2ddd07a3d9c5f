"""Options from YAML, command line and keywords: what is accepted, what wins, and what each mistake says."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visformer.config import TrainConfig, option
from visformer.errors import UsageError
from visformer.option_types import convert, expected
from visformer.options import from_keywords, parse, to_yaml


@dataclass
class LabelOptions:
    """A verb's options, as other verbs than train have them."""

    inputs: list[str] = option([], "image files", positional=True, alias="image_path")
    ckpt_path: str = option("", "checkpoint")
    batch_size: int = option(64, "images at once")
    top_k: int = option(5, "classes to print")
    json: bool = option(False, "print JSON")
    sizes: list[int] = option([], "sizes to try")


@dataclass
class CopyOptions:
    source: str = option("", "from", positional=True)
    target: str = option("", "to", positional=True)


def train(*argv: str) -> TrainConfig:
    return parse(TrainConfig, argv, prog="visformer train")


def label(*argv: str) -> LabelOptions:
    return parse(LabelOptions, argv, prog="visformer label")


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- what wins


def test_nothing_given_is_the_defaults():
    assert train() == TrainConfig()


def test_the_file_wins_over_defaults_and_the_command_line_over_the_file(tmp_path):
    file = write(tmp_path, "lr: 5e-4\nbatch_size: 32\n")
    config = train("--batch_size", "16", "-c", file, "--epoch_size=7")
    assert (config.lr, config.batch_size, config.epoch_size, config.seed) == (5e-4, 16, 7, 42)


def test_the_last_of_a_repeated_flag_counts():
    assert train("--lr", "1", "--lr", "2").lr == 2


@pytest.mark.parametrize("flag", [["-c"], ["--config"]])
def test_recipe_by_name(flag):
    assert train(*flag, "visformer_small").model == "visformer_small"
    assert train(f"{flag[0]}=visformer_small").model == "visformer_small"


# ---- MindCV's files

MINDCV = """\
# system
mode: 0
distribute: True
num_parallel_workers: 8
val_while_train: True

dataset: 'imagenet'
data_dir: '/path/to/imagenet'
num_samples: null
drop_remainder: true

scale: [0.08, 1]
ratio: [0.75, 1.333]
interpolation: BICUBIC
color_jitter: 0.4
auto_augment: 'randaug-m7-mstd0.5'
re_value: random
mixup: 0.8

num_classes: 1000
drop_path_rate: None
pretrained: False
ckpt_path:
dataset_sink_mode: True
amp_level: 'O3'
lr: 5e-4
min_lr: 1e-3
eps: 1.0e-8
weight_decay: .05
warmup_factor: 0
loss_scale: 1024
multi_step_decay_milestones: [30, 60, 90]
use_nesterov: yes
"""


def test_a_mindcv_file_runs_unchanged(tmp_path):
    expected_values = {
        "distribute": True,
        "data_dir": "/path/to/imagenet",
        "num_samples": None,
        "scale": (0.08, 1.0),
        "interpolation": "bicubic",
        "auto_augment": "randaug-m7-mstd0.5",
        "re_value": "random",
        "drop_path_rate": None,
        "pretrained": False,
        "ckpt_path": "",
        "lr": 5e-4,
        "min_lr": 1e-3,
        "eps": 1e-8,
        "weight_decay": 0.05,
        "warmup_factor": 0.0,
        "loss_scale": 1024.0,
        "use_nesterov": True,
    }
    config = train("-c", write(tmp_path, MINDCV))
    found = {name: getattr(config, name) for name in expected_values}
    assert found == expected_values
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in expected_values.items()}


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_gives_nothing(tmp_path, text):
    assert train("-c", write(tmp_path, text)) == TrainConfig()


def test_a_byte_order_mark_is_passed_over(tmp_path):
    assert train("-c", write(tmp_path, "\ufefflr: 1\n")).lr == 1


# ---- spellings on the command line


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--data_dir", "d"], "data_dir", "d"),
        (["--data-dir=d"], "data_dir", "d"),
        (["--data-dir", "123"], "data_dir", "123"),
        (["--data_dir=a=b"], "data_dir", "a=b"),
        (["--data_dir", "-"], "data_dir", "-"),
        (["--model=--odd"], "model", "--odd"),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--lr", ".5"], "lr", 0.5),
        (["--ema"], "ema", True),
        (["--ema", "--lr", "1"], "ema", True),
        (["--ema", "True"], "ema", True),
        (["--ema", "1"], "ema", True),
        (["--ema=YES"], "ema", True),
        (["--shuffle", "False"], "shuffle", False),
        (["--shuffle", "0"], "shuffle", False),
        (["--shuffle=no"], "shuffle", False),
        (["--distribute", "False"], "distribute", False),
        (["--distribute", "None"], "distribute", None),
        (["--distribute"], "distribute", True),
        (["--pretrained"], "pretrained", True),
        (["--pretrained", "False"], "pretrained", False),
        (["--pretrained", "best.safetensors"], "pretrained", "best.safetensors"),
        (["--scale", "0.08", "1"], "scale", (0.08, 1.0)),
        (["--scale", "0.08,1"], "scale", (0.08, 1.0)),
        (["--scale", "[0.08, 1]"], "scale", (0.08, 1.0)),
        (["--scale=(0.08, 1)"], "scale", (0.08, 1.0)),
        (["--image_resize", "224"], "image_resize", 224),
        (["--image_resize", "224", "192"], "image_resize", (224, 192)),
        (["--image_resize", "224,192"], "image_resize", (224, 192)),
        (["--multi_step_decay_milestones", "30"], "multi_step_decay_milestones", [30]),
        (["--multi_step_decay_milestones", "[]"], "multi_step_decay_milestones", []),
        (["--mean", "127.5", "--std", "60"], "mean", (127.5,)),
        (["--num_classes", "null"], "num_classes", None),
        (["--auto_augment", "none"], "auto_augment", "none"),
        (["--re_value", "12"], "re_value", 12),
        (["--re_value", "channel"], "re_value", "channel"),
        (["--interpolation", "Bicubic"], "interpolation", "bicubic"),
        (["--loss", "ce"], "loss", "CE"),
        (["--device_target", "CPU"], "device_target", "CPU"),
        (["--device_target", "cpu"], "device_target", "cpu"),
    ],
)
def test_spellings(argv, name, value):
    found = getattr(train(*argv), name)
    assert found == value
    assert type(found) is type(value)


# ---- positional words, aliases, and the options of other verbs


def test_bare_words_fill_a_list():
    options = label("a.jpg", "--json", "b.jpg", "--top_k", "3", "--image_path", "c.jpg", "--", "--odd.jpg")
    assert options == LabelOptions(inputs=["a.jpg", "b.jpg", "c.jpg", "--odd.jpg"], json=True, top_k=3)


def test_a_comma_in_a_file_name_stays():
    assert label("a,b.jpg").inputs == ["a,b.jpg"]


def test_standard_input_is_a_bare_word():
    assert label("-").inputs == ["-"]


def test_bare_words_fill_single_options_in_order():
    assert parse(CopyOptions, ["a", "b"], prog="x") == CopyOptions("a", "b")
    with pytest.raises(UsageError, match=r"^c: not expected here; x takes its options as --name value"):
        parse(CopyOptions, ["a", "b", "c"], prog="x")


def test_a_training_recipe_serves_every_verb(tmp_path):
    file = write(tmp_path, "lr: 5e-4\nbatch_size: 128\nckpt_path: ''\n")
    assert label("-c", file, "--ckpt_path", "x") == LabelOptions(batch_size=128, ckpt_path="x")


def test_a_key_unknown_to_both_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"^batch_sise: no such option \(.*line 2\); did you mean batch_size"):
        label("-c", write(tmp_path, "lr: 1\nbatch_sise: 3\n"))


def test_a_training_flag_elsewhere_says_where_it_belongs():
    with pytest.raises(UsageError, match=r"^--lr: an option of visformer train, not of visformer label"):
        label("--lr", "1")


# ---- mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "abc"], "lr: 'abc' is not a number"),
        (["--lr", "nan"], "lr: 'nan' is not a number"),
        (["--lr", ""], "lr: '' is not a number"),
        (["--epoch_size", "1.5"], "epoch_size: '1.5' is not a whole number"),
        (["--epoch_size", "9" * 5000], f"epoch_size: '{'9' * 56}... is not a whole number"),
        (["--ema=maybe"], "ema: 'maybe' is not True or False"),
        (["--opt", "adamx"], "opt: 'adamx' is not one of sgd, momentum, .*; did you mean .*adamw"),
        (["--scale", "1,2,3"], "scale: '1,2,3' is not two numbers such as 1,2"),
        (["--num_classes", "ten"], "num_classes: 'ten' is not a whole number or None"),
        (
            ["--multi_step_decay_milestones", "a"],
            "multi_step_decay_milestones: 'a' is not a list of whole numbers such as 1,2",
        ),
        (["--dta_dir", "x"], "--dta_dir: no such option of visformer train; did you mean --data_dir"),
        (["--dta-dir=x"], "--dta-dir: no such option of visformer train; did you mean --data_dir"),
        (["--xylophone_q"], "--xylophone_q: no such option of visformer train; see visformer train --help"),
        (["-x"], "-x: no such option of visformer train; see visformer train --help"),
        (["--data_dir"], r"--data_dir: needs a value \(text\)"),
        (["--lr", "--ema"], r"--lr: needs a value \(a number\)"),
        (["-c"], r"-c: needs a value \(text\)"),
        (["photos"], "photos: not expected here; visformer train takes its options as --name value"),
        (["--ema", "maybe"], "maybe: not expected here"),
        (["--batch_size", "0"], "batch_size: 0 is out of range; it must be at least 1"),
        (
            ["-c", "visformer_tny"],
            "visformer_tny: no such config file or recipe; recipes are visformer_small, .*; did you mean",
        ),
        (["-c", "."], r"\.: no such config file or recipe"),
        (
            ["-c", "visformer_tiny", "--config", "b.yaml"],
            "--config b.yaml: a second config; visformer_tiny is given already",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(argv, message):
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        train(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nlearning_rte: 2\n", r"learning_rte: no such option \(FILE, line 2\)"),
        ("warmup_epoch: 2\n", r"warmup_epoch: no such option \(FILE, line 1\); did you mean warmup_epochs"),
        ("seed: 1\n\nlr: abc\n", r"lr: 'abc' is not a number \(FILE, line 3\)"),
        ("lr: True\n", r"lr: True is not a number \(FILE, line 1\)"),
        ("lr:\n", r"lr: None is not a number \(FILE, line 1\)"),
        ("model: 12\n", r"model: 12 is not text \(FILE, line 1\); put it in quotes"),
        ("scale: 0.5\n", r"scale: 0.5 is not two numbers such as 1,2 \(FILE, line 1\)"),
        ("lr: {peak: 1}\n", r"lr: \{'peak': 1\} is not a number \(FILE, line 1\)"),
        ("lr: -1\n", r"lr: -1.0 is out of range; it must be at least 0 \(FILE, line 1\)"),
        ("lr: 1\nlr: 2\n", r"lr: given twice \(FILE, line 1, and line 2\)"),
        ("lr: 1\n  batch_size: [\n", r"FILE, line 2: not valid YAML: "),
        ("lr: !!python/object:os.system x\n", r"FILE, line 1: not valid YAML: "),
        ("model: 2020-13-45\n", r"FILE: not valid YAML: "),
        ("- lr\n- seed\n", r"FILE: holds no options; each line must be a name and a value"),
        ("just words\n", r"FILE: holds no options"),
        ("[a]: 1\n", r"\[.*\]: no such option \(FILE, line 1\)"),
        ("\x00", r"FILE: not valid YAML: "),
    ],
)
def test_a_mistake_in_a_file_names_file_and_line(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(UsageError, match="^" + message.replace("FILE", file)) as caught:
        train("-c", file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match=r"model.yaml: cannot be read as a YAML file"):
        train("-c", str(tmp_path / "model.yaml"))


# ---- Python keywords


def test_keywords_are_checked_like_flags(tmp_path):
    config = from_keywords(TrainConfig, {"data_dir": tmp_path, "scale": [0.5, 1], "lr": 1}, config="visformer_tiny")
    assert (config.data_dir, config.scale, config.lr, config.re_prob) == (str(tmp_path), (0.5, 1.0), 1.0, 0.25)
    with pytest.raises(UsageError, match=r"^epochs: no such option$|^epochs: no such option; did you mean"):
        from_keywords(TrainConfig, {"epochs": 3})
    with pytest.raises(UsageError, match=r"^lr: 'x' is not a number$"):
        from_keywords(TrainConfig, {"lr": "x"})


# ---- the record of a run

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
TRAIN_CONFIGS = st.builds(
    TrainConfig,
    lr=st.floats(0, 1e3),
    eps=st.floats(0, 1),
    min_lr=st.floats(0, 1e-3),
    data_dir=NAMES,
    model=NAMES,
    ema=st.booleans(),
    distribute=st.none() | st.booleans(),
    num_classes=st.none() | st.integers(1, 10**9),
    image_resize=st.integers(32, 4096) | st.tuples(st.integers(32, 4096), st.integers(32, 4096)),
    scale=st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)),
    mean=st.lists(st.floats(0, 255), min_size=1, max_size=4).map(tuple),
    re_value=st.integers(0, 255) | st.sampled_from(["channel", "random"]),
    pretrained=st.booleans() | st.sampled_from(["best.safetensors", "hf-hub:owner/name", "C:\\x: y"]),
    auto_augment=st.none() | st.sampled_from(["autoaug", "randaug-m9-mstd0.5-inc1", "none", "3a"]),
    drop_rate=st.none() | st.floats(0, 0.9),
    multi_step_decay_milestones=st.lists(st.integers(0, 10**6)),
    opt=st.sampled_from(["adamw", "sgd"]),
)


@given(TRAIN_CONFIGS)
@settings(max_examples=25, deadline=None)
def test_the_record_reads_back_to_the_same_options(tmp_path_factory, config):
    file = write(tmp_path_factory.mktemp("run"), to_yaml(config), "config.yaml")
    assert train("-c", file) == config


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\n", "\r", "\t", "\ufeff", "\x7f", "\0"])
def test_breaks_and_marks_in_a_name_come_back(tmp_path, mark):
    config = TrainConfig(data_dir=mark, model=f"a{mark}b", mean=(1.0,), auto_augment=f" {mark}{mark} ")
    assert train("-c", write(tmp_path, to_yaml(config), "config.yaml")) == config


def test_the_record_has_every_option_in_sections():
    text = to_yaml(TrainConfig())
    assert text.startswith("# system\nmode: 0\n")
    for field in dataclasses.fields(TrainConfig):
        assert f"\n{field.name}:" in text
    assert "\nscale: [0.08, 1.0]\n" in text


# ---- whatever is typed or written, the answer is options or one line

WORDS = st.sampled_from([f"--{f.name}" for f in dataclasses.fields(TrainConfig)]) | NAMES | st.floats().map(str)


@given(st.lists(WORDS, max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_words_give_options_or_a_usage_error(words):
    try:
        assert isinstance(train(*[w for w in words if w not in ("-h", "--help")]), TrainConfig)
    except UsageError as error:
        assert str(error)


YAML_LINES = st.builds("{}: {}".format, st.sampled_from([f.name for f in dataclasses.fields(TrainConfig)]), NAMES)


@given(st.lists(YAML_LINES | NAMES, max_size=5).map("\n".join))
@settings(max_examples=100, deadline=None)
def test_any_file_gives_options_or_a_usage_error(tmp_path_factory, text):
    file = write(tmp_path_factory.mktemp("any"), text)
    try:
        assert isinstance(train("-c", file), TrainConfig)
    except UsageError as error:
        assert str(error)


# ---- types in words


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (float | None, "a number or None"),
        (Literal["", "auto"], "one of '', auto"),
        (int | tuple[int, int], "a whole number or two whole numbers such as 1,2"),
        (list[str], "a list of texts such as a,b"),
        (tuple[float, ...], "a list of numbers such as 1,2"),
        (bool | str, "True or False or text"),
    ],
)
def test_types_in_words(hint, words):
    assert expected(hint) == words


def test_infinity_is_no_number():
    with pytest.raises(ValueError, match="not finite"):
        convert(float("inf"), float)
