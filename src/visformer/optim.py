"""Optimizers by MindCV's names, and which parameter decays and learns how fast.

Adam's weight decay is added to the gradient, AdamW's is taken off the weight, as in MindSpore. Lion and LAMB are
timm's.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from visformer.config import TrainConfig
from visformer.freezing import frozen_parts
from visformer.models import Visformer
from visformer.models.layers import ChannelNorm


def build_optimizer(model: Visformer, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `config` over `model`'s parameters; each group holds its `lr_scale`."""
    groups = parameter_groups(model, config)
    fused: dict[str, Any] = {"fused": True} if device.type in ("cpu", "cuda") else {}
    adaptive: dict[str, Any] = {"lr": config.lr, "eps": config.eps}
    momentum: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum}
    if config.opt in ("sgd", "momentum"):
        return torch.optim.SGD(groups, **momentum, nesterov=config.use_nesterov, **fused)
    if config.opt == "adam":
        return torch.optim.Adam(groups, **adaptive, **fused)
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, **adaptive, **fused)
    if config.opt == "nadam":
        return torch.optim.NAdam(groups, **adaptive)
    if config.opt == "rmsprop":
        return torch.optim.RMSprop(groups, **momentum, eps=config.eps)
    if config.opt == "adagrad":
        return torch.optim.Adagrad(groups, **adaptive)
    from timm.optim.lamb import Lamb  # here, as timm takes a while to import, and few runs need it
    from timm.optim.lion import Lion

    return Lamb(groups, **adaptive) if config.opt == "lamb" else Lion(groups, lr=config.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def parameter_groups(model: Visformer, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters that share a decay and a rate, as optimizers take them.

    `weight_decay_filter` spares nothing (disable), norms (auto), or norms and biases (norm_and_bias) from decay.
    `layer_decay` multiplies the rate of each layer by its power of the depth, counted from the head.
    """
    spared = _spared(model, config.weight_decay_filter)
    scales = _layer_scales(model, config.layer_decay)
    # What is frozen has groups of its own: fused SGD wants momentum for all parameters of a group or for none.
    frozen = {parameter for part in frozen_parts(model, config.freeze) for parameter in part.parameters()}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name in spared else config.weight_decay
            groups[decay, scales.get(name, 1.0), parameter in frozen].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "lr": config.lr * scale}
        for (decay, scale, _), parameters in groups.items()
    ]


def _spared(model: nn.Module, weight_decay_filter: str) -> set[str]:
    if weight_decay_filter == "disable":
        return set()
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, (_BatchNorm, ChannelNorm, nn.LayerNorm))
        for name, _ in module.named_parameters()
    }
    if weight_decay_filter == "auto":
        return norms
    return norms | {name for name, _ in model.named_parameters() if name.endswith(".bias")}


def _layer_scales(model: Visformer, layer_decay: float | None) -> dict[str, float]:
    if layer_decay is None:
        return {}
    from timm.models import group_parameters

    layers = cast("dict[str, int]", group_parameters(model, model.group_matcher(), reverse=True))
    deepest = max(layers.values())
    return {name: layer_decay ** (deepest - layer) for name, layer in layers.items()}
