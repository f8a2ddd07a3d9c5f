"""Weights that are elsewhere: the table of the published ones, downloads, and the Hugging Face hub in both directions.

`fetch` brings any source to a local file; `Visformer` is the model that hubs know, with `from_pretrained`,
`save_pretrained` and `push_to_hub`; `model_card` writes what its page says. These two load torch and `huggingface_hub`,
which a file that is here already does not need, so they are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from visformer.hub.download import download
from visformer.hub.fetch import Fetched, fetch
from visformer.hub.published import PUBLISHED, Weights, find_weights, list_pretrained
from visformer.machine import cache_folder

if TYPE_CHECKING:
    from visformer.hub.card import model_card
    from visformer.hub.model import Visformer

__all__ = [
    "PUBLISHED",
    "Fetched",
    "Visformer",
    "Weights",
    "cache_folder",
    "download",
    "fetch",
    "find_weights",
    "list_pretrained",
    "model_card",
]

_LATER = {"Visformer": "visformer.hub.model", "model_card": "visformer.hub.card"}


def __getattr__(name: str) -> Any:
    """Import what a public name stands for, once (PEP 562)."""
    if name not in _LATER:
        raise AttributeError(f"module 'visformer.hub' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_LATER[name]), name)
    return value
