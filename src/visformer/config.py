"""Every hyper-parameter of training, under MindCV's flat names.

One dataclass: a field is a name, a type, a default and a sentence that says unit and scope, which is also what
`visformer train --help` prints. `options.py` fills it from YAML and the command line; nothing here imports torch.
Fields that mean nothing on PyTorch are kept, so that MindCV's YAML files run unchanged; `WITHOUT_EFFECT` names them.
Where `None` stands for "the tool decides", the sentence says how.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from visformer.errors import UsageError

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # ImageNet's mean and standard deviation on the 0-255 scale
IMAGENET_STD = (58.395, 57.12, 57.375)

WITHOUT_EFFECT = {
    "mode": "PyTorch has no graph mode to choose here; see --compile",
    "dataset_sink_mode": "data is always prepared ahead of the device",
    "amp_cast_list": "PyTorch's autocast decides for each operation",
    "eval_shuffle": "the order of a validation set does not change its figures",
    "aux_factor": "Visformer has no auxiliary head",
    "drop_overflow_update": "a step whose fp16 gradients overflowed is always skipped",
}


def option(default: Any, text: str, *, group: str = "", positional: bool = False, alias: str = "") -> Any:
    """A dataclass field with the sentence that `--help` prints and, on the first field of a group, the group's title.

    A `positional` field takes the command line's bare words: one if it is a single value, all that are left if a list.
    `alias` is a second flag for the field, such as `image_path`.
    """
    metadata = {"help": text, "group": group, "positional": positional, "alias": alias}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Options of `visformer train`; see each field's help."""

    mode: int = option(0, "MindSpore's graph (0) or eager (1) mode", group="System")
    distribute: bool | None = option(None, "data parallel over the launched processes; None: on when there are several")
    num_devices: int | None = option(
        None, "processes that a plain start makes on this machine, one for each device; None: as many as accelerators"
    )
    sync_bn: bool = option(False, "batch norms take the statistics of all processes' batches together")
    device_target: Literal["auto", "CPU", "GPU", "Ascend", "cuda", "npu", "xpu", "mps", "cpu"] = option(
        "auto", "device to train on; auto: the accelerator that is there, else the CPU"
    )
    seed: int = option(42, "the whole run is a function of it: split, order, augmentation, initial weights")
    log_interval: int = option(100, "steps between lines in metrics.jsonl and, off a terminal, in the log")
    val_while_train: bool | None = option(None, "validate while training; None: yes when there is a validation set")
    val_interval: int = option(1, "epochs between validations")
    compile: bool = option(False, "torch.compile the training step: minutes to start, faster afterwards")
    speed: Literal["auto", "measure", "off"] = option(
        "auto",
        "auto: compute in ways that give the same numbers to within rounding and are faster everywhere, and on an "
        "accelerator the grouped convolutions in the way that measures fastest; measure: so on the CPU too; off: as "
        "the model is written. What was measured is recorded in the run, and a resumed run takes it again",
    )
    tensorboard: bool = option(
        False, "write TensorBoard's event files into the run folder; needs the extra [tensorboard]"
    )
    trackio: str = option(
        "", "name of a trackio project that gets the figures as well; empty: none; needs the extra [trackio]"
    )

    dataset: str = option(
        "imagenet",
        "imagenet (class folders), cifar10, cifar100, mnist, fashion_mnist, digits, or a timm name such as torch/NAME, "
        "hfds/NAME, wds/NAME",
        group="Dataset",
    )
    data_dir: str = option(
        "./",
        "folder with train/ and val/ of class folders, or class folders alone (split on the spot); or what `visformer "
        "pack` wrote, also by its address, such as s3://bucket/set",
    )
    train_split: str = option("train", "name of the training split or folder")
    val_split: str = option("val", "name of the validation split or folder")
    val_fraction: float = option(0.2, "share of each class held out when the data has no validation split")
    dataset_download: bool = option(
        False, "fetch the dataset if it is not there (cifar10, cifar100, mnist, fashion_mnist)"
    )
    num_parallel_workers: int = option(8, "processes that decode and augment; at most the cores there are; 0: none")
    decode: Literal["workers", "device"] = option(
        "workers", "who decodes and augments: the workers, or the device (CUDA: nvJPEG), for which they only read"
    )
    data_timeout_s: float = option(
        120.0, "seconds that a worker may spend on one image before another worker takes its place; 0: no limit"
    )
    max_bad_images: int | None = option(
        None, "training images that may be unreadable before the run stops; None: 1 % of them, but at least 10"
    )
    shuffle: bool = option(True, "draw the training samples in a new order each epoch")
    num_samples: int | None = option(None, "train on this many samples, drawn with the seed; None: all")
    batch_size: int = option(128, "images per device and step")
    drop_remainder: bool = option(True, "leave out the last, smaller batch of an epoch (training only)")

    image_resize: int | tuple[int, int] = option(
        224, "side of the model's input, or [height, width], in pixels", group="Augmentation"
    )
    scale: tuple[float, float] = option((0.08, 1.0), "share of the area that a random crop takes, from and to")
    ratio: tuple[float, float] = option((0.75, 1.333), "aspect ratio of a random crop, from and to")
    hflip: float = option(0.5, "probability of a horizontal flip")
    vflip: float = option(0.0, "probability of a vertical flip")
    color_jitter: float | None = option(
        0.4, "strength of brightness, contrast and saturation jitter; only without auto_augment"
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos", "random"] = option(
        "bilinear", "how pixels are resampled; random: bilinear or bicubic, drawn for each training image"
    )
    auto_augment: str | None = option(
        None, "policy: autoaug, autoaugr, 3a, randaug-m9-n2-mstd0.5-inc1, augmix-m3-w3, trivialaugwide, or none"
    )
    aug_splits: int = option(
        0, "3: one clean and two augmented copies of each image, with a Jensen-Shannon loss; 0: off"
    )
    re_prob: float = option(0.0, "probability of random erasing, after normalisation")
    re_scale: tuple[float, float] = option((0.02, 0.33), "share of the area that is erased, from and to")
    re_ratio: tuple[float, float] = option((0.3, 3.3), "aspect ratio of the erased box, from and to")
    re_value: int | str = option(
        0, "what fills the box: 0 (the mean colour), a level, channel (one random colour), random (noise)"
    )
    re_max_attempts: int = option(10, "tries to place a box before giving up")
    mean: tuple[float, ...] = option(IMAGENET_MEAN, "mean of each channel on the 0-255 scale")
    std: tuple[float, ...] = option(IMAGENET_STD, "standard deviation of each channel on the 0-255 scale")
    crop_pct: float = option(0.875, "validation: the short side becomes image_resize / crop_pct, then a centre crop")
    mixup: float = option(0.0, "Beta parameter of mixup; 0: off")
    cutmix: float = option(0.0, "Beta parameter of cutmix; 0: off")
    cutmix_prob: float = option(
        1.0, "probability that a batch is mixed at all; with both, each batch takes one of the two"
    )
    aug_repeats: int = option(0, "repeated augmentation: copies of an image in an epoch's draw, when above 1")

    model: str = option("visformer_tiny", "model name; `visformer models` lists them", group="Model")
    num_classes: int | None = option(None, "None: as many as the data has")
    in_channels: int = option(3, "channels of the input: 1 grey, 3 RGB, 4 RGB with alpha")
    drop_rate: float | None = option(None, "dropout after position embeddings and projections; None: the model's own")
    drop_path_rate: float | None = option(
        None, "stochastic depth of the last block, rising from 0; None: the model's own"
    )
    attn_drop_rate: float | None = option(None, "dropout of attention weights; None: the model's own")
    gelu: Literal["erf", "tanh"] | None = option(None, "form of the activation; None: the model's own")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower")

    pretrained: bool | str = option(
        False,
        "weights to fine-tune from: a file that `visformer convert` reads, a URL, hf-hub:owner/name, a published "
        "weight's name, or True for those published of this model; rows of the head are matched by class name",
        group="Checkpoints",
    )
    ckpt_path: str = option("", "as pretrained, as MindCV names it; with resume_opt, the run's checkpoint to continue")
    fine_tune: Literal["auto", "off"] = option(
        "auto",
        "auto: with weights to start from and no file of options, those that are not given take the weights' own model "
        "and preprocessing, and a recipe for as many images as there are; off: the defaults of this help",
    )
    freeze: Literal["none", "stem", "stage1", "stage2", "stage3", "stage4", "backbone"] = option(
        "none",
        "weights and statistics that stay as they are: from the input up to this part; backbone: all but the head",
    )
    freeze_epochs: int | None = option(None, "epochs after which what freeze names learns too; None: never")
    resume_opt: bool = option(False, "continue the run of ckpt_path exactly: optimizer, schedule, position in the data")
    resume: Literal["", "auto"] = option("", "auto: continue the run in ckpt_save_dir if there is one, else begin")
    keep_checkpoint_max: int = option(10, "checkpoints kept beside last and best")
    ckpt_save_dir: str = option("./ckpt", "run folder")
    ckpt_save_interval: int = option(1, "epochs between kept checkpoints; last is written every epoch")
    ckpt_save_steps: int | None = option(None, "optimizer steps between saves of last within an epoch; None: none")
    ckpt_save_policy: Literal["latest_k", "top_k"] = option(
        "latest_k", "which are kept: the latest, or the best by top-1"
    )
    epoch_size: int = option(90, "epochs to train for", group="Training")
    dataset_sink_mode: bool = option(True, "MindSpore's on-device data queue")
    ema: bool = option(False, "keep an exponential moving average of the weights, and validate and save that")
    ema_decay: float = option(0.9999, "decay of the average per step, reached after a warm-up")
    clip_grad: bool = option(False, "clip the gradient's global norm")
    clip_value: float = option(15.0, "the norm to clip to")
    layer_decay: float | None = option(
        None, "lr of each layer is multiplied by this to the power of its depth from the end"
    )
    early_stop_epochs: int | None = option(
        None, "end after this many epochs with neither a better top-1 nor a lower validation loss; None: never"
    )
    max_bad_steps: int = option(10, "steps in a row without a finite loss or gradient, all skipped, that end the run")
    gradient_accumulation_steps: int = option(1, "batches summed up for one optimizer step")

    opt: Literal["sgd", "momentum", "adam", "adamw", "lion", "rmsprop", "adagrad", "lamb", "nadam"] = option(
        "adam", "optimizer", group="Optimizer"
    )
    momentum: float = option(0.9, "momentum of sgd, momentum and rmsprop")
    weight_decay: float = option(1e-6, "weight decay")
    weight_decay_filter: Literal["disable", "auto", "norm_and_bias"] = option(
        "disable", "which parameters are spared from decay: none (disable), norms (auto), norms and biases"
    )
    use_nesterov: bool = option(False, "Nesterov's form of momentum")
    eps: float = option(1e-10, "term in the denominator of adaptive optimizers")

    scheduler: Literal[
        "constant", "cosine_decay", "exponential_decay", "step_decay", "multi_step_decay", "one_cycle", "cyclic"
    ] = option("cosine_decay", "learning-rate schedule", group="Learning rate")
    lr: float = option(1e-3, "peak learning rate, for the recipe's global batch")
    recipe_batch_size: int | None = option(
        None, "batch_size that lr and min_lr are meant for, on recipe_devices; None: they are taken as they are"
    )
    recipe_devices: int = option(1, "devices that lr and min_lr are meant for")
    scale_lr: bool = option(True, "scale lr and min_lr with the global batch, if it is not the recipe's")
    min_lr: float = option(1e-6, "lowest learning rate of cosine, one_cycle and cyclic")
    warmup_epochs: int = option(3, "epochs of linear warm-up; not with one_cycle and cyclic")
    warmup_factor: float = option(0.0, "warm-up starts from lr times this")
    decay_epochs: int = option(100, "epochs of decay after warm-up; cosine then stays at min_lr")
    decay_rate: float = option(0.9, "factor of exponential, step and multi-step decay")
    multi_step_decay_milestones: list[int] = option(
        [30, 60, 90], "epochs at which multi_step_decay multiplies by decay_rate"
    )
    lr_epoch_stair: bool = option(False, "True: the rate changes once an epoch; False: every step")
    num_cycles: int = option(1, "cycles of cosine and cyclic")
    cycle_decay: float = option(1.0, "factor on the peak from one cosine cycle to the next")

    loss: Literal["CE", "BCE"] = option(
        "CE", "cross entropy over classes, or binary cross entropy for each class", group="Loss"
    )
    label_smoothing: float = option(0.0, "share of the target spread over all classes")
    aux_factor: float = option(0.0, "weight of auxiliary heads")
    reduction: Literal["mean", "sum"] = option("mean", "how the losses of a batch become one")
    class_weights: Literal["none", "balanced"] = option(
        "none", "balanced: a class counts as much as another in the training loss, however many images it has"
    )

    teacher: str = option(
        "",
        "model to learn from beside the labels: a checkpoint, as pretrained takes, or timm:NAME; empty: none",
        group="Distillation",
    )
    teacher_ckpt_path: str = option(
        "", "with timm:NAME, a file of its weights, .safetensors or .pth; empty: those that timm publishes"
    )
    distillation_type: Literal["hard", "soft"] = option(
        "hard", "learn the teacher's first class (hard) or its probabilities (soft)"
    )
    distillation_alpha: float = option(0.5, "share of the teacher in the loss; the labels have the rest")
    distillation_tau: float = option(1.0, "temperature of the probabilities in soft distillation")

    amp_level: Literal["auto", "O0", "O1", "O2", "O3"] = option(
        "O0",
        "O0: fp32; O1, O2 and O3 are one here: products and maps in half precision under autocast, while weights, "
        "BatchNorm's statistics and the loss stay in fp32; auto: O0 or O2, whichever a few steps at the start show to "
        "be faster here",
        group="Mixed precision",
    )
    amp_dtype: Literal["bf16", "fp16"] = option(
        "bf16", "the half precision of amp_level; fp16 trains with loss scaling"
    )
    val_amp_level: Literal["O0", "O1", "O2", "O3"] = option("O0", "amp_level of validation")
    amp_cast_list: str | None = option(None, "MindSpore's list of operations to cast")
    loss_scale_type: Literal["fixed", "dynamic", "auto"] = option(
        "fixed", "how fp16's loss scale evolves; auto is dynamic"
    )
    loss_scale: float = option(1.0, "fp16's loss scale, or where the dynamic one starts")
    drop_overflow_update: bool = option(False, "skip a step whose fp16 gradients overflowed; here always done")
    eval_shuffle: bool = option(False, "shuffle the validation set")

    def __post_init__(self) -> None:
        self.given: frozenset[str] | None = None  # what was set by file, flag or keyword; None: not known
        self.from_file = False  # whether a file or recipe was among them
        check(self)

    def change(self, **values: Any) -> TrainConfig:
        """A copy with other values, which remembers what was given."""
        changed = dataclasses.replace(self, **values)
        changed.given, changed.from_file = self.given, self.from_file
        return changed

    def without_effect(self) -> dict[str, str]:
        """Names of options that were given a value other than their default and do nothing here, with the reason."""
        default = {f.name: f.default for f in dataclasses.fields(self)}
        return {name: why for name, why in WITHOUT_EFFECT.items() if getattr(self, name) != default[name]}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's input, pixels."""
        return (self.image_resize, self.image_resize) if isinstance(self.image_resize, int) else self.image_resize


def fields_by_group(cls: type) -> dict[str, list[dataclasses.Field]]:
    """The fields of an options dataclass under the title of their group, in order."""
    groups: dict[str, list[dataclasses.Field]] = {}
    title = "Options"
    for field in dataclasses.fields(cls):
        title = field.metadata.get("group") or title
        groups.setdefault(title, []).append(field)
    return groups


# Ranges: (lowest, highest) with None for "no bound"; both ends allowed.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    **dict.fromkeys(("hflip", "vflip", "re_prob", "cutmix_prob", "label_smoothing", "ema_decay"), (0, 1)),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "attn_drop_rate"), (0, 0.999)),
    **dict.fromkeys(
        ("epoch_size", "batch_size", "log_interval", "val_interval", "gradient_accumulation_steps", "num_cycles"),
        (1, None),
    ),
    **dict.fromkeys(("keep_checkpoint_max", "ckpt_save_interval", "re_max_attempts", "num_classes"), (1, None)),
    **dict.fromkeys(("num_devices", "recipe_batch_size", "recipe_devices", "max_bad_steps"), (1, None)),
    **dict.fromkeys(("ckpt_save_steps", "freeze_epochs", "early_stop_epochs"), (1, None)),
    "distillation_alpha": (0, 1),
    "distillation_tau": (1e-3, None),
    **dict.fromkeys(
        ("num_parallel_workers", "warmup_epochs", "decay_epochs", "weight_decay", "lr", "min_lr", "mixup", "cutmix"),
        (0, None),
    ),
    **dict.fromkeys(("eps", "momentum", "aug_repeats", "warmup_factor", "color_jitter", "seed"), (0, None)),
    **dict.fromkeys(("clip_value", "layer_decay", "loss_scale"), (1e-12, None)),
    **dict.fromkeys(("data_timeout_s", "max_bad_images"), (0, None)),
    "num_samples": (1, None),
    "crop_pct": (0.01, 1),
    "val_fraction": (0.01, 0.9),
}


def check(config: TrainConfig) -> None:
    """Raise `UsageError` naming the field, the value and the rule when a value is out of range."""
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if (low is not None and value < low) or (high is not None and value > high) or value != value:
            bounds = f"between {low:g} and {high:g}" if low is not None and high is not None else f"at least {low:g}"
            raise UsageError(f"{name}: {value} is out of range; it must be {bounds}")
    if min(config.image_size) < 32:
        raise UsageError(f"image_resize: {config.image_resize} is too small; the model needs at least 32 pixels a side")
    if config.in_channels not in (1, 3, 4):
        raise UsageError(f"in_channels: {config.in_channels} is not possible with image files; use 1, 3 or 4")
    if config.aug_splits not in (0, 3):
        raise UsageError(f"aug_splits: {config.aug_splits} is not possible; use 0 (off) or 3")
    if config.aug_splits and (config.mixup or config.cutmix):
        raise UsageError("aug_splits: 3 does not go with mixup or cutmix; set both to 0")
    if config.re_value not in ("channel", "random") and not isinstance(config.re_value, int):
        raise UsageError(
            f"re_value: {config.re_value!r} is not possible; use 0, a level from 0 to 255, channel or random"
        )
    for name in ("scale", "ratio", "re_scale", "re_ratio"):
        low, high = getattr(config, name)
        if not 0 < low <= high:
            raise UsageError(f"{name}: [{low}, {high}] must be two rising numbers above 0")
    if config.ckpt_save_policy == "top_k" and config.val_while_train is False:
        raise UsageError("ckpt_save_policy: top_k needs val_while_train, which is off")
    _check_combinations(config)


def _check_combinations(config: TrainConfig) -> None:
    if config.resume_opt and not config.ckpt_path:
        raise UsageError("resume_opt: give the checkpoint to continue with --ckpt_path RUN/last.safetensors")
    if config.freeze_epochs and config.freeze == "none":
        raise UsageError("freeze_epochs: nothing is frozen; say what with --freeze, such as backbone")
    if config.early_stop_epochs and config.val_while_train is False:
        raise UsageError("early_stop_epochs: needs val_while_train, which is off")
    if config.aug_splits and (config.teacher or config.class_weights != "none"):
        raise UsageError("aug_splits: 3 goes with neither teacher nor class_weights; set it to 0")
    if config.teacher_ckpt_path and not config.teacher.startswith("timm:"):
        raise UsageError(
            "teacher_ckpt_path: goes with --teacher timm:NAME; another checkpoint is named by --teacher itself"
        )
