"""Foreign checkpoints as ours: what they are is told from the tensors, every tensor is accounted for, or an error."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import upstream
from visformer.conversion import Choices, convert_file, name_and_source, read_any, resized, with_new_head
from visformer.conversion.foreign import read_foreign
from visformer.conversion.layouts import AUTHORS, AUTHORS_2021, LAYOUTS, MINDCV, OURS, TIMM
from visformer.conversion.mindspore import write_ckpt
from visformer.conversion.pickles import write_pth
from visformer.conversion.recognise import recognise_layout, recognise_model
from visformer.data import imagenet
from visformer.errors import UsageError
from visformer.models import create_model, list_models, variant


def convert(fixture, **choices):
    return convert_file(upstream.mini_path(fixture), Choices(num_heads=upstream.HEADS[fixture], **choices))


def raw_tensors(fixture):
    return dict(read_foreign(upstream.mini_path(fixture)).tensors)


@pytest.mark.parametrize("fixture", upstream.MINI)
def test_every_tensor_of_a_fixture_is_accounted_for(fixture):
    foreign, conversion = read_foreign(upstream.mini_path(fixture)), convert(fixture)
    taken, left_out = set(conversion.taken.values()), {name for name, _ in conversion.left_out}
    assert taken | left_out == set(foreign.tensors) | {name for name, _ in foreign.ignored}
    assert not taken & left_out and all(reason for _, reason in conversion.left_out)
    assert set(conversion.taken) | set(conversion.filled) == set(conversion.checkpoint.state_dict)
    assert bool(conversion.filled) == fixture.startswith("mindcv")  # MindSpore counts no batches
    assert conversion.checkpoint.source["sha256"] and len(conversion.notes) == 3


@pytest.mark.parametrize("fixture", upstream.MINI)
@pytest.mark.parametrize("model", list_models())
def test_a_fixture_in_the_wrong_variant_is_refused(fixture, model):
    with pytest.raises(UsageError, match=rf"it is no {model}: .+, in the file|it has \d stages, the file \d"):
        convert(fixture, model=model)


@pytest.mark.parametrize("fixture", ["mindcv_mini_v1", "mindcv_mini_v2", "orig_mini_v1", "orig_mini_net1"])
def test_heads_that_no_tensor_tells_are_asked_for(fixture):
    with pytest.raises(UsageError, match=r"no published model \(nearest: \w+, but .+\).*--num_heads 2"):
        convert_file(upstream.mini_path(fixture))


@pytest.mark.parametrize(
    "model, layout",
    [
        (model, layout)
        for model in list_models()
        for layout in (MINDCV, AUTHORS, AUTHORS_2021, TIMM, OURS)
        if layout in (AUTHORS, AUTHORS_2021, OURS) or not model.startswith(("swin", "net"))
    ],
)
def test_every_model_is_told_from_its_tensors(model, layout):
    """At full size, on the meta device: names and shapes are all that recognition looks at."""
    base = variant(model).architecture
    with torch.device("meta"):
        ours = create_model(model, num_classes=7, in_channels=1)
    tensors = {
        name.theirs: tensor.reshape((*tensor.shape, *(1,) * name.trailing_axes))
        for tensor, name in zip(ours.state_dict().values(), layout.names(base, ours.state_dict()).values(), strict=True)
    }
    assert recognise_layout(tensors).name == layout.name
    found = recognise_model(tensors, layout, {}, Choices())
    assert found.name == model
    assert found.architecture == replace(base, num_classes=7, in_channels=1, gelu=layout.gelu or base.gelu)


def test_the_rule_of_gelu_and_scale():
    assert convert("mindcv_mini_v2").checkpoint.architecture.gelu == "tanh"
    assert convert("orig_mini_v1").checkpoint.architecture.gelu == "erf"
    assert convert("mindcv_mini_v2").checkpoint.architecture.qk_scale_power == -0.5  # four stages with blocks
    assert convert("mindcv_mini_v1").checkpoint.architecture.qk_scale_power == -0.25
    said = convert("orig_mini_swin_v2")  # its training recorded the scale
    assert said.checkpoint.architecture.qk_scale_power == -0.5
    assert any("the training's arguments in the file say so" in note for note in said.notes)
    chosen = convert("mindcv_mini_v2", gelu="erf", qk_scale_power=-0.25).checkpoint.architecture
    assert (chosen.gelu, chosen.qk_scale_power) == ("erf", -0.25)


def test_another_projects_conventions():
    path = upstream.mini_path("mindcv_mini_v1")
    theirs = read_any(path, num_heads=(2,))
    assert (theirs.preprocessing.antialias, theirs.preprocessing.crop_rounding) == (False, "floor")
    assert theirs.preprocessing.crop_pct == 0.875 and theirs.preprocessing.image_size == (64, 64)
    as_timm = read_any(path, num_heads=(2,), source="timm")
    assert as_timm.architecture.gelu == "erf"
    assert as_timm.preprocessing.crop_pct == 0.9 and as_timm.preprocessing.antialias
    assert name_and_source("visformer_small.mindcv") == ("visformer_small", "mindcv")
    assert name_and_source("") == (None, None)
    with pytest.raises(UsageError, match="'keras'"):
        name_and_source("visformer_small.keras")


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    write_pth(tmp_path / "x.pth", {"model": {prefix + k: v for k, v in raw_tensors("orig_mini_v1").items()}})
    read = read_any(tmp_path / "x.pth", num_heads=(2,)).state_dict
    expected = upstream.mini_checkpoint("orig_mini_v1").state_dict
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_moving_average_of_the_authors_layout(tmp_path):
    tensors = raw_tensors("orig_mini_v1")
    average = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    write_pth(tmp_path / "x.pth", {"model": tensors, "model_ema": average, "epoch": 3})
    chosen = read_any(tmp_path / "x.pth", num_heads=(2,))
    plain = read_any(tmp_path / "x.pth", num_heads=(2,), ema=False)
    assert torch.equal(chosen.state_dict["head.bias"], plain.state_dict["head.bias"] + 1)
    assert torch.equal(plain.state_dict["head.bias"], tensors["head.bias"]) and chosen.training["epoch"] == 3


def test_training_state_of_mindcv(tmp_path):
    tensors = raw_tensors("mindcv_mini_v1")
    trainable = {k: v for k, v in tensors.items() if "moving_" not in k}
    state = {f"adam_m.{k}": v * 0 for k, v in trainable.items()} | {f"ema.{k}": v + 1 for k, v in trainable.items()}
    state |= {"learning_rate": torch.tensor(0.1), "global_step": torch.tensor([5], dtype=torch.int32)}
    write_ckpt(tmp_path / "x.ckpt", tensors | state)
    conversion = convert_file(tmp_path / "x.ckpt", Choices(num_heads=(2,)))
    assert torch.equal(conversion.checkpoint.state_dict["head.bias"], tensors["head.bias"] + 1)
    mean = conversion.checkpoint.state_dict["stem.1.running_mean"]
    assert torch.equal(mean, tensors["stem.1.moving_mean"])  # statistics have no average
    reasons = dict(conversion.left_out)
    assert reasons["adam_m.head.bias"] == "adam_m of the optimizer"
    assert reasons["learning_rate"] == "state of the training"
    assert reasons["head.bias"] == "its moving average is taken"
    plain = read_any(tmp_path / "x.ckpt", num_heads=(2,), ema=False)
    assert torch.equal(plain.state_dict["head.bias"], tensors["head.bias"])


def test_half_precision_becomes_single(tmp_path):
    tensors = raw_tensors("mindcv_mini_v1")
    write_ckpt(tmp_path / "x.ckpt", {name: tensor.half() for name, tensor in tensors.items()})
    conversion = convert_file(tmp_path / "x.ckpt", Choices(num_heads=(2,)))
    assert all(t.dtype in (torch.float32, torch.int64) for t in conversion.checkpoint.state_dict.values())
    assert torch.equal(conversion.checkpoint.state_dict["head.bias"], tensors["head.bias"].half().float())
    assert any("float16 became float32" in note for note in conversion.notes)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda t: t.pop("stage2.1.attn.proj.weight"), r"1 missing: stage2\.1\.attn\.proj\.weight"),
        (lambda t: t.pop("head.bias"), r"1 missing: head\.bias"),
        (lambda t: t.update(extra=torch.ones(3)), r"1 that no rule takes: extra"),
        (lambda t: t.update({"head.bias": torch.ones(3)}), r"head\.bias is 3, not 10"),
        (lambda t: t.update({"stem.1.bn.wieght": t.pop("stem.1.bn.weight")}), r"missing: stem.1.bn.weight;.*wieght"),
        (lambda t: t.pop("norm.bn.weight"), "the norm before the head is missing"),
        (lambda t: t.update({"stem.0.weight": torch.ones(8)}), r"'stem\.0\.weight' has shape \(8,\)"),
        (lambda t: t.update({"stage1.5.x": torch.ones(1)}), "not numbered from 0 on"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("patch_embed1")], "no 'patch_embed1.proj.weight'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, spoil, words):
    tensors = raw_tensors("orig_mini_v1")
    spoil(tensors)
    write_pth(tmp_path / "x.pth", tensors)
    with pytest.raises(UsageError, match=rf"x\.pth: .*{words}"):
        read_any(tmp_path / "x.pth", num_heads=(2,))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_spoiled_file_passes_or_crashes(data):
    """Any one tensor lost, renamed or reshaped: an error that names it, and nothing but an error."""
    tensors = raw_tensors("orig_mini_v1")
    name = data.draw(st.sampled_from([n for n in sorted(tensors) if "num_batches" not in n]))
    kind = data.draw(st.sampled_from(["lost", "renamed", "longer", "flat"]))
    tensor = tensors.pop(name)
    if kind == "renamed":
        tensors[name + data.draw(st.sampled_from(["x", ".y", "0"]))] = tensor
    elif kind == "longer":
        tensors[name] = torch.cat([tensor, tensor])
    elif kind == "flat" and tensor.dim() > 1:
        tensors[name] = tensor.flatten()
    with pytest.raises(UsageError):
        recognised = recognise_model(tensors, AUTHORS, {}, Choices(num_heads=(2,)))
        from visformer.checkpoint import Checkpoint
        from visformer.conversion.reading import Conversion, _take
        from visformer.data.preprocessing import Preprocessing

        empty = Checkpoint(recognised.name, recognised.architecture, [], Preprocessing((64, 64)), {})
        _take(tensors, recognise_layout(tensors), Conversion(empty, "torch", "authors"))


def test_number_of_heads():
    path = upstream.mini_path("mindcv_mini_v1")  # MindCV counts four stages where there are three
    for heads in ((2,), (2, 2, 2), (1, 2, 2, 2)):
        assert [s.num_heads for s in read_any(path, num_heads=heads).architecture.stages] == [2, 2, 2]
    for heads, words in (((3,), "3 does not divide the 64"), ((2, 2), "2 numbers.* 3 stages"), ((0,), "0 does not")):
        with pytest.raises(UsageError, match=words):
            read_any(path, num_heads=heads)
    with pytest.raises(UsageError, match="table of position biases is for 4"):
        read_any(upstream.mini_path("orig_mini_swin_v2"), num_heads=(1, 1, 2, 8))


def test_class_names():
    path = upstream.mini_path("mindcv_mini_v1")
    assert read_any(path, num_heads=(2,)).class_names == [str(i) for i in range(10)]
    names = [f"class {i}" for i in range(10)]
    assert read_any(path, num_heads=(2,), class_names=names).class_names == names
    with pytest.raises(UsageError, match="3 names for a head of 10"):
        read_any(path, num_heads=(2,), class_names=["a", "b", "c"])
    with pytest.raises(UsageError, match="stands there twice"):
        read_any(path, num_heads=(2,), class_names=["a"] * 10)


def test_names_of_imagenet_are_timms():
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    assert imagenet.class_names() == list(info.label_names()) and len(imagenet.class_names()) == 1000
    assert imagenet.describe(["n02099601", "cat"]) == {"n02099601": "golden retriever"}
    assert imagenet.describe(["cat", "dog"]) == {}
    words = imagenet.describe(imagenet.class_names())
    assert all(info.label_name_to_description(name) == text for name, text in words.items()) and len(words) == 1000


def test_new_head_and_new_size():
    checkpoint = upstream.mini_checkpoint("orig_mini_v1")
    other = with_new_head(checkpoint, 3, ["a", "b", "c"])
    model = other.build()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3) and model.class_names == ["a", "b", "c"]
    assert torch.equal(other.state_dict["stem.0.weight"], checkpoint.state_dict["stem.0.weight"])
    assert with_new_head(checkpoint, 3).class_names == ["0", "1", "2"]
    assert with_new_head(checkpoint, 0).build()(torch.randn(1, 3, 64, 64)).shape == (1, 128)
    with pytest.raises(UsageError, match="2 names for a head of 3"):
        with_new_head(checkpoint, 3, ["a", "b"])
    larger = resized(checkpoint, (96, 80))
    assert larger.build()(torch.randn(1, 3, 96, 80)).shape == (1, 10)
    assert larger.preprocessing.image_size == (96, 80)


def test_our_own_files_say_everything_themselves(tmp_path):
    from visformer.checkpoint import write_checkpoint

    checkpoint = upstream.mini_checkpoint("orig_mini_v1")
    write_checkpoint(tmp_path / "ours.safetensors", checkpoint)
    conversion = convert_file(tmp_path / "ours.safetensors")
    assert conversion.layout == "visformer" and conversion.checkpoint.architecture == checkpoint.architecture
    with pytest.raises(UsageError, match="it says itself"):
        convert_file(tmp_path / "ours.safetensors", Choices(gelu="tanh"))
    with pytest.raises(UsageError, match="it holds custom, not visformer_tiny"):
        convert_file(tmp_path / "ours.safetensors", Choices(model="visformer_tiny"))


def test_layouts_and_reasons():
    assert set(LAYOUTS) == {"mindcv", "authors", "timm", "visformer"}
    assert AUTHORS.reason_to_leave_out("stage2.0.attn_mask") and not AUTHORS.reason_to_leave_out("stage2.0.attn.x")
    assert re.fullmatch(MINDCV.extras[0][0], "beta1_power")
