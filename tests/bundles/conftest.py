"""A small Visformer with norms that do something, as a checkpoint, and bundles of it that tests share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visformer.bundles.build import Request, build
from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.data.preprocessing import Preprocessing
from visformer.models import Architecture, StageConfig, Visformer
from visformer.pretrained import load

CLASSES = ["bird", "cat", "dog", "frog", "horse"]


def settle(model: Visformer, side: int) -> Visformer:
    """Give every BatchNorm statistics, a scale and a shift of its own, and the head logits of some size."""
    random = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=random) + 0.5
            module.bias.data = torch.randn(module.num_features, generator=random) * 0.2
            module.momentum = None
    model.head.weight.data *= 10
    with torch.no_grad():
        model.train()(torch.randn(8, model.config.in_channels, side, side, generator=random))
    return model.eval()


def small_model(channels: int = 3) -> Visformer:
    torch.manual_seed(0)
    stages = (
        StageConfig(width=16, depth=2, patch_size=4, spatial_mlp=True),
        StageConfig(width=32, depth=1, patch_size=2, num_heads=2, attention=True),
        StageConfig(width=64, depth=1, patch_size=2, num_heads=4, attention=True),
    )
    shape = Architecture(8, stages, num_classes=len(CLASSES), image_size=(64, 64), in_channels=channels, groups=2)
    return settle(Visformer(shape), 64)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    model = small_model()
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    preprocessing = Preprocessing((64, 64), crop_pct=0.9)
    write_checkpoint(path, Checkpoint("visformer_tiny", model.config, CLASSES, preprocessing, model.state_dict()))
    return path


@pytest.fixture(scope="session")
def model(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="session")
def bundles(model, checkpoint, tmp_path_factory):
    """`bundles(format, precision, input)` -> a bundle, exported once."""
    made = {}

    def exported(format: str = "onnx", precision: str = "fp32", input: str = "image"):
        key = (format, precision, input)
        if key not in made:
            folder = tmp_path_factory.mktemp("bundles") / "-".join(key)
            made[key] = build(model, Request(format, precision, input, checkpoint=str(checkpoint)), folder)
        return made[key]

    return exported


@pytest.fixture(scope="session")
def photos(tmp_path_factory, model) -> Path:
    """Labelled images: the class of each is what the model says, so that its own accuracy is 100 %."""
    from visformer.bundles.parity import source_logits
    from visformer.bundles.samples import generated

    root = tmp_path_factory.mktemp("photos")
    for name in CLASSES:
        (root / name).mkdir()
    for number in range(40):
        picture = Image.fromarray(generated((70 + number, 90), 3, number))
        label = CLASSES[int(np.argmax(source_logits(model, [picture])[0]))]
        picture.save(root / label / f"{number}.png")
    for name in CLASSES:
        if not any((root / name).iterdir()):
            (root / name).rmdir()
    return root
