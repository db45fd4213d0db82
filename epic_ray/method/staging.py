"""Batches of pixels on their way from main memory to the device that forwards them."""

import numpy as np
import torch


class Staging:
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
