"""Which options a run must keep when it is resumed, because its saved state is only right for them."""

from __future__ import annotations

import yaml

from visformer import console
from visformer.errors import UsageError

_FIXED = {
    "model",
    "in_channels",
    "image_resize",
    "gelu",
    "num_classes",
    "opt",
    "weight_decay_filter",
    "layer_decay",
    "ema",
    "batch_size",
    "gradient_accumulation_steps",
    "drop_remainder",
    "num_samples",
    "aug_repeats",
    "seed",
    "amp_dtype",
    "freeze",
}
_FREE = {
    "resume",
    "resume_opt",
    "ckpt_path",
    "ckpt_save_dir",
    "pretrained",
    "fine_tune",
    "num_parallel_workers",
    "log_interval",
    "num_devices",
    "ckpt_save_steps",
    "max_bad_steps",
    "tensorboard",
    "trackio",
}


def compare_options(before: str, now: str) -> None:
    """Compare the options that a run was saved with to those that resume it, both as `to_yaml` writes them.

    Raises `UsageError` for the first that must not change; warns of others that change the result.
    """
    old, new = yaml.safe_load(before), yaml.safe_load(now)
    for name, value in new.items():
        if name in _FREE or old.get(name) == value:
            continue
        if name in _FIXED:
            raise UsageError(
                f"{name}: the run to resume has {old.get(name)}, not {value}; resume with the options it began with"
            )
        console.warn(f"resuming with another {name}: {old.get(name)} before, {value} now")
