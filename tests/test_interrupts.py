"""Ctrl-C and SIGTERM end a command in good order, wherever they find it; most is seen on real processes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from epic_ray import interrupts
from epic_ray.interrupts import Terminated, catch_signals, check, rearm

# a process born in the background has Ctrl-C ignored
COMMAND = """
import gc, os, signal, sys, time
import typer
signal.signal(signal.SIGINT, signal.default_int_handler)
from epic_ray.cli.app import guarded
from epic_ray.errors import RunFailed
from epic_ray.interrupts import check, rearm
def ready():
    print("ready", flush=True)
def command():
{body}
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(guarded(command))
app()
"""
IN_GARBAGE = """
    class Slow:
        def __del__(self):
            ready()
            time.sleep(1.5)
    slow = Slow()
    slow.itself = slow
    del slow
    gc.collect()
"""
ENDINGS = {
    signal.SIGINT: (130, "interrupted; what is finished is kept, the same command goes on from there"),
    signal.SIGTERM: (143, "stopped by SIGTERM; what is finished is kept, the same command goes on from there"),
}
both = pytest.mark.parametrize("number", list(ENDINGS), ids=["ctrl-c", "sigterm"])


class Process:
    """A Python process that says `ready`, is sent signals, and ends."""

    def __init__(self, script: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True)

    def send(self, number: int) -> None:
        """Sends a signal as soon as the process says that it is ready."""
        if self.process.stdout.readline() != "ready\n":
            pytest.fail(self.process.communicate()[1])
        time.sleep(0.1)  # from the line to what it announces
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, list[str]]:
        """Exit code, the rest of stdout, lines of stderr."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err.splitlines()


@pytest.fixture
def start() -> Iterator[Callable[[str], Process]]:
    started = []

    def begin(script: str) -> Process:
        started.append(Process(script))
        return started[-1]

    yield begin
    for process in started:
        process.process.kill()
        process.process.communicate()


@pytest.fixture
def command(start) -> Callable[[str], Process]:
    """Starts a guarded command with this body."""
    return lambda body: start(COMMAND.format(body=body))


@both
def test_a_sleeping_command_ends_at_once_and_says_that_it_goes_on(command, number):
    process = command("    ready()\n    time.sleep(50)\n")
    begin = time.monotonic()
    process.send(number)
    exit_code, _, err = process.end()
    assert (exit_code, err[-1]) == ENDINGS[number]
    assert len(err) == 1, "no traceback"
    assert time.monotonic() - begin < 20


@both
def test_the_cleaning_up_is_done(command, number):
    process = command("    ready()\n    try:\n        time.sleep(50)\n    finally:\n        print('cleaned')\n")
    process.send(number)
    assert process.end()[:2] == (ENDINGS[number][0], "cleaned\n")


@both
def test_an_interrupt_that_python_drops_inside_gc_is_raised_at_the_next_check(command, number):
    process = command(f"{IN_GARBAGE}\n    print('went on', flush=True)\n    check()\n    print('too far')\n")
    process.send(number)
    exit_code, out, err = process.end()
    assert any("Exception ignored in" in line for line in err), "the exception was not dropped: this shows nothing"
    assert out == "went on\n"
    assert (exit_code, err[-1]) == ENDINGS[number]


def test_work_that_finishes_after_a_dropped_interrupt_is_finished(command):
    process = command(IN_GARBAGE)
    process.send(signal.SIGTERM)
    assert process.end()[0] == 0


def test_a_fault_after_a_dropped_interrupt_is_told_and_ends_as_the_interrupt(command):
    process = command(f"{IN_GARBAGE}\n    raise RunFailed('the workers were stopped too')\n")
    process.send(signal.SIGTERM)
    exit_code, _, err = process.end()
    assert (exit_code, err[-1]) == ENDINGS[signal.SIGTERM]
    assert err[-2] == "RunFailed: the workers were stopped too"


def test_a_bug_stays_a_bug(command):
    process = command("    raise ValueError('a bug')\n")
    exit_code, _, err = process.end()
    assert (exit_code, err[-1]) == (1, "ValueError: a bug")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_second_signal_ends_the_process_at_once(command, first, second):
    """Also out of a cleaning up that would take for ever."""
    body = "    try:\n        ready()\n        time.sleep(50)\n    finally:\n        ready()\n        time.sleep(50)\n"
    process = command(f"{body}        print('cleaned')\n")
    process.send(first)
    begin = time.monotonic()
    process.send(second)
    exit_code, out, _ = process.end()
    assert (exit_code, out) == (ENDINGS[second][0], "")
    assert time.monotonic() - begin < 10


def test_two_signals_in_quick_succession_end_the_process(command):
    process = command("    ready()\n    try:\n        time.sleep(50)\n    finally:\n        time.sleep(50)\n")
    process.send(signal.SIGTERM)
    for _ in range(20):  # two that come before Python looks are one
        time.sleep(0.02)
        process.process.send_signal(signal.SIGTERM)
    assert process.end()[0] == 143


def test_a_handler_that_a_library_put_in_place_is_replaced(command):
    process = command(
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))\n    rearm()\n    ready()\n    time.sleep(50)\n"
    )
    process.send(signal.SIGTERM)
    assert process.end()[0] == 143


def test_a_library_that_forgets_the_kind_of_an_interrupt_does_not_change_the_ending(command):
    body = "    ready()\n    try:\n        time.sleep(50)\n    except KeyboardInterrupt:\n"
    process = command(f"{body}        raise KeyboardInterrupt from None\n")
    process.send(signal.SIGTERM)
    exit_code, _, err = process.end()
    assert (exit_code, err[-1]) == ENDINGS[signal.SIGTERM]


def test_what_the_caller_ignores_stays_ignored(start):
    """As in `nohup epic-ray train &`."""
    script = COMMAND.format(body="    ready()\n    time.sleep(1)\n    print('done')\n")
    process = start(script.replace("signal.default_int_handler", "signal.SIG_IGN"))
    process.send(signal.SIGINT)
    assert process.end()[:2] == (0, "done\n")


@pytest.mark.ray
@pytest.mark.slow
@both
def test_a_command_that_waits_for_ray_ends_at_once(command, number):
    body = """
    import ray
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    rearm()
    @ray.remote
    def wait():
        time.sleep(100)
    waiting = wait.remote()
    ready()
    ray.get(waiting)
"""
    process = command(body)
    process.send(number)
    begin = time.monotonic()
    exit_code, _, err = process.end()
    assert (exit_code, err[-1]) == ENDINGS[number]
    assert time.monotonic() - begin < 40


@pytest.mark.slow
@both
def test_the_job_on_a_cluster_ends_with_the_same_codes(start, number):
    job = Path(__file__).resolve().parents[1] / "jobs" / "train.py"
    process = start(
        "import signal, sys, time, runpy\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import epic_ray.config, epic_ray.pipeline\n"
        "def train(*_, **__):\n    print('ready', flush=True)\n    time.sleep(50)\n"
        "epic_ray.config.load_config = lambda *_: None\nepic_ray.pipeline.train = train\n"
        f"sys.argv = ['train.py', 'run.yaml']\nrunpy.run_path({str(job)!r}, run_name='__main__')\n"
    )
    process.send(number)
    exit_code, _, err = process.end()
    assert (exit_code, err[-1]) == ENDINGS[number]


# --- within this process


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_the_handlers_of_before_are_back_afterwards():
    before = {number: signal.getsignal(number) for number in ENDINGS}
    with pytest.raises(Terminated), catch_signals():
        stop_this_process()
    assert {number: signal.getsignal(number) for number in ENDINGS} == before
    check()  # nothing of then is raised now
    rearm()
    assert {number: signal.getsignal(number) for number in ENDINGS} == before


def test_an_inner_command_leaves_the_handlers_to_the_outer():
    def work() -> None:
        with catch_signals():
            pass
        stop_this_process()

    with pytest.raises(Terminated), catch_signals():
        work()


def test_an_interrupt_that_was_not_seen_is_raised_by_every_check():
    with catch_signals():
        with suppress(BaseException):
            stop_this_process()
        for _ in range(2):
            with pytest.raises(Terminated):
                check()


def test_outside_of_the_main_thread_nothing_is_changed():
    before = {number: signal.getsignal(number) for number in ENDINGS}
    seen = []

    def work() -> None:
        with catch_signals():
            rearm()
            check()
            seen.append({number: signal.getsignal(number) for number in ENDINGS})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_codes_are_those_that_are_written_down():
    text = sys.modules["epic_ray.errors"].__doc__
    assert all(re.search(rf"\b{code}\b", text) for code, _ in ENDINGS.values())
    assert interrupts.ending(Terminated())[0] != interrupts.ending(KeyboardInterrupt())[0]
