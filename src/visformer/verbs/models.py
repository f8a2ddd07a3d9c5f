"""`visformer models`: every model with its size, its cost and the accuracy that its publishers report.

    visformer models --json

Sizes and cost are counted on the models themselves, built without memory on torch's meta device. Accuracies are
quoted, each with its source.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from visformer import console
from visformer.config import option

if TYPE_CHECKING:
    from torch import nn

GMACS_IMAGE_SIZE = 224  # pixels a side, at which the literature counts


@dataclass
class ModelsOptions:
    """Options of `visformer models`."""

    json: bool = option(False, "print the list as one JSON document on stdout", group="Output")


def run(options: ModelsOptions) -> int:
    """Print the models and return the exit code."""
    rows = models(options)
    if options.json:
        console.print_json(rows)
        return 0
    console.table(
        "",
        ["model", "family", "parameters", "with stats", "GMACs", "pixels", "top-1, %", "top-5, %", "source"],
        [line for row in rows for line in _lines(row)],
        numeric_from=2,
    )
    print(
        "Parameters alone, and with BatchNorm's running statistics, as MindCV counts. GMACs: billions of multiply-adds"
        f"\nfor one image of {GMACS_IMAGE_SIZE}x{GMACS_IMAGE_SIZE}. Both are counted here, on the models. Accuracy on "
        "ImageNet-1k's validation set is quoted\nfrom MindCV's page and from the authors' repository, which has none "
        "for net1 to net7, the steps that the paper takes\nfrom a transformer to a convolutional network."
    )
    return 0


def models(options: ModelsOptions) -> list[dict[str, Any]]:
    """One record for each model of `create_model`, in the order of `list_models`.

    name; family; params: number of parameters; params_with_stats: with BatchNorm's running means and variances; gmacs:
    1e9 multiply-adds in the products of one image at 224x224; image_size: side in pixels that it was published for;
    published: list of {top1, top5, source}, percent on ImageNet-1k, top5 None where it is not reported; and top1, top5
    and source of the first of these, None where nothing is published.
    """
    import torch

    from visformer.models import VARIANTS, create_model

    records = []
    for name, variant in VARIANTS.items():
        with torch.device("meta"):
            model = create_model(name).eval()
        params = sum(parameter.numel() for parameter in model.parameters())
        stats = sum(b.numel() for key, b in model.named_buffers() if not key.endswith("num_batches_tracked"))
        published = [asdict(figure) for figure in variant.published]
        first: dict[str, Any] = published[0] if published else dict.fromkeys(("top1", "top5", "source"))
        records.append(
            {
                "name": name,
                "family": variant.family,
                "params": params,
                "params_with_stats": params + stats,
                "gmacs": count_gmacs(model, variant.architecture.in_channels, GMACS_IMAGE_SIZE),
                "image_size": variant.architecture.image_size[0],
                "published": published,
                **first,
            }
        )
    return records


def count_gmacs(model: nn.Module, in_channels: int, image_size: int) -> float:
    """1e9 multiply-adds of the products (convolutions, linear maps, attention) for one image.

    `model` is on the meta device, where nothing is computed, in eval mode.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.empty(1, in_channels, image_size, image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2e9


def _lines(row: dict[str, Any]) -> list[list[str]]:
    """A model's lines of the table: its figures with the first publication, then the others below."""
    side = row["image_size"]
    figures = [
        row["name"],
        row["family"],
        f"{row['params']:,}",
        f"{row['params_with_stats']:,}",
        f"{row['gmacs']:.2f}",
        f"{side}x{side}",
    ]
    lines = []
    for accuracy in row["published"] or [{"top1": None, "top5": None, "source": "-"}]:
        percent = ["-" if accuracy[key] is None else f"{accuracy[key]:.2f}" for key in ("top1", "top5")]
        lines.append([*figures, *percent, accuracy["source"]])
        figures = [""] * len(figures)
    return lines
