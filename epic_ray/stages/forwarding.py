"""The actor with the classifier: units forwarded in fixed batches, on a GPU without waiting for it."""

from collections.abc import Iterator

import numpy as np
import torch

from epic_ray.config import ModelConfig
from epic_ray.method.classifier import SplitClassifier
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

        On a GPU nothing waits for its work: the next batch is copied there while it computes.
        """
        staged = _Staging(self.batch_size, pixels.shape[1:], self.device)
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            with torch.inference_mode():
                maps, logits = self.classifier(self.classifier.normalise(staged.send(pixels, chosen)))
            yield slice(start, start + len(chosen)), maps[: len(chosen)], logits[: len(chosen)]


class _Staging:
    """Batches on their way to the device: on a GPU through two pinned buffers, one filled while the other is read."""

    def __init__(self, batch_size: int, shape: tuple[int, ...], device: torch.device) -> None:
        self._device, self._pinned, self._number = device, device.type == "cuda", 0
        count = 2 if self._pinned else 1
        self._buffers = [
            torch.empty((batch_size, *shape), dtype=torch.uint8, pin_memory=self._pinned) for _ in range(count)
        ]
        self._arrived: list[torch.cuda.Event | None] = [None] * count

    def send(self, pixels: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """A batch of these rows on the device, the rest of it zeros."""
        place = self._number % len(self._buffers)
        self._number += 1
        buffer, event = self._buffers[place], self._arrived[place]
        if event:
            event.synchronize()
        batch = buffer.numpy()
        np.take(pixels, rows, axis=0, out=batch[: len(rows)], mode="clip")  # the mode that copies once
        batch[len(rows) :] = 0
        on_device = buffer.to(self._device, non_blocking=True)
        if self._pinned:
            self._arrived[place] = event = torch.cuda.Event()
            event.record()
        return on_device
