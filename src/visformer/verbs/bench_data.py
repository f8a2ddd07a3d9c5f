"""`visformer bench --what data`: how fast images come from files, by our loader and by timm's, side by side.

    visformer bench --what data --workers 2
    visformer bench --what data --data_dir photos/train --models visformer_tiny,visformer_small

All contenders read the same images with the same augmentation and as many worker processes, and take turns pass by pass
in one process. Two stages are told apart. `loaded` is what the workers deliver: bytes of pixels; timm's have been mixed
by then, because its workers do that (`timm, unmixed` leaves it out), ours are mixed on the device. `ready` is what a
model is given: normalised, erased and mixed, on the device.

`visformer, packed` reads the same images as `visformer pack --format uint8` writes them, the short side reduced to 256
pixels for a model that takes 224. What the files are is in bench_data_images.py.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader
from timm.data.mixup import FastCollateMixup
from torch import Tensor

from visformer import console
from visformer.config import TrainConfig
from visformer.data import Batch, DeviceTransform, ImageSource, TrainLoader, make_train_loader
from visformer.data.policies import parse_policy, pillow_posterize
from visformer.errors import UsageError
from visformer.models import create_model
from visformer.verbs.bench_data_images import images, packed_images
from visformer.verbs.bench_timing import Contender, Timed, cells, summarize, take_turns
from visformer.verbs.trainer import Trainer

NUM_CLASSES = 1000
STEPS = 5  # of training, for a model's own rate; two more come before
BASELINE = "timm"
PACKED = "visformer, packed"


def measure(options: Any, device: torch.device) -> list[dict[str, Any]]:
    """One result for each batch size: batch_size, images, `stages` and `models`.

    A stage has a name and `contenders` as `bench_timing.summarize` describes them. A model has its name, images_per_s
    of training, `limit` (loader or model), and `packed_limit`, the same of packed data. Raises `UsageError` for a
    folder or policy that can't be used.
    """
    with images(options) as source:
        names = [source.name(index) for index in range(len(source))]
        console.note(
            f"{len(names)} JPEGs, {np.mean([Path(name).stat().st_size for name in names]) / 1000:.0f} kB on average; "
            f"{options.workers} workers; {options.repeats} passes of each contender"
        )
        with packed_images(source, options.image_size) as packed:
            return [_measure(source, packed, batch_size, options, device) for batch_size in options.batch_sizes]


def versions() -> dict[str, str]:
    """What decodes, beside what every benchmark names."""
    import simplejpeg

    return {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__}


def data_config(options: Any, batch_size: int) -> TrainConfig:
    """The augmentation of the recipe visformer_tiny, with the options' policy and size."""
    return TrainConfig(
        image_resize=options.image_size,
        batch_size=batch_size,
        num_parallel_workers=options.workers,
        interpolation="bicubic",
        auto_augment=options.auto_augment,
        re_prob=0.25,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
        max_bad_images=0,
    )


def _measure(
    source: ImageSource, packed: ImageSource, batch_size: int, options: Any, device: torch.device
) -> dict[str, Any]:
    config = data_config(options, batch_size)
    batches = len(source) // batch_size
    if not batches:
        raise UsageError(
            f"batch_sizes: {batch_size} is more than the {len(source)} images; lower it or raise num_images"
        )
    ours, ours_packed = (make_train_loader(images, config) for images in (source, packed))
    theirs, unmixed = (timm_loader(source, config, device, mixed) for mixed in (True, False))
    prepare = DeviceTransform(config, NUM_CLASSES)
    stages = []
    try:
        for stage, contenders in {
            "loaded": [
                _contender("visformer", lambda: (batch.images for batch in _epoch(ours))),
                _contender(PACKED, lambda: (batch.images for batch in _epoch(ours_packed))),
                _contender(BASELINE, lambda: (images for images, _ in theirs.loader)),
                _contender("timm, unmixed", lambda: (images for images, _ in unmixed.loader)),
            ],
            "ready": [
                *(
                    _contender(name, lambda loader=loader: _readied(loader, prepare, device), "float32")
                    for name, loader in (("visformer", ours), (PACKED, ours_packed))
                ),
                _contender(BASELINE, lambda: (images for images, _ in theirs), "float32"),
            ],
        }.items():
            title = f"{stage}, batch {batch_size}"
            timed = take_turns(contenders, device, warmup=options.warmup, repeats=options.repeats, title=title)
            baseline = next(t for t in timed if t.contender.name == BASELINE)
            records = [_record(t, baseline, batches * batch_size, options.warmup) for t in timed]
            stages.append({"stage": stage, "contenders": records})
    finally:
        ours.close()
        ours_packed.close()
    rates = [contender["images_per_s"] for contender in stages[-1]["contenders"][:2]]
    models = [_compare(name, rates, batch_size, options, device) for name in options.models or []]
    return {"batch_size": batch_size, "images": batches * batch_size, "stages": stages, "models": models}


class _Pass:
    """A contender's step: one pass over the images. It returns the first pixels of the last batch, and keeps how many
    seconds of processors each pass took, of this process and the workers."""

    def __init__(self, batches: Callable[[], Iterator[Tensor]]) -> None:
        self.batches = batches
        self.processor_s: list[float] = []

    def __call__(self) -> Tensor:
        began = _processor_s()
        last = torch.zeros(1)
        for batch in self.batches():  # dropped one by one, as training does
            last = batch
        self.processor_s.append(_processor_s() - began)
        return last.flatten()[:16].float()


def _contender(name: str, batches: Callable[[], Iterator[Tensor]], precision: str = "uint8") -> Contender:
    return Contender(name, precision, "channels_last" if name.startswith("visformer") else "contiguous", _Pass(batches))


def _record(timed: Timed, baseline: Timed, images: int, warmup: int) -> dict[str, Any]:
    """A contender's record, with the processors' time, which other work on the machine disturbs less than the clock's:
    milliseconds an image, and the baseline's over it; None where it can't be told."""
    own, base = (np.median(t.contender.step.processor_s[warmup:]) for t in (timed, baseline))  # type: ignore
    known = bool(np.isfinite(own) and own > 0)
    return summarize(timed, baseline, images) | {
        "processor_ms_per_image": float(own) / images * 1000 if known else None,
        "processor_ratio": float(base / own) if known else None,
    }


def _processor_s() -> float:
    """Seconds of processors that this process and its children have used; NaN where there is no /proc."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system, in ticks
    return total


_epochs = iter(range(1 << 30))


def _epoch(loader: TrainLoader) -> Iterator[Batch]:
    loader.set_epoch(next(_epochs))
    return iter(loader)


def _readied(loader: TrainLoader, prepare: DeviceTransform, device: torch.device) -> Iterator[Tensor]:
    return (_ready(batch, prepare, device) for batch in _epoch(loader))


def _ready(batch: Batch, prepare: DeviceTransform, device: torch.device) -> Tensor:
    images, targets = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.targets))
    return prepare(images, targets, seed=batch.indices[0])[0]


# ---- timm's


def timm_loader(source: ImageSource, config: TrainConfig, device: torch.device, mixed: bool) -> Any:
    """timm's training loader on the same files, with the same settings in its own words; see `create_loader`.

    `.loader` of it is the part that runs in workers. With `mixed`, they mix while they collate, as timm's recipes do.
    """
    dataset = _Files([(source.name(index), source.target(index)) for index in range(len(source))])
    collate = FastCollateMixup(
        config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=NUM_CLASSES
    )
    loader = create_loader(
        dataset,
        (config.in_channels, *config.image_size),
        config.batch_size,
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=config.color_jitter or 0.0,
        auto_augment=_timms_policy(config.auto_augment),
        interpolation=config.interpolation,
        re_prob=config.re_prob,
        re_mode="const",
        num_workers=config.num_parallel_workers,
        collate_fn=collate if mixed else None,
        pin_memory=device.type == "cuda",
        device=device,
        persistent_workers=config.num_parallel_workers > 0,
    )
    for operation in _operations(dataset.transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = pillow_posterize  # timm's asks Pillow for 0 bits now and then, which it refuses
    return loader


def _operations(transform: Any) -> Iterator[Any]:
    """The operations of timm's policy in a composed transform."""
    for step in transform.transforms:
        yield from getattr(step, "ops", ())
        for chosen in getattr(step, "policy", ()):
            yield from chosen


class _Files(ImageDataset):
    """timm's dataset of image files, on a list of (path, target) instead of a folder."""

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        super().__init__("", reader=_Reader(samples))


class _Reader:
    """What timm's dataset asks of a reader: an open file and a target by index."""

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return open(path, "rb"), target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.samples[index][0]


def _timms_policy(text: str | None) -> str | None:
    """timm's spelling of a policy. Raises `UsageError` for one that timm lacks."""
    if not text or text == "none":
        return None
    kind, name, parts = parse_policy(text)
    if kind == "trivial" or parts.get("w") == "0":
        raise UsageError(f"auto_augment: timm has no {text!r} to measure against; use autoaug, randaug-..., 3a or none")
    return "-".join([name, *(key + value for key, value in parts.items())])


# ---- what limits


def _compare(name: str, loaded: list[float], batch_size: int, options: Any, device: torch.device) -> dict[str, Any]:
    """A model's rate beside those of the loader, from JPEGs and packed."""
    rate = training_rate(name, batch_size, options, device)
    limits = ["loader" if images_per_s < rate else "model" for images_per_s in loaded]
    return {"model": name, "images_per_s": rate, "limit": limits[0], "packed_limit": limits[1]}


def training_rate(name: str, batch_size: int, options: Any, device: torch.device) -> float:
    """Images a second of `visformer train`'s step on a batch that is there already, the median of `STEPS`."""
    config = TrainConfig(
        model=name, batch_size=batch_size, image_resize=options.image_size, amp_level=options.amp_level, opt="adamw"
    )
    model = create_model(name, num_classes=NUM_CLASSES, image_size=options.image_size).train()
    trainer = Trainer(model, config, device, batches_per_epoch=1)
    images = torch.zeros(batch_size, 3, *config.image_size, dtype=torch.uint8, device=device)
    targets = torch.zeros(batch_size, dtype=torch.int64, device=device)
    batch = Batch(images.contiguous(memory_format=torch.channels_last), targets, [0] * batch_size)
    seconds = []
    for _ in range(2 + STEPS):
        began = time.perf_counter()
        trainer.train_batch(batch, 0)
        trainer.loss_sum.item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return batch_size / float(np.median(seconds[2:]))


def verdict(result: dict[str, Any], model: dict[str, Any], workers: int) -> str:
    """Sentences that say which of the two limits training, and by how much, from JPEGs and packed."""
    jpegs, packed = (contender["images_per_s"] for contender in result["stages"][-1]["contenders"][:2])
    return (
        f"{model['model']} trains at {model['images_per_s']:,.0f} images/s. "
        + _limit(f"{workers} workers deliver {jpegs:,.0f} from JPEGs", jpegs, model["images_per_s"], workers)
        + _limit(f" Packed, they deliver {packed:,.0f}", packed, model["images_per_s"], workers)
    )


def _limit(what: str, loader: float, rate: float, workers: int) -> str:
    if loader >= rate:
        return f"{what}: the model is the limit, the loader could feed {loader / rate:.1f} of it."
    return (
        f"{what}: the loader is the limit; {-(-rate * workers // loader):,.0f} workers on as many cores would feed it."
    )


def print_tables(document: dict[str, Any]) -> None:
    """Print what `measure` found."""
    for result in document["results"]:
        for stage in result["stages"]:
            meaning = {"loaded": "pixels from the workers", "ready": "normalised, erased and mixed on the device"}
            console.table(
                f"{stage['stage']}: {meaning[stage['stage']]}; batch {result['batch_size']}, {document['workers']} "
                f"workers, {document['image_size']}x{document['image_size']} pixels, {document['auto_augment']}",
                ["contender", "images/s", "quartiles", "x timm", "quartiles", "CPU ms/image", "x timm"],
                [
                    [
                        c["name"],
                        *cells(c),
                        *(
                            "-" if c[key] is None else f"{c[key]:.2f}"
                            for key in ("processor_ms_per_image", "processor_ratio")
                        ),
                    ]
                    for c in stage["contenders"]
                ],
            )
        for model in result["models"]:
            print(verdict(result, model, document["workers"]))
    print(
        f"{document['device']}; {document['processor']}, {document['cores']} cores; timm {document['versions']['timm']}"
    )
