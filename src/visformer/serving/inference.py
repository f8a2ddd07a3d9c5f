"""From images or a tensor to logits, and from logits to labels: what all the protocols share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from visformer.serving.batching import Computed
from visformer.serving.decoding import Decoder
from visformer.serving.door import Call
from visformer.serving.model import ServedModel
from visformer.serving.refusals import Refusal, bad
from visformer.serving.scores import best
from visformer.serving.settings import Settings

_NOT_FINITE = "the model's output for it is not finite"


class Inference:
    """Computes for requests that have been admitted. Cancel a call to withdraw its images."""

    def __init__(self, decoder: Decoder, settings: Settings) -> None:
        self.decoder, self.settings = decoder, settings

    async def images(self, call: Call, model: ServedModel, images: Sequence[bytes]) -> list[Computed | Refusal]:
        """Image files -> for each what was computed, or why nothing was: a broken one fails alone.

        Raises `Refusal` when there are too many, or none.
        """
        self._count(call, model, len(images))
        answers = [self.decoder.feed(data, model.preprocessing, model.batcher) for data in images]
        results = await asyncio.gather(*answers, return_exceptions=True)
        outcomes: list[Computed | Refusal] = []
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Refusal):
                raise result
            finite = isinstance(result, Refusal) or result.finite
            outcomes.append(result if finite else bad(f"the image can't be labelled: {_NOT_FINITE}"))
        computed = [one for one in outcomes if isinstance(one, Computed)]
        call.images = len(computed)
        if computed:
            call.stages["decode"] = max(one.decode_s for one in computed)
            _note(call, computed)
        return outcomes

    async def tensor(self, call: Call, model: ServedModel, batch: np.ndarray) -> np.ndarray:
        """Preprocessed images, float32 (B, C, H, W) -> logits, float32 (B, classes). Raises `Refusal` 400."""
        self._count(call, model, len(batch))
        _check_shape(model, batch.shape)
        if not np.isfinite(batch).all():
            raise bad("images: has values that are not finite")
        computed = await asyncio.gather(*model.batcher.submit(list(batch)))
        if not all(one.finite for one in computed):
            raise bad(f"images: {_NOT_FINITE}")
        _note(call, computed)
        return np.stack([one.logits for one in computed])

    def _count(self, call: Call, model: ServedModel, images: int) -> None:
        call.model, call.version, call.images = model.name, model.version, images
        call.statistics = model.statistics
        if not 0 < images <= self.settings.max_images:
            raise bad(f"{images} images in one request; send 1 to {self.settings.max_images}")


def _check_shape(model: ServedModel, shape: tuple[int, ...]) -> None:
    channels, (height, width) = model.preprocessing.in_channels, model.preprocessing.image_size
    fits = len(shape) == 4 and shape[1] == channels
    if model.loaded.any_size:
        largest = 4 * max(height, width)
        fits = fits and all(0 < side <= largest and side % 32 == 0 for side in shape[2:])
        wanted = f"[n, {channels}, height, width], with sides that are multiples of 32, up to {largest}"
    else:
        fits = fits and shape[2:] == (height, width)
        wanted = f"[n, {channels}, {height}, {width}]"
    if not fits:
        raise bad(f"images: shape {list(shape)} does not fit; it must be {wanted}")


def _note(call: Call, computed: Sequence[Computed]) -> None:
    call.stages["queue"] = max(one.queue_s for one in computed)
    call.stages["compute"] = max(one.compute_s for one in computed)


def predictions(model: ServedModel, computed: Computed, top_k: int) -> list[dict[str, Any]]:
    """The records that `visformer predict` gives of an image."""
    chances = computed.probabilities
    records = []
    for index in best(chances[None], top_k)[0].tolist():
        label = model.labels[index]
        words = {"description": model.descriptions[label]} if label in model.descriptions else {}
        records.append({"label": label, **words, "index": index, "probability": float(chances[index])})
    return records
