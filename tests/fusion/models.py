"""Models for tests of fusion: with statistics and scales that are anything but those of a fresh model."""

import torch
from torch import nn

import visformer
from visformer.models import Architecture, StageConfig, Visformer

MINIATURES = {
    "spatial, then attention": Architecture(
        16,
        (
            StageConfig(32, 1, 4, spatial_mlp=True),
            StageConfig(48, 1, 2, num_heads=3, attention=True),
        ),
        num_classes=7,
        image_size=(32, 48),
        groups=4,
    ),
    "windows and tanh": Architecture(
        16,
        (
            StageConfig(32, 2, 2, num_heads=2, attention=True, window=4),
            StageConfig(64, 1, 2, num_heads=2, attention=True, window=3),
        ),
        num_classes=5,
        image_size=(36, 32),
        gelu="tanh",
    ),
    "layer norm, no stem": Architecture(
        0,
        (StageConfig(32, 2, 16, num_heads=2, attention=True),),
        num_classes=3,
        image_size=(32, 48),
        norm="layer",
        embed_norm=False,
    ),
    "no positions, norm after embedding, dense": Architecture(
        16,
        (StageConfig(32, 1, 4, num_heads=2, attention=True, spatial_mlp=True),),
        num_classes=0,
        image_size=(32, 32),
        groups=1,
        pos_embed=False,
    ),
}


def lived_in(model: Visformer) -> Visformer:
    """`model` as training would leave it: norms with scales and shifts, and statistics of what they were given."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics are the mean over all that is given
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    model.train()
    shape = (4, model.config.in_channels, *model.config.image_size)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(shape, generator=generator))
    return model.eval()


def build(name: str, **options) -> Visformer:
    """A named model, or one of `MINIATURES`, lived in."""
    torch.manual_seed(0)
    if name in MINIATURES:
        return lived_in(Visformer(MINIATURES[name], **options))
    return lived_in(visformer.models.create_model(name, **options))


def images(model: Visformer, count: int = 2, seed: int = 2) -> torch.Tensor:
    """Normalised images for `model`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.config.in_channels, *model.config.image_size, generator=generator)


def off_by(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of the largest logit."""
    logits, expected = logits.detach(), expected.detach()
    return float((logits.double() - expected.double()).abs().max() / expected.double().abs().max())
