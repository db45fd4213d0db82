"""The top-n of any partition, merged in any order, is the top-n of all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_ray.method import topk
from epic_ray.method.topk import Query, TopN, search, search_all, top_n


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


@given(case=scored_images(), rows=st.integers(1, 50), run=st.integers(1, 8), crowded=st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_search_over_blocks_equals_sorting_everything(case, rows, run, crowded):
    """However the blocks are cut, and however many scores are looked at at once."""
    pooled, indices, n, cuts, _ = case
    basis = torch.eye(pooled.shape[1]).flip(0)  # a permutation: products stay exact, ties stay ties
    blocks = list(zip(indices.tensor_split(cuts), pooled.tensor_split(cuts), strict=True))
    queries = [Query(matrix, n, sign) for matrix in (basis, torch.eye(len(basis))) for sign in (+1, -1)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BLOCK_ROWS", rows), ("_RUN", run), ("_CROWDED", crowded), ("_CHANNELS_SORTED", 2)):
            patch.setattr(topk, name, value)
        found = search_all(blocks, queries)
    for query, top in zip(queries, found, strict=True):
        assert_is(top, brute_force(query.sign * pooled @ query.basis.T, indices, n))


def full_sort(scores, indices, n):
    """The top-n by two stable sorts of all scores."""
    by_index = indices.argsort()
    values, order = scores[by_index].sort(dim=0, descending=True, stable=True)
    return values[:n].T, indices[by_index][order[:n]].T


@pytest.mark.parametrize("order", ["listed", "reversed", "shuffled"])
@pytest.mark.parametrize("kind", ["noise", "classes", "ties", "zeros", "rising", "falling"])
def test_a_long_search_equals_a_full_sort(order, kind):
    """Scores of every habit, in blocks in which few can enter, and in orders in which equal scores may."""
    generator = torch.Generator().manual_seed(5)
    rows, d, n = 20_000, 6, 30
    noise = torch.randn(rows, d, generator=generator)
    classes = 5 * torch.randn(20, d, generator=generator).repeat_interleave(rows // 20, dim=0)
    along = torch.linspace(0, 1, rows)[:, None].expand(rows, d)
    pooled = {
        "noise": noise,
        "classes": noise + classes,
        "ties": (3 * noise).round(),
        "zeros": torch.where(noise > 3.5, noise, 0).mul(torch.tensor([0.0, 1, 1, 0, 1, 1])),
        "rising": along,
        "falling": -along,
    }[kind].contiguous()
    indices = torch.arange(rows)
    blocks = list(zip(indices.split(1500), pooled.split(1500), strict=True))
    if order == "reversed":
        blocks = blocks[::-1]
    if order == "shuffled":
        blocks = [blocks[place] for place in torch.randperm(len(blocks), generator=generator)]
    basis = torch.eye(d).flip(0)
    queries = [Query(basis, n), Query(basis, n, -1), Query(torch.eye(d), 5)]
    for query, top in zip(queries, search_all(blocks, queries), strict=True):
        assert_is(top, full_sort(query.sign * pooled @ query.basis.T, indices, query.n))


def test_several_queries_in_one_passage_equal_each_alone_to_the_bit():
    generator = torch.Generator().manual_seed(6)
    pooled = torch.rand(3000, 40, generator=generator)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    blocks = list(zip(torch.arange(3000).split(700), pooled.split(700), strict=True))
    queries = [Query(matrix, n, sign) for matrix in (basis, torch.eye(40)) for n, sign in ((20, 1), (5, -1))]
    for query, top in zip(queries, search_all(iter(blocks), queries), strict=True):
        assert_is(top, vars(search(blocks, query.basis, query.n, query.sign)).values())


def test_features_of_half_precision_are_scored_in_single():
    generator = torch.Generator().manual_seed(7)
    pooled = torch.rand(500, 16, generator=generator).half()
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    found = search([(torch.arange(500), pooled)], basis, 9)
    assert found.values.dtype == torch.float32
    assert_is(found, vars(search([(torch.arange(500), pooled.float())], basis, 9)).values())
    values = (pooled.double() @ basis.double().T).T.gather(1, found.indices)
    assert (found.values - values).abs().max() < 1e-6  # float16 would be off by 1e-3


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


def test_a_search_ranks_images_of_infinite_score_before_unused_slots():
    blocks = [(torch.tensor([place]), torch.tensor([[score]])) for place, score in enumerate((2.0, -torch.inf, 3.0))]
    assert search(blocks, torch.eye(1), n=4).indices.tolist() == [[2, 0, 1, -1]]


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


@pytest.mark.parametrize("sign", [+1, -1])
@pytest.mark.parametrize("kind", ["low", "flat"])
def test_nan_in_a_late_block_is_refused_by_a_search(monkeypatch, sign, kind):
    """Be it among scores of which none could enter, or in a channel that is sorted as a whole."""
    monkeypatch.setattr(topk, "BLOCK_ROWS", 256)
    pooled = torch.linspace(9, 1, 512)[:, None] if kind == "low" else torch.ones(512, 1)
    pooled = sign * pooled
    pooled[400] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        search([(torch.arange(512), pooled)], torch.eye(1), 1, sign)


def test_merging_different_shapes_or_a_wrong_n_or_sign_is_refused():
    with pytest.raises(ValueError, match="merge"):
        TopN.empty(2, 3).merge(TopN.empty(2, 4))
    with pytest.raises(ValueError, match="at least one"):
        top_n(torch.zeros(2, 2), torch.arange(2), n=0)
    with pytest.raises(ValueError, match="sign"):
        search([], torch.eye(2), n=1, sign=0)
