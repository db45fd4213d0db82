"""The proof that the method leaves the classifier as it is, from the feature tables: no image is read."""

from dataclasses import dataclass

import pyarrow.compute as pc
import torch

from epic_ray.errors import ResultError
from epic_ray.method.basis import absorb, rotate_pooled
from epic_ray.method.classifier import SplitClassifier
from epic_ray.run_dir import RunDir
from epic_ray.stages.features import FeaturePass, read_features, read_status
from epic_ray.tables import to_numpy


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
    run_dir: RunDir, passed: FeaturePass, classifier: SplitClassifier, basis: torch.Tensor
) -> Exactness:
    """Rebuilds the logits of every image of a split as (A·Uᵀ)(U·v) + b and compares them with the classifier's own."""
    weight, bias = absorb(classifier.weight.cpu(), basis), classifier.bias.cpu()
    images = labelled = own_right = right = agreeing = 0
    largest: float | None = None
    for file, unit in zip(passed.files(), passed.readable_units(), strict=True):
        features = read_features(run_dir, file)
        status = read_status(run_dir, passed.split, unit.number, ["position", "status", "label", "predicted"])
        status = status.filter(pc.equal(status["status"], "ok"))
        if not status["position"].equals(features["position"]):
            raise ResultError(f"{run_dir.show(file.relative)}: has other images than the unit's statuses; run it again")
        pooled = torch.tensor(to_numpy(features["pooled"])).to(basis)
        rebuilt = rotate_pooled(pooled, basis) @ weight.T + bias
        guess, predicted = rebuilt.argmax(dim=1).numpy(), to_numpy(status["predicted"])
        labels = to_numpy(pc.fill_null(status["label"], -1))
        images += len(guess)
        labelled += int((labels >= 0).sum())
        own_right += int((predicted == labels).sum())
        right += int((guess == labels).sum())
        agreeing += int((guess == predicted).sum())
        if "logits" in features.column_names:
            difference = (rebuilt - torch.tensor(to_numpy(features["logits"]))).abs().max()
            largest = max(largest or 0.0, float(difference))

    def share(count: int) -> float | None:
        return count / labelled if labelled else None

    return Exactness(images, share(own_right), share(right), largest, agreeing / images if images else 1.0)
