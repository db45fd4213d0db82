"""Where a channel fires in an image, and how purely.

P pairs (image, channel), B feature maps, S = H W cells (row-major), D channels; U (D,D) basis with rows u_k.

Peak of channel k in an image: the cell where u_k.z is largest. Purity there: u_k.z / |z|, in [-1, 1]
(EPIC, arXiv 2505.12897, sec. 3, which divides by |U z|: the same for an orthogonal U, so row k is enough).
Negative side (ours): the cell where u_k.z is smallest, purity -u_k.z / |z|. An all-zero cell has purity 0.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Peaks:
    """The peak of each (image, channel) pair.

    cells: flat index of the peak cell, row * W + column; the lowest among equals.
    purity: in [-1, 1].
    value: the rotated activation u_k.z at the peak, with its own sign also on the negative side.
    """

    cells: Int[Tensor, "p"]
    purity: Float[Tensor, "p"]
    value: Float[Tensor, "p"]


def find_peaks(
    cells_PSD: Float[Tensor, "p s d"],
    channels: Int[Tensor, "p"],
    basis: Float[Tensor, "d d"],
    sign: int = +1,
) -> Peaks:
    """Peaks of one (image, channel) pair a row: its cells and its channel.

    Raises:
        ValueError: the sign is neither +1 nor -1.
    """
    scores_PS = torch.bmm(cells_PSD, basis[channels].unsqueeze(2)).squeeze(2)
    signed, cells = (_checked(sign) * scores_PS).max(dim=1)
    peak_PD = cells_PSD[torch.arange(len(cells), device=cells.device), cells]
    return _with_purity(cells, signed, peak_PD.norm(dim=1), sign)


def find_peaks_grouped(
    maps_BSD: Float[Tensor, "b s d"],
    image_slots: Int[Tensor, "p"],
    channels: Int[Tensor, "p"],
    basis: Float[Tensor, "d d"],
    sign: int = +1,
) -> Peaks:
    """Peaks of pairs that share feature maps: pair i is row `image_slots[i]` of the maps and its channel.

    Each map is multiplied by the channels asked of it and never copied per pair.

    Raises:
        ValueError: the sign is neither +1 nor -1.
    """
    by_image = image_slots.argsort(stable=True)
    slots, counts = image_slots[by_image].unique_consecutive(return_counts=True)
    signed_basis = _checked(sign) * basis
    cells, signed, norms = (
        torch.zeros(len(by_image), dtype=torch.int64, device=basis.device),
        torch.zeros(len(by_image), dtype=basis.dtype, device=basis.device),
        torch.zeros(len(by_image), dtype=basis.dtype, device=basis.device),
    )
    for slot, pairs in zip(slots.tolist(), by_image.split(counts.tolist()), strict=True):
        map_SD = maps_BSD[slot].to(basis)
        signed[pairs], cells[pairs] = (signed_basis[channels[pairs]] @ map_SD.T).max(dim=1)
        norms[pairs] = map_SD.norm(dim=1)[cells[pairs]]
    return _with_purity(cells, signed, norms, sign)


def heat_maps(
    maps_BSD: Float[Tensor, "b s d"],
    image_slots: Int[Tensor, "p"],
    channels: Int[Tensor, "p"],
    basis: Float[Tensor, "d d"],
) -> Float[Tensor, "p s"]:
    """The rotated activation u_k.z at every cell, of pairs as in `find_peaks_grouped`."""
    heat_PS = torch.zeros((len(channels), maps_BSD.shape[1]), dtype=basis.dtype, device=basis.device)
    for slot in image_slots.unique().tolist():
        pairs = (image_slots == slot).nonzero()[:, 0]
        heat_PS[pairs] = basis[channels[pairs]] @ maps_BSD[slot].to(basis).T
    return heat_PS


def unit_peak_vectors(
    maps_BSD: Float[Tensor, "b s d"], image_slots: Int[Tensor, "p"], peaks: Peaks
) -> Float[Tensor, "p d"]:
    """The unrotated cell at each peak, scaled to length 1: z / |z|; 0 for an all-zero cell."""
    vectors_PD = maps_BSD[image_slots, peaks.cells].to(peaks.value.dtype)
    norms = vectors_PD.norm(dim=1, keepdim=True)
    return torch.where(norms == 0, 0.0, vectors_PD / norms)


def _checked(sign: int) -> int:
    if sign not in (+1, -1):
        raise ValueError(f"sign is +1 or -1, not {sign}")
    return sign


def _with_purity(cells: Tensor, signed: Tensor, norms: Tensor, sign: int) -> Peaks:
    # Only rounding can leave [-1, 1]; NaN stays NaN.
    purity = torch.where(norms == 0, 0.0, signed / norms).clamp(-1.0, 1.0)
    return Peaks(cells, purity, sign * signed)
