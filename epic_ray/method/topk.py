"""Exact streaming top-n images of every channel.

N images, D channels, n images kept per channel; V (N,D) pooled features, U (D,D) basis.

The score that selects prototypes is the sum of a rotated channel over its cells (EPIC, arXiv 2505.12897, sec. 3).
It is linear, sum_hw (U z_hw)_k = H W (U v)_k, so pooled features are enough (ours). Scores here are (U v)_k, the
mean over cells. Equal scores are ordered by image index, the lower first, so that every partition of the images,
merged in any order, gives the same answer.

Of the scores of a block few can enter once many images have been seen. So the largest of each run of 64 is taken
first, at the speed of memory; runs below their channel's n-th score are never looked into, and what is found waits
until there is enough of it to be sorted in (ours).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_LAST = torch.iinfo(torch.int64).max
# Images scored at once: small enough for the scores of 2,048 channels to take 64 MB, large enough that merging
# costs little beside the product.
BLOCK_ROWS = 8192
_RUN = 64  # scores of which only the largest is looked at
_CROWDED = 4  # a channel in which this part of the runs may hold something is sorted as a whole
_CHANNELS_SORTED = 256  # at once, which bounds what is copied
_WAITING = 4  # times n: candidates of one channel that may wait to be sorted in

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
    def empty(cls, d: int, n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> "TopN":
        """No image yet, for d channels."""
        return cls(
            torch.full((d, n), -torch.inf, device=device, dtype=dtype),
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


@dataclass(frozen=True)
class Query:
    """What is searched for: the n images with the largest scores under each row of a basis.

    sign: -1 gives the negative prototypes, the top-n of the negated scores; its `values` are the negated ones.

    Raises:
        ValueError: n is below 1, or the sign is neither +1 nor -1.
    """

    basis: Float[Tensor, "d d"]
    n: int
    sign: int = +1

    def __post_init__(self) -> None:
        if self.sign not in (+1, -1):
            raise ValueError(f"sign is +1 or -1, not {self.sign}")
        _demand_some(self.n)


def top_n(scores_ND: Float[Tensor, "n_images d"], indices: Int[Tensor, "n_images"], n: int) -> TopN:
    """The n best images of every channel; `indices` names the rows and may come in any order.

    Raises:
        ValueError: a score is NaN, or n is below 1.
    """
    _demand_some(n)
    scores_DN = scores_ND.T.contiguous()
    rows = scores_DN.shape[1]
    kept = min(n, rows)
    # One more than is kept shows whether the cut falls among equal scores.
    values, positions = scores_DN.topk(min(n + 1, rows), dim=1)
    _demand_numbers(values)  # topk puts NaN first, so none can hide among the rest
    if rows > kept:
        tied = (values[:, kept - 1] == values[:, kept]).nonzero().squeeze(1)
        values, positions = values[:, :kept], positions[:, :kept].clone()
        if len(tied):
            positions[tied] = _lowest_indices_at_cut(scores_DN[tied], values[tied], indices)
    return _padded(_ordered(scores_DN.gather(1, positions), indices.long()[positions], kept), n)


def search(blocks: Iterable[Block], basis: Float[Tensor, "d d"], n: int, sign: int = +1) -> TopN:
    """The top-n of every channel of U over blocks of (image indices, pooled features): one `Query` of `search_all`."""
    return search_all(blocks, [Query(basis, n, sign)])[0]


def search_all(blocks: Iterable[Block], queries: Sequence[Query]) -> list[TopN]:
    """The answers to several queries from one passage over the blocks; queries of one basis share its product.

    Features of any floating type are taken to the basis's type and device, in which scores are computed. Beside the
    blocks themselves that takes about 4 B D 3 + 330 D n bytes in float32 for blocks of B <= 8,192 images, which longer
    ones are cut into: the scores, a copy of the features, and of each query what waits to be sorted in.

    Raises:
        ValueError: a score is NaN.
    """
    running = [_Running(query) for query in queries]
    bases = {id(query.basis): query.basis for query in queries}
    identities = {key for key, basis in bases.items() if torch.equal(basis, torch.eye(len(basis)).to(basis))}
    for indices, pooled in _cut(blocks):
        for key, basis in bases.items():
            scores_DN = _scores(pooled, basis, key in identities)
            for one in running:
                if one.query.basis is basis:
                    one.add(scores_DN, indices.to(basis.device))
            del scores_DN  # before the next are made
    return [one.finish() for one in running]


def _scores(pooled_ND: Tensor, basis: Tensor, is_identity: bool) -> Tensor:
    """(D, rows up to a multiple of the run length): U V^T, with zeros for the images that are not there."""
    missing = -len(pooled_ND) % _RUN
    if missing:
        pooled_ND = torch.nn.functional.pad(pooled_ND, (0, 0, 0, missing))
    pooled_ND = pooled_ND.to(basis)
    return pooled_ND.T.contiguous() if is_identity else basis @ pooled_ND.T


class _Running:
    """The answer to a query so far, and what is waiting to be sorted into it."""

    def __init__(self, query: Query) -> None:
        self.query = query
        basis = query.basis
        self._best = TopN.empty(len(basis), query.n, basis.device, basis.dtype)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._counts = torch.zeros(len(basis), dtype=torch.int64, device=basis.device)

    def add(self, scores_DN: Float[Tensor, "d n_padded"], indices: Int[Tensor, "n_images"]) -> None:
        """Takes up a block's scores, of which only the first len(indices) of each channel count."""
        n, sign, rows = self.query.n, self.query.sign, len(indices)
        channels, places, crowded = self._reaching(scores_DN, indices)
        if bool(crowded.any()):
            kept = ~crowded[channels]
            channels, places = channels[kept], places[kept]
        self._wait(channels, sign * scores_DN[channels, places], indices[places])
        for some in crowded.nonzero().squeeze(1).split(_CHANNELS_SORTED):
            part = top_n(sign * scores_DN[some, :rows].T, indices, n)
            used = part.indices >= 0
            self._wait(some[used.nonzero()[:, 0]], part.values[used], part.indices[used])
        if int(self._counts.max()) > _WAITING * n or int(self._counts.sum()) > n * len(self._counts) // 2:
            self._sort_in()

    def _reaching(self, scores_DN: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Bool[Tensor, "d"]]:
        """Channels and places of the scores that may enter, NaN among them; and the channels that have too many.

        Those are to be sorted as a whole; what is given of them is not all.
        """
        n, best = self.query.n, self._best
        runs_DRL = scores_DN.view(len(scores_DN), -1, _RUN)
        cut = best.values[:, -1:]
        # an equal score of a later image never enters
        below = torch.le if int(indices.min()) > int(best.indices.max()) else torch.lt
        hit = ~below(self._largest(runs_DRL), cut)
        crowded = (best.indices[:, -1] < 0) | (hit.sum(dim=1) * _CROWDED > hit.shape[1])
        channels, runs = (hit & ~crowded[:, None]).nonzero(as_tuple=True)
        found, offsets = (~below(self.query.sign * runs_DRL[channels, runs], cut[channels])).nonzero(as_tuple=True)
        channels, places = channels[found], runs[found] * _RUN + offsets
        there = places < len(indices)
        channels, places = channels[there], places[there]
        return channels, places, crowded | (torch.bincount(channels, minlength=len(crowded)) > n)

    def _largest(self, runs_DRL: Tensor) -> Tensor:
        """The largest score of each run under the query's sign; NaN where there is one."""
        return runs_DRL.amax(dim=2) if self.query.sign > 0 else -runs_DRL.amin(dim=2)

    def _wait(self, channels: Tensor, values: Tensor, indices: Tensor) -> None:
        _demand_numbers(values)
        self._waiting.append((channels, values, indices))
        self._counts += torch.bincount(channels, minlength=len(self._counts))

    def _sort_in(self) -> None:
        """Merges what waits into the answer, in the channels that it is of."""
        channels, values, indices = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        order = channels.argsort(stable=True)
        slots = torch.arange(len(order), device=order.device) - (self._counts.cumsum(0) - self._counts)[channels[order]]
        new = TopN.empty(len(self._counts), int(self._counts.max()), values.device, values.dtype)
        new.values[channels[order], slots], new.indices[channels[order], slots] = values[order], indices[order]
        touched = self._counts.nonzero().squeeze(1)
        merged = _ordered(
            torch.cat([self._best.values[touched], new.values[touched]], dim=1),
            torch.cat([self._best.indices[touched], new.indices[touched]], dim=1),
            self.query.n,
        )
        self._best.values[touched], self._best.indices[touched] = merged.values, merged.indices
        self._waiting = []
        self._counts.zero_()

    def finish(self) -> TopN:
        if self._waiting:
            self._sort_in()
        return self._best


def _padded(top: TopN, n: int) -> TopN:
    """The same with unused slots up to n columns."""
    spare = TopN.empty(len(top.values), n - top.values.shape[1], top.values.device, top.values.dtype)
    return TopN(torch.cat([top.values, spare.values], dim=1), torch.cat([top.indices, spare.indices], dim=1))


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


def _cut(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same rows in blocks of at most BLOCK_ROWS, none of them empty."""
    for indices, pooled in blocks:
        for part in zip(indices.split(BLOCK_ROWS), pooled.split(BLOCK_ROWS), strict=True):
            if len(part[0]):
                yield part


def _demand_some(n: int) -> None:
    if n < 1:
        raise ValueError(f"top_n keeps at least one image per channel, not {n}")


def _demand_numbers(values: Tensor) -> None:
    if bool(values.isnan().any()):
        raise ValueError("top_n: scores contain NaN")
