"""Ours as the other projects': bit for bit there and back, with what their loaders want, or refused."""

from dataclasses import replace

import pytest
import timm
import torch

from tests import upstream
from visformer.checkpoint import Checkpoint
from visformer.conversion import read_any, resized, write_as
from visformer.conversion.foreign import read_foreign
from visformer.conversion.writing import logit_difference, relative_position_index
from visformer.data.preprocessing import Preprocessing
from visformer.errors import UsageError
from visformer.models import Visformer, architecture


def checkpoint_of(name, **changes):
    """A full model with a small head, each tensor random, as after training."""
    torch.manual_seed(1)
    model = Visformer(architecture(name, num_classes=4, **changes))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("num_batches_tracked"):
                tensor.fill_(1234)
            elif key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() <= 2:
                tensor.normal_(0, 0.1)
    size = model.config.image_size
    return Checkpoint(name, model.config, list("abcd"), Preprocessing(size), model.state_dict())


def assert_same(read, checkpoint):
    assert read.state_dict.keys() == checkpoint.state_dict.keys()
    for key, tensor in checkpoint.state_dict.items():
        assert torch.equal(read.state_dict[key], tensor) and read.state_dict[key].dtype == tensor.dtype, key


@pytest.mark.parametrize(
    "name, to, suffix, said",
    [
        ("visformer_tiny", "mindcv", ".ckpt", {"gelu": "erf"}),
        ("visformer_tiny", "authors", ".pth", {}),
        ("visformer_tiny", "timm", ".safetensors", {}),
        ("visformer_tiny", "timm", ".pth", {}),
        ("visformer_tiny_v2", "mindcv", ".ckpt", {}),
        ("swin_visformer_tiny_v2", "authors", ".pth", {}),
        ("net1", "authors", ".pt", {}),
        ("net7", "authors", ".pth", {}),
    ],
)
def test_there_and_back_bit_for_bit(tmp_path, name, to, suffix, said):
    checkpoint, path = checkpoint_of(name), tmp_path / f"x{suffix}"
    written = write_as(path, checkpoint, to)
    read = read_any(path, class_names=list("abcd"), **said)
    assert_same(read, checkpoint)
    assert read.model_name == name and read.architecture == checkpoint.architecture
    assert set(written.taken) == set(checkpoint.state_dict)


@pytest.mark.parametrize("fixture", upstream.MINI)
def test_a_fixture_goes_home_and_back(tmp_path, fixture):
    """What we write for the fixture's own project has the very tensors of the fixture."""
    to = "mindcv" if fixture.startswith("mindcv") else "authors"
    path = tmp_path / ("x.ckpt" if to == "mindcv" else "x.pth")
    checkpoint = upstream.mini_checkpoint(fixture)
    write_as(path, checkpoint, to)
    ours, theirs = read_foreign(path).tensors, read_foreign(upstream.mini_path(fixture)).tensors
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
    again = read_any(path, num_heads=upstream.HEADS[fixture], qk_scale_power=checkpoint.architecture.qk_scale_power)
    assert_same(again, checkpoint)
    assert again.architecture == checkpoint.architecture


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timms_own_loader_takes_the_file(tmp_path, suffix):
    checkpoint, path = checkpoint_of("visformer_tiny"), tmp_path / f"x{suffix}"
    write_as(path, checkpoint, "timm")
    theirs = timm.create_model("visformer_tiny", num_classes=4, checkpoint_path=str(path)).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.build()(images), theirs(images), atol=5e-5, rtol=0)


def test_v2_becomes_the_authors_with_a_bias_of_zero(tmp_path):
    checkpoint = checkpoint_of("visformer_tiny_v2", gelu="erf")
    written = write_as(tmp_path / "x.pth", checkpoint, "authors")
    assert any("written as zero" in note for note in written.notes)
    assert any("--qk-scale-factor=-0.5" in note for note in written.notes)
    read = read_any(tmp_path / "x.pth")
    assert read.model_name == "swin_visformer_tiny_v2"
    assert logit_difference(read, checkpoint) < 1e-5


def test_windows_are_lost_on_the_way_to_mindcv(tmp_path):
    checkpoint = checkpoint_of("swin_visformer_tiny_v2")
    with pytest.raises(UsageError, match=r"no relative position bias \(9 tables\); logits change by .*--allow_loss"):
        write_as(tmp_path / "x.ckpt", checkpoint, "mindcv")
    assert not list(tmp_path.iterdir())
    written = write_as(tmp_path / "x.ckpt", checkpoint, "mindcv", allow_loss=True)
    assert any("logits change by" in note for note in written.notes)
    read = read_any(tmp_path / "x.ckpt")
    assert read.model_name == "visformer_tiny_v2"
    assert torch.equal(read.state_dict["norm.weight"], checkpoint.state_dict["norm.weight"])


def test_a_zero_bias_is_no_loss(tmp_path):
    checkpoint = checkpoint_of("swin_visformer_tiny_v2")
    tensors = {k: v * 0 if k.endswith(".table") else v for k, v in checkpoint.state_dict.items()}
    write_as(tmp_path / "x.ckpt", replace(checkpoint, state_dict=tensors), "mindcv")
    assert read_any(tmp_path / "x.ckpt").model_name == "visformer_tiny_v2"


def test_the_price_of_another_gelu_is_measured(tmp_path):
    checkpoint = checkpoint_of("visformer_tiny", gelu="tanh")
    written = write_as(tmp_path / "x.pth", checkpoint, "timm")
    (note,) = written.notes
    assert "timm computes GELU in the erf form" in note and "--gelu tanh" in note
    other = replace(checkpoint, architecture=replace(checkpoint.architecture, gelu="erf"))
    assert f"differ by {logit_difference(checkpoint, other):.1e}" in note


@pytest.mark.parametrize(
    "name, to, words",
    [
        ("visformer_tiny_v2", "timm", "timm's Visformer is V1"),
        ("net5", "timm", "it has no net5"),
        ("net1", "mindcv", "it has no net1"),
        ("swin_visformer_small", "mindcv", "it has no swin_visformer_small"),
    ],
)
def test_what_a_project_does_not_have_is_refused(tmp_path, name, to, words):
    with torch.device("meta"):
        model = Visformer(architecture(name))
    checkpoint = Checkpoint(name, model.config, [], Preprocessing((224, 224)), model.state_dict())
    with pytest.raises(UsageError, match=words):
        write_as(tmp_path / ("x.ckpt" if to == "mindcv" else "x.pth"), checkpoint, to)
    assert not list(tmp_path.iterdir())


def test_the_suffix_is_that_of_the_project(tmp_path):
    checkpoint = upstream.mini_checkpoint("orig_mini_v1")
    for to, suffix in (("mindcv", ".pth"), ("authors", ".safetensors"), ("timm", ".ckpt")):
        with pytest.raises(UsageError, match=r"must end in \."):
            write_as(tmp_path / f"x{suffix}", checkpoint, to)


@pytest.mark.parametrize("size, window", [(96, 6), (192, 12), (224, 14)])
def test_tables_are_cut_to_the_authors_windows(tmp_path, size, window):
    checkpoint = resized(checkpoint_of("swin_visformer_tiny_v2"), size)
    write_as(tmp_path / "x.pth", checkpoint, "authors")
    tensors = read_foreign(tmp_path / "x.pth").tensors
    assert tensors["stage2.0.attn.relative_position_bias_table"].shape == ((2 * window - 1) ** 2, 6)
    assert tensors["stage2.0.attn.relative_position_index"].shape == (window**2, window**2)
    read = read_any(tmp_path / "x.pth")
    assert read.model_name == "swin_visformer_tiny_v2" and read.architecture.image_size == (size, size)
    assert logit_difference(read, checkpoint) < 1e-5


@pytest.mark.parametrize("size", [(160, 192), (256, 256)])
def test_sizes_that_the_authors_code_refuses(tmp_path, size):
    with pytest.raises(UsageError, match="no square of whole"):
        write_as(tmp_path / "x.pth", resized(checkpoint_of("swin_visformer_tiny_v2"), size), "authors")


def test_index_of_relative_positions():
    index = relative_position_index(3)
    assert index.shape == (9, 9) and index[0, 0] == 12 and index[0, 8] == 0 and index[8, 0] == 24
    assert torch.equal(index + index.T, torch.full((9, 9), 24))
