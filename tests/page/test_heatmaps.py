"""Heat maps are sums that come out right, and lie where the model looked."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.page.models import CLASSES, small_model
from visformer.bundles.pixels import ImagePreprocessing
from visformer.data.preprocessing import Preprocessing
from visformer.models import create_model
from visformer.serving import heatmaps


def an_input(height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, height, width)).astype(np.float32)


def reference(model, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(image)[None])[0].numpy()


# ---- class activation


@pytest.mark.parametrize("windows", [False, True])
def test_activation_sums_to_the_logit(windows):
    model, image = small_model(windows), an_input()
    logits = reference(model, image)
    last = heatmaps.last_map(model, image)
    np.testing.assert_allclose(last.logits, logits, rtol=1e-5, atol=1e-5)
    assert np.ptp(logits) > 1
    for index in range(len(CLASSES)):
        values = heatmaps.class_activation(last.features, *heatmaps.head(model, index))
        assert values.shape == (4, 4)
        assert values.sum() == pytest.approx(logits[index], abs=1e-4)


def test_activation_is_of_the_place_that_gives_it():
    features = np.zeros((3, 4, 5), dtype=np.float32)
    features[:, 1, 3] = (1, 2, 3)
    values = heatmaps.class_activation(features, np.array([2, 0, -4], dtype=np.float32), 0.0)
    assert values[1, 3] == pytest.approx((2 - 12) / 20)
    assert np.count_nonzero(values) == 1
    with_bias = heatmaps.class_activation(features, np.array([2, 0, -4], dtype=np.float32), 5.0)
    np.testing.assert_allclose(with_bias - values, 5 / 20, rtol=1e-6)


@pytest.mark.parametrize("name", ["visformer_tiny", "swin_visformer_tiny_v2", "net1", "net7"])
def test_the_family_can_be_explained(name):
    """Every kind of last stage: attention over all, in windows, a single stage of patches, none at all."""
    model = create_model(name, num_classes=4, image_size=(96, 128)).eval()
    image = an_input(96, 128)
    logits, last = reference(model, image), heatmaps.last_map(model, image)
    assert last.features.shape[1:] == model.config.grids[-1]
    np.testing.assert_allclose(last.logits, logits, rtol=1e-5)
    values = heatmaps.class_activation(last.features, *heatmaps.head(model, 2))
    assert values.sum() == pytest.approx(logits[2], rel=1e-5)
    if name == "net7":
        assert last.attention is None
    else:
        assert last.attention.shape == model.config.grids[-1]
        assert last.attention.sum() == pytest.approx(1, abs=1e-5)


# ---- attention


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7)])
def test_attention_is_shared_out_whole(windows, grid):
    model = small_model(windows)
    for block in model.stages[1].blocks:  # with windows, the second one's are shifted
        maps = torch.randn(2, 32, *grid)
        with torch.no_grad():
            rows = heatmaps.attention_rows(block.attn.branch, maps)
            received = heatmaps.received(block.attn.branch, maps)
        torch.testing.assert_close(rows.sum(3), torch.ones(rows.shape[:3]))
        assert received.shape == (2, *grid)
        torch.testing.assert_close(received.sum((1, 2)), torch.ones(2))
        assert (received > 0).all()


@pytest.mark.parametrize("windows", [False, True])
def test_attention_is_that_of_the_model(windows):
    """Its rows, applied to the values, give what the module gives."""
    attention = small_model(windows).stages[1].blocks[1].attn.branch
    maps = torch.randn(1, 32, 6, 6)
    with torch.no_grad():
        rows = heatmaps.attention_rows(attention, maps)
        if windows:
            from visformer.models.attention import Windows

            cut = Windows.over((6, 6), 3, attention.shifted)
            _, _, v = cut.split(attention.qkv(maps), 4)
            mixed = cut.join(rows @ v, 4)
        else:
            v = attention.qkv(maps)[:, 64:].unflatten(1, (4, 8)).flatten(3)  # (B, heads, d, N)
            mixed = (rows @ v.transpose(2, 3)).transpose(2, 3).flatten(1, 2).unflatten(2, (6, 6))
        torch.testing.assert_close(attention.proj(mixed), attention(maps), rtol=1e-4, atol=1e-5)


# ---- occlusion


def test_occlusion_finds_what_the_odds_hang_on():
    """A model that counts brightness in one place of the input, and nothing else."""
    image = np.ones((3, 70, 140), dtype=np.float32)
    grid = heatmaps.occlusion_grid(70, 140)
    assert grid == (7, 7)
    covered = np.stack(list(heatmaps.occluded(image, grid)))
    assert covered.shape == (49, 3, 70, 140)

    def run(batch: np.ndarray) -> np.ndarray:
        seen = batch[:, 0, 20:30, 100:120].mean((1, 2))  # row 2, column 5
        return np.stack([seen * 5, np.zeros_like(seen)], axis=1)

    values = heatmaps.occlusion(run(image[None])[0], run(covered), 0, grid)
    assert np.unravel_index(values.argmax(), grid) == (2, 5)
    assert values[2, 5] == pytest.approx(5)
    assert values[6, 0] == 0
    other = heatmaps.occlusion(run(image[None])[0], run(covered), 1, grid)
    np.testing.assert_allclose(other, -values, atol=1e-6)


def test_log_odds_are_of_the_probability():
    logits = np.array([[2.0, -1.0, 0.5], [900.0, -900.0, 0.0]])
    powers = np.exp(logits[0])
    chance = powers[1] / powers.sum()
    odds = heatmaps.log_odds(logits, 1)
    assert odds[0] == pytest.approx(np.log(chance / (1 - chance)))
    assert odds[1] == pytest.approx(-1800)
    assert heatmaps.log_odds(np.array([3.0]), 0) == 3


@pytest.mark.parametrize("size", [(1, 1), (3, 30), (8, 8), (28, 28), (224, 224)])
def test_occlusion_covers_everything(size):
    image = np.ones((1, *size), dtype=np.float32)
    grid = heatmaps.occlusion_grid(*size)
    covered = list(heatmaps.occluded(image, grid))
    assert len(covered) == grid[0] * grid[1]
    assert (np.min(covered, axis=0) == 0).all()
    assert image.min() == 1


# ---- where it lies on the photo


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (50, 41), (640, 20), (20, 900), (1000, 999)])
@pytest.mark.parametrize("crop", [(64, 64), (64, 96), (96, 64)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("rounding", ["round", "floor"])
def test_the_crop_is_what_the_model_sees(size, crop, crop_pct, rounding):
    """A picture whose colours say where in it they are: red the column, green the row."""
    width, height = size
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    pixels = np.stack([columns, rows, np.zeros_like(rows)], axis=2)
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    values = Preprocessing(crop, crop_pct, "bilinear", crop_rounding=rounding).to_dict()
    seen = ImagePreprocessing.from_dict(values).pixels(picture).astype(float) / 255
    box = heatmaps.crop_box(ImagePreprocessing.from_dict(values), height, width)
    across = (box.left + (np.arange(crop[1]) + 0.5) / crop[1] * box.width) / width
    down = (box.top + (np.arange(crop[0]) + 0.5) / crop[0] * box.height) / height
    inner = slice(2, -2)  # at the picture's edges the kernel is cut off
    tolerance = 2 / 255 + 0.5 / min(size)
    np.testing.assert_allclose(
        seen[:, inner, 0], np.broadcast_to(across[inner], seen[:, inner, 0].shape), atol=tolerance
    )
    np.testing.assert_allclose(
        seen[inner, :, 1].T, np.broadcast_to(down[inner], seen[inner, :, 1].T.shape), atol=tolerance
    )
    assert box.left >= 0 and box.top >= 0
    assert box.left + box.width <= width + 1e-9 and box.top + box.height <= height + 1e-9


def test_a_grid_is_scaled_by_its_largest_magnitude():
    numbers, scale = heatmaps.scaled(np.array([[1.0, -4.0], [0.0, 2.0]]))
    assert (numbers, scale) == ([[0.25, -1.0], [0.0, 0.5]], 4.0)
    assert heatmaps.scaled(np.zeros((1, 2))) == ([[0.0, 0.0]], 1.0)
