"""Every fault at every moment, on 204 images; `make test-faults` adds the tests of one fault of each kind."""

import os
import shutil
import signal
import struct
import time
from itertools import product
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from harness import (
    LINUX,
    Disturbed,
    Outcome,
    descendants,
    disturbed,
    kill,
    wait_until,
)
from moments import MOMENTS, Moment, meanwhile, signalled, strike
from stores import gated_s3, s3
from verdict import Result, fault_table, images, result_of, run, undisturbed

from epic_ray.run_dir import RUN, round_file
from epic_ray.storage import PATIENCE_VARIABLE, join

__all__ = ["fault_table", "gated_s3", "images", "run", "s3", "undisturbed"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600), LINUX]

# maps of chosen images alone, so that the workers of the fit load the classifier, and pass its points
TWO_WORKERS = {
    "features": {"map_budget_bytes": 0},
    "fit": {"workers": 2, "adam": {"epochs_per_round": 8, "batch_size": 64}},
}
TRAIN_WORKER = r"^ray::.*TrainWorker"


@pytest.fixture(scope="module")
def undisturbed_workers(images, tmp_path_factory, ray_session) -> Result:
    return result_of(images, tmp_path_factory.mktemp("workers"), **TWO_WORKERS)


# --- the driver


DRIVER_FAULTS: dict[str, tuple[int, bool, int]] = {
    "kill -9 of the driver": (signal.SIGKILL, False, -signal.SIGKILL),
    "SIGTERM of the driver": (signal.SIGTERM, False, 143),
    "Ctrl-C": (signal.SIGINT, True, 130),
}


AMONG_THE_QUICK = {("SIGTERM of the driver", "fit"), ("Ctrl-C", "publish of a unit")}


@pytest.mark.parametrize(
    ("fault", "where"), [pair for pair in product(DRIVER_FAULTS, MOMENTS) if pair not in AMONG_THE_QUICK]
)
def test_the_driver_is_ended(run, undisturbed, fault_table, fault, where):
    number, group, expected = DRIVER_FAULTS[fault]
    exit_code, said = strike(run, MOMENTS[where], signalled(number, group))
    assert exit_code == expected, said
    assert len(said.splitlines()) == (0 if number == signal.SIGKILL else 1), said
    assert not run.run_dir.exists(RUN)
    assert run.start().end() == 0
    fault_table.judge(fault, where, run, undisturbed)
    least, most = MOMENTS[where].units_redone
    assert least <= run.redone() <= most


def test_of_two_starts_at_the_same_moment_one_does_the_work(run, undisturbed, fault_table):
    starts = [run.start(), run.start()]
    assert sorted(start.end() for start in starts) == [0, 2]
    fault_table.judge("two starts at the same moment", "start", run, undisturbed)
    assert run.redone() == 0


# --- processes of the pass


@pytest.mark.parametrize(
    ("where", "point", "match", "redone"),
    [
        ("pass", "forward", "", 1),
        ("publish of maps", "publish", "/maps/train/unit-", 1),
        ("publish of statuses, which commits the unit", "publish", "/tables/images/train/", 1),
    ],
)
def test_an_actor_is_killed(run, undisturbed, fault_table, where, point, match, redone):
    run.points.arm(point, "kill", match, after=2)
    assert run.start_here() == Outcome(0, "")
    assert run.points.met(point)
    fault_table.judge("kill -9 of a FeatureActor", where, run, undisturbed)
    assert run.redone() == redone


def test_an_actor_that_dies_each_time_fails_the_run(run, undisturbed, fault_table):
    run.points.arm("forward", "kill every")
    failed = run.start_here()
    assert failed.exit_code == 5
    assert "was begun 5 times, and its process died each time (forward); " in failed.first_line
    run.points.clear()
    assert run.start_here() == Outcome(0, "")
    fault_table.judge("kill -9 of every FeatureActor, five times", "pass", run, undisturbed)
    assert run.redone() >= 5


# --- machines and workers of the fit


def lose_a_raylet(run: Disturbed, moment: Moment, title: str = "") -> None:
    """Kills the raylet, not the head's, of the process that is held, or of one with a title."""
    moment.arm(run)
    start = run.on_three_machines()
    raylets = start.raylets()
    held = moment.wait(run, start)
    below = {raylet: descendants(raylet, title) for raylet in raylets[1:]}
    lost = next(raylet for raylet, found in below.items() if (held in found if held else found))
    kill(lost)
    assert start.end() == 0


def test_a_raylet_is_lost_in_the_publish_of_a_unit(images, tmp_path, undisturbed, fault_table):
    with disturbed(images, tmp_path, resources={"gpus_per_actor": 1}) as run:
        lose_a_raylet(run, MOMENTS["publish of a unit"])
        fault_table.judge("kill -9 of one raylet of three", "publish of a unit", run, undisturbed)
        assert run.redone() >= 1


@pytest.mark.parametrize("where", ["fit", "publish of a round"])
def test_a_raylet_is_lost_in_the_fit(images, tmp_path, undisturbed_workers, fault_table, where):
    with disturbed(images, tmp_path, **TWO_WORKERS, resources={"gpus_per_actor": 1}) as run:
        lose_a_raylet(run, MOMENTS[where], TRAIN_WORKER)
        fault_table.judge("kill -9 of one raylet of three", f"{where}, 2 workers", run, undisturbed_workers)
        assert run.redone() == 0


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_a_worker_of_the_fit_is_killed_in_a_round(images, tmp_path, undisturbed_workers, fault_table, which):
    with disturbed(images, tmp_path, **TWO_WORKERS) as run:
        killed: list[int] = []

        def strike_it() -> None:
            wait_until(lambda: run.run_dir.exists(round_file(2)))
            killed.append(sorted(descendants(os.getpid(), TRAIN_WORKER))[which])
            kill(killed[0])

        thread = meanwhile(strike_it)
        ended = run.start_here()
        thread.join()
        assert ended == Outcome(0, "")
        assert killed
        fault_table.judge("kill -9 of a Train worker", "fit, 2 workers", run, undisturbed_workers)


def test_a_worker_of_the_fit_is_killed_in_the_publish_of_a_round(images, tmp_path, undisturbed_workers, fault_table):
    with disturbed(images, tmp_path, **TWO_WORKERS) as run:
        run.points.arm("publish", "kill", "/fit/round-003")
        assert run.start_here() == Outcome(0, "")
        assert run.points.met("publish")
        fault_table.judge("kill -9 of a Train worker", "publish of a round, 2 workers", run, undisturbed_workers)


# --- stores


def shut(run: Disturbed, where: str, gate, seconds: float, **environment: str) -> tuple[int, str]:
    """A start whose store is away for some seconds from a moment on; for as long as it takes where they are 0."""
    MOMENTS[where].arm(run)
    start = run.start(**environment)
    MOMENTS[where].wait(run, start)
    gate.shut()
    run.points.clear()
    if seconds:
        time.sleep(seconds)
        gate.open()
    exit_code, said = start.end(), start.stderr()
    gate.open()
    return exit_code, said


@pytest.fixture
def in_store(images, tmp_path, gated_s3):
    store, gate = gated_s3
    bucket = store.new_bucket()
    store.upload(images, join(bucket, "images"))
    with disturbed(join(bucket, "images"), tmp_path, join(bucket, "runs")) as run:
        yield run, gate


@pytest.mark.parametrize("where", ["pass", "fit"])
def test_a_store_is_away_for_20_seconds(in_store, undisturbed, fault_table, where):
    run, gate = in_store
    assert shut(run, where, gate, 20) == (0, "")
    fault_table.judge("object store away for 20 s", where, run, undisturbed, without=("uri",))
    assert run.redone() == 0


@pytest.mark.parametrize("where", ["pass", "fit"])
def test_a_store_is_away_for_too_long(in_store, undisturbed, fault_table, where):
    run, gate = in_store
    exit_code, said = shut(run, where, gate, 0, **{PATIENCE_VARIABLE: "5"})
    assert exit_code == 5, said
    assert "the store did not answer for 5 s" in said.splitlines()[0]
    assert run.start().end() == 0
    fault_table.judge("object store away for longer than the patience", where, run, undisturbed, without=("uri",))


# --- an image that no decoder ends with


def endless_jpeg(side: int = 4000, scans: int = 250_000) -> bytes:
    """A gray progressive JPEG of a few bytes a scan, each of which goes over every block of the image."""

    def segment(marker: int, *body: int) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + bytes(body)

    blocks = (side // 8) ** 2
    bits = ("0" + "1" * 14) * -(-blocks // 32_767)  # runs of 32767 empty blocks
    bits += "1" * (-len(bits) % 8)
    empty = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    head = segment(0xDB, 0, *[1] * 64) + segment(0xC2, 8, *struct.pack(">HH", side, side), 1, 1, 0x11, 0)
    tables = segment(0xC4, 0, 1, *[0] * 15, 0) + segment(0xC4, 0x10, 1, *[0] * 15, 0xE0)
    first = segment(0xDA, 1, 1, 0, 0, 0, 0) + bytes(blocks // 8)
    return b"\xff\xd8" + head + tables + first + (segment(0xDA, 1, 1, 0, 1, 63, 0) + empty) * scans + b"\xff\xd9"


def test_an_image_that_hangs_its_decoder_costs_its_row_alone(images, tmp_path, undisturbed):
    here = Path(shutil.copytree(images, tmp_path / "images"))
    (here / "val" / "red" / "zz-endless.jpg").write_bytes(endless_jpeg())
    with disturbed(here, tmp_path, data={"max_failed_fraction": 0.05}) as run:
        assert run.start_here() == Outcome(0, "")
        rows = ds.dataset(run.run_dir.path("tables/images")).to_table(columns=["image_id", "reason"]).to_pylist()
        assert [row for row in rows if row["reason"]] == [
            {"image_id": "val/red/zz-endless.jpg", "reason": "took longer than 60 s to decode"}
        ]
        found = Result.of(run.run_dir)
        for name, table in undisturbed.tables.items():
            if name.startswith("tables/features/"):
                assert found.tables[name].equals(table)
