"""What only a GPU can show: nvJPEG's pixels, the operations on CUDA, and that no memory is overwritten too early."""

import numpy as np
import pytest
import torch

from tests.data.test_device_feed import Files, config, encoded, epoch_of, photographs, pixels_of
from visformer.data import device_decode, device_ops, make_train_loader
from visformer.data.device_policies import move
from visformer.data.device_resize import resize_crops
from visformer.data.preprocessing import PIL_RESAMPLING

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def photos() -> Files:
    return Files([encoded(pixels, subsampling=index % 3) for index, pixels in enumerate(photographs(64))])


def on_cuda(source, number: int = 0, busy: bool = False, **options):
    loader = make_train_loader(source, config(decode="device", **options), device=CUDA)
    loader.set_epoch(number)
    work = torch.randn(2048, 2048, device=CUDA)
    batches = []
    for batch in loader:
        for _ in range(20 if busy else 0):  # the training stream is still at this when the next batch is decoded
            work = (work @ work).tanh()
        batches.append(batch.images.clone())
    loader.close()
    return torch.cat(batches).cpu()


@pytest.mark.parametrize("policy", [None, "randaug-m9-n2-mstd0.5-inc1", "augmix-m5-w3"])
def test_samples_are_those_of_the_workers(photos, policy, monkeypatch):
    decoded, nvjpeg = [], device_decode._nvjpeg

    def counting(encoded, *others):
        decoded.extend(encoded)
        return nvjpeg(encoded, *others)

    monkeypatch.setattr(device_decode, "_nvjpeg", counting)
    options = {"auto_augment": policy, "interpolation": "bicubic"}
    theirs = pixels_of(epoch_of(photos, decode="workers", **options))
    difference = np.abs(on_cuda(photos, **options).numpy().astype(int) - theirs).mean((1, 2, 3))
    assert np.median(difference) < 3 and (difference < 12).mean() > 0.95
    assert len(decoded) > 32, "nvJPEG was hardly asked"


def test_nothing_is_overwritten(photos):
    """Batches made while the training stream is busy are those made alone, epoch after epoch."""
    for number in range(4):
        alone = on_cuda(photos, number, auto_augment="autoaug")
        assert torch.equal(on_cuda(photos, number, busy=True, auto_augment="autoaug"), alone)


def test_operations_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 40, 56), dtype=torch.uint8, generator=generator)
    factors = torch.tensor([0.0, 0.3, 1.0, 1.4, 1.9])
    matrices = torch.tensor(
        [move("Rotate", by, (40, 56), PIL_RESAMPLING["bicubic"]).values for by in (0.0, 9.0, -30.0, 70.0, 135.0)],
        dtype=torch.float64,
    )
    fill = torch.tensor((9, 99, 199), dtype=torch.uint8)
    for operation, arguments in (
        (device_ops.contrast, (factors,)), (device_ops.color, (factors,)), (device_ops.sharpness, (factors,)),
        (device_ops.equalize, ()), (device_ops.auto_contrast, ()), (device_ops.affine, (matrices, fill, "bicubic")),
    ):  # fmt: skip
        expected = operation(images, *arguments).int()
        result = operation(images.to(CUDA), *(a.to(CUDA) if torch.is_tensor(a) else a for a in arguments)).cpu().int()
        assert ((result - expected).abs() > 1).float().mean() < 0.001, operation.__name__
    crops = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((375, 500), (31, 7), (100, 200))]
    filters = ["bicubic", "bilinear", "lanczos"]
    resized = resize_crops([crop.to(CUDA) for crop in crops], (32, 48), filters).cpu().int()
    assert (resized - resize_crops(crops, (32, 48), filters).int()).abs().max() <= 1
