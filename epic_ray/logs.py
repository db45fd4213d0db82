"""What a run says while it works: to stderr, as bars on a terminal and as plain lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PLAIN_LINE_SECONDS = 10.0
_RAY_LOGGERS = ("ray", "ray.data", "ray.train")


class Meter:
    """Counts what a stage has done; the base class is silent."""

    done = 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


class Reporter:
    """Tells a person what happens. The base class is silent: for tests and for use as a library."""

    def say(self, text: str) -> None:
        """One line of news."""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, brief: bool = False) -> Iterator[Meter]:
        """A stretch of work of `total` units (None: unknown). A `brief` one leaves no trace unless it takes long."""
        yield Meter()


class LineReporter(Reporter):
    """Plain lines with rate and time left, at most one every ten seconds a stage: for logs and pipes."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, brief: bool = False) -> Iterator[Meter]:
        meter = _LineMeter(self, name, total, unit)
        yield meter
        if not brief or meter.seconds >= PLAIN_LINE_SECONDS:
            meter.finish()


class _LineMeter(Meter):
    def __init__(self, reporter: LineReporter, name: str, total: int | None, unit: str) -> None:
        self._reporter, self._name, self._total, self._unit = reporter, name, total, unit
        self._start = self._last = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if time.monotonic() - self._last >= PLAIN_LINE_SECONDS:
            self._last = time.monotonic()
            rate = self.done / (self._last - self._start)
            left = f", {max(self._total - self.done, 0) / rate:.0f} s left" if self._total and rate else ""
            of = f" of {self._total}" if self._total else ""
            self._reporter.say(f"{self._name}: {self.done}{of} {self._unit}, {rate:.1f}/s{left}{_note(note)}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def finish(self) -> None:
        self._reporter.say(f"{self._name}: {self.done} {self._unit} in {self.seconds:.1f} s")


class BarReporter(Reporter):
    """One bar a stage, with rate and time left: for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, brief: bool = False) -> Iterator[Meter]:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description:<14}"),
            progress.BarColumn(bar_width=30),
            progress.MofNCompleteColumn(),
            progress.TextColumn(unit + " {task.fields[rate]} {task.fields[note]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("eta"),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self._console, transient=brief) as bars:
            yield _BarMeter(bars, bars.add_task(name, total=total, note="", rate=""))


class _BarMeter(Meter):
    def __init__(self, bars, task) -> None:
        self._bars, self._task, self._start = bars, task, time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        rate = f"{self.done / max(time.monotonic() - self._start, 1e-6):.1f}/s"
        self._bars.update(self._task, advance=count, note=note, rate=rate)


def _note(note: str) -> str:
    return f" ({note})" if note else ""


def make_reporter(quiet: bool = False) -> Reporter:
    """Bars on a terminal, plain lines elsewhere, nothing if asked to be quiet."""
    if quiet:
        return Reporter()
    return BarReporter() if sys.stderr.isatty() and "NO_COLOR" not in os.environ else LineReporter()


def quiet_ray() -> None:
    """Keeps Ray's own progress and start-up talk off the screen; its log files keep everything."""
    for name in _RAY_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
