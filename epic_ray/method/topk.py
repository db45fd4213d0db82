"""Exact streaming top-n images of every channel.

N images, D channels, n images kept per channel; V (N,D) pooled features, U (D,D) basis.

The score that selects prototypes is the sum of a rotated channel over its cells (EPIC, arXiv 2505.12897, sec. 3).
It is linear, sum_hw (U z_hw)_k = H W (U v)_k, so pooled features are enough (ours). Scores here are (U v)_k, the
mean over cells. Equal scores are ordered by image index, the lower first, so that every partition of the images,
merged in any order, gives the same answer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LAST = torch.iinfo(torch.int64).max
# Images scored at once: small enough for the scores of 2,048 channels to take 64 MB, large enough that merging
# costs little beside the product.
_BLOCK_ROWS = 8192

Block = tuple[Int[Tensor, "_"], Float[Tensor, "_ d"]]


@dataclass(frozen=True)
class TopN:
    """The n images with the largest scores, per channel; always n columns.

    values: scores, descending; -inf in unused slots.
    indices: image indices (int64), ascending among equal scores; -1 in unused slots, which come last.
    """

    values: Float[Tensor, "d n"]
    indices: Int[Tensor, "d n"]

    @classmethod
    def empty(cls, d: int, n: int, device: torch.device | str = "cpu") -> "TopN":
        """No image yet, for d channels."""
        return cls(
            torch.full((d, n), -torch.inf, device=device),
            torch.full((d, n), -1, dtype=torch.int64, device=device),
        )

    @property
    def count(self) -> Int[Tensor, "d"]:
        """Used slots per channel."""
        return (self.indices >= 0).sum(dim=1)

    def merge(self, other: "TopN") -> "TopN":
        """The top-n of both, which must come from different images.

        Raises:
            ValueError: the two differ in channels or in n.
        """
        if self.values.shape != other.values.shape:
            raise ValueError(f"cannot merge top-n of shapes {self.values.shape} and {other.values.shape}")
        device = self.values.device
        values = torch.cat([self.values, other.values.to(device)], dim=1)
        indices = torch.cat([self.indices, other.indices.to(device)], dim=1)
        return _ordered(values, indices, self.values.shape[1])


def top_n(scores_ND: Float[Tensor, "n_images d"], indices: Int[Tensor, "n_images"], n: int) -> TopN:
    """The n best images of every channel; `indices` names the rows and may come in any order.

    Raises:
        ValueError: a score is NaN, or n is below 1.
    """
    if n < 1:
        raise ValueError(f"top_n keeps at least one image per channel, not {n}")
    scores_DN = scores_ND.T.contiguous()
    rows = scores_DN.shape[1]
    kept = min(n, rows)
    # One more than is kept shows whether the cut falls among equal scores.
    values, positions = scores_DN.topk(min(n + 1, rows), dim=1)
    if bool(values.isnan().any()):  # topk puts NaN first, so none can hide among the rest
        raise ValueError("top_n: scores contain NaN")
    if rows > kept:
        tied = (values[:, kept - 1] == values[:, kept]).nonzero().squeeze(1)
        values, positions = values[:, :kept], positions[:, :kept].clone()
        if len(tied):
            positions[tied] = _lowest_indices_at_cut(scores_DN[tied], values[tied], indices)
    return _padded(_ordered(scores_DN.gather(1, positions), indices.long()[positions], kept), n)


def search(blocks: Iterable[Block], basis: Float[Tensor, "d d"], n: int, sign: int = +1) -> TopN:
    """The top-n of every channel of U over blocks of (image indices, pooled features).

    `sign` -1 gives the negative prototypes: the top-n of the negated scores, and `values` are the negated ones.
    Memory stays bounded whatever the size of the blocks.

    Raises:
        ValueError: a score is NaN, n is below 1, or the sign is neither +1 nor -1.
    """
    if sign not in (+1, -1):
        raise ValueError(f"sign is +1 or -1, not {sign}")
    signed_basis = sign * basis
    best = TopN.empty(len(basis), n, basis.device)
    for indices, pooled in _regroup(blocks, _BLOCK_ROWS):
        pooled = pooled.to(signed_basis)
        scores_DN = signed_basis @ pooled.T
        # Only an image that reaches a channel's n-th score can enter: few, once many images have been seen.
        entering = int((scores_DN >= best.values[:, -1:]).sum(dim=1).max())
        part = top_n(scores_DN.T, indices.to(basis.device), min(n, max(entering, 1)))
        best = _padded(part, n).merge(best)
    return best


def _padded(top: TopN, n: int) -> TopN:
    """The same with unused slots up to n columns."""
    spare = TopN.empty(len(top.values), n - top.values.shape[1], top.values.device)
    return TopN(
        torch.cat([top.values, spare.values.to(top.values.dtype)], dim=1),
        torch.cat([top.indices, spare.indices], dim=1),
    )


def _ordered(values: Tensor, indices: Tensor, n: int) -> TopN:
    """The first n by (value descending, index ascending), unused slots last."""
    by_index = torch.where(indices < 0, _LAST, indices).argsort(dim=1)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    by_value = values.argsort(dim=1, descending=True, stable=True)[:, :n]
    return TopN(values.gather(1, by_value), indices.gather(1, by_value))


def _lowest_indices_at_cut(scores_TN: Tensor, values_Tn: Tensor, indices: Tensor) -> Tensor:
    """Positions (T,n) of the top-n where several scores equal the n-th: of those, the lowest image indices."""
    n = values_Tn.shape[1]
    by_index = indices.argsort()
    scores_TN = scores_TN[:, by_index]
    cut = values_Tn[:, -1:]
    above, at_cut = scores_TN > cut, scores_TN == cut
    room = n - above.sum(dim=1, keepdim=True)
    keep = above | (at_cut & (at_cut.cumsum(dim=1) <= room))
    return by_index[keep.nonzero()[:, 1].view(len(scores_TN), n)]


def _regroup(blocks: Iterable[Block], rows: int) -> Iterator[Block]:
    """The same rows in blocks of at least `rows` (but the last) and less than twice as many."""
    held: list[Block] = []
    count = 0
    for indices, pooled in blocks:
        for part in zip(indices.split(rows), pooled.split(rows), strict=True):
            held.append(part)
            count += len(part[0])
            if count >= rows:
                yield _join(held)
                held, count = [], 0
    if count:
        yield _join(held)


def _join(blocks: list[Block]) -> Block:
    return torch.cat([indices for indices, _ in blocks]), torch.cat([pooled for _, pooled in blocks])
