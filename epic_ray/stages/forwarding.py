"""The actor with the classifier: units forwarded in fixed batches, on a GPU without waiting for it."""

from collections.abc import Iterator

import numpy as np
import torch

from epic_ray.config import ModelConfig
from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.staging import Staging
from epic_ray.run_dir import RunDir
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.loading import load
from epic_ray.stages.resources import Resources, take_device
from epic_ray.stages.unit_actor import UnitActor


class ForwardingActor(UnitActor):
    """Base of the actors that hold the classifier."""

    def __init__(self, run_dir: RunDir, model: ModelConfig, resources: Resources, attempts: Attempts) -> None:
        super().__init__(run_dir, attempts)
        self.device = take_device(resources.device, resources.threads)
        self.classifier: SplitClassifier = load(model, resources.precision).to(self.device)
        self.batch_size = resources.batch_size

    def forward(self, pixels: np.ndarray, rows: np.ndarray) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(place among `rows`, maps (b,d,h,w), logits (b,c)) batch by batch; the last batch is padded, then cut.

        On a GPU nothing waits for its work: the next batch is gathered, and its copy asked for, while it computes.
        """
        staged = Staging(self.batch_size, pixels.shape[1:], self.device)
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            with torch.inference_mode():
                maps, logits = self.classifier(self.classifier.normalise(staged.send(pixels, chosen)))
            yield slice(start, start + len(chosen)), maps[: len(chosen)], logits[: len(chosen)]
