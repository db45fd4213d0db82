"""Fitting U under Ray Train: rounds of search, maps of the chosen images, update; a checkpoint of our own each round.

Every worker searches its share of the feature files, kept in memory as far as they fit, and holds the maps of its share
of the chosen images; only top-n lists and one (D, D) matrix travel. Rank 0 publishes `fit/round-NNN.pt`; whoever starts
again goes on from the newest.
"""

import io
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from epic_ray.config import FITTING_SPLIT, RunConfig
from epic_ray.errors import ResultError, RunFailed
from epic_ray.logs import Reporter
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
from epic_ray.run_dir import BASIS, RunDir, round_file
from epic_ray.stages.features import FeaturePass
from epic_ray.stages.loading import load
from epic_ray.stages.maps import MapGatherer, MapStore
from epic_ray.stages.resources import Resources, available_cores, peak_memory_bytes, take_device
from epic_ray.stages.search import PooledBlocks, file_blocks
from epic_ray.stages.worker_group import WorkerLost, room, run_group, wait_for_room

_POLL_SECONDS = 0.5
_ROUND = re.compile(r"fit/round-(\d+)\.pt")
_RAY_TRAIN_FOLDER = ".ray-train"
_START_ITERATIONS = 10
_MOST_RESTARTS = 3
# below, a matrix product takes less time than its threads wait for one another on a busy machine
_CHANNELS_WORTH_THREADS = 256


@dataclass(frozen=True)
class FitJob:
    """What a worker of the fit is told."""

    run_dir: RunDir
    config: RunConfig
    resources: Resources
    passed: FeaturePass
    fingerprint: str


@dataclass(frozen=True)
class FitResult:
    basis: torch.Tensor
    start: str
    history: list[dict[str, Any]]
    decoded: int
    forwarded: int
    peak_memory_bytes: int
    restarts: int


def fit_basis(job: FitJob, reporter: Reporter) -> FitResult:
    """Runs the fit under Ray Train to its end, from its newest round. Raises the first cause of a failure.

    A group that lost a worker starts anew and goes on from its newest round. ClusterError: no room for the group.
    """
    rounds = job.config.fit.prototypes_per_channel.rounds
    with _progress(job, rounds, reporter):
        restarts = _run_rounds(job, rounds, reporter)
    last = read_own_round(job, rounds)
    return FitResult(
        last["basis"],
        _name_of(last["start"], job.config.fit.start),
        last["history"],
        last["decoded"],
        last["forwarded"],
        last["peak_memory_bytes"],
        restarts,
    )


def _name_of(start: torch.Tensor, asked: str) -> str:
    """The start that `auto` came to, or the one that was asked for."""
    if asked != "auto":
        return asked
    return "identity" if torch.equal(start, torch.eye(len(start))) else "varimax"


def _run_rounds(job: FitJob, rounds: int, reporter: Reporter) -> int:
    """Starts groups of workers until the last round is done; gives how many were started after a loss."""
    restarts, in_vain, reached = 0, 0, finished_rounds(job.run_dir)
    while finished_rounds(job.run_dir) < rounds:
        workers = _worker_count(job, reporter)
        try:
            job.run_dir.delete_folder(_RAY_TRAIN_FOLDER)
            on_gpu = job.resources.device == "cuda"
            run_group(_work, {"job": job}, workers, on_gpu, "fit", job.run_dir.show(_RAY_TRAIN_FOLDER))
            if finished_rounds(job.run_dir) < rounds:
                raise RunFailed(
                    f"fit: its workers ended, but round {rounds} is not in {job.run_dir.show('fit')}; "
                    "is it a folder that all machines share?"
                )
        except WorkerLost as loss:
            done = finished_rounds(job.run_dir)
            # only losses without a finished round between them add up: a long fit on spot machines sees many
            in_vain, reached = (in_vain + 1 if done == reached else 1), done
            if in_vain > _MOST_RESTARTS:
                raise RunFailed(
                    f"fit: round {done + 1} lost a worker {in_vain} times ({loss}); ask for fewer (fit.workers) where "
                    "machines are short of memory; Ray's logs lie under /tmp/ray/session_latest/logs"
                ) from loss
            restarts += 1
            again = f"restart {in_vain} of {_MOST_RESTARTS}"
            reporter.say(f"fit: a worker was lost ({loss}); going on from round {done + 1}, {again}")
        finally:
            job.run_dir.delete_folder(_RAY_TRAIN_FOLDER)
    return restarts


def _worker_count(job: FitJob, reporter: Reporter) -> int | tuple[int, int]:
    """Processes of the fit, or the least and the most of them, for which there is room now. Raises ClusterError."""
    on_gpu = job.resources.device == "cuda"
    asked = job.config.fit.workers

    def wanted() -> int:
        if isinstance(asked, str):
            return max(1, room(on_gpu))
        return asked[0] if isinstance(asked, list) else asked

    # auto: in this process where it can do the work itself: no start-up, nothing to send
    here = not on_gpu or (torch.cuda.is_available() and room(on_gpu) <= 1)
    if asked == 0 or (asked == "auto" and here):
        return 0
    count = wait_for_room(wanted, on_gpu, "fit.workers", reporter)
    return (count, asked[1]) if isinstance(asked, list) else count


@contextmanager
def _progress(job: FitJob, rounds: int, reporter: Reporter) -> Iterator[None]:
    """Shows finished rounds, wherever they are computed: their files tell."""
    with reporter.stage("fit", rounds, "rounds", already=finished_rounds(job.run_dir)) as meter:

        def look() -> None:
            done = finished_rounds(job.run_dir)
            if done > meter.done:
                record = read_round(job.run_dir, done)["history"][-1]
                meter.advance(done - meter.done, f"purity {record['purity_start']:.3f} -> {record['purity_end']:.3f}")

        watcher = _Watcher(look)
        watcher.start()
        try:
            yield
        finally:
            watcher.end()
            if watcher.fault is not None:
                reporter.say(f"fit: the rounds could not be shown ({watcher.fault})")


class _Watcher(threading.Thread):
    """Looks again and again until it is ended, and once more; a look that fails is no fault of what it looks at.

    fault: what the last look failed with; an earlier one has been made good since.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._look, self._ended = look, threading.Event()
        self.fault: Exception | None = None

    def run(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            self._try()

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._try()

    def _try(self) -> None:
        try:
            self._look()
            self.fault = None
        except Exception as error:
            self.fault = error


# --- rounds on disk


def finished_rounds(run_dir: RunDir) -> int:
    numbers = [_ROUND.fullmatch(file) for file in run_dir.list("fit")]
    return max((int(found[1]) for found in numbers if found), default=0)


def read_round(run_dir: RunDir, number: int) -> dict[str, Any]:
    """What a round left, on the CPU. Raises ResultError for a file that is not whole."""
    try:
        return torch.load(io.BytesIO(run_dir.read_bytes(round_file(number))), map_location="cpu", weights_only=True)
    except ResultError:
        raise
    except Exception as error:  # torch's unpickler ends in many kinds of error on bytes that are none of its own
        where = run_dir.show(round_file(number))
        raise ResultError(f"{where}: is no whole round of a fit ({error}); remove it and run again") from None


def read_own_round(job: FitJob, number: int) -> dict[str, Any]:
    """A round of this very fit. Raises RunFailed for one that a start with other settings has left meanwhile."""
    content = read_round(job.run_dir, number)
    if content["fingerprint"] != job.fingerprint:
        where = job.run_dir.show(round_file(number))
        raise RunFailed(f"{where}: is of another fit, which still wrote when this one began; start again")
    return content


def drop_foreign_rounds(run_dir: RunDir, fingerprint: str) -> None:
    """Removes the rounds of another fit (other features or settings)."""
    number = finished_rounds(run_dir)
    if number and read_round(run_dir, number)["fingerprint"] != fingerprint:
        run_dir.delete(run_dir.list("fit"))


def _write_round(
    job: FitJob, state: FitState, history: list[dict[str, Any]], seen: np.ndarray, counts: dict[str, int]
) -> None:
    content = {
        "fingerprint": job.fingerprint,
        "round": state.round,
        "basis": state.basis.cpu(),
        "start": state.start.cpu(),
        "parameter": None if state.parameter is None else state.parameter.cpu(),
        "optimizer": state.optimizer,
        "history": history,
        "seen": torch.from_numpy(seen),
        **counts,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    job.run_dir.publish_bytes(round_file(state.round), buffer.getvalue())


def counts_so_far(job: FitJob) -> dict[str, int]:
    """Images decoded and forwarded by the rounds that earlier starts of this same fit have finished."""
    drop_foreign_rounds(job.run_dir, job.fingerprint)
    number = finished_rounds(job.run_dir)
    content = read_round(job.run_dir, number) if number else {"decoded": 0, "forwarded": 0}
    return {key: content[key] for key in ("decoded", "forwarded")}


def read_basis(run_dir: RunDir) -> torch.Tensor:
    """U of a finished fit, (channel, feature)."""
    try:
        tensors = load_tensors(run_dir.read_bytes(BASIS))
    except SafetensorError as error:
        raise ResultError(f"{run_dir.show(BASIS)}: cannot be read ({error}); run the fit again") from None
    if "U" not in tensors:
        raise ResultError(f"{run_dir.show(BASIS)}: holds no `U`; run the fit again")
    return tensors["U"]


# --- what each worker does


def _work(settings: dict[str, Any]) -> None:
    """The train loop of Ray Train: the same in the driver's process and in each of several workers."""
    _Worker(settings["job"]).run()


class _Worker:
    def __init__(self, job: FitJob) -> None:
        self.job, self.config = job, job.config.fit
        self.reducer: Reducer = DistributedReducer() if dist.is_initialized() else SingleProcess()
        self.device = take_device(job.resources.device, 1)
        self.source = StoredMaps(job, self.reducer, self.device)
        if self.source.channel_count >= _CHANNELS_WORTH_THREADS:
            torch.set_num_threads(max(1, available_cores() // self.reducer.world))
        self.history: list[dict[str, Any]] = []
        self.seen = np.empty(0, np.int64)  # images that some round has chosen

    def run(self) -> None:
        weigh = rank_weights if self.config.weights == "rank" else equal_weights
        settings = self.config.prototypes_per_channel
        schedule = prototypes_per_round(
            settings.start, settings.end, settings.rounds, settings.decay, settings.exact_end
        )
        try:
            state = self._resume() or FitState.begin(self._start(settings.start, weigh))
            if self.config.solver == "procrustes":
                fit_procrustes(self.source, state, schedule, self.reducer, self._on_round, weigh)
            else:
                self._adam(state, schedule)
        except NonFiniteError as error:
            raise RunFailed(f"fit: {error}; the features or the settings of fit.adam are at fault") from error

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
        number = finished_rounds(self.job.run_dir)
        if not number:
            return None
        content = read_own_round(self.job, number)
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
        self._demand_equal_ranks(state.basis)
        counts = self.source.counts()
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
        if self.reducer.rank == 0:
            _write_round(self.job, state, self.history, self.seen, counts)
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
        for positions, maps in self._store.blocks(self._own_images(top)):
            low, high = np.searchsorted(images.cpu().numpy(), [positions[0], positions[-1] + 1])
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
