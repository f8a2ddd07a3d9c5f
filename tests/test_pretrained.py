"""`create_model` with a checkpoint's weights, and checkpoints that are damaged or do not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.upstream import mini_architecture
from visformer import create_model, load
from visformer.checkpoint import Checkpoint, load_state, read_checkpoint, save_state, write_checkpoint
from visformer.data import Preprocessing
from visformer.errors import RunError, UsageError
from visformer.models import Visformer

NAMES = [f"class {i}" for i in range(10)]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = Visformer(mini_architecture("mindcv_mini_v2"))
    made = Checkpoint(
        "visformer_tiny_v2",
        model.config,
        NAMES,
        Preprocessing((64, 64)),
        model.state_dict(),
        {"top1": 50.0},
        {"kind": "test"},
    )
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, made)
    return path


def test_a_checkpoint_comes_back_whole(checkpoint):
    read = read_checkpoint(checkpoint)
    assert read.class_names == NAMES and read.training == {"top1": 50.0} and read.source == {"kind": "test"}
    assert read.architecture == mini_architecture("mindcv_mini_v2")
    model = load(checkpoint)
    assert model.class_names == NAMES and model.model_name == "visformer_tiny_v2" and not model.training


def test_create_model_takes_the_weights(checkpoint):
    model, loaded = create_model("visformer_tiny_v2", pretrained=checkpoint).eval(), load(checkpoint)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), loaded(images))


def test_create_model_at_another_size_and_with_another_head(checkpoint):
    model = create_model("visformer_tiny_v2", pretrained=checkpoint, image_size=96, num_classes=4).eval()
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 4)
    body = load(checkpoint).stages[0].blocks.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in model.stages[0].blocks.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    with pytest.raises(UsageError, match="holds visformer_tiny_v2, not visformer_small"):
        create_model("visformer_small", pretrained=checkpoint)


def test_a_missing_file_offers_its_neighbours(checkpoint):
    with pytest.raises(UsageError, match=r"no such file.*model\.safetensors"):
        load(checkpoint.with_name("modle.safetensors"))


def test_a_truncated_file_is_refused(checkpoint):
    for keep in (0, 7, 100, 5000):
        cut = checkpoint.with_name(f"cut{keep}.safetensors")
        cut.write_bytes(checkpoint.read_bytes()[:keep])
        with pytest.raises(UsageError, match=f"cut{keep}.safetensors"):
            load(cut)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("format_version", "9", "format version 9"),
        ("architecture", "{", "not JSON"),
        ("architecture", json.dumps({"stem_width": 8}), "lacks 'stages'"),
        ("class_names", "5", "damaged"),
        ("preprocessing", "{}", "missing"),
    ],
)
def test_damaged_metadata_is_named(checkpoint, key, value, words):
    read = read_checkpoint(checkpoint)
    path = checkpoint.with_name("damaged.safetensors")
    save_file(read.state_dict, str(path), metadata=read.metadata() | {key: value})
    with pytest.raises(UsageError, match=words) as error:
        load(path)
    assert "damaged.safetensors" in str(error.value)


def test_tensors_of_another_shape_are_named(checkpoint):
    read = read_checkpoint(checkpoint)
    read.state_dict["head.weight"] = torch.zeros(3, 3)
    path = checkpoint.with_name("shape.safetensors")
    write_checkpoint(path, read)
    with pytest.raises(UsageError, match=r"shape\.safetensors.*head\.weight"):
        load(path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RunError, match=r"evil\.pt"):
        load_state(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_state_comes_back(tmp_path):
    save_state(tmp_path / "state.pt", {"step": 3, "x": torch.arange(3)})
    state = load_state(tmp_path / "state.pt")
    assert state["step"] == 3 and torch.equal(state["x"], torch.arange(3))
