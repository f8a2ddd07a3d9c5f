"""`--decode device`: from the bytes of a batch to its augmented images, on the device, ahead of the step that trains.

A batch is decoded, cropped and resized, flipped, and goes through the steps that its workers drew, all of it as whole
batches of bytes. Normalising, erasing and mixing follow in the training step (mixing.py), as with any other loader.

On CUDA this is done by a thread and on streams of its own, `AHEAD` batches before they are asked for, so that the step
that trains runs meanwhile. On a CPU it is done when a batch is asked for.

A JPEG that turns out damaged here gets a second chance with the decoders that the workers use; one that they refuse
counts as an image that can't be read, and the first good sample of its batch stands in for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from visformer.data.batch import Batch
from visformer.data.decode import ImageError
from visformer.data.device_augment import Augmenter
from visformer.data.device_decode import DECODED_AT_ONCE, Lane, check_device, upright
from visformer.data.device_jobs import Sample, ToldBytes
from visformer.data.device_resize import resize_crops
from visformer.data.encoded import Encoded
from visformer.data.policies import fill_of
from visformer.data.preprocessing import for_channels
from visformer.data.transforms import TrainTransform

if TYPE_CHECKING:
    from visformer.config import TrainConfig

AHEAD = 2  # batches

# Letters in shapes: N images that were read, S copies of each, C channels, H x W of the model.


class DeviceFeed:
    """What `ByteJob` made -> `Batch`es whose images are on `device`, `ahead` of when they are asked for.

    Raises `UsageError` for a device that can't decode.
    """

    def __init__(self, config: TrainConfig, device: torch.device, ahead: int | None = None) -> None:
        check_device(device)
        self.device = device
        self.ahead = (AHEAD if device.type == "cuda" else 0) if ahead is None else ahead
        self.size = config.image_size
        self.channels = config.in_channels
        self.splits = config.aug_splits
        self.transform = TrainTransform(config)
        self.augment = Augmenter(fill_of(for_channels(config.mean, config.in_channels, "mean")), device)
        self.lane = Lane(device)

    def __call__(self, made: Iterable[tuple[Tensor, ToldBytes]]) -> Iterator[Batch]:
        if not self.ahead:
            for memory, told in made:
                yield self._handed_over(*self._make(memory, told))
            return
        coming: deque[Future] = deque()
        with ThreadPoolExecutor(1, "decoding") as thread:
            try:
                for memory, told in made:
                    coming.append(thread.submit(self._make, memory, told))
                    if len(coming) > self.ahead:
                        yield self._handed_over(*coming.popleft().result())
                while coming:
                    yield self._handed_over(*coming.popleft().result())
            finally:
                for future in coming:
                    future.cancel()

    def _handed_over(self, batch: Batch, ready: Any) -> Batch:
        self.lane.hand_over(batch.images, ready)
        return batch

    @torch.no_grad()
    def _make(self, memory: Tensor, told: ToldBytes) -> tuple[Batch, Any]:
        """The batch, and the point in the lane from which on its images are there."""
        with self.lane.aside():
            data = [_bytes(sample, memory) for sample in told.samples]
            images, damaged = self._placed(told.samples, data)
            good = [row for row in range(len(told.samples)) if row not in damaged]
            if damaged:
                images = images[_index(good, self.device)]
            samples = [told.samples[row] for row in good]
            images, shown = self._complete(self._looking(images, samples), samples, told.count)
            failures = told.failures + [
                (told.samples[row].place, told.samples[row].name, why) for row, why in damaged.items()
            ]
            targets = torch.tensor([sample.target for sample in shown], dtype=torch.int64)
            listed = [(name, reason) for _, name, reason in sorted(failures)]
            batch = Batch(images, targets, [sample.index for sample in shown], listed)
            return batch, self.lane.mark()

    def _placed(self, samples: Sequence[Sample], data: Sequence[Tensor]) -> tuple[Tensor, dict[int, str]]:
        """Images cropped, resized and flipped, uint8 (N, C, H, W), and the reason for each row that could not be."""
        images = torch.zeros((len(samples), self.channels, *self.size), dtype=torch.uint8, device=self.device)
        damaged: dict[int, str] = {}
        rows = [row for row, sample in enumerate(samples) if sample.stored is None]
        finished = [data[row].view(*self.size, self.channels) for row in rows]
        groups = deque(_decoded_together(samples))
        while groups:
            group = groups.popleft()
            decoded = self.lane.decode([data[row] for row in group], self.channels)
            if decoded is not None:
                self._fill(images, group, decoded, samples)
            elif len(group) > 1:  # by halves, to find the one that is at fault
                groups.extend((group[: len(group) // 2], group[len(group) // 2 :]))
            else:
                [row] = group
                try:
                    image = Encoded(data[row].numpy().tobytes(), self.channels)
                    finished.append(torch.from_numpy(self.transform.placed(image, samples[row].placing)))
                    rows.append(row)
                except ImageError as error:
                    damaged[row] = error.reason
        if rows:
            pixels = torch.stack(finished).to(self.device, non_blocking=True)  # (rows, H, W, C)
            images[_index(rows, self.device)] = pixels.permute(0, 3, 1, 2)
        return images, damaged

    def _fill(self, images: Tensor, rows: list[int], decoded: list[Tensor], samples: Sequence[Sample]) -> None:
        """Crop, resize and flip `decoded` images into their rows of `images`."""
        placings = [samples[row].placing for row in rows]
        crops = []
        for row, image, placing in zip(rows, decoded, placings, strict=True):
            left, top, width, height = placing.box
            crops.append(upright(image, samples[row].upright)[:, top : top + height, left : left + width])
        resized = resize_crops(crops, self.size, [placing.resampling.name.lower() for placing in placings])
        for axis, chosen in ((3, [p.mirrored for p in placings]), (2, [p.upside_down for p in placings])):
            if any(chosen):
                flipped = torch.tensor(chosen).to(self.device, non_blocking=True)
                resized = torch.where(flipped[:, None, None, None], resized.flip(axis), resized)
        images[_index(rows, self.device)] = resized

    def _looking(self, images: Tensor, samples: Sequence[Sample]) -> Tensor:
        """Images after their looks, uint8 (S, N, C, H, W); with aug_splits, the clean ones first."""
        if not samples:
            return images[None].expand(max(self.splits, 1), *images.shape)
        copies = range(len(samples[0].looks))
        looking = [self.augment(images, [sample.looks[copy] for sample in samples]) for copy in copies]
        return torch.stack([images, *looking] if self.splits else looking)

    def _complete(self, images: Tensor, samples: list[Sample], count: int) -> tuple[Tensor, list[Sample]]:
        """A batch of `count`, (S * count, C, H, W), in which copies of the first stand in for images that could not be
        read, and the sample that each place shows. Without a single good one there is no batch."""
        if 0 < len(samples) < count:
            row_of = {sample.place: row for row, sample in enumerate(samples)}
            rows = [row_of.get(place, 0) for place in range(count)]
            images = images[:, _index(rows, self.device)]
            samples = [samples[row] for row in rows]
        return images.flatten(0, 1), samples


def _decoded_together(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Rows of those that are still encoded, in groups that the device's memory holds decoded."""
    group: list[int] = []
    pixels = 0
    for row, sample in enumerate(samples):
        if sample.stored is None:
            continue
        own = sample.stored[0] * sample.stored[1]
        if group and pixels + own > DECODED_AT_ONCE:
            yield group
            group, pixels = [], 0
        group.append(row)
        pixels += own
    if group:
        yield group


def _bytes(sample: Sample, memory: Tensor) -> Tensor:
    """The sample's own part of the batch's memory, uint8 (bytes,)."""
    if sample.loose is not None:
        return torch.from_numpy(np.frombuffer(bytearray(sample.loose), np.uint8))
    return memory[sample.begin : sample.end]


def _index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
