"""One fault of each kind on 204 images: the run ends as it should, and with the tables of an undisturbed one."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from harness import (
    LINUX,
    SLOW_UNIT,
    UNITS,
    Outcome,
    descendants,
    disturbed,
    kill,
    wait_gone,
    wait_until,
)
from moments import MOMENTS, meanwhile, signalled, strike
from stores import gated_s3, s3
from verdict import fault_table, images, run, undisturbed

from epic_ray.run_dir import RUN, attempts_folder, mark_file, round_file
from epic_ray.storage import join

__all__ = ["fault_table", "gated_s3", "images", "run", "s3", "undisturbed"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), LINUX]
GOES_ON = "what is finished is kept, the same command goes on from there"


# --- processes of the pass


def test_an_actor_that_is_killed_while_it_publishes_costs_its_unit(run, undisturbed, fault_table):
    run.points.arm("publish", "kill", match="/tables/features/train/")
    assert run.start_here() == Outcome(0, "")
    assert run.points.met("publish")
    fault_table.judge("kill -9 of a FeatureActor", "publish of a feature file", run, undisturbed)
    assert run.redone() == 1


def test_a_decode_task_that_is_killed_is_done_again(run, undisturbed, fault_table):
    begun = run.run_dir.path(attempts_folder("features", *SLOW_UNIT))
    killed: list[int] = []

    def strike_it() -> None:
        wait_until(lambda: os.path.isdir(begun) and os.listdir(begun))
        time.sleep(0.3)  # into its images
        killed.extend(descendants(os.getpid(), r"^ray::MapBatches\("))
        for pid in killed:
            kill(pid)

    thread = meanwhile(strike_it)
    assert run.start_here() == Outcome(0, "")
    thread.join()
    assert killed
    fault_table.judge("kill -9 of a decode task", "pass", run, undisturbed)
    assert run.redone() == 0, "nothing was forwarded twice"


def test_after_a_fault_of_an_actor_the_gpus_are_free_and_the_same_process_goes_on(
    images, tmp_path, undisturbed, fault_table
):
    with disturbed(images, tmp_path, resources={"gpus_per_actor": 1}) as run:
        run.points.arm("forward", "raise", after=3)
        run.points.arm("publish", "hold", match="/tables/features/val/")  # the other actor must not come to its end
        failed = run.start_here()
        assert failed.exit_code == 5
        assert failed.first_line.startswith("RunFailed: features: RuntimeError: a fault that a test has asked for; ")
        assert not run.run_dir.exists(RUN)
        wait_until(lambda: ray.available_resources().get("GPU") == 2, seconds=10)
        run.points.clear()
        assert run.committed() >= 2
        assert run.start_here() == Outcome(0, "")
        fault_table.judge("an exception in a FeatureActor", "pass", run, undisturbed)
        assert 1 <= run.redone() <= 3
        wait_until(lambda: ray.available_resources().get("GPU") == 2, seconds=10)


# --- machines


def test_of_three_machines_one_is_lost_in_the_middle_of_the_pass(images, tmp_path, undisturbed, fault_table):
    with disturbed(images, tmp_path, resources={"gpus_per_actor": 1}) as run:
        MOMENTS["pass"].arm(run)
        start = run.on_three_machines()
        raylets = start.raylets()
        held = MOMENTS["pass"].wait(run, start)
        kill(next(raylet for raylet in raylets[1:] if held in descendants(raylet)))
        assert start.end() == 0
        fault_table.judge("kill -9 of one raylet of three", "pass", run, undisturbed)
        assert run.redone() >= 1


# --- the driver


def test_a_second_start_is_refused_and_a_killed_one_is_succeeded_at_once(run, undisturbed, fault_table):
    MOMENTS["pass"].arm(run)
    first = run.start()
    held = run.points.wait("forward", first)
    second = run.start_here()
    assert second.exit_code == 2
    assert second.first_line.startswith(f"ConfigError: {run.run_dir}: `train` (process {first.process.pid} on host ")
    assert first.process.poll() is None
    kill(first.process.pid)
    assert first.end() == -signal.SIGKILL
    wait_gone(held)
    run.points.clear()
    third = run.start()
    assert third.end() == 0
    fault_table.judge("two starts at once; kill -9 of the one that holds the run", "pass", run, undisturbed)
    assert 1 <= run.redone() <= 2


@pytest.mark.parametrize(
    ("fault", "number", "where", "exit_code", "said"),
    [
        ("SIGTERM of the driver", signal.SIGTERM, "fit", 143, f"stopped by SIGTERM; {GOES_ON}"),
        ("Ctrl-C", signal.SIGINT, "publish of a unit", 130, f"interrupted; {GOES_ON}"),
    ],
)
def test_a_stopped_run_says_so_and_goes_on(run, undisturbed, fault_table, fault, number, where, exit_code, said):
    ended = strike(run, MOMENTS[where], signalled(number, group=number == signal.SIGINT))
    assert ended == (exit_code, f"{said}\n")
    assert not run.run_dir.exists(RUN)
    first_round = Path(run.run_dir.path(round_file(1)))
    made = first_round.stat().st_mtime_ns if where == "fit" else None
    assert run.start_here() == Outcome(0, "")
    fault_table.judge(fault, where, run, undisturbed)
    assert made in (None, first_round.stat().st_mtime_ns), "the fit went on from its newest round"
    least, most = MOMENTS[where].units_redone
    assert least <= run.redone() <= most


# --- disks and stores


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "none", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small disk: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, left_bytes: int) -> None:
    space = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        file.write(bytes(max(0, space.f_bavail * space.f_frsize - left_bytes)))


def make_room(disk: Path) -> None:
    (disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)


# the file before the stage, which space there is for, and how many bytes more
FILLED = {
    "images": ("/config.yaml", 0),
    "features": ("/marks/images", 300_000),
    "fit": ("/marks/features", 0),
    "prototypes": ("/marks/fit", 0),
    "run.json": ("/marks/prototypes", 0),
}


def test_a_disk_that_fills_up_at_any_stage_ends_the_start_with_5_and_nothing_is_lost(
    images, tmp_path, small_disk, undisturbed, fault_table
):
    with disturbed(images, tmp_path, small_disk) as run:
        for stage, (before, left_bytes) in FILLED.items():
            run.points.arm("publish", "hold", before, torn=False)

            def fill_up(left_bytes: int = left_bytes) -> None:
                run.points.wait("publish")
                fill(small_disk, left_bytes)
                run.points.clear()

            thread = meanwhile(fill_up)
            failed = run.start_here()
            thread.join()
            assert failed.exit_code == 5, stage
            assert failed.first_line.startswith(f"RunFailed: {run.run_dir}/"), stage
            assert "no space left" in failed.first_line, stage
            assert not run.run_dir.exists(RUN), stage
            assert not run.run_dir.exists(mark_file(stage)), stage
            assert stage != "features" or 0 < run.committed() < UNITS
            make_room(small_disk)
        assert run.start_here() == Outcome(0, "")
        fault_table.judge("disk full", "each of the five stages in turn", run, undisturbed)
        assert run.redone() < UNITS, "units that found the disk full, one after another"


def test_a_store_that_is_away_for_a_while_is_waited_for(images, tmp_path, gated_s3, undisturbed, fault_table):
    store, gate = gated_s3
    bucket = store.new_bucket()
    store.upload(images, join(bucket, "images"))
    with disturbed(join(bucket, "images"), tmp_path, join(bucket, "runs")) as run:
        MOMENTS["pass"].arm(run)
        start = run.start()
        MOMENTS["pass"].wait(run, start)
        gate.shut()
        run.points.clear()
        time.sleep(5)
        gate.open()
        assert start.end() == 0, start.stderr()
        fault_table.judge("object store away for 5 s", "pass", run, undisturbed, without=("uri",))
        assert run.redone() == 0


# --- a start that fails at a stage


def file_for_folder(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"a file where a folder is needed")


def folder_for_file(place: Path) -> None:
    (place / "folder").mkdir(parents=True)


def cut_short(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:1000])


# in the order of the stages: each start comes as far as its damage
FAILURES: tuple[tuple[str, Callable[[Path], None], str, str], ...] = (
    ("tables/manifest", file_for_folder, "images", "InputError"),
    ("attempts", file_for_folder, "features", "InputError"),
    ("tables/images", file_for_folder, "features", "InputError"),
    ("marks/features.json", folder_for_file, "features", "InputError"),
    ("fit", file_for_folder, "fit", "InputError"),
    ("basis", file_for_folder, "fit", "InputError"),
    (round_file(8), cut_short, "fit", "ResultError"),
    ("tables/prototypes", file_for_folder, "prototypes", "InputError"),
    (RUN, folder_for_file, "run.json", "InputError"),
)


def test_a_start_that_fails_at_any_stage_does_not_end_with_0_and_the_next_goes_on(run, undisturbed, fault_table):
    for relative, damage, stage, kind in FAILURES:
        place = Path(run.run_dir.path(relative))
        damage(place)
        failed = run.start_here()
        assert failed.first_line.startswith(f"{kind}: {run.run_dir}"), failed
        assert f"/{relative}" in failed.first_line
        assert failed.exit_code == {"InputError": 3, "ResultError": 6}[kind], relative
        assert not run.run_dir.exists(mark_file(stage))
        assert not run.run_dir.exists(RUN)
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert run.start_here() == Outcome(0, "")
    fault_table.judge("a place that cannot be written, a torn round", "nine places in turn", run, undisturbed)
