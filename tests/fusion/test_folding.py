"""Folding is exact, in whatever order the norm and the product stand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from visformer.fusion.convolutions import merge_groups
from visformer.fusion.folding import fold_after, fold_before, fold_queries, remainder, scale_and_shift
from visformer.models.layers import ChannelNorm

seeds = st.integers(0, 2**31)


def lived_in_norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    norm = kind(channels).double().eval()
    for values in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
        values.data.copy_(torch.rand(channels) + 0.2)
    return norm


@given(seeds, st.booleans())
def test_a_norm_after_a_convolution(seed, with_bias):
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(3, 5, 3, padding=1, bias=with_bias).double(), lived_in_norm(5)
    weight, bias = fold_after(conv.weight, conv.bias, norm)
    x = torch.randn(2, 3, 6, 5).double()
    assert torch.allclose(F.conv2d(x, weight, bias, padding=1), norm(conv(x)), atol=1e-12)


@given(seeds, st.booleans(), st.sampled_from([nn.BatchNorm2d, ChannelNorm]))
def test_a_norm_before_a_product(seed, with_bias, kind):
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(4, 6, 1, bias=with_bias).double(), lived_in_norm(4, kind)
    weight, bias = fold_before(conv.weight, conv.bias, norm)
    x = torch.randn(2, 4, 3, 5).double()
    assert torch.allclose(F.conv2d(remainder(norm)(x), weight, bias), conv(norm(x)), atol=1e-12)


def test_no_norm_leaves_what_there_is():
    weight, bias = torch.randn(3, 2, 1, 1), torch.randn(3)
    for fold in (fold_after, fold_before):
        folded = fold(weight, bias, nn.Identity())
        assert torch.equal(folded[0], weight.double())
        assert torch.equal(folded[1], bias.double())
        assert fold(weight, None, nn.Identity())[1] is None
    assert scale_and_shift(nn.Identity()) is None


def test_the_scale_of_attention_goes_into_the_queries_alone():
    weight, bias = fold_queries(torch.ones(6, 4), torch.ones(6), 2, 0.5)
    assert weight[:, 0].tolist() == bias.tolist() == [0.5, 0.5, 1, 1, 1, 1]


@given(seeds, st.sampled_from([(8, 2), (8, 4), (8, 8), (4, 2), (3, 3)]))
def test_merged_groups_are_the_same_function(seed, pair):
    groups, count = pair
    torch.manual_seed(seed)
    weight, x = torch.randn(groups * 2, 3, 3, 3).double(), torch.randn(1, groups * 3, 5, 4).double()
    merged = merge_groups(weight, groups, count)
    assert merged.shape == (groups * 2, 3 * count, 3, 3)
    expected = F.conv2d(x, weight, padding=1, groups=groups)
    assert torch.allclose(F.conv2d(x, merged, padding=1, groups=groups // count), expected, atol=1e-12)


def test_a_norm_that_can_not_be_folded_is_refused():
    with pytest.raises(AssertionError, match="GroupNorm"):
        scale_and_shift(nn.GroupNorm(1, 4))
