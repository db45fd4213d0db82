"""What carries a prediction: the strongest channels of an image, with their peaks.

B images, C classes, D channels, K channels shown, H x W cells; U (D,D) basis, A^ = A U^T (C,D), v^ = U v.
Shares and scores: `contribution.py`; peaks and purity: `peaks.py`.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from epic_ray.method.basis import rotate_pooled
from epic_ray.method.contribution import scores, shares, strongest
from epic_ray.method.peaks import find_peaks_grouped


@dataclass(frozen=True)
class Explained:
    """The explanation of each image's predicted class.

    predicted, logit, probability: the classifier's own prediction. channels: strongest first. shares, scores, values:
    s_k, the paper's score and v^_k of those channels. signs: the side the channel is on, that of v^_k (+1 at 0).
    cells: flat index of the channel's peak on that side. purity: there.
    difference: largest |difference| of A^ v^ + b from the classifier's own logits. agrees: both predict the same.
    """

    predicted: Int[Tensor, "b"]
    logit: Float[Tensor, "b"]
    probability: Float[Tensor, "b"]
    channels: Int[Tensor, "b k"]
    shares: Float[Tensor, "b k"]
    scores: Float[Tensor, "b k"]
    values: Float[Tensor, "b k"]
    signs: Int[Tensor, "b k"]
    cells: Int[Tensor, "b k"]
    purity: Float[Tensor, "b k"]
    difference: Float[Tensor, "b"]
    agrees: Bool[Tensor, "b"]

    def cpu(self) -> "Explained":
        """The same in main memory."""
        return Explained(**{field.name: getattr(self, field.name).cpu() for field in fields(self)})


def explain_maps(
    maps: Float[Tensor, "b d h w"],
    logits: Float[Tensor, "b c"],
    weight_rotated: Float[Tensor, "c d"],
    bias: Float[Tensor, "c"],
    basis: Float[Tensor, "d d"],
    k: int,
    rank_by: Literal["share", "score"] = "share",
) -> Explained:
    """Explains the prediction of each image by its k strongest channels (EPIC, arXiv 2505.12897, sec. 3; share: ours).

    `maps` and `logits` are the classifier's own; at most D channels are given.
    """
    pooled_rotated = rotate_pooled(maps.mean(dim=(2, 3)), basis)
    logit, predicted = logits.max(dim=1)
    all_shares = shares(weight_rotated, pooled_rotated, predicted)
    all_scores = scores(weight_rotated, pooled_rotated, predicted)
    _, channels = strongest(all_shares if rank_by == "share" else all_scores, min(k, len(basis)))
    values = pooled_rotated.gather(1, channels)
    signs = torch.where(values < 0, -1, 1)
    cells, purity = _peaks_by_sign(maps.flatten(2).transpose(1, 2).contiguous(), channels, signs, basis)
    rebuilt = pooled_rotated @ weight_rotated.T + bias
    return Explained(
        predicted=predicted,
        logit=logit,
        probability=torch.exp(logit - logits.logsumexp(dim=1)),
        channels=channels,
        shares=all_shares.gather(1, channels),
        scores=all_scores.gather(1, channels),
        values=values,
        signs=signs,
        cells=cells,
        purity=purity,
        difference=(rebuilt - logits).abs().amax(dim=1),
        agrees=rebuilt.argmax(dim=1) == predicted,
    )


def _peaks_by_sign(
    maps_BSD: Float[Tensor, "b s d"], channels: Int[Tensor, "b k"], signs: Int[Tensor, "b k"], basis: Tensor
) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
    cells = torch.zeros_like(channels)
    purity = torch.zeros(channels.shape, dtype=maps_BSD.dtype, device=maps_BSD.device)
    for sign in (+1, -1):
        images, slots = (signs == sign).nonzero(as_tuple=True)
        if len(images):
            peaks = find_peaks_grouped(maps_BSD, images, channels[images, slots], basis, sign)
            cells[images, slots], purity[images, slots] = peaks.cells, peaks.purity
    return cells, purity
