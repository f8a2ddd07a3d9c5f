"""The tables of names against the tensor lists of the three upstream implementations."""

import pytest
import torch

from tests.upstream import FIXTURES, tensor_shapes
from visformer.conversion.layouts import AUTHORS, AUTHORS_2021, LAYOUTS, MINDCV, OURS, TIMM
from visformer.models import create_model, list_models

SOURCES = {"mindcv": MINDCV, "original": AUTHORS, "timm": TIMM}
LISTS = sorted(tuple(path.stem.split(".", 1)) for path in (FIXTURES / "keys").glob("*.json"))


def meta_model(name):
    with torch.device("meta"):
        return create_model(name)


def test_there_is_a_list_for_every_model():
    assert {model for _, model in LISTS} == set(list_models()) and len(LISTS) == 19


@pytest.mark.parametrize("source, model", LISTS)
def test_every_upstream_tensor_has_its_place(source, model):
    layout, ours = SOURCES[source], meta_model(model)
    tensors = ours.state_dict()
    names = layout.names(ours.config, tensors)
    expected = {
        name.theirs: (*tensors[key].shape, *(1,) * name.trailing_axes)
        for key, name in names.items()
        if source != "mindcv" or not key.endswith("num_batches_tracked")
    }
    found = tensor_shapes(source, model)
    extras = {name for name in found if layout.reason_to_leave_out(name)}
    assert {name: shape for name, shape in found.items() if name not in extras} == expected
    assert bool(extras) == model.startswith("swin")


def test_every_rule_takes_something():
    used = {name: set() for name in SOURCES}
    for source, model in LISTS:
        ours = meta_model(model)
        used[source] |= {name.rule for name in SOURCES[source].names(ours.config, ours.state_dict()).values()}
    for source, layout in SOURCES.items():
        assert used[source] == {*layout.rules, *layout.layer_norm_rules}


@pytest.mark.parametrize(
    "name, layout",
    [
        (name, layout)
        for name in list_models()
        for layout in (*LAYOUTS.values(), AUTHORS_2021)
        if layout in (AUTHORS, AUTHORS_2021, OURS) or not name.startswith(("swin", "net"))
    ],
)
def test_names_are_one_to_one(name, layout):
    model = meta_model(name)
    names = layout.names(model.config, model.state_dict())
    assert len({name.theirs for name in names.values()}) == len(names)
    if layout is OURS:
        assert all(key == name.theirs for key, name in names.items())


def test_a_name_that_no_rule_takes():
    with pytest.raises(KeyError, match="extra"):
        TIMM.names(meta_model("visformer_tiny").config, ["stages.0.blocks.0.extra"])
