"""`visformer bench --what end_to_end`: training steps from JPEG files, loading and learning together, beside timm's.

    visformer bench --what end_to_end --batch_sizes 256 --workers 16 --num_images 25600 --compile True

Three contenders train the same model on the same files with the same augmentation (random resized crop, flip, the
policy, erasing, mixup and cutmix) and AdamW, with as many worker processes: ours with `--decode device`, ours with
`--decode workers`, and timm's own model behind timm's own loader, in the same precision and memory format. They take
turns pass by pass in one process. A pass is `num_images` images, from the first byte read to the last weight moved;
files are read again when there are fewer.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visformer import console
from visformer.config import TrainConfig
from visformer.data import ImageSource, Subset, TrainLoader, make_train_loader
from visformer.distributed import autocast
from visformer.errors import UsageError
from visformer.verbs import bench_data, bench_data_images, bench_timm
from visformer.verbs.bench_timing import Contender, cells, summarize, take_turns
from visformer.verbs.trainer import Trainer

FILES = 1024  # that are made at most; from then on they come from memory anyway
OURS = ("device", "workers")  # values of --decode


def measure(options: Any, image_size: int, device: torch.device) -> list[dict[str, Any]]:
    """One result for each model and batch size: model, batch_size, images of a pass, and `contenders` as
    `bench_timing.summarize` describes them. Raises `UsageError` for a model, folder or policy that can't be used."""
    models = options.models or []
    for name in models:
        bench_timm.check_peer(name, image_size)
    options = dataclasses.replace(options, image_size=image_size)
    with _files(options) as source:
        return [_measure(source, name, size, options, device) for name in models for size in options.batch_sizes]


@contextmanager
def _files(options: Any) -> Iterator[ImageSource]:
    """`num_images` images in files, of which some may be the same."""
    made = dataclasses.replace(options, num_images=min(options.num_images, FILES))
    with bench_data_images.images(made) as source:
        yield Subset(source, np.arange(options.num_images) % len(source))


def feed_config(name: str, batch_size: int, options: Any, decode: Any) -> TrainConfig:
    """The options of `visformer train` for one of our contenders."""
    return dataclasses.replace(
        bench_data.data_config(options, batch_size),
        model=name,
        decode=decode,
        opt="adamw",
        lr=bench_timm.LEARNING_RATE,
        eps=1e-8,
        weight_decay=bench_timm.WEIGHT_DECAY,
        scheduler="constant",
        warmup_epochs=0,
        amp_level=options.amp_level,
        compile=options.compile,
    )


def _measure(source: ImageSource, name: str, batch_size: int, options: Any, device: torch.device) -> dict[str, Any]:
    batches = len(source) // batch_size
    if not batches:
        raise UsageError(
            f"batch_sizes: {batch_size} is more than the {len(source)} images of a pass; lower it or raise num_images"
        )
    title = f"{name}, batch {batch_size}"
    console.note(f"{title}: {options.warmup} + {options.repeats} passes of {batches} steps for each contender")
    configs = {decode: feed_config(name, batch_size, options, decode) for decode in OURS}
    precision = "fp32" if options.amp_level == "O0" else configs["device"].amp_dtype
    loaders = {
        decode: make_train_loader(source, config, pin_memory=device.type == "cuda", device=device)
        for decode, config in configs.items()
    }
    pair = bench_timm.build_pair(name, options.image_size)
    contenders = [
        Contender(f"visformer, decode {decode}", precision, "channels_last", step)
        for decode in OURS
        for step in [_ours(pair, configs[decode], loaders[decode], device)]
    ]
    theirs = _theirs(pair, configs["workers"], source, device)
    contenders.append(Contender(bench_timm.BASELINE, precision, "channels_last", theirs))
    try:
        timed = take_turns(contenders, device, warmup=options.warmup, repeats=options.repeats, title=title)
    finally:
        for loader in loaders.values():
            loader.close()
    baseline = timed[-1]
    records = [summarize(t, baseline, batches * batch_size) for t in timed]
    return {"model": name, "batch_size": batch_size, "images": batches * batch_size, "contenders": records}


def _ours(
    pair: bench_timm.Pair, config: TrainConfig, loader: TrainLoader, device: torch.device
) -> Callable[[], Tensor]:
    """A pass of `visformer train`: the loop of its epoch, without validation and saving."""
    model = copy.deepcopy(pair.ours).train()
    trainer = Trainer(model, config, device, batches_per_epoch=len(loader))
    epochs = iter(range(1 << 30))

    def run() -> Tensor:
        loader.set_epoch(next(epochs))
        for index, batch in enumerate(loader):
            trainer.train_batch(batch, index)
        return trainer.loss_sum

    return run


def _theirs(
    pair: bench_timm.Pair, config: TrainConfig, source: ImageSource, device: torch.device
) -> Callable[[], Tensor]:
    """A pass of timm's training loop: its loader, which mixes in the workers and normalises and erases on the device,
    its model, and a loss of soft targets."""
    model: Any = pair.theirs.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(model) if config.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    loader = bench_data.timm_loader(source, config, device, mixed=True)

    def run() -> Tensor:
        loss = torch.zeros(())
        for images, targets in loader:
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            with autocast(device, config.amp_level, config.amp_dtype):
                loss = F.cross_entropy(forward(images), targets.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def print_tables(document: dict[str, Any]) -> None:
    """Print what `measure` found."""
    for result in document["results"]:
        console.table(
            f"{result['model']} from JPEG files; batch {result['batch_size']}, {document['workers']} workers, "
            f"{document['image_size']}x{document['image_size']} pixels, {document['auto_augment']}, "
            f"passes of {result['images']:,} images",
            ["contender", "images/s", "quartiles", "x timm", "quartiles"],
            [[f"{c['name']} ({c['precision']})", *cells(c)] for c in result["contenders"]],
        )
    print(
        f"{document['device']}; {document['processor']}, {document['cores']} cores; torch "
        f"{document['versions']['torch']}, timm {document['versions']['timm']}"
        + (", compiled" if document["compile"] else "")
    )
