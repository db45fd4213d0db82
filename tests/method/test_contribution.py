"""Shares add up to the logit; the paper's scores leave the negative channels out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_ray.method.basis import absorb, polar_factor, rotate_pooled
from epic_ray.method.contribution import scores, shares, strongest


def drawn(seed, n=6, c=4, d=9):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return randn(n, d), randn(c, d), randn(c), polar_factor(randn(d, d))


@given(seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_shares_add_up_to_the_logit(seed):
    pooled, weight, bias, basis = drawn(seed)
    logits = pooled @ weight.T + bias
    classes = logits.argmax(dim=1)
    share = shares(absorb(weight, basis), rotate_pooled(pooled, basis), classes)
    added = share.sum(dim=1) + bias[classes]
    torch.testing.assert_close(added, logits.gather(1, classes[:, None])[:, 0], rtol=0, atol=1e-10)


@given(seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_scores_are_the_shares_of_the_positive_channels_and_zero_elsewhere(seed):
    pooled, weight, _, _ = drawn(seed)
    classes = torch.arange(6) % 4
    share, score = shares(weight, pooled, classes), scores(weight, pooled, classes)
    assert torch.equal(score[pooled > 0], share[pooled > 0])
    assert (score[pooled <= 0] == 0).all()


def test_a_negative_channel_with_a_negative_weight_raises_the_logit_but_has_no_score():
    weight, pooled, classes = torch.tensor([[-2.0, 1.0]]), torch.tensor([[-3.0, 1.0]]), torch.tensor([0])
    assert shares(weight, pooled, classes).tolist() == [[6.0, 1.0]]
    assert scores(weight, pooled, classes).tolist() == [[0.0, 1.0]]


def test_the_strongest_channels_come_first_and_equal_ones_by_number():
    values, channels = strongest(torch.tensor([[1.0, 3.0, 3.0, -5.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), 3)
    assert channels.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert values.tolist() == [[3.0, 3.0, 2.0], [0.0, 0.0, 0.0]]


def test_equal_shares_of_many_channels_are_listed_in_order():
    _, channels = strongest(torch.zeros(2, 500), 500)
    assert torch.equal(channels, torch.arange(500).expand(2, 500))


@pytest.mark.parametrize("k", [0, 6])
def test_more_channels_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match="1 to 5"):
        strongest(torch.zeros(1, 5), k)
