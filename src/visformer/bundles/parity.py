"""Does what was exported give the source's logits? Every export is run on both sides before it is called done.

The source is torch in fp32 behind its own preprocessing; the bundle is opened as anyone would open it. A logit's
difference is judged by the scale of the logits, the largest there is (at least 1): fp32 may differ by 1e-4 of it.
The graph that takes images may differ by 5e-3 where the runtime has no double precision (OpenVINO): there about one
pixel in ten thousand is rounded to the next level, which costs more than the arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from visformer.bundles.engines import Engine, to_picture
from visformer.bundles.pixels import ImagePreprocessing
from visformer.errors import RunError

LIMITS = {"fp32": (1e-4, 5e-3), "fp16": (1e-2, 1e-2), "bf16": (1e-1, 1e-1)}  # of batches and of images, x scale
LEAST_AGREEMENT = 99.5  # percent of real images with the same best class, for half precision
ENOUGH = 200  # real images for that to be judged
_APART = 0.01  # by which an int8 bundle's two graphs may differ in that share
_BATCH = 16


@dataclass(frozen=True)
class Parity:
    """What was measured: the largest difference of a logit, and the share of images with the same best class.

    `image_...` is of the graph that takes images, `batch_...` of that for batches; None where there is none.
    """

    images: str  # generated, or real
    num_images: int
    largest_logit: float  # of the source, by magnitude
    batch_difference: float
    batch_agreement: float
    image_difference: float | None
    image_agreement: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def largest_difference(self) -> float:
        return max(self.batch_difference, self.image_difference or 0.0)

    @property
    def scale(self) -> float:
        return max(1.0, self.largest_logit)


def compare(
    model: Any,
    engine: Engine,
    preprocessing: ImagePreprocessing,
    images: Sequence[Callable[[], np.ndarray]],
    *,
    real: bool,
    takes_images: bool,
) -> Parity:
    """Run both sides on images, each uint8 (H, W, channels), given as functions so that they need not all be held."""
    source, batches, singles = [], [], []
    for first in range(0, len(images), _BATCH):
        arrays = [image() for image in images[first : first + _BATCH]]
        pictures = [to_picture(array) for array in arrays]
        source.append(source_logits(model, pictures))
        batches.append(engine.run(preprocessing(pictures)))
        singles += [engine.run_image(array) for array in arrays] if takes_images else []
    wanted, batch = np.concatenate(source), np.concatenate(batches)
    image = np.stack(singles) if singles else None
    return Parity(
        images="real" if real else "generated",
        num_images=len(images),
        largest_logit=float(np.abs(wanted).max()),
        batch_difference=_difference(wanted, batch),
        batch_agreement=_agreement(wanted, batch),
        image_difference=None if image is None else _difference(wanted, image),
        image_agreement=None if image is None else _agreement(wanted, image),
    )


def other_size_difference(model: Any, engine: Engine, parity: Parity, precision: str) -> float:
    """The largest difference of a logit at a size that the model was not exported at, for a bundle of dynamic size.

    The source's position embeddings are resampled to it. Raises `RunError` when the difference is too large.
    """
    height, width = model.config.image_size
    size = (height + 32 - height % 32, width + 64 - width % 32)
    sized = copy.deepcopy(model)
    sized.set_image_size(size)
    batch = np.random.default_rng(0).standard_normal((2, model.config.in_channels, *size)).astype(np.float32)
    with torch.inference_mode():
        difference = _difference(sized(torch.from_numpy(batch)).numpy(), engine.run(batch))
    limit = LIMITS.get(precision, (np.inf,))[0] * parity.scale
    if not difference <= limit:
        raise RunError(f"dynamic_image_size: at {size[0]}x{size[1]} a logit differs by {difference:.3g}")
    return difference


def source_logits(model: Any, pictures: Sequence[Any]) -> np.ndarray:
    """The logits of the model that is exported, float32 (B, classes), for PIL images."""
    with torch.inference_mode():
        batch = torch.stack([model.preprocessing(picture) for picture in pictures])
        return model(model.preprocessing.normalize(batch)).numpy()


def judge(parity: Parity, precision: str, min_agreement: float = LEAST_AGREEMENT) -> None:
    """Raise `RunError` when the export does not give what the source gives. Int8 is judged by its accuracy instead.

    `min_agreement` is of half precision: the percentage of real images whose best class must be the source's.
    """
    if not np.isfinite(parity.largest_difference):
        raise RunError(f"precision: {precision} gives logits that are not finite; export with --precision fp32")
    enough = parity.images == "real" and parity.num_images >= ENOUGH
    if precision not in LIMITS:
        of_images = parity.image_agreement
        if enough and of_images is not None and of_images < parity.batch_agreement - _APART:
            raise RunError(
                f"precision: {precision}: the graph for images agrees with the source on {100 * of_images:.2f} % "
                f"of the images, that for batches on {100 * parity.batch_agreement:.2f} %; try --input tensor"
            )
        return
    for which, limit in zip(("batch", "image"), LIMITS[precision], strict=True):
        difference = getattr(parity, f"{which}_difference")
        if difference is not None and difference > limit * parity.scale:
            raise RunError(
                f"precision: {precision}: a logit differs by {difference:.3g} from the source's, where the {which} "
                f"graph may by {limit * parity.scale:.3g}; nothing was written. Try fp32"
            )
        agreement = getattr(parity, f"{which}_agreement")
        judged = precision != "fp32" and enough
        if judged and agreement is not None and 100 * agreement < min_agreement:
            raise RunError(
                f"precision: {precision}: the best class is the source's for {100 * agreement:.2f} % of "
                f"{parity.num_images:,} images, below min_agreement {min_agreement:g} %; nothing was written. "
                f"Try another precision"
            )


def _difference(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(wanted - got).max())


def _agreement(wanted: np.ndarray, got: np.ndarray) -> float:
    return float((wanted.argmax(1) == got.argmax(1)).mean())
