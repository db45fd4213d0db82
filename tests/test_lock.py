"""One start at a time writes to a run, on a disk and in a store; what has died does not hold it for ever."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from stores import s3

from epic_ray import lock
from epic_ray.errors import ConfigError, InputError, RunFailed
from epic_ray.lock import hold
from epic_ray.run_dir import RunDir
from epic_ray.storage import join

__all__ = ["s3"]

ROUNDS = 20
HOLDER = """
import sys
from epic_ray.lock import hold
from epic_ray.run_dir import RunDir
with hold(RunDir(sys.argv[1]), "train"):
    print("holding", flush=True)
    sys.stdin.read()
"""
RACER = """
import sys, time
from epic_ray.errors import ConfigError
from epic_ray.lock import hold
from epic_ray.run_dir import RunDir
for line in sys.stdin:
    root, start = line.split()
    while time.time() < float(start):
        pass
    try:
        with hold(RunDir(root), "train"):
            print("won", flush=True)
            sys.stdin.readline()
    except ConfigError as error:
        print("refused", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def on_disk(tmp_path) -> RunDir:
    return RunDir(str(tmp_path / "runs" / "one"))


@pytest.fixture(params=["disk", "store"])
def run_dir(request, on_disk) -> RunDir:
    if request.param == "disk":
        return on_disk
    return RunDir(join(request.getfixturevalue("s3").new_bucket(), "runs", "one"))


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a Python process of this script; ended with the test."""
    started: list[subprocess.Popen] = []

    def begin(script: str, *arguments: str) -> subprocess.Popen:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-c", script, *arguments], stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def holder(start: Callable[..., subprocess.Popen], run_dir: RunDir) -> subprocess.Popen:
    process = start(HOLDER, run_dir.root)
    assert process.stdout.readline() == "holding\n"
    return process


def claims_of(run_dir: RunDir) -> list[Path]:
    return [Path(run_dir.path(file)) for file in run_dir.list("locks")]


def leave_claim(run_dir: RunDir, content: bytes | dict[str, Any], age_seconds: float, name: str = "a.json") -> Path:
    """A file in `locks/` as another start left it so long ago."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    run_dir.publish_bytes(f"locks/{name}", data)
    path = Path(run_dir.path(f"locks/{name}"))
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


ELSEWHERE = {
    "host": "elsewhere",
    "boot": "b",
    "namespace": "pid:[1]",
    "pid": 7,
    "started": 8,
    "what": "train",
    "since": "2026-01-01T00:00:00Z",
}


def is_refused(run_dir: RunDir) -> bool:
    try:
        with hold(run_dir, "train"):
            return False
    except ConfigError:
        return True


# --- one at a time


@pytest.mark.slow
def test_a_second_start_is_told_who_holds_the_run_and_goes_on_when_it_is_free(run_dir, start):
    process = holder(start, run_dir)
    message = (
        rf"/one: `train` \(process {process.pid} on host \S+, since \d+-\d+-\d+T\d+:\d+:\d+Z\) is writing to it; "
        "wait for it, stop it, or choose another name"
    )
    with pytest.raises(ConfigError, match=message), hold(run_dir, "explain"):
        pass
    assert process.poll() is None
    assert len(run_dir.list("locks")) == 2, "the refused start left something, or took something away"
    process.communicate("")
    assert process.returncode == 0
    with hold(run_dir, "explain") as held:
        held.demand()
        assert held.freed == []
    assert run_dir.list("locks") == []


@pytest.mark.slow
def test_of_starts_at_the_same_moment_exactly_one_wins(tmp_path, start):
    racers = [start(RACER) for _ in range(2)]
    for number in range(ROUNDS):
        moment = time.time() + (3 if number == 0 else 0.2)
        for racer in racers:
            racer.stdin.write(f"{tmp_path / f'run-{number}'} {moment}\n")
            racer.stdin.flush()
        assert sorted(racer.stdout.readline() for racer in racers) == ["refused\n", "won\n"], number
        for racer in racers:
            racer.stdin.write("\n")
            racer.stdin.flush()


@pytest.mark.slow
def test_of_starts_at_the_same_moment_exactly_one_wins_in_a_store(s3):
    bucket = s3.new_bucket()
    for number in range(4):
        run_dir, together, looked = RunDir(join(bucket, f"run-{number}")), threading.Barrier(3), threading.Barrier(3)

        def attempt(run_dir=run_dir, together=together, looked=looked) -> bool:
            together.wait()
            with ExitStack() as stack:
                try:
                    stack.enter_context(hold(run_dir, "train"))
                    return True
                except ConfigError:
                    return False
                finally:
                    looked.wait()

        with ThreadPoolExecutor(3) as pool:
            won = [future.result() for future in [pool.submit(attempt) for _ in range(3)]]
        assert sum(won) == 1, number


class SlowRunDir(RunDir):
    """A run on a disk where a claim appears some time after it was written, and word of the owner goes out late."""

    def __init__(self, root: str, claim_seconds: float, owner_seconds: float) -> None:
        super().__init__(root)
        self.claim_seconds, self.owner_seconds = claim_seconds, owner_seconds

    def publish(self, relative: str, write: Callable[[pa.NativeFile], None], durable: bool = True) -> int:
        def write_and_wait(stream: pa.NativeFile) -> None:
            write(stream)
            if relative.endswith(".json"):
                time.sleep(self.claim_seconds)
            elif written_by(write) == b"owner":
                time.sleep(self.owner_seconds)

        return super().publish(relative, write_and_wait, durable)


def written_by(write: Callable[[pa.NativeFile], None]) -> bytes:
    buffer = pa.BufferOutputStream()
    write(buffer)
    return buffer.getvalue().to_pybytes()


@pytest.mark.slow
@pytest.mark.parametrize("late_seconds", [0.3, 0.8], ids=["within the time to settle", "later than that"])
def test_a_claim_that_appears_late_does_not_make_a_second_owner(on_disk, monkeypatch, late_seconds):
    """The time of a file is that of its writing: the late claim is the earlier one."""
    monkeypatch.setattr(lock, "_PROMPT_SECONDS", 0.4)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.5)
    late, quick = SlowRunDir(on_disk.root, late_seconds, 0), SlowRunDir(on_disk.root, 0, 1)

    def attempt(run_dir: RunDir) -> bool:
        try:
            with hold(run_dir, "train"):
                time.sleep(3)
                return True
        except ConfigError:
            return False

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(attempt, late)
        time.sleep(0.1)
        second = pool.submit(attempt, quick)
        assert [first.result(), second.result()] == [late_seconds < 0.4, late_seconds > 0.4]


def test_a_slow_disk_is_no_hindrance_where_nobody_else_starts(on_disk):
    with hold(SlowRunDir(on_disk.root, 0.2, 0), "train") as held:
        held.demand()
        assert is_refused(on_disk)


def test_a_process_may_hold_two_runs_but_none_twice(on_disk, tmp_path):
    with hold(on_disk, "train"), hold(RunDir(str(tmp_path / "runs" / "two")), "train"):
        assert is_refused(on_disk)
    assert not is_refused(on_disk)


def test_an_owner_stays_the_owner_when_the_clock_goes_back(on_disk):
    with hold(on_disk, "train") as held:
        for file in claims_of(on_disk):
            os.utime(file, (time.time() + 3600,) * 2)
        assert is_refused(on_disk)
        held.demand()


# --- the end of a start


@pytest.mark.parametrize("fault", [RuntimeError(), KeyboardInterrupt(), SystemExit()])
def test_a_start_that_fails_lets_go(on_disk, fault):
    with pytest.raises(type(fault)), hold(on_disk, "train"):
        raise fault
    assert on_disk.list("locks") == []


def test_a_killed_start_is_succeeded_at_once(run_dir, start):
    process = holder(start, run_dir)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how
    begin = time.monotonic()
    with hold(run_dir, "train") as held:
        held.demand()
        assert time.monotonic() - begin < 10
        (sentence,) = held.freed
        assert f"`train` (process {process.pid} on host" in sentence
        assert sentence.endswith("its process has ended")
        assert len(run_dir.list("locks")) == 2
    assert run_dir.list("locks") == []


def test_a_stopped_start_goes_on_after_a_pause_but_not_after_another_took_over(on_disk, start):
    process = holder(start, on_disk)
    process.send_signal(signal.SIGSTOP)
    assert is_refused(on_disk)
    for file in claims_of(on_disk):
        os.utime(file, (time.time() - 61,) * 2)
    with hold(on_disk, "train") as held:
        assert "nothing was heard of it for 61 s" in held.freed[0]
        process.send_signal(signal.SIGCONT)
        process.communicate("")  # its end takes nothing away from its successor
        held.demand()
        assert len(on_disk.list("locks")) == 2


@pytest.mark.slow
def test_who_was_silent_for_too_long_learns_that_the_run_is_lost(run_dir, monkeypatch):
    monkeypatch.setattr(lock, "_SILENT_SECONDS", 2.0)  # a heartbeat is due after ten
    with hold(run_dir, "train") as first:
        first.demand()
        time.sleep(4)
        with hold(run_dir, "train") as second:
            assert len(second.freed) == 1
            second.demand()
            with pytest.raises(RunFailed, match="another start has taken it over, because nothing was heard"):
                first.demand()
        with pytest.raises(RunFailed):
            first.demand()


@pytest.mark.slow
def test_heartbeats_keep_a_claim_alive_and_end_with_it(run_dir, monkeypatch):
    monkeypatch.setattr(lock, "_SILENT_SECONDS", 3.0)
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.3)
    with hold(run_dir, "train") as held:
        time.sleep(5)
        assert is_refused(run_dir)
        held.demand()
    time.sleep(1)
    assert run_dir.list("locks") == []


def test_a_heart_notices_that_its_claim_is_gone(on_disk, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.1)
    with hold(on_disk, "train"):
        claims = [file for file in on_disk.list("locks") if file.endswith(".json")]
        on_disk.delete(claims)  # and a heartbeat comes before that is deleted, too
        time.sleep(1)
        assert on_disk.list("locks") == []


def test_a_fork_does_not_let_go_of_the_run_of_its_parent(on_disk):
    with hold(on_disk, "train") as held:
        child = os.fork()
        if child == 0:
            held.release()
            os._exit(0)
        os.waitpid(child, 0)
        held.demand()


# --- claims of others


@pytest.mark.parametrize(
    "claim",
    [ELSEWHERE, b"", b'{"host": "elsew', b"[]", b"\xff", ELSEWHERE | {"pid": "x"}, ELSEWHERE | {"pid": 10**30}],
    ids=["elsewhere", "empty", "half", "list", "bytes", "odd pid", "huge pid"],
)
def test_a_claim_from_elsewhere_or_unreadable_counts_by_its_age(on_disk, claim):
    path = leave_claim(on_disk, claim, 15)
    assert is_refused(on_disk)
    assert path.exists()
    leave_claim(on_disk, claim, 70)
    with hold(on_disk, "train") as held:
        assert len(held.freed) == 1
        assert "nothing was heard of it for 70 s" in held.freed[0]
        assert not path.exists()


def test_an_old_claim_with_a_young_heartbeat_lives(on_disk):
    leave_claim(on_disk, ELSEWHERE, 100_000)
    beat = leave_claim(on_disk, b"owner", 15, "a.beat")
    assert is_refused(on_disk)
    os.utime(beat, (time.time() - 70,) * 2)
    assert not is_refused(on_disk)
    assert on_disk.list("locks") == []


@pytest.mark.slow
def test_who_was_not_heard_for_two_beats_is_waited_for_and_succeeded_if_silent(on_disk, monkeypatch):
    monkeypatch.setattr(lock, "_SILENT_SECONDS", 23.0)
    leave_claim(on_disk, ELSEWHERE, 100_000)
    leave_claim(on_disk, b"owner", 21, "a.beat")
    start = time.monotonic()
    with hold(on_disk, "train") as held:
        assert "nothing was heard of it for" in held.freed[0]
    assert 1 < time.monotonic() - start < 10


def test_who_was_not_heard_for_two_beats_and_then_is_keeps_the_run(on_disk):
    leave_claim(on_disk, ELSEWHERE, 100_000)
    beat = leave_claim(on_disk, b"owner", 30, "a.beat")
    heard = threading.Timer(1.5, lambda: os.utime(beat))
    heard.start()
    start = time.monotonic()
    assert is_refused(on_disk)
    assert time.monotonic() - start < 10
    heard.join()


def test_what_is_neither_a_claim_nor_of_one_goes_when_it_is_old(on_disk):
    for name in ("b.beat", ".tmp-12345678-c.json"):
        leave_claim(on_disk, b"owner", 70, name)
    young = leave_claim(on_disk, b"owner", 20, "d.beat")
    assert not is_refused(on_disk)
    assert list(young.parent.iterdir()) == [young]


def test_a_number_that_another_process_has_now_holds_nothing(on_disk):
    with hold(on_disk, "train"):
        (facts,) = [json.loads(file.read_text()) for file in claims_of(on_disk) if file.suffix == ".json"]
    leave_claim(on_disk, facts, 0)
    assert is_refused(on_disk), "this process is there"
    leave_claim(on_disk, facts | {"started": facts["started"] - 1}, 0)
    assert not is_refused(on_disk)


@pytest.mark.parametrize("name", ["host", "boot", "namespace"])
def test_where_numbers_mean_other_processes_only_time_tells(on_disk, name):
    with hold(on_disk, "train"):
        (facts,) = [json.loads(file.read_text()) for file in claims_of(on_disk) if file.suffix == ".json"]
    leave_claim(on_disk, facts | {"pid": 2**22 + 1, name: "another"}, 0)
    assert is_refused(on_disk)
    leave_claim(on_disk, facts | {"pid": 2**22 + 1}, 0)
    assert not is_refused(on_disk)


def test_where_nothing_tells_of_processes_only_time_tells(on_disk, start, monkeypatch):
    monkeypatch.setattr(lock, "_place", lambda: {"host": "here", "boot": None, "namespace": None})
    monkeypatch.setattr(lock, "_started", lambda pid: None)
    with hold(on_disk, "train"):
        assert is_refused(on_disk)
        (facts,) = [json.loads(file.read_text()) for file in claims_of(on_disk) if file.suffix == ".json"]
    leave_claim(on_disk, facts | {"pid": 2**22 + 1}, 0)
    assert is_refused(on_disk)
    leave_claim(on_disk, facts | {"pid": 2**22 + 1}, 61)
    assert not is_refused(on_disk)


# --- the folder


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(InputError, match=r"cannot be written .*check rights and free space"),
        hold(RunDir(str(tmp_path / "file" / "run")), "train"),
    ):
        pass


def test_claims_are_no_output(run_dir):
    with hold(run_dir, "train"):
        assert run_dir.list("") == []
        assert len(run_dir.list("locks")) == 2
