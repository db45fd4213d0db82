"""The proof that the method leaves the classifier as it is, from the feature tables: no image is read."""

from dataclasses import dataclass

import numpy as np
import torch

from epic_ray.method.basis import absorb, rotate_pooled
from epic_ray.method.classifier import SplitClassifier
from epic_ray.run_dir import RunDir
from epic_ray.stages.features import feature_files, read_images_table
from epic_ray.tables import read_table, to_numpy


@dataclass(frozen=True)
class Exactness:
    """Over the readable images of a split: top-1 shares (None without labels), and the rebuilt logits against the
    classifier's own (None where the split's own logits are not kept)."""

    images: int
    backbone_top1: float | None
    top1: float | None
    max_abs_difference: float | None
    top1_agreement: float


def prove_exactness(
    run_dir: RunDir, split: str, fingerprint: str, classifier: SplitClassifier, basis: torch.Tensor
) -> Exactness:
    """Rebuilds the logits of every image of a split as (A·Uᵀ)(U·v) + b and compares them with the classifier's own."""
    weight, bias = absorb(classifier.weight.cpu(), basis), classifier.bias.cpu()
    images = read_images_table(run_dir, split, ["position", "label", "predicted"])
    labels, predicted = (images[name].to_numpy(zero_copy_only=False) for name in ("label", "predicted"))
    rebuilt_class = np.full(images.num_rows, -1)
    largest: float | None = None
    for file in feature_files(run_dir, split, fingerprint):
        table = read_table(run_dir, file)
        rebuilt = rotate_pooled(torch.tensor(to_numpy(table["pooled"])), basis) @ weight.T + bias
        rebuilt_class[to_numpy(table["position"])] = rebuilt.argmax(dim=1).numpy()
        if "logits" in table.column_names:
            difference = (rebuilt - torch.tensor(to_numpy(table["logits"]))).abs().max()
            largest = max(largest or 0.0, float(difference))
    read = rebuilt_class >= 0
    labelled = read & ~np.isnan(labels.astype(float))

    def share(guess: np.ndarray) -> float | None:
        return float((guess[labelled] == labels[labelled]).mean()) if labelled.any() else None

    agreement = float((rebuilt_class[read] == predicted[read]).mean()) if read.any() else 1.0
    return Exactness(int(read.sum()), share(predicted), share(rebuilt_class), largest, agreement)
