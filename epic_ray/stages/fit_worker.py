"""What each worker of a fit does: rounds of search, maps of the chosen images, update.

Every worker searches its share of the feature files, kept in memory as far as they fit, and holds the maps of its share
of the chosen images; only top-n lists and one (D, D) matrix travel. Rank 0 publishes each round.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from epic_ray.config import FITTING_SPLIT, RunConfig
from epic_ray.errors import RunFailed
from epic_ray.method.basis import orthogonality_error
from epic_ray.method.schedule import prototypes_per_round
from epic_ray.method.solvers import (
    DistributedReducer,
    FitState,
    MapBlock,
    NonFiniteError,
    Reducer,
    RoundRecord,
    SingleProcess,
    Weights,
    equal_weights,
    fit_adam,
    fit_procrustes,
    rank_weights,
)
from epic_ray.method.starts import purest_start, quartimax_start, varimax_start
from epic_ray.method.topk import TopN, search
from epic_ray.run_dir import RunDir
from epic_ray.stages.features import FeaturePass
from epic_ray.stages.loading import load
from epic_ray.stages.maps import MapGatherer, MapStore
from epic_ray.stages.resources import Resources, peak_memory_bytes, take_device, take_threads
from epic_ray.stages.rounds import newest_round, read_own_round, write_round
from epic_ray.stages.search import PooledBlocks, file_blocks

_START_ITERATIONS = 10


@dataclass(frozen=True)
class FitJob:
    """What a worker of the fit is told."""

    run_dir: RunDir
    config: RunConfig
    resources: Resources
    passed: FeaturePass
    fingerprint: str


def work(settings: dict[str, Any]) -> None:
    """The train loop of Ray Train: the same in the driver's process and in each of several workers."""
    _Worker(settings["job"]).run()


class _Worker:
    def __init__(self, job: FitJob) -> None:
        self.job, self.config = job, job.config.fit
        self.reducer: Reducer = DistributedReducer() if dist.is_initialized() else SingleProcess()
        self.device = take_device(job.resources.device, 1)
        self.source = StoredMaps(job, self.reducer, self.device)
        take_threads(self.source.channel_count, self.reducer.world)
        self.history: list[dict[str, Any]] = []
        self.seen = np.empty(0, np.int64)  # images that some round has chosen

    def run(self) -> None:
        weigh = rank_weights if self.config.weights == "rank" else equal_weights
        settings = self.config.prototypes_per_channel
        schedule = prototypes_per_round(
            settings.start, settings.end, settings.rounds, settings.decay, settings.exact_end
        )
        state = self._resume() or self._begin(settings.start, weigh)
        try:
            if self.config.solver == "procrustes":
                fit_procrustes(self.source, state, schedule, self.reducer, self._on_round, weigh)
            else:
                self._adam(state, schedule)
        except NonFiniteError as error:
            also = "the settings of fit.adam or " if self.config.solver == "adam" else ""
            raise RunFailed(f"fit: {error}; {also}the features are at fault") from error

    def _adam(self, state: FitState, schedule: Sequence[int]) -> None:
        adam = self.config.adam
        fit_adam(
            self.source,
            state,
            schedule,
            self.reducer,
            self._on_round,
            seed=self.config.seed,
            epochs_per_round=adam.epochs_per_round,
            batch_size=adam.batch_size,
            learning_rate=adam.learning_rate,
            weight_decay=adam.weight_decay,
            wrap=torch.nn.parallel.DistributedDataParallel if self.reducer.world > 1 else None,
        )

    def _begin(self, prototypes: int, weigh: Weights) -> FitState:
        """The state before the first round; kept, as choosing a start takes as long as some rounds."""
        try:
            state = FitState.begin(self._start(prototypes, weigh))
        except NonFiniteError as error:
            raise RunFailed(f"fit: start {self.config.start}: {error}; the features are at fault") from error
        self._publish(state)
        return state

    def _start(self, prototypes: int, weigh: Weights) -> torch.Tensor:
        chosen, channels = self.config.start, self.source.channel_count
        identity = torch.eye(channels, device=self.device)
        if chosen == "identity":
            return identity
        rotate = quartimax_start if chosen == "quartimax" else varimax_start
        rotated = rotate(self.source.own_pooled, channels, _START_ITERATIONS, self.reducer, device=self.device)
        if chosen != "auto":
            return rotated
        starts = [identity, rotated]
        return starts[purest_start(self.source, starts, prototypes, self.reducer, weigh)]

    def _resume(self) -> FitState | None:
        number = newest_round(self.job.run_dir)
        if number is None:
            return None
        content = read_own_round(self.job.run_dir, number, self.job.fingerprint)
        self.history = content["history"]
        self.seen = content["seen"].numpy()
        self.source.counts_before = {key: content[key] for key in ("decoded", "forwarded")}
        parameter = content["parameter"]
        return FitState(
            content["round"],
            content["basis"].to(self.device),
            content["start"].to(self.device),
            None if parameter is None else parameter.to(self.device),
            content["optimizer"],
        )

    def _on_round(self, state: FitState, record: RoundRecord) -> None:
        facts = asdict(record)
        self.history.append(
            {
                "round": record.round + 1,
                "new_images": len(np.setdiff1d(self.source.chosen, self.seen)),
                "orthogonality_error": orthogonality_error(state.basis),
            }
            | {key: value for key, value in facts.items() if key != "round"}
        )
        self.seen = np.union1d(self.seen, self.source.chosen)
        self._publish(state)

    def _publish(self, state: FitState) -> None:
        self._demand_equal_ranks(state.basis)
        counts = self.source.counts()
        if self.reducer.rank == 0:
            write_round(self.job.run_dir, self.job.fingerprint, state, self.history, self.seen, counts)
        if dist.is_initialized():
            dist.barrier()

    def _demand_equal_ranks(self, basis: torch.Tensor) -> None:
        """Every worker must hold the same U, to the last bit: they would drift apart unseen otherwise."""
        if self.reducer.world == 1:
            return
        largest, smallest = basis.clone(), basis.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        if not torch.equal(largest, smallest):
            raise RunFailed("fit: the workers' bases differ; all must run the same torch on the same kind of processor")


class StoredMaps:
    """The solvers' view of a run: features and maps in files, shared out among the workers by unit and by image."""

    def __init__(self, job: FitJob, reducer: Reducer, device: torch.device) -> None:
        self._job, self._reducer, self._device = job, reducer, device
        blocks = file_blocks(job.passed.files())
        cache_bytes = job.config.resources.feature_cache_bytes
        self._pooled = PooledBlocks(job.run_dir, blocks[reducer.rank :: reducer.world], cache_bytes)
        self._store = MapStore(job.run_dir, FITTING_SPLIT, job.passed.made_from())
        self._gatherer: MapGatherer | None = None
        self.counts_before = {"decoded": 0, "forwarded": 0}
        self.chosen = np.empty(0, np.int64)
        self.channel_count = next(iter(PooledBlocks(job.run_dir, [blocks[0][:1]])))[1].shape[1]

    def own_pooled(self) -> Iterable[torch.Tensor]:
        return (pooled for _, pooled in self._pooled)

    def search(self, basis: torch.Tensor, n: int) -> TopN:
        """The top-n over all images; the maps of images newly chosen are there when it returns."""
        best = search(self._pooled, basis, n)
        for other in self._gather(best):
            best = best.merge(other)
        self.chosen = best.indices[best.indices >= 0].unique().cpu().numpy()
        self._ensure(best)
        return best

    def _gather(self, own: TopN) -> list[TopN]:
        """The other workers' top-n, in the order of their ranks."""
        if self._reducer.world == 1:
            return []
        values = [torch.empty_like(own.values) for _ in range(self._reducer.world)]
        indices = [torch.empty_like(own.indices) for _ in range(self._reducer.world)]
        dist.all_gather(values, own.values.contiguous())
        dist.all_gather(indices, own.indices.contiguous())
        others = [rank for rank in range(self._reducer.world) if rank != self._reducer.rank]
        return [TopN(values[rank], indices[rank]) for rank in others]

    def _ensure(self, top: TopN) -> None:
        """Forwards those of the chosen images whose map is not kept: each worker its share."""
        own = self._own_images(top)
        if len(self._store.missing(own)):
            if self._gatherer is None:
                job, classifier = self._job, load(self._job.config.model, self._job.resources.precision)
                made_from, batch_size = job.passed.fingerprint, job.resources.batch_size
                self._gatherer = MapGatherer(self._store, made_from, classifier, batch_size, self._device)
            self._gatherer.ensure(own)
        if dist.is_initialized():
            dist.barrier()
        self._store.refresh()

    def _own_images(self, top: TopN) -> np.ndarray:
        chosen = top.indices[top.indices >= 0].unique().cpu().numpy()
        return chosen[chosen % self._reducer.world == self._reducer.rank]

    def blocks(self, top: TopN) -> Iterator[MapBlock]:
        """This worker's share of the pairs, image by image in blocks of bounded memory."""
        channels, ranks = (top.indices >= 0).nonzero(as_tuple=True)
        images = top.indices[channels, ranks]
        order = images.argsort(stable=True)
        images, channels, ranks = images[order], channels[order], ranks[order]
        known = images.cpu().numpy()
        for positions, maps in self._store.blocks(self._own_images(top)):
            low, high = np.searchsorted(known, [positions[0], positions[-1] + 1])
            mine = torch.isin(images[low:high], torch.from_numpy(positions).to(images.device))
            chosen = images[low:high][mine]
            image_slots = torch.searchsorted(torch.from_numpy(positions).to(images.device), chosen)
            on_device = torch.from_numpy(maps).to(self._device)
            yield on_device, image_slots, channels[low:high][mine], ranks[low:high][mine]

    def pair_maps(self, image_indices: torch.Tensor) -> torch.Tensor:
        """The maps of any images, one row an entry."""
        return torch.from_numpy(self._store.read(image_indices.cpu().numpy())).to(self._device)

    def counts(self) -> dict[str, int]:
        """Images decoded and forwarded for their maps, over all workers and starts; the largest memory of one."""
        own = self._gatherer
        numbers = torch.tensor([own.decoded if own else 0, own.forwarded if own else 0], device=self._device)
        self._reducer.sum_(numbers)
        peak = torch.tensor([peak_memory_bytes()], device=self._device)
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return {
            "decoded": self.counts_before["decoded"] + int(numbers[0]),
            "forwarded": self.counts_before["forwarded"] + int(numbers[1]),
            "peak_memory_bytes": int(peak[0]),
        }
