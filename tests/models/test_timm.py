"""Our models through timm's front door: registry, feature networks, options, configuration, checkpoints."""

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models._features import FeatureGetterNet

from visformer.config import IMAGENET_MEAN
from visformer.errors import UsageError
from visformer.models import Visformer, create_model, list_models

TIMMS_OWN = {"visformer_tiny", "visformer_small"}
OURS = [name for name in list_models() if name not in TIMMS_OWN]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def seeded(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=64, **options).eval()


def test_every_model_is_registered_and_timms_own_stay_timms():
    assert all(timm.models.is_model(name) for name in list_models())
    assert set(timm.list_models("*visformer*")) == {name for name in list_models() if "visformer" in name}
    assert set(OURS) == set(timm.list_models(module="timm_models"))
    assert not set(timm.list_models(pretrained=True)) & set(OURS)
    assert type(timm.create_model("visformer_tiny", num_classes=3)).__module__.startswith("timm.")
    assert isinstance(seeded("visformer_small_v2", num_classes=3), Visformer)


@pytest.mark.parametrize("name", OURS)
def test_features_are_those_of_the_model(name):
    model, features = seeded(name), seeded(name, features_only=True)
    assert isinstance(features, FeatureGetterNet)
    with torch.no_grad():
        expected = model.forward_intermediates(IMAGES, intermediates_only=True)
        maps = features(IMAGES)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == features.feature_info.reduction()
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(maps, expected, strict=True))


@settings(max_examples=8, deadline=None)
@given(
    indices=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(sorted).map(tuple) | st.integers(1, 4),
    kind=st.sampled_from(["getter", "list", "dict", "hook"]),
)
def test_chosen_features_need_only_the_stages_before_them(indices, kind):
    model = seeded("swin_visformer_tiny_v2")
    features = seeded("swin_visformer_tiny_v2", features_only=True, out_indices=indices, feature_cls=kind)
    with torch.no_grad():
        expected = model.forward_intermediates(IMAGES, indices=indices, intermediates_only=True)
        maps = features(IMAGES)
    maps = list(maps.values()) if kind == "dict" else maps
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(maps, expected, strict=True))
    last = 3 if isinstance(indices, int) else indices[-1]
    parts = [model.stem, *model.stages[: last + 1]]
    assert sum(p.numel() for p in features.parameters()) == sum(p.numel() for part in parts for p in part.parameters())


def test_negative_indices_count_from_the_end():
    features = seeded("visformer_tiny_v2", features_only=True, out_indices=(-3, -1))
    assert features.feature_info.channels() == [96, 384] and features.feature_info.reduction() == [8, 32]


def test_every_parameter_of_a_feature_network_gets_a_gradient():
    features = seeded("visformer_tiny_v2", features_only=True, out_indices=(0, 2)).train()
    sum(m.square().mean() for m in features(IMAGES)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in features.parameters())


def test_a_pruned_model_is_consistent():
    model = seeded("visformer_tiny_v2")
    assert model.prune_intermediate_layers((0, 1), prune_norm=True) == [0, 1]
    assert model.num_features == 96 and len(model.config.stages) == len(model.stages) == 2
    model.set_image_size(96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 96)
    kept = seeded("visformer_tiny_v2", num_classes=5)
    kept.prune_intermediate_layers(2, prune_head=False)
    assert torch.equal(kept(IMAGES), seeded("visformer_tiny_v2", num_classes=5)(IMAGES))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"out_indices": (0,)}, "out_indices: it is for features_only"),
        ({"features_only": True, "out_indices": (0, 4)}, r"out_indices: \(0, 4\) is not possible.*0 to 3"),
        ({"features_only": True, "out_indices": (2, 1)}, "rising order"),
        ({"features_only": True, "out_indices": (1, -3)}, "rising order"),
        ({"features_only": True, "out_indices": ()}, "out_indices"),
        ({"features_only": True, "out_indices": 5}, "out_indices: 5"),
        ({"features_only": True, "output_stride": 8}, "output_stride: 8 is not possible.*4, 8, 16, 32"),
        ({"output_stride": 16}, "output_stride: 16 is not possible"),
        ({"features_only": True, "feature_cls": "fx"}, "feature_cls: 'fx'.*getter"),
        ({"global_pool": ""}, "global_pool: '' is not possible.*forward_features"),
        ({"drop_path": 0.1}, "no option 'drop_path'; did you mean drop_path_rate"),
        ({"act_layer": "silu"}, "no option 'act_layer'"),
        ({"pretrained": True}, "timm knows no weights of it; visformer.create_model"),
    ],
)
def test_wrong_options_are_refused_in_plain_words(options, words):
    with pytest.raises(UsageError, match=words):
        timm.create_model("visformer_tiny_v2", **options)


def test_options_have_timms_names():
    model = timm.create_model(
        "visformer_tiny_v2",
        img_size=(64, 96),
        in_chans=1,
        num_classes=0,
        drop_path_rate=0.2,
        drop_rate=0.1,
        global_pool="avg",
        scriptable=True,
        exportable=True,
        no_jit=True,
        output_stride=32,
        dtype=torch.float64,
    )
    assert model.config.image_size == (64, 96) and model.in_chans == 1 and model.config.drop_path_rate == 0.2
    assert model.eval()(torch.zeros(2, 1, 64, 96, dtype=torch.float64)).shape == (2, 384)
    dynamic = timm.create_model("visformer_tiny_v2", dynamic_img_size=True).eval()
    assert dynamic(torch.zeros(1, 3, 64, 96)).shape == (1, 1000)
    assert next(timm.create_model("net4", device="meta").parameters()).is_meta


def test_configuration_says_what_the_model_takes():
    config = timm.data.resolve_model_data_config(seeded("visformer_tiny_v2", in_chans=4))
    assert config["input_size"] == (4, 64, 64) and config["crop_pct"] == 0.875 and config["interpolation"] == "bicubic"
    assert config["mean"] == pytest.approx([value / 255 for value in IMAGENET_MEAN])
    assert timm.data.resolve_model_data_config(timm.create_model("net7"))["input_size"] == (3, 224, 224)
    own = timm.create_model("visformer_tiny_v2", pretrained_cfg_overlay={"crop_pct": 1.0})
    assert timm.data.resolve_model_data_config(own)["crop_pct"] == 1.0


@pytest.mark.parametrize("name", OURS)
def test_first_layer_and_classifier_are_where_the_configuration_says(name):
    config = timm.models.get_pretrained_cfg(name)
    with torch.device("meta"):
        model = create_model(name)
    modules = dict(model.named_modules())
    with_three_channels = [key for key, p in model.named_parameters() if p.dim() == 4 and p.shape[1] == 3]
    assert with_three_channels == [f"{config.first_conv}.weight"]
    assert modules[config.classifier] is model.get_classifier()
    assert config.pool_size == model.config.grids[-1]
    assert config.fixed_input_size == any("pos_embed" in key for key, _ in model.named_parameters())


def test_a_checkpoint_of_ours_loads_by_its_path(tmp_path):
    model = seeded("visformer_tiny_v2", num_classes=3)
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    torch.manual_seed(1)
    path = str(tmp_path / "model.safetensors")
    loaded = timm.create_model("visformer_tiny_v2", img_size=64, num_classes=3, checkpoint_path=path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_models_are_copied_and_pickled():
    model = seeded("visformer_tiny_v2", num_classes=3)
    features = seeded("visformer_tiny_v2", features_only=True)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(IMAGES), model(IMAGES))
        assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), model(IMAGES))
        assert torch.equal(copy.deepcopy(features)(IMAGES)[3], features(IMAGES)[3])
