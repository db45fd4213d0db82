"""A fit in several processes that are killed, interrupted, or too few: real Rays, real signals."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch
from conftest import small_settings
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.util.placement_group import placement_group, remove_placement_group

from epic_ray import interrupts, pipeline
from epic_ray.config import RunConfig
from epic_ray.demo import DIGIT_PREPROCESSING
from epic_ray.errors import ClusterError, ConfigError, InputError, RunFailed
from epic_ray.logs import Meter, Reporter
from epic_ray.method.solvers import SingleProcess, rank_weights
from epic_ray.method.starts import purest_start, quartimax_start, varimax_start
from epic_ray.run_dir import RunDir, round_file
from epic_ray.stages import fit, fit_worker, worker_group
from epic_ray.stages.fit_worker import FitJob, StoredMaps
from epic_ray.stages.resources import first_cause
from epic_ray.stages.rounds import finished_rounds, read_round
from epic_ray.stages.worker_group import run_group, wait_for_room, worker_loss

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's processes in /proc")
# 512 channels: a round takes longer than a killer needs
NETWORK = {
    "architecture": "resnet18",
    "source": "torchvision",
    "class_count": 3,
    "arguments": {},
    "preprocessing": DIGIT_PREPROCESSING | {"resize": 64, "crop": 64},
}
SCHEDULE = {"start": 12, "end": 5, "rounds": 4}
# of 90 images with 512 channels U is known to some 1e-4: float32 over the least singular values of M that count
ROUNDING = 2e-3
SOLVERS: dict[str, dict[str, Any]] = {
    "procrustes": {"solver": "procrustes"},
    "adam": {"solver": "adam", "adam": {"epochs_per_round": 2, "batch_size": 4096, "learning_rate": 1e-2}},
}


class Listener(Reporter):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.meter = Meter()

    def say(self, text: str) -> None:
        self.told.append(text)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, brief: bool = False, already: int = 0) -> Iterator[Meter]:
        self.meter = Meter(already)
        yield self.meter

    @property
    def losses(self) -> list[str]:
        return [text for text in self.told if "a worker was lost" in text]


@dataclass
class Prepared:
    """A run whose pass is done and whose fit has not begun, to be copied."""

    images: Path
    output: Path
    sections: dict[str, Any]

    def job(self, output: Path, **fit_settings: Any) -> FitJob:
        """What the pipeline would tell the fit of a copy under `output`."""
        output.mkdir(exist_ok=True)
        if output != self.output:
            shutil.copytree(self.output / "small", output / "small")
        fitting = {"start": "identity", "prototypes_per_channel": SCHEDULE, **fit_settings}
        return told_to_the_fit(small_settings(self.images, output, model=NETWORK, fit=fitting, **self.sections))


class EnoughError(Exception):
    pass


def told_to_the_fit(config: RunConfig) -> FitJob:
    jobs: list[FitJob] = []

    def take(job: FitJob, reporter: Reporter) -> None:
        jobs.append(job)
        raise EnoughError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "fit_basis", take)
        with suppress(EnoughError):
            pipeline.train(config, Reporter(), force=True)
    return jobs[0]


def prepare(images: Path, output: Path, **sections: Any) -> Prepared:
    prepared = Prepared(images, output, sections)
    prepared.job(output)
    return prepared


@pytest.fixture(scope="module")
def prepared(patches: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Prepared:
    return prepare(patches, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], fit.FitResult]:
    """What a fit with two workers finds that nobody disturbs; each is made once."""
    made: dict[str, fit.FitResult] = {}

    def of(solver: str) -> fit.FitResult:
        if solver not in made:
            made[solver] = fit.fit_basis(
                prepared.job(tmp_path_factory.mktemp(solver), workers=2, **SOLVERS[solver]), Listener()
            )
        return made[solver]

    return of


@pytest.mark.ray
@pytest.mark.parametrize("asked", ["identity", "quartimax", "varimax", "auto"])
def test_a_fit_begins_where_its_start_setting_says(prepared, tmp_path, asked):
    job = prepared.job(tmp_path, workers=0, start=asked)
    result = fit.fit_basis(job, Listener())
    source = StoredMaps(job, SingleProcess(), torch.device("cpu"))
    own = (source.own_pooled, source.channel_count, 10, SingleProcess())
    starts = {
        "identity": torch.eye(source.channel_count),
        "quartimax": quartimax_start(*own),
        "varimax": varimax_start(*own),
    }
    if asked == "auto":
        tried = [starts["identity"], starts["varimax"]]
        best = purest_start(source, tried, SCHEDULE["start"], SingleProcess(), rank_weights)
        assert result.start == ("identity", "varimax")[best]
    else:
        assert result.start == asked
    begun = read_round(job.run_dir, 0)
    assert (begun["round"], begun["history"]) == (0, [])
    torch.testing.assert_close(begun["start"], starts[result.start], rtol=0, atol=1e-5)
    assert torch.equal(begun["basis"], begun["start"])
    distances = sorted(float((starts[name] - begun["start"]).abs().max()) for name in starts)
    assert distances[1] > 1e-2  # no two starts are alike


@pytest.mark.ray
def test_a_fit_that_was_killed_after_choosing_its_start_does_not_choose_again(prepared, tmp_path, monkeypatch):
    job = prepared.job(tmp_path, workers=0, start="auto")
    whole = fit.fit_basis(job, Listener())
    job.run_dir.delete([file for file in job.run_dir.list("fit") if not file.endswith("round-000.pt")])
    assert finished_rounds(job.run_dir) == 0

    def choose(*arguments: Any) -> int:
        raise AssertionError("the start was chosen again")

    monkeypatch.setattr(fit_worker, "purest_start", choose)
    demand_same(fit.fit_basis(job, Listener()), whole)


def demand_same(found: fit.FitResult, expected: fit.FitResult) -> None:
    assert torch.equal(found.basis, expected.basis)  # to the last bit
    assert found.history == expected.history
    assert [row["round"] for row in found.history] == [1, 2, 3, 4]
    assert (found.decoded, found.forwarded) == (expected.decoded, expected.forwarded)


# --- real processes


def own_processes(title: str) -> list[int]:
    """Ids of the processes of that title that this one has started, through others too."""
    parents: dict[int, int] = {}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_bytes().decode().startswith(title):
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue  # it has ended meanwhile

    def is_own(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return sorted(process for process in found if is_own(process))


def kill_worker(place: int = 0) -> None:
    os.kill(own_processes("ray::RayTrainWorker")[place], signal.SIGKILL)


def processes_of_the_fit() -> list[int]:
    titles = ("ray::RayTrainWorker", "ray::TrainController", "ray::SynchronizationActor", "ray::PlacementGroupCleaner")
    return [process for title in titles for process in own_processes(title)]


def wait_until(met: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.005)


def act_when(met: Callable[[], Any], act: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        wait_until(met, 200)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def in_round_after(number: int, job: FitJob) -> Callable[[], bool]:
    return Path(job.run_dir.path(round_file(number))).exists


# --- a worker is lost


@linux
@pytest.mark.ray
@pytest.mark.parametrize(
    ("solver", "place"),
    [("procrustes", 0), pytest.param("adam", 1, marks=pytest.mark.faults)],
    ids=["procrustes", "adam"],
)
def test_a_killed_worker_costs_a_restart_and_changes_no_bit(prepared, undisturbed, tmp_path, solver, place):
    expected = undisturbed(solver)
    job, listener = prepared.job(tmp_path, workers=2, **SOLVERS[solver]), Listener()
    killer = act_when(in_round_after(1, job), lambda: kill_worker(place))
    found = fit.fit_basis(job, listener)
    killer.join()
    demand_same(found, expected)
    assert found.restarts == 1
    (line,) = listener.losses
    assert line.endswith("going on from round 2, restart 1 of 3")
    assert listener.meter.done == 4
    assert not (tmp_path / "small" / ".ray-train").exists()


@linux
@pytest.mark.faults
@pytest.mark.ray
def test_losses_with_finished_rounds_between_them_do_not_add_up(prepared, undisturbed, tmp_path):
    job, listener = prepared.job(tmp_path, workers=2), Listener()
    killers = [act_when(in_round_after(number, job), kill_worker) for number in (1, 2)]
    found = fit.fit_basis(job, listener)
    for killer in killers:
        killer.join()
    demand_same(found, undisturbed("procrustes"))
    assert [line.split("; ")[-1] for line in listener.losses] == [
        f"going on from round {number}, restart 1 of 3" for number in (2, 3)
    ]


@linux
@pytest.mark.faults
@pytest.mark.ray
def test_a_round_that_loses_a_worker_each_time_ends_the_fit(prepared, tmp_path):
    job, listener, ended = prepared.job(tmp_path, workers=2), Listener(), threading.Event()
    killed: set[int] = set()

    def kill_all_that_start() -> None:
        while not ended.wait(0.2):
            for process in set(own_processes("ray::RayTrainWorker")) - killed:
                killed.add(process)
                os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill_all_that_start)
    killer.start()
    try:
        with pytest.raises(RunFailed, match=r"^fit: round 1 lost a worker 4 times \(.*fit\.workers"):
            fit.fit_basis(job, listener)
    finally:
        ended.set()
        killer.join()
    assert [line.split(", ")[-1] for line in listener.losses] == [f"restart {number} of 3" for number in (1, 2, 3)]
    assert finished_rounds(job.run_dir) == 0


# --- faults that no restart cures


@pytest.mark.slow
@pytest.mark.ray
def test_an_image_that_a_worker_cannot_read_ends_the_fit_at_once(patches, tmp_path, ray_session):
    images = tmp_path / "images"
    shutil.copytree(patches, images)
    prepared = prepare(images, tmp_path / "prepared", features={"map_budget_bytes": 0})
    job, listener = prepared.job(tmp_path, workers=2), Listener()
    for file in (images / "train").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read again"):
        fit.fit_basis(job, listener)
    assert listener.losses == []


@pytest.mark.faults
@pytest.mark.ray
def test_a_step_that_is_not_finite_ends_the_fit_at_once(prepared, tmp_path):
    adam = {"epochs_per_round": 2, "batch_size": 4096, "learning_rate": 1e30}
    job, listener = prepared.job(tmp_path, workers=2, solver="adam", adam=adam), Listener()
    with pytest.raises(RunFailed, match="not finite"):
        fit.fit_basis(job, listener)
    assert listener.losses == []


def crossed(error: Exception) -> Exception:
    """An error as it comes from another process."""
    return pickle.loads(pickle.dumps(error))


GONE = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
PEER_GONE = RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.1]:34217. GLHF!")
NCCL_GONE = torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error")


@pytest.mark.parametrize(
    ("failures", "lost"),
    [
        ({1: GONE}, True),
        ({0: PEER_GONE, 1: GONE}, True),
        ({0: GONE, 1: RuntimeError("anything that comes of it")}, True),
        ({0: PEER_GONE}, True),  # a machine that is gone is missed by its peers first
        ({0: NCCL_GONE, 2: NCCL_GONE}, True),
        ({0: TypeError("a bug")}, False),
        ({0: TypeError("a bug"), 1: PEER_GONE}, False),
        ({0: RuntimeError("shapes do not match")}, False),
        ({0: RunFailed("the bases differ"), 1: GONE}, False),
        ({0: InputError("cannot be read"), 1: PEER_GONE}, False),
    ],
)
def test_a_lost_worker_is_told_from_a_fault_by_all_that_the_workers_report(failures, lost):
    error = crossed(ray.train.WorkerGroupError("Training failed", failures))
    assert bool(worker_loss(error)) == lost


def test_the_kind_of_a_fault_survives_what_ray_train_wraps_it_in():
    wrapped = ray.train.WorkerGroupError("Training failed", {0: PEER_GONE, 1: InputError("x.png: cannot be read")})
    for error in (wrapped, ray.train.ControllerError(wrapped), ray.train.ControllerError(InputError("x.png"))):
        assert type(first_cause(crossed(error), "fit")) is InputError
        assert worker_loss(crossed(error)) is None
    assert worker_loss(crossed(ray.train.ControllerError(WorkerGroupStartupTimeoutError(2))))
    assert "shapes" in str(first_cause(ray.train.ControllerError(ValueError("shapes")), "fit"))


@pytest.mark.ray
def test_a_fit_in_the_drivers_own_process_is_never_started_anew(ray_session, tmp_path):
    starts = []

    def loop(settings: dict[str, Any]) -> None:
        starts.append(settings)
        raise ActorDiedError

    with pytest.raises(RunFailed, match=r"^fit: ActorDiedError"):
        run_group(loop, {"job": 1}, 0, False, "fit", str(tmp_path / "train"))
    assert starts == [{"job": 1}]


# --- room


def test_least_and_most_workers_are_two_numbers_in_order(patches, tmp_path):
    assert small_settings(patches, tmp_path, fit={"workers": [1, 2]}).fit.workers == [1, 2]
    for wrong, words in (([2, 1], "least, most"), ([0, 2], "greater than or equal to 1"), ([1], "at least 2 items")):
        with pytest.raises(ConfigError, match=rf"fit\.workers.*{words}"):
            small_settings(patches, tmp_path, fit={"workers": wrong})


@pytest.mark.ray
@pytest.mark.parametrize("workers", [64, [64, 65]])
def test_more_workers_than_one_machine_holds_are_refused_at_once(prepared, tmp_path, workers):
    job = prepared.job(tmp_path, workers=workers)
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"fit\.workers: 64 asked, but Ray has 4 CPU\(s\); ask for fewer"):
        fit.fit_basis(job, Listener())
    assert time.monotonic() - start < 5


@pytest.mark.ray
def test_room_that_others_take_is_waited_for_and_not_for_ever(ray_session, monkeypatch):
    monkeypatch.setattr(worker_group, "PATIENT_SECONDS", 1)
    taken, listener = placement_group([{"CPU": 3}]), Listener()
    ray.get(taken.ready())
    try:
        act_when(lambda: listener.told, lambda: remove_placement_group(taken))
        assert wait_for_room(lambda: 2, False, "fit.workers", listener) == 2
        assert listener.told == ["fit.workers: 2 asked, but Ray has 4 CPU(s), not all free; waiting for at most 300 s"]
        monkeypatch.setattr(worker_group, "ROOM_SECONDS", 3)
        taken = placement_group([{"CPU": 3}])
        ray.get(taken.ready())
        with pytest.raises(ClusterError, match=r"2 asked, but Ray has 4 .*, not all free, and 3 s did not change that"):
            wait_for_room(lambda: 2, False, "fit.workers", listener)
    finally:
        remove_placement_group(taken)


def apart(scene: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a scene comes to in a process of its own, with Rays of its own."""
    code = f"import json, {__name__} as t; print('\\nOUTCOME', json.dumps(t.{scene.__name__}(*{arguments!r})))"
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        check=False,
    )
    assert "\nOUTCOME " in done.stdout, done.stdout[-3000:]
    return json.loads(done.stdout.rsplit("\nOUTCOME ", 1)[1])


def fit_apart(job_file: str) -> dict[str, Any]:
    job, listener = pickle.loads(Path(job_file).read_bytes()), Listener()
    try:
        found = fit.fit_basis(job, listener)
        return {
            "told": listener.told,
            "basis": found.basis.tolist(),
            "history": found.history,
            "restarts": found.restarts,
        }
    except Exception as error:
        return {"told": listener.told, "error": repr(error)}


def demand_close(found: dict[str, Any], expected: fit.FitResult, tolerance: float) -> None:
    assert (torch.tensor(found["basis"]) - expected.basis).abs().max() <= tolerance
    for row, expected_row in zip(found["history"], expected.history, strict=True):
        assert row["purity_end"] == pytest.approx(expected_row["purity_end"], abs=tolerance / 10)


def on_one_machine(job_file: str, cpus: int) -> dict[str, Any]:
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    most: list[int] = []
    job = pickle.loads(Path(job_file).read_bytes())
    act_when(in_round_after(1, job), lambda: most.append(len(own_processes("ray::RayTrainWorker"))))
    return fit_apart(job_file) | {"workers": most[0]}


def on_two_machines(job_file: str, comes_back: bool) -> dict[str, Any]:
    """One of two machines, of one CPU each, is lost in round 2."""
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 1, "object_store_memory": 200 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args=machine | {"include_dashboard": False})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    lost = cluster.add_node(**machine)
    outcome: dict[str, Any] = {}
    worker = threading.Thread(target=lambda: outcome.update(fit_apart(job_file)))
    worker.start()
    wait_until(in_round_after(1, pickle.loads(Path(job_file).read_bytes())), 100)
    cluster.remove_node(lost, allow_graceful=False)
    if comes_back:
        wait_until(lambda: ray.cluster_resources().get("CPU") == 1, 60)
        time.sleep(15)  # long enough for the wait to be told
        cluster.add_node(**machine)
    worker.join()
    return outcome


@pytest.fixture
def job_file(prepared, tmp_path):
    def write(**settings: Any) -> str:
        (tmp_path / "job").write_bytes(pickle.dumps(prepared.job(tmp_path, **settings)))
        return str(tmp_path / "job")

    return write


@linux
@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.parametrize("cpus", [1, 2])
def test_least_to_most_workers_start_with_what_there_is(job_file, undisturbed, cpus):
    found = apart(on_one_machine, job_file(workers=[1, 2]), cpus)
    assert found["workers"] == cpus
    demand_close(found, undisturbed("procrustes"), 0 if cpus == 2 else ROUNDING)


@linux
@pytest.mark.faults
@pytest.mark.ray
def test_a_fixed_number_of_workers_waits_for_a_lost_machine_to_be_replaced(job_file, undisturbed):
    found = apart(on_two_machines, job_file(workers=2), True)
    demand_close(found, undisturbed("procrustes"), 0)
    assert found["restarts"] >= 1
    assert any("2 asked, but Ray has 1 CPU(s); waiting for at most 300 s" in text for text in found["told"])


@linux
@pytest.mark.faults
@pytest.mark.ray
def test_least_to_most_workers_go_on_with_fewer_after_a_lost_machine(job_file, undisturbed):
    found = apart(on_two_machines, job_file(workers=[1, 2]), False)
    demand_close(found, undisturbed("procrustes"), ROUNDING)
    assert found["restarts"] >= 1


# --- interrupts


@linux
@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fit_ends_promptly_leaves_nothing_and_goes_on_later(prepared, undisturbed, tmp_path, number):
    job, sent = prepared.job(tmp_path, workers=2), []
    handler = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    act_when(in_round_after(1, job), interrupt)
    kind = KeyboardInterrupt if number == signal.SIGINT else interrupts.Terminated
    with pytest.raises(kind), interrupts.catch_signals():
        fit.fit_basis(job, Listener())
    assert time.monotonic() - sent[0] < 20  # one, unless other Rays on the machine confuse Ray Train
    assert signal.getsignal(signal.SIGINT) is handler
    wait_until(lambda: not processes_of_the_fit(), 15)
    assert ray.available_resources()["CPU"] == 4
    files = [path.name for path in (tmp_path / "small" / "fit").iterdir()]
    assert "round-001.pt" in files
    assert not [name for name in files if name.startswith(".")]
    first = (tmp_path / "small" / "fit" / "round-001.pt").stat().st_mtime_ns
    demand_same(fit.fit_basis(job, Listener()), undisturbed("procrustes"))
    assert (tmp_path / "small" / "fit" / "round-001.pt").stat().st_mtime_ns == first


@linux
@pytest.mark.faults
@pytest.mark.ray
def test_an_interrupt_while_the_workers_start_leaves_nothing(prepared, tmp_path):
    job = prepared.job(tmp_path, workers=2)
    act_when(lambda: own_processes("ray::RayTrainWorker"), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), interrupts.catch_signals():
        fit.fit_basis(job, Listener())
    wait_until(lambda: not processes_of_the_fit(), 15)
    wait_until(lambda: ray.available_resources()["CPU"] == 4, 15)  # Ray's own books are a moment behind


# --- progress


def test_a_round_that_is_half_there_when_it_is_looked_at_is_shown_later(tmp_path):
    run_dir, listener = RunDir(str(tmp_path)), Listener()
    job: Any = SimpleNamespace(run_dir=run_dir)
    with fit._progress(job, 2, listener):
        run_dir.publish_bytes(round_file(1), b"half")
        time.sleep(1.2)
        assert listener.meter.done == 0
        torch.save({"history": [{"purity_start": 0.1, "purity_end": 0.2}]}, run_dir.path(round_file(1)))
        wait_until(lambda: listener.meter.done == 1, 5)
    assert listener.told == []


def fail_after_half_a_round(run_dir: RunDir) -> None:
    run_dir.publish_bytes(round_file(1), b"half")
    time.sleep(0.7)
    raise ZeroDivisionError


def test_rounds_that_cannot_be_shown_are_told_and_stop_nothing(tmp_path):
    run_dir, listener = RunDir(str(tmp_path)), Listener()
    job: Any = SimpleNamespace(run_dir=run_dir)
    with pytest.raises(ZeroDivisionError), fit._progress(job, 2, listener):
        fail_after_half_a_round(run_dir)
    assert len(listener.told) == 1
    assert "is no whole round" in listener.told[0]
