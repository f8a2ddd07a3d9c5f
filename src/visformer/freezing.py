"""Which parts of a model stay as they are while the others learn (`--freeze`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from visformer.errors import UsageError
from visformer.models import Visformer


def frozen_parts(model: Visformer, freeze: str) -> list[nn.Module]:
    """The modules from the input up to the part that `freeze` names: stem, stage1, ..., or backbone, all but the head.

    Raises `UsageError` for a stage that the model does not have.
    """
    if freeze == "none":
        return []
    body: list[nn.Module] = [model.stem, *model.stages]
    if freeze == "backbone":
        return [*body, model.norm]
    count = 1 if freeze == "stem" else 1 + int(freeze.removeprefix("stage"))
    if count > len(body):
        raise UsageError(f"freeze: {freeze} is not there; the model has stages 1 to {len(model.stages)}")
    return body[:count]


def set_frozen(parts: Sequence[nn.Module], frozen: bool) -> None:
    """Let the weights of `parts` learn or not; frozen ones are in evaluation mode, so their statistics stay too."""
    for part in parts:
        part.requires_grad_(not frozen)
        part.train(not frozen)
