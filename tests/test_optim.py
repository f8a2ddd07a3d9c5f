"""Which parameters decay, which learn slower, and the loss."""

import pytest
import torch
import torch.nn.functional as F

from tests.upstream import mini_architecture
from visformer.config import TrainConfig
from visformer.losses import build_loss
from visformer.models import Visformer
from visformer.optim import build_optimizer, parameter_groups, set_learning_rate


@pytest.fixture(scope="module")
def model():
    return Visformer(mini_architecture("mindcv_mini_v2"))


def decayed(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


@pytest.mark.parametrize(
    "name, spared",
    [
        ("disable", lambda n: False),
        ("auto", lambda n: ".norm." in n or n.startswith(("norm.", "stem.1."))),
        ("norm_and_bias", lambda n: ".norm." in n or n.startswith(("norm.", "stem.1.")) or n.endswith(".bias")),
    ],
)
def test_the_decay_filter_spares_what_it_says(model, name, spared):
    groups = parameter_groups(model, TrainConfig(weight_decay=0.05, weight_decay_filter=name))
    everything = {n for n, _ in model.named_parameters()}
    assert decayed(model, groups) == {n for n in everything if not spared(n)}
    assert sum(len(group["params"]) for group in groups) == len(everything)


def test_layer_decay_falls_from_head_to_stem(model):
    groups = parameter_groups(model, TrainConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    order = [
        model.head.weight,
        model.stages[3].blocks[1].mlp.branch.conv1.weight,
        model.stages[3].blocks[0].mlp.norm.weight,
    ]
    order += [model.stages[2].blocks[0].attn.norm.weight, model.stages[0].embed.proj.weight, model.stem[0].weight]
    scales = [scale[id(p)] for p in order]
    assert scales[0] == 1 and scales == sorted(scales, reverse=True) and len(set(scales)) == len(scales)


def test_each_group_keeps_its_share_of_the_rate(model):
    optimizer = build_optimizer(model, TrainConfig(opt="adamw", layer_decay=0.5), torch.device("cpu"))
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] / group["lr_scale"] for group in optimizer.param_groups] == pytest.approx(
        [0.1] * len(optimizer.param_groups)
    )


@pytest.mark.parametrize("loss", ["CE", "BCE"])
def test_hard_and_soft_targets_give_the_same_loss(loss):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5), torch.randint(0, 5, (6,))
    function = build_loss(TrainConfig(loss=loss, label_smoothing=0.1))
    torch.testing.assert_close(function(logits, targets), function(logits, F.one_hot(targets, 5).float()))


def test_smoothing_is_mindcvs():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5), torch.randint(0, 5, (6,))
    soft = F.one_hot(targets, 5) * 0.9 + 0.1 / 5
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(build_loss(TrainConfig(label_smoothing=0.1))(logits, targets), expected)


def test_the_sum_is_the_mean_times_the_batch():
    logits, targets = torch.randn(6, 5), torch.randint(0, 5, (6,))
    summed = build_loss(TrainConfig(reduction="sum"))(logits, targets)
    torch.testing.assert_close(summed, 6 * build_loss(TrainConfig())(logits, targets))
