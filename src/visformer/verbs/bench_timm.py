"""timm's Visformer beside ours, with the same weights and the same work.

Three contenders: ours, as `visformer train` and `visformer validate` run it; timm's model as it comes (fp32, eager,
contiguous), which is the baseline; and timm's in our precision and memory format, which tells how much of the
difference these make. Where ours is compiled to train, there is a fourth, timm's compiled as well. Before anything is
timed, the two models must give the same logits in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model, list_models, model_entrypoint
from torch import Tensor, nn

from visformer.bundles.engines import to_picture
from visformer.bundles.samples import generated
from visformer.config import TrainConfig
from visformer.conversion.layouts import TIMM
from visformer.data import Batch, Preprocessing
from visformer.distributed import autocast
from visformer.errors import RunError, UsageError
from visformer.models import Visformer, create_model, variant
from visformer.verbs.bench_timing import Contender
from visformer.verbs.trainer import Trainer

NUM_CLASSES = 1000
PATCH = 32  # timm's patch embeddings refuse an image whose sides are not multiples of this
LABEL_SMOOTHING = 0.1
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
TOLERANCE = 1e-6  # of the largest logit, in float64
BASELINE = "timm"  # name of the contender that ratios are against


@dataclass(frozen=True)
class Pair:
    """Our model and timm's with equal weights, and how far apart their logits are (share of the largest one)."""

    ours: Visformer
    theirs: nn.Module
    difference: float


def check_peer(name: str, image_size: int) -> None:
    """Raise `UsageError` unless timm has a model of its own by this name that takes this size."""
    variant(name)
    own = [n for n in list_models("visformer*") if _is_timms_own(n)]
    if name not in own:
        raise UsageError(f"models: timm has no {name} to measure against; it has {', '.join(own)}")
    if image_size % PATCH:
        raise UsageError(f"image_size: {image_size} is not possible here; timm's model takes multiples of {PATCH}")


def _is_timms_own(name: str) -> bool:
    return is_model(name) and model_entrypoint(name).__module__.startswith("timm.")


def timms_names(ours: Visformer) -> dict[str, str]:
    """Names in timm's state dict -> in ours."""
    return {name.theirs: key for key, name in TIMM.names(ours.config, ours.state_dict()).items()}


def build_pair(name: str, image_size: int) -> Pair:
    """Both models, on the CPU, with timm's initial weights and our stochastic depth.

    Raises `RunError` when their logits differ: what gives other numbers is not to be timed as the same thing.
    """
    ours = create_model(name, num_classes=NUM_CLASSES, image_size=image_size)
    theirs = timm.create_model(
        name, num_classes=NUM_CLASSES, img_size=image_size, drop_path_rate=ours.config.drop_path_rate
    )
    settle(theirs, image_size)
    names = timms_names(ours)
    ours.load_state_dict({names[key]: tensor for key, tensor in theirs.state_dict().items()})
    difference = logit_difference(ours, theirs, image_size)
    if not difference <= TOLERANCE:
        raise RunError(
            f"{name}: its logits differ from timm {timm.__version__}'s by {difference:.1e} of the largest, where at "
            f"most {TOLERANCE:.0e} is allowed; nothing was timed. Try another version of timm"
        )
    return Pair(ours, theirs, difference)


@torch.no_grad()
def settle(model: nn.Module, image_size: int) -> None:
    """Give the norms the statistics of images, as training would: with fresh ones activations grow from block to block,
    until rounding decides the logits.

    The images are both kinds that a bench infers: pictures, on which an export is judged, and noise, which is timed.
    """
    preprocessing = Preprocessing((image_size, image_size))
    pictures = [to_picture(generated((image_size + 32, image_size + 50), 3, seed)) for seed in range(100, 108)]
    noise = torch.randint(0, 256, (4, 3, image_size, image_size), generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.stack([preprocessing(picture) for picture in pictures]), noise.to(torch.uint8)])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the next batch
    model.train()(preprocessing.normalize(images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def logit_difference(ours: Visformer, theirs: nn.Module, image_size: int) -> float:
    """Largest difference between the logits in eval mode and float64, as a share of the largest logit.

    Norms get random statistics, scales and shifts for this, the same in both; the models themselves stay as they are.
    """
    ours, theirs = copy.deepcopy(ours).double().eval(), copy.deepcopy(theirs).double().eval()
    generator = torch.Generator().manual_seed(0)
    mine, names = ours.state_dict(), timms_names(ours)
    for key, tensor in theirs.state_dict().items():
        if tensor.dim() == 1:  # norms and biases
            mine[names[key]].copy_(tensor.uniform_(0.5, 1.5, generator=generator))
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64, generator=generator)
    expected = theirs(images)
    return ((ours(images) - expected).abs().max() / expected.abs().max()).item()


def contenders(pair: Pair, config: TrainConfig, device: torch.device, what: str) -> list[Contender]:
    """The ways to do a step of `what` (train or infer) on one synthetic batch, which all share.

    They get copies of the pair's weights; `config` is that of `training_config`, its precision not auto.
    """
    batch = synthetic_batch(config, device)
    images = synthetic_images(config, device)
    plain, last = images.contiguous(), images.contiguous(memory_format=torch.channels_last)
    ours, theirs, theirs_last = copy.deepcopy(pair.ours), copy.deepcopy(pair.theirs), copy.deepcopy(pair.theirs)
    theirs.to(device)
    for model in (ours, theirs_last):
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if what == "train":
        our_step = _our_training(ours, config, batch, device)
        their_step = _training(theirs, plain, batch.targets, "O0")
        their_step_as_ours = _training(theirs_last, last, batch.targets, config.amp_level)
    else:
        our_step = _inference(ours, last, config.amp_level)
        their_step = _inference(theirs, plain, "O0")
        their_step_as_ours = _inference(theirs_last, last, config.amp_level)
    precision = "fp32" if config.amp_level == "O0" else config.amp_dtype
    found = [
        Contender("visformer", precision, "channels_last", our_step),
        Contender(BASELINE, "fp32", "contiguous", their_step),
        Contender("timm as ours", precision, "channels_last", their_step_as_ours),
    ]
    if what == "train" and config.compile:
        step = _training(copy.deepcopy(theirs_last), last, batch.targets, config.amp_level, compiled=True)
        found.append(Contender("timm as ours, compiled", precision, "channels_last", step))
    return found


def training_config(name: str, batch_size: int, image_size: int, amp_level: Any) -> TrainConfig:
    """The options of `visformer train` that matter to a step, with AdamW and label smoothing."""
    return TrainConfig(
        model=name,
        batch_size=batch_size,
        image_resize=image_size,
        opt="adamw",
        lr=LEARNING_RATE,
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
        scheduler="constant",
        warmup_epochs=0,
        label_smoothing=LABEL_SMOOTHING,
        amp_level=amp_level,
    )


def synthetic_batch(config: TrainConfig, device: torch.device) -> Batch:
    """Noise as images and random targets, on the device, in the form of the training loader."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, config.in_channels, *config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, NUM_CLASSES, (config.batch_size,), generator=generator)
    images = images.to(device, memory_format=torch.channels_last)
    return Batch(images, targets.to(device), list(range(config.batch_size)))


def synthetic_images(config: TrainConfig, device: torch.device) -> Tensor:
    """The images of that batch as a model takes them: normalised, fp32."""
    return Preprocessing.from_config(config).normalize(synthetic_batch(config, device).images)


def _our_training(model: Visformer, config: TrainConfig, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """What `visformer train` does with a batch, from uint8 on: normalisation is in the step, unlike in timm's."""
    trainer = Trainer(model.train(), config, device, batches_per_epoch=1)

    def step() -> Tensor:
        trainer.train_batch(batch, 0)
        return trainer.loss_sum

    return step


def _training(
    model: nn.Module, images: Tensor, targets: Tensor, amp_level: str, *, compiled: bool = False
) -> Callable[[], Tensor]:
    """The same step as a plain loop: forward, label-smoothed cross entropy, backward, torch's AdamW as it comes."""
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step() -> Tensor:
        with autocast(images.device, amp_level, "bf16"):
            loss = F.cross_entropy(forward(images), targets, label_smoothing=LABEL_SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _inference(model: nn.Module, images: Tensor, amp_level: str) -> Callable[[], Tensor]:
    """A forward pass in eval mode, as `visformer validate` does it."""
    model.eval()

    @torch.no_grad()
    def step() -> Tensor:
        with autocast(images.device, amp_level, "bf16"):
            return model(images)

    return step
