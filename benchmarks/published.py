"""EPIC's fit with the schedule and the amount of work of the published one: the baseline of `end_to_end.py`.

Written from the paper (arXiv 2505.12897, sec. 3) and from a description of the published procedure; no code is taken
over, and none of its faults: the top-n is exact. N training images, D channels, S cells; n prototypes per channel of
a round, by the round 100, 90, 81, 71, 62, 52, 43, 33, 24, 14 (sum 570).

What is stated, and done here:
* 20 epochs; prototypes are selected anew every 2 epochs, so 10 times, each time by a pass of all training images
  through the frozen network and bookkeeping in Python, channel by channel: 10 N pass forwards.
* In every epoch the image of every pair (image, channel) is decoded and forwarded again, whether or not another pair
  has the same image: 2 * 570 D = 1,140 D prototype forwards, in batches of 512 pairs in an order drawn anew.
* U = expm(S - S^T), S = 0 at the start; loss -mean(z_k / max(|z|, 1e-8)) with z = U * (cell), at the cell where channel
  k is largest under the present U; Adam, learning rate 1e-3, betas .9 and .999, weight decay 1e-5 in the gradient.

What is stated as a number alone, 12 passes and 1,720 D prototype forwards in all, and how it is read here: the purity
of the prototypes is measured, by forwarding them again, after each selection (570 D) and, with 5 a channel chosen by a
pass of their own, before the first epoch and after the last (2 passes, 2 * 5 D). 1,140 + 570 + 10 = 1,720. The parts
are kept apart, so that the schedule alone (10 passes, 1,140 D) can be compared too.

Where the description leaves the work open, the cheaper is done: a pair's peak is found with row k of U, and the peak's
cell alone is rotated; the network and the decoding are epic-ray's own; batches of the forward and decoding processes
are those that are fastest here.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.preprocessing import Preprocessing, decode_image
from epic_ray.method.schedule import prototypes_per_round
from epic_ray.method.solvers import pair_order

EPOCHS_PER_ROUND = 2
PAIRS_PER_STEP = 512
IMAGES_PER_BOOKKEEPING = 256
MEASURED_PER_CHANNEL = 5
PARTS = ("selecting: passes", "training: prototypes", "measuring: passes", "measuring: prototypes")
SELECTING, TRAINING, MEASURING_PASSES, MEASURING = PARTS

Place = tuple[str, int, int]
"""Where the bytes of an image lie: file, first byte, bytes (-1: to the end)."""


def schedule(start: int = 100, end: int = 5) -> tuple[int, ...]:
    """Prototypes per channel of the ten rounds; as published, the last stops short of `end`."""
    return prototypes_per_round(start, end, 10, "linear", exact_end=False)


def forwards(images: int, channels: int, rounds: Sequence[int]) -> dict[str, int]:
    """The forwards of each part by formula: what is counted must equal them."""
    pairs = sum(rounds) * channels
    counts = (len(rounds) * images, EPOCHS_PER_ROUND * pairs, 2 * images, pairs + 2 * MEASURED_PER_CHANNEL * channels)
    return dict(zip(PARTS, counts, strict=True))


class Images(Dataset):
    """The images at these places as the network is fed, (h, w, 3) uint8, decoded anew each time one is asked for."""

    def __init__(self, places: Sequence[Place], preprocessing: Preprocessing) -> None:
        self._places, self._preprocessing = places, preprocessing

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: int) -> Tensor:
        path, start, size = self._places[position]
        with open(path, "rb") as file:
            file.seek(start)
            return torch.from_numpy(self._preprocessing.apply(decode_image(file.read(size))))


class MapSource(Protocol):
    """Where feature maps come from; `forwarded` counts the images sent through the network for them."""

    forwarded: int

    def maps(self, positions: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The maps (b, S, D) of these images, in batches in this order."""
        ...


class Forwarding:
    """Maps by decoding and forwarding, every time; counts both where they happen."""

    def __init__(self, images: Images, classifier: SplitClassifier, forward_batch: int, decoders: int) -> None:
        """decoders: processes that decode ahead (0: this one, in between). forward_batch divides every batch asked."""
        self._images, self._classifier = images, classifier
        self._forward_batch, self._decoders = forward_batch, decoders
        self.decoded = 0
        self.forwarded = 0

    def maps(self, positions: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The maps (b, S, D) of these images, in batches in this order; an image may come again."""
        held: list[Tensor] = []
        loader = DataLoader(self._images, self._forward_batch, sampler=positions.tolist(), num_workers=self._decoders)
        for pixels in loader:
            self.decoded += len(pixels)
            held.append(self._forward(pixels))
            if len(held) * self._forward_batch >= batch_size:
                yield torch.cat(held)
                held = []
        if held:
            yield torch.cat(held)

    @torch.no_grad()
    def _forward(self, pixels: Tensor) -> Tensor:
        maps_BDHW, _ = self._classifier(self._classifier.normalise(pixels))
        self.forwarded += len(pixels)
        return maps_BDHW.flatten(2).transpose(1, 2)


class Kept:
    """Maps (N, S, D) that are there already: the same fit without its cost, for its purities alone."""

    def __init__(self, maps_NSD: Tensor) -> None:
        self._maps = maps_NSD
        self.forwarded = 0

    def maps(self, positions: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The maps (b, S, D) of these images, in batches in this order."""
        return (self._maps[rows] for rows in positions.split(batch_size))


@dataclass
class Cost:
    """What a part of the fit has cost so far."""

    forwarded: int = 0
    seconds: float = 0.0


class PublishedFit:
    """The fit over the images 0 .. image_count - 1 of a source, and what each part of it costs."""

    def __init__(self, source: MapSource, image_count: int, channel_count: int, seed: int = 42) -> None:
        self._source, self._images, self._channels = source, image_count, channel_count
        self._seed = seed
        self._skew = torch.zeros(channel_count, channel_count, requires_grad=True)
        self._adam = torch.optim.Adam([self._skew], lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-5)
        self.costs = {part: Cost() for part in PARTS}

    def run(self, rounds: Sequence[int]) -> Tensor:
        """The whole procedure; gives U (D, D)."""
        self.measure_apart()
        for number, n in enumerate(rounds):
            chosen = self.select(n)
            self.measure(chosen)
            for epoch in range(EPOCHS_PER_ROUND):
                self.train(chosen, number, epoch)
        self.measure_apart()
        return self.basis().detach()

    def basis(self) -> Tensor:
        """U of the present S."""
        return torch.linalg.matrix_exp(self._skew - self._skew.T)

    @torch.no_grad()
    def select(self, n: int, part: str = SELECTING) -> Tensor:
        """The images (D, n) with the largest sum over cells, channel by channel, the best first: one pass."""
        with self._charged(part):
            basis, first = self.basis(), 0
            values, images = [torch.empty(0)] * self._channels, [[] for _ in range(self._channels)]
            for maps_BSD in self._source.maps(torch.arange(self._images), IMAGES_PER_BOOKKEEPING):
                sums_BD = (maps_BSD @ basis.T).sum(dim=1)
                batch = list(range(first, first + len(sums_BD)))
                for channel in range(self._channels):
                    scores = torch.cat([values[channel], sums_BD[:, channel]])
                    known = images[channel] + batch
                    values[channel], places = scores.topk(min(n, len(scores)))
                    images[channel] = [known[place] for place in places.tolist()]
                first += len(batch)
            return torch.tensor(images)

    @torch.no_grad()
    def measure(self, chosen: Tensor) -> float:
        """The mean purity of the prototypes (D, n), each forwarded again."""
        with self._charged(MEASURING):
            basis, total = self.basis(), 0.0
            for maps_PSD, channels in self._pairs(chosen, torch.arange(chosen.numel())):
                total += float(_purity(maps_PSD, channels, basis).sum())
            return total / chosen.numel()

    def measure_apart(self) -> float:
        """The mean purity of 5 prototypes a channel, chosen by a pass of their own."""
        return self.measure(self.select(MEASURED_PER_CHANNEL, MEASURING_PASSES))

    def train(self, chosen: Tensor, number: int, epoch: int, steps: int | None = None) -> None:
        """One epoch over the prototypes (D, n) of a round, or its first `steps` steps."""
        order = pair_order(chosen.numel(), self._seed, number, epoch)
        with self._charged(TRAINING):
            for maps_PSD, channels in self._pairs(chosen, order[: steps and steps * PAIRS_PER_STEP]):
                self._adam.zero_grad()
                loss = -_purity(maps_PSD, channels, self.basis()).mean()
                loss.backward()
                self._adam.step()

    def _pairs(self, chosen: Tensor, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps (p, S, D) and channels (p) of pairs in this order; they are numbered channel by channel."""
        images, channels = chosen.flatten()[order], order // chosen.shape[1]
        maps = self._source.maps(images, PAIRS_PER_STEP)
        yield from zip(maps, channels.split(PAIRS_PER_STEP), strict=True)

    @contextmanager
    def _charged(self, part: str) -> Iterator[None]:
        forwarded, start = self._source.forwarded, time.perf_counter()
        yield
        cost = self.costs[part]
        cost.forwarded += self._source.forwarded - forwarded
        cost.seconds += time.perf_counter() - start


def _purity(maps_PSD: Tensor, channels: Tensor, basis: Tensor) -> Tensor:
    """z_k / max(|z|, 1e-8) of each pair, z = U * (the cell where its channel k is largest)."""
    pairs = torch.arange(len(channels))
    with torch.no_grad():
        cells = torch.bmm(maps_PSD, basis[channels].unsqueeze(2)).squeeze(2).argmax(dim=1)
    rotated_PD = maps_PSD[pairs, cells] @ basis.T
    return rotated_PD[pairs, channels] / rotated_PD.norm(dim=1).clamp(min=1e-8)


def fastest(images: Images, classifier: SplitClassifier, cores: int, tried: int) -> tuple[Forwarding, list[dict]]:
    """The source with the fastest of three settings, and what was tried on the first images."""
    settings = [(64, 0), (64, cores), (256, cores)]
    rows, best = [], (0.0, settings[0])
    for batch, decoders in settings:
        source = Forwarding(images, classifier, batch, decoders)
        for _ in source.maps(torch.arange(min(batch, len(images))), batch):  # warms up
            pass
        start = time.perf_counter()
        count = sum(len(maps) for maps in source.maps(torch.arange(tried) % len(images), batch))
        rate = count / (time.perf_counter() - start)
        rows.append({"forward batch": batch, "decoding processes": decoders, "images/s": f"{rate:.0f}"})
        best = max(best, (rate, (batch, decoders)))
    return Forwarding(images, classifier, *best[1]), rows
