"""Which channels carry a prediction.

N images, C classes, D channels; rotated head A^ = A U^T (C,D), rotated pooled features v^ = V U^T (N,D), y the
class explained.
"""

from jaxtyping import Float, Int
from torch import Tensor


def shares(
    logit_weight_rotated: Float[Tensor, "c d"],
    pooled_rotated: Float[Tensor, "n d"],
    classes: Int[Tensor, "n"],
) -> Float[Tensor, "n d"]:
    """The exact signed share of every channel in the logit of class y: s_k = A^_yk v^_k (ours).

    They add up: sum_k s_k + b_y is the logit of y.
    """
    return logit_weight_rotated[classes] * pooled_rotated


def scores(
    logit_weight_rotated: Float[Tensor, "c d"],
    pooled_rotated: Float[Tensor, "n d"],
    classes: Int[Tensor, "n"],
) -> Float[Tensor, "n d"]:
    """The score of every channel for class y: A^_yk ReLU(v^_k) (EPIC, arXiv 2505.12897, sec. 3).

    The ReLU drops channels below zero, also those that raise the logit through a negative weight, so scores do
    not add up to the logit.
    """
    return logit_weight_rotated[classes] * pooled_rotated.relu()


def strongest(values: Float[Tensor, "n d"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest values of each image and their channels, descending; equal values by the lower channel.

    Raises:
        ValueError: k is below 1 or above the number of channels.
    """
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"strongest takes 1 to {values.shape[1]} channels, not {k}")
    ordered, channels = values.sort(dim=1, descending=True, stable=True)
    return ordered[:, :k], channels[:, :k]
