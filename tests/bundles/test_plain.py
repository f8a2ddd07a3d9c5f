"""The form that is exported gives the model's logits, for every model; and the graphs are clean."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from tests.bundles.conftest import settle, small_model
from visformer.bundles.graphs import batch_graph, joined, preprocessing_graph
from visformer.bundles.plain import Form, _widen_groups, plain
from visformer.data.preprocessing import Preprocessing
from visformer.errors import UsageError
from visformer.models import Visformer, architecture, create_model, list_models


@pytest.mark.parametrize("name", list_models())
def test_the_plain_form_gives_the_models_logits(name):
    torch.manual_seed(0)
    model = settle(create_model(name, num_classes=20, image_size=64), 64)
    images = torch.randn(2, 3, 64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(images)
        for form in (Form(), Form(split_first=True, wide_groups=True)):
            assert (wanted - plain(model, form)(images)).abs().max() < 1e-5 * wanted.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model has changed"


def onnx_difference(model, side: int) -> float:
    """The largest difference from ONNX Runtime's logits, for batches of one and three, in units of the largest."""
    session = onnxruntime.InferenceSession(batch_graph(model, dynamic_size=False).SerializeToString())
    largest = 0.0
    for count in (1, 3):
        images = torch.randn(count, model.config.in_channels, side, side)
        with torch.no_grad():
            wanted = model(images).numpy()
        got = session.run(["logits"], {"images": images.numpy()})[0]
        largest = max(largest, float(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max())))
    return largest


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_model_exports(name):
    """One block in each stage, or two where every other one shifts its windows, of which one model has several; more
    are more of the same, and `benchmarks/export_parity.py` has them all."""
    side = 64 if name == "swin_visformer_tiny_v2" else 32
    config = architecture(name, num_classes=20, image_size=(side, side))
    depth = 2 if name.startswith("swin") else 1
    stages = tuple(replace(stage, depth=min(stage.depth, depth)) for stage in config.stages)
    assert onnx_difference(settle(Visformer(replace(config, stages=stages)), side), side) < 1e-4


def test_a_dynamic_size_resamples_positions_like_the_model():
    model = small_model()
    graph = batch_graph(model, dynamic_size=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for size in ((64, 64), (32, 96), (160, 128)):
        model.set_image_size(size)
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            wanted = model(images).numpy()
        model.set_image_size((64, 64))
        model.load_state_dict(small_model().state_dict())  # resampling is for good
        np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], wanted, atol=1e-4)


def test_windows_do_not_take_a_dynamic_size():
    with pytest.raises(UsageError, match="windowed attention"):
        plain(create_model("swin_visformer_tiny_v2", image_size=64), dynamic_size=True)


def test_attention_is_the_same_in_either_order():
    model = small_model()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        for form in (Form(), Form(split_first=True)):
            torch.testing.assert_close(plain(model, form)(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("visformer_tiny", {(24, 8)}),
        ("visformer_small", {(48, 8)}),
        ("visformer_tiny_v2", {(48, 2), (24, 8)}),
        ("visformer_small_v2", {(16, 8), (32, 8)}),
    ],
)
def test_wide_groups_fill_registers(name, widths):
    model = plain(create_model(name, num_classes=2, image_size=32), Form(wide_groups=True))
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d) and module.groups > 1]
    assert {(conv.weight.shape[1], conv.groups) for conv in convs} == widths


def test_groups_whose_number_does_not_allow_it_stay():
    conv = torch.nn.Conv2d(24, 24, 3, groups=2)  # of 12 channels, of which it takes four
    before = conv.weight.clone()
    _widen_groups(conv)
    assert conv.groups == 2 and torch.equal(conv.weight, before)


def test_a_graph_has_readable_names_and_nothing_of_this_machine():
    batch = batch_graph(small_model(), dynamic_size=False)
    graph = joined(preprocessing_graph(Preprocessing((64, 64))), batch)
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert {"stem.0/Conv", "stages.1.blocks.0.attn.branch.q/Conv", "stages.0.embed.proj/Conv"} <= set(names)
    weights = {tensor.name for tensor in batch.graph.initializer}
    assert {"stem.0.weight", "stages.2.blocks.0.attn.branch.proj.weight", "head.bias"} <= weights
    assert [value.name for value in graph.graph.input] == ["image"]
    assert [value.name for value in graph.graph.output] == ["logits"]
    assert b"site-packages" not in graph.SerializeToString() and b".py" not in graph.SerializeToString()


@pytest.mark.parametrize(("split_first", "transposes"), [(True, 3 + 1 + 1), (False, 3 * 2 + 2)])
def test_a_graph_has_no_norms_left_and_few_transposes(split_first, transposes):
    graph = batch_graph(small_model(), dynamic_size=False, form=Form(split_first=split_first)).graph
    operations = Counter(node.op_type for node in graph.node)
    assert operations["BatchNormalization"] == 0
    assert operations["Transpose"] <= transposes * 2  # q, k, v, k again, and back, in each of two attentions
