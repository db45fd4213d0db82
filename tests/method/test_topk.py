"""The top-n of any partition, merged in any order, is the top-n of all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_ray.method import topk
from epic_ray.method.topk import TopN, search, top_n


def brute_force(scores, indices, n):
    """Sorts pairs (score, index) of each channel in plain Python."""
    values, chosen = [], []
    for channel in scores.T.tolist():
        ranked = sorted(zip(channel, indices.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))[:n]
        padding = n - len(ranked)
        values.append([value for value, _ in ranked] + [-torch.inf] * padding)
        chosen.append([index for _, index in ranked] + [-1] * padding)
    return torch.tensor(values), torch.tensor(chosen)


def assert_is(top, expected):
    values, indices = expected
    assert torch.equal(top.indices, indices)
    assert torch.equal(top.values, values.to(top.values))


@st.composite
def scored_images(draw):
    """Scores of few distinct values (many ties), shuffled image indices, n, and a partition."""
    rows, d, n = draw(st.integers(1, 40)), draw(st.integers(1, 6)), draw(st.integers(1, 12))
    largest = draw(st.sampled_from([0, 1, 3, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randint(-largest, largest + 1, (rows, d), generator=generator).float()
    indices = torch.randperm(3 * rows, generator=generator)[:rows]
    sizes = draw(st.lists(st.integers(1, 15), min_size=1, max_size=8))
    cuts = [size for size in torch.tensor(sizes).cumsum(0).tolist() if size < rows]
    return scores, indices, n, cuts, draw(st.randoms(use_true_random=False))


@given(case=scored_images())
@settings(deadline=None, max_examples=100)
def test_any_partition_in_any_order_merges_to_the_top_n_of_all(case):
    scores, indices, n, cuts, random = case
    expected = brute_force(scores, indices, n)
    assert_is(top_n(scores, indices, n), expected)

    parts = [
        top_n(part, ids, n) for part, ids in zip(scores.tensor_split(cuts), indices.tensor_split(cuts), strict=True)
    ]
    random.shuffle(parts)
    merged = TopN.empty(scores.shape[1], n)
    while parts:  # a random tree of merges, not only a chain
        merged = merged.merge(parts.pop()) if random.random() < 0.7 else parts.pop().merge(merged)
    assert_is(merged, expected)
    assert merged.count.tolist() == [min(n, len(scores))] * scores.shape[1]


@given(case=scored_images(), sign=st.sampled_from([+1, -1]), rows=st.integers(1, 50))
@settings(deadline=None, max_examples=100)
def test_search_over_blocks_equals_sorting_everything(case, sign, rows):
    pooled, indices, n, cuts, _ = case
    basis = torch.eye(pooled.shape[1]).flip(0)  # a permutation: products stay exact, ties stay ties
    blocks = zip(indices.tensor_split(cuts), pooled.tensor_split(cuts), strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_BLOCK_ROWS", rows)
        found = search(blocks, basis, n, sign)
    assert_is(found, brute_force(sign * pooled.flip(1), indices, n))


def test_a_last_block_smaller_than_n_keeps_the_right_images():
    # The published code derives an image's index from `position % batch`: wrong as soon as the last batch is short.
    pooled = torch.arange(10.0).unsqueeze(1)
    blocks = [(torch.arange(10)[part], pooled[part]) for part in (slice(0, 4), slice(4, 8), slice(8, 10))]
    assert search(blocks, torch.eye(1), n=3).indices.tolist() == [[9, 8, 7]]


def test_more_prototypes_than_images_leaves_slots_marked_unused():
    top = top_n(torch.tensor([[1.0], [2.0]]), torch.tensor([7, 5]), n=4)
    assert top.indices.tolist() == [[5, 7, -1, -1]]
    assert top.values.tolist() == [[2.0, 1.0, -torch.inf, -torch.inf]]
    assert top.count.tolist() == [2]


def test_no_images_at_all():
    top = search([], torch.eye(3), n=2)
    assert top.count.tolist() == [0, 0, 0]
    assert search([(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))], torch.eye(3), 2).count.sum() == 0


def test_infinite_scores_rank_before_unused_slots():
    top = top_n(torch.tensor([[-torch.inf], [torch.inf]]), torch.tensor([4, 9]), n=3)
    assert top.indices.tolist() == [[9, 4, -1]]
    assert top.merge(TopN.empty(1, 3)).indices.tolist() == [[9, 4, -1]]


def test_negative_prototypes_are_the_most_negative_images():
    pooled = torch.tensor([[3.0], [-2.0], [-5.0], [1.0]])
    top = search([(torch.arange(4), pooled)], torch.eye(1), n=2, sign=-1)
    assert top.indices.tolist() == [[2, 1]]
    assert top.values.tolist() == [[5.0, 2.0]]


@pytest.mark.parametrize("row", [0, 3])
def test_nan_scores_are_refused_and_not_ranked(row):
    scores = torch.arange(8.0).reshape(4, 2)
    scores[row, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        top_n(scores, torch.arange(4), n=1)


def test_nan_in_a_late_block_is_refused_by_a_search(monkeypatch):
    monkeypatch.setattr(topk, "_BLOCK_ROWS", 2)
    pooled = torch.tensor([[9.0], [8.0], [1.0], [torch.nan]])
    with pytest.raises(ValueError, match="NaN"):
        search([(torch.arange(4), pooled)], torch.eye(1), n=1)


def test_merging_different_shapes_or_a_wrong_n_or_sign_is_refused():
    with pytest.raises(ValueError, match="merge"):
        TopN.empty(2, 3).merge(TopN.empty(2, 4))
    with pytest.raises(ValueError, match="at least one"):
        top_n(torch.zeros(2, 2), torch.arange(2), n=0)
    with pytest.raises(ValueError, match="sign"):
        search([], torch.eye(2), n=1, sign=0)
