"""A fused network gives the logits of the model it was made from."""

import dataclasses
import json

import pytest
import torch

import visformer
from tests.fusion.models import MINIATURES, build, images, off_by
from visformer.data.preprocessing import Preprocessing
from visformer.errors import UsageError
from visformer.models import list_models

SMALL = "spatial, then attention"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Choices of this test alone."""
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuning"


@torch.no_grad()
def logits_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
@pytest.mark.parametrize("name", list_models())
def test_every_model_in_fp32_and_bf16(name, size):
    model = build(name, num_classes=10, image_size=size)
    x = images(model)
    exact = logits_of(model.double(), x.double())
    model.float()
    assert off_by(visformer.fuse(model, choose="library")(x), exact) < 1e-5
    fused = visformer.fuse(model, dtype=torch.bfloat16, choose="library")(x)
    plain = logits_of(model.bfloat16(), x.bfloat16())
    assert off_by(fused, exact) < max(2e-2, 2.5 * off_by(plain, exact))  # fresh weights amplify what bf16 rounds off


@pytest.mark.parametrize("name", MINIATURES)
def test_whatever_measured_fastest(name, cache):
    model = build(name)
    x = images(model)
    fused = visformer.fuse(model)
    assert fused(x).shape == logits_of(model, x).shape
    assert off_by(fused(x), logits_of(model, x)) < 1e-5
    (file,) = cache.iterdir()
    entries = json.loads(file.read_text())
    assert all(entry["choice"] in entry["microseconds"] for entry in entries.values())
    assert any(signature.startswith("linear 2x") for signature in entries)


def test_what_was_measured_is_not_measured_again(cache, monkeypatch):
    model = build(SMALL)
    visformer.fuse(model)(images(model))

    def refuse(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("visformer.fusion.tuner.time_candidates", refuse)
    visformer.fuse(model)(images(model))
    with pytest.raises(AssertionError, match="measured again"):
        visformer.fuse(model)(images(model, count=3))


def test_a_broken_cache_is_written_anew(cache):
    model = build(SMALL)
    x = images(model)
    visformer.fuse(model)(x)
    (file,) = cache.iterdir()
    for broken in ("{", "[]", '{"linear": 3}'):
        file.write_text(broken)
        assert off_by(visformer.fuse(model)(x), logits_of(model, x)) < 1e-5
        assert len(json.loads(file.read_text())) > 3


def test_a_cache_that_can_not_be_written_is_no_obstacle(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISFORMER_CACHE", str(tmp_path / "file"))
    model = build(SMALL)
    x = images(model)
    assert off_by(visformer.fuse(model)(x), logits_of(model, x)) < 1e-5
    assert "measured again by the next process" in capsys.readouterr().err


def test_any_size_with_positions_resampled():
    model = build(SMALL, dynamic_image_size=True)
    fused = visformer.fuse(model, choose="library")
    for size in ((32, 48), (64, 40), (33, 81)):
        x = torch.randn(1, 3, *size)
        assert off_by(fused(x), logits_of(model, x)) < 1e-5


@pytest.mark.parametrize("name", [SMALL, "layer norm, no stem"])
def test_bytes_are_normalised_as_the_checkpoint_says(name):
    model = build(name)
    mean, std = (100.0, 120.0, 140.0), (50.0, 60.0, 70.0)
    model.preprocessing = Preprocessing(model.config.image_size, mean=mean, std=std)
    pixels = torch.randint(0, 256, (3, *model.config.image_size, 3), dtype=torch.uint8)
    x = (pixels.permute(0, 3, 1, 2) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    fused = visformer.fuse(model, choose="library")
    expected = logits_of(model, x)
    assert off_by(fused(pixels.permute(0, 3, 1, 2)), expected) < 1e-5
    probabilities, labels = fused.classify(pixels, top_k=2)
    assert torch.equal(labels, expected.topk(2).indices)
    assert torch.allclose(probabilities, expected.softmax(1).topk(2).values, atol=1e-5)


def test_the_model_stays_as_it_is():
    model = build(SMALL)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    fused = visformer.fuse(model)
    fused(images(model))
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    model.requires_grad_(True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "dtype: torch.float64 is not possible"),
        ({"choose": "best"}, "choose: 'best' is not one of fastest, remembered, library, kernels"),
    ],
)
def test_what_can_not_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        visformer.fuse(build(SMALL), **options)


def test_only_a_visformer_can_be_fused():
    with pytest.raises(UsageError, match="a Visformer can be fused, not a Linear"):
        visformer.fuse(torch.nn.Linear(2, 2))


def test_wrong_inputs_are_refused():
    fused = visformer.fuse(build(SMALL), choose="library")
    with pytest.raises(UsageError, match=r"images: \(1, 4, 32, 48\) is not \(B, 3, H, W\)"):
        fused(torch.zeros(1, 4, 32, 48))
    with pytest.raises(UsageError, match=r"pixels: float32 \(1, 3, 32, 48\) is not uint8"):
        fused.classify(torch.zeros(1, 3, 32, 48))
    with pytest.raises(UsageError, match="top_k: 8 is out of range; the model has 7 classes"):
        fused.classify(torch.zeros(1, 32, 48, 3, dtype=torch.uint8), top_k=8)


@pytest.mark.parametrize("name", MINIATURES)
def test_eight_bits_are_emulated_on_a_cpu(name):
    model = build(name)
    x = images(model)
    exact = logits_of(model, x)
    eight = visformer.fuse(model, choose="library", fp8=True)(x)
    assert 1e-4 < off_by(eight, exact) < 0.2


def test_a_gpu_without_eight_bit_products_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UsageError, match="fp8: NVIDIA A100 does not multiply eight-bit"):
        visformer.fuse(build(SMALL), device="cuda", fp8=True)


def test_a_norm_behind_an_embedding_stays_as_it_is():
    """Of the caller's model, while the fused network has it in its own precision."""
    shape = dataclasses.replace(MINIATURES["layer norm, no stem"], embed_norm=True)
    model = visformer.Visformer(shape).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    visformer.fuse(model, dtype=torch.bfloat16, choose="library")
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
