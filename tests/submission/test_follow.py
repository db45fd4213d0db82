"""A job's log as a person sees it elsewhere: the same bars and lines as of a run on this machine, however it is cut."""

import io
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_ray.errors import ClusterError, ConfigError, InputError, RunFailed
from epic_ray.logs import LineReporter, Progress, RecordReporter, Reporter
from epic_ray.submission.follow import Replay, Standing, ending_of, exit_code_of, fault_of
from epic_ray.submission.jobs import Job, newest_job


def progress(done: int, seconds: float, **others: object) -> Progress:
    return Progress("features", "images", done, 4000, 1000, seconds, **others)


LOG = "\n".join(
    [
        "photos: resnet18 (512 channels)",
        progress(1000, 0.0).line(),
        progress(1512, 16.0, note="1 failed").line(),
        "a worker was lost; going on",
        progress(4000, 100.0, note="1 failed", ended=True).line(),
        Progress("fit", "rounds", 3, 10, 0, 12.0).line(),
        "RunFailed: fit: the disk is full",
        "",
    ]
)
SHOWN = [
    "photos: resnet18 (512 channels)",
    "features: 1512 of 4000 images, 32.0/s, 78 s left (1 failed)",
    "a worker was lost; going on",
    "features: 4000 of 4000 images, 30.0/s, 0 s left (1 failed)",
    "features: 3000 images in 100.0 s",
    "fit: 3 of 10 rounds, 0.2/s, 28 s left",
    "RunFailed: fit: the disk is full",
]


def shown(*pieces: str) -> list[str]:
    screen = io.StringIO()
    replay = Replay(LineReporter(screen))
    for piece in pieces:
        replay.feed(piece)
    replay.close()
    return screen.getvalue().splitlines()


def test_a_log_is_shown_with_its_own_rates_and_times():
    assert shown(LOG) == SHOWN


@given(st.lists(st.integers(0, len(LOG)), max_size=8))
def test_it_does_not_matter_how_the_stream_is_cut(cuts):
    places = [0, *sorted(cuts), len(LOG)]
    assert shown(*(LOG[a:b] for a, b in pairwise(places))) == SHOWN


def test_a_stage_that_broke_off_is_not_said_to_have_ended():
    assert not [line for line in shown(LOG) if line.startswith("fit:") and " in " in line]


@pytest.mark.parametrize("line", ["@epic-ray {", '@epic-ray {"stage": 1}', "@epic-ray 7", " @epic-ray {}"])
def test_a_torn_record_is_shown_as_it_is(line):
    assert shown(line + "\n") == [line]


def test_what_a_job_writes_is_what_the_follower_reads(capsys):
    with RecordReporter().stage("features", 10, "images", already=4) as meter:
        meter.advance(6, "2 failed")
    first, last = (Progress.of(line) for line in capsys.readouterr().err.splitlines())
    assert first is not None
    assert last is not None
    assert (first.done, first.already, first.ended) == (4, 4, False)
    assert (last.done, last.total, last.note, last.ended) == (10, 10, "2 failed", True)


def test_a_brief_stage_leaves_nothing_in_the_log(capsys):
    with RecordReporter().stage("list train", None, "images", brief=True) as meter:
        meter.advance(6)
    assert capsys.readouterr().err == ""


def test_quiet_follows_in_silence(capsys):
    replay = Replay(Reporter())
    replay.feed(LOG)
    replay.close()
    assert capsys.readouterr() == ("", "")


def job(status: str, exit_code: int | None = None, message: str = "") -> Job:
    facts = {"root": "", "model": "", "data": "", "version": "", "started_at": 1.0, "ended_at": 3.0}
    return Job("photos-2", "photos", 2, "train", status, exit_code=exit_code, message=message, **facts)


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (job("SUCCEEDED", 0), 0),
        (job("FAILED", InputError.exit_code), 3),
        (job("FAILED", ClusterError.exit_code), 4),
        (job("FAILED", None, "the runtime environment could not be made"), RunFailed.exit_code),
        (job("FAILED", -9), RunFailed.exit_code),
        (job("STOPPED"), 143),
    ],
)
def test_a_followed_job_ends_the_command_with_its_own_code(ended, code):
    assert exit_code_of(ended) == code
    assert ending_of(ended).startswith("photos-2: ")


class JobTable:
    """A connection to a head that knows these jobs."""

    origin = "a cluster"

    def __init__(self, *jobs: tuple[str, str, int]) -> None:
        self._jobs = jobs

    def call(self, _: object) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                metadata={"epic_ray.run": run, "epic_ray.attempt": job_id.rsplit("-", 1)[1]},
                submission_id=job_id, status="RUNNING", start_time=started, end_time=None, driver_exit_code=None,
                message="", job_id=None, driver_node_id=None,
            )
            for job_id, run, started in self._jobs
        ]  # fmt: skip


def test_a_run_is_not_mistaken_for_a_job_of_another_run():
    table = JobTable(("photos-1-1", "photos-1", 1000), ("photos-1", "photos", 2000), ("photos-2", "photos", 3000))
    assert newest_job(table, "photos-1").id == "photos-1-1"
    assert newest_job(table, "photos").id == "photos-2"
    assert newest_job(table, "photos-2").id == "photos-2"
    assert newest_job(table).id == "photos-2"
    with pytest.raises(ConfigError, match="no such run on a cluster; it knows photos, photos-1"):
        newest_job(table, "photo")


def test_the_fault_of_a_job_is_found_in_its_log():
    assert fault_of(LOG) == "RunFailed: fit: the disk is full"
    assert fault_of("Traceback\nZeroDivisionError: x\n") == "ZeroDivisionError: x"


def test_status_counts_what_was_done_before_this_start_but_not_in_the_rate():
    facts = Standing(job("RUNNING"), [progress(2500, 50.0, note="3 failed")], actors_alive=2).facts()
    assert (facts["done"], facts["total"], facts["rate"], facts["seconds_left"]) == (2500, 4000, 30.0, 50.0)
    assert (facts["failed"], facts["actors_alive"], facts["stage"]) == (3, 2, "features")
