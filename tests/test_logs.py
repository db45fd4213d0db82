"""What a person sees while it works: on stderr, rare lines in a log, bars on a terminal, nothing when quiet."""

import io
import logging
import sys

import pytest

from epic_ray import logs
from epic_ray.logs import BarReporter, LineReporter, Reporter, make_reporter, quiet_ray


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(logs, "time", stopped)
    return stopped


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_in_ten_seconds_with_rate_and_time_left(clock, capsys):
    with LineReporter().stage("features", 100, "images") as meter:
        for _ in range(30):
            clock.now += 1
            meter.advance(2, "1 failed")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "features: 20 of 100 images, 2.0/s, 40 s left (1 failed)",
        "features: 40 of 100 images, 2.0/s, 30 s left (1 failed)",
        "features: 60 of 100 images, 2.0/s, 20 s left (1 failed)",
        "features: 60 images in 30.0 s",
    ]


def test_work_of_unknown_length_has_a_rate_and_no_time_left(clock, capsys):
    with LineReporter().stage("training", None, "epochs") as meter:
        clock.now += 20
        meter.advance(5)
    assert capsys.readouterr().err.splitlines()[0] == "training: 5 epochs, 0.2/s"


def test_a_stage_that_fails_does_not_say_that_it_ended(capsys):
    with pytest.raises(RuntimeError), LineReporter().stage("fit", 3, "rounds"):
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_bars_are_drawn_on_stderr_and_the_text_is_taken_as_it_is(monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    reporter = make_reporter()
    assert isinstance(reporter, BarReporter)
    reporter.say("train: [bold]not markup[/bold] 7")
    with reporter.stage("features", 10, "images") as meter:
        meter.advance(4, "1 failed")
        assert meter.done == 4
    assert "[bold]not markup[/bold] 7" in screen.getvalue()
    assert "4/10" in screen.getvalue()
    assert "images" in screen.getvalue()
    assert capsys.readouterr().out == ""


def test_the_reporter_follows_the_place_it_writes_to(monkeypatch):
    assert type(make_reporter(quiet=True)) is Reporter
    assert type(make_reporter()) is LineReporter  # pytest's stderr is no terminal
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert type(make_reporter()) is BarReporter
    monkeypatch.setenv("NO_COLOR", "1")
    assert type(make_reporter()) is LineReporter


def test_quiet_says_nothing_but_counts(capsys):
    reporter = Reporter()
    reporter.say("x")
    with reporter.stage("fit", 3, "rounds") as meter:
        meter.advance(2)
    assert meter.done == 2
    assert capsys.readouterr() == ("", "")


def test_rays_talk_stays_off_the_screen_and_in_its_files(tmp_path):
    logger = logging.getLogger("ray.data")
    level = logger.level
    screen, file = logging.StreamHandler(io.StringIO()), logging.FileHandler(tmp_path / "ray.log")
    logger.addHandler(screen)
    logger.addHandler(file)
    try:
        quiet_ray()
        assert screen.level == logging.ERROR
        assert file.level == logging.NOTSET
        assert not logger.isEnabledFor(logging.WARNING)
    finally:
        logger.removeHandler(screen)
        logger.removeHandler(file)
        file.close()
        logger.setLevel(level)
