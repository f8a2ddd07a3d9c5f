"""The published weights: a table from a name, MODEL.SOURCE, to where they are and what they should be.

Sources: the model zoo of MindCV (mindspore-lab/mindcv), the releases of the authors' repository (danczs/Visformer), and
timm's repositories on the Hugging Face hub. MindCV puts the first digits of a file's SHA-256 into its name; the authors
state none. Accuracies are quoted from these projects, top-1 and top-5 in percent on ImageNet-1k's validation set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visformer.errors import UsageError, nearest

HUB = "hf-hub:"

_MINDCV = "https://download.mindspore.cn/toolkits/mindcv/visformer/"
_MINDCV_910V2 = "https://download-mindspore.osinfra.cn/toolkits/mindcv/visformer/"
_AUTHORS = "https://github.com/danczs/Visformer/releases/download/v1.0.0/"


@dataclass(frozen=True)
class Weights:
    """One published file: an https address or a hub's `hf-hub:owner/name`, and what its publishers say of it."""

    model: str
    source: Literal["mindcv", "authors", "timm"]
    url: str
    filename: str
    sha256: str | None = None  # hex digits with which the file's SHA-256 begins; None: its publishers state none
    top1: float | None = None
    top5: float | None = None

    @property
    def on_hub(self) -> bool:
        """True when the file is in a repository of the Hugging Face hub, whose own checks apply."""
        return self.url.startswith(HUB)


def _mindcv(model: str, sha256: str, top1: float, top5: float) -> Weights:
    filename = f"{model}-{sha256}.ckpt"
    return Weights(model, "mindcv", _MINDCV + filename, filename, sha256, top1, top5)


def _authors(model: str, top1: float, filename: str = "") -> Weights:
    filename = filename or f"{model}.pth"
    return Weights(model, "authors", _AUTHORS + filename, filename, None, top1)


def _timm(model: str) -> Weights:
    return Weights(model, "timm", f"{HUB}timm/{model}.in1k", "model.safetensors")


PUBLISHED: dict[str, Weights] = {
    "visformer_tiny.mindcv": _mindcv("visformer_tiny", "daee0322", 78.28, 94.15),
    "visformer_tiny_v2.mindcv": _mindcv("visformer_tiny_v2", "6711a758", 78.82, 94.41),
    "visformer_small.mindcv": _mindcv("visformer_small", "6c83b6db", 81.73, 95.88),
    "visformer_small_v2.mindcv": _mindcv("visformer_small_v2", "63674ade", 82.17, 95.90),
    "visformer_tiny.mindcv_910v2": Weights(  # for later hardware; the accuracies above are those of the other files
        "visformer_tiny",
        "mindcv",
        f"{_MINDCV_910V2}visformer_tiny-df995ba4-910v2.ckpt",
        "visformer_tiny-df995ba4-910v2.ckpt",
        "df995ba4",
    ),
    "visformer_small.authors": _authors("visformer_small", 82.21),
    "swin_visformer_small.authors": _authors("swin_visformer_small", 82.34),
    "swin_visformer_small_v2.authors": _authors("swin_visformer_small_v2", 83.00),
    "swin_visformer_medium_v2.authors": _authors(
        "swin_visformer_medium_v2", 83.62, filename="swin_visofrmer_medium.pth"
    ),  # so spelt
    "visformer_tiny.timm": _timm("visformer_tiny"),
    "visformer_small.timm": _timm("visformer_small"),
}


def list_pretrained(model: str | None = None) -> list[str]:
    """Names of the published weights, all of them or those of `model`; `load` and `pretrained=` take them."""
    return [name for name, weights in PUBLISHED.items() if model in (None, weights.model)]


def find_weights(name: str) -> Weights:
    """The table's row of `name`. Raises `UsageError` with the nearest names for one that is not there."""
    if name not in PUBLISHED:
        raise UsageError(
            f"there are no published weights {name!r}{nearest(name, PUBLISHED)}; there are: {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def row_of_url(url: str) -> Weights | None:
    """The table's row of an address, if it is one of the published."""
    return next((weights for weights in PUBLISHED.values() if weights.url == url), None)
