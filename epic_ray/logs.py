"""What a run says while it works, to stderr: bars on a terminal, plain lines elsewhere, records in a job's log."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

PLAIN_LINE_SECONDS = 10.0
RECORD_SECONDS = 2.0
# set for the jobs of `epic-ray submit`, whose log is followed from elsewhere
PROGRESS_VARIABLE, RECORDS = "EPIC_RAY_PROGRESS", "records"
_RECORD_MARK = "@epic-ray "
_RAY_LOGGERS = ("ray", "ray.data", "ray.train")


class Meter:
    """Counts what a stage has done; the base class is silent.

    already: what was done before this start; it counts, but not towards the rate.
    """

    def __init__(self, already: int = 0) -> None:
        self.done = self.already = already
        self._start = time.monotonic()

    def advance(self, count: int = 1, note: str = "", seconds: float | None = None) -> None:
        """Counts on. seconds: since the stage began, where that was elsewhere."""
        self.done += count
        if seconds is not None:
            self._start = time.monotonic() - seconds
        self.show(note)

    def show(self, note: str) -> None:
        """Tells a person, if it is time to."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """What is done a second, in this start."""
        return (self.done - self.already) / max(self.seconds, 1e-6)


class Reporter:
    """Tells a person what happens. The base class is silent: for tests and for use as a library."""

    def say(self, text: str) -> None:
        """One line of news."""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, brief: bool = False, already: int = 0) -> Iterator[Meter]:
        """A stretch of work of `total` units (None: unknown), `already` of which are there. A `brief` one leaves no
        trace unless it takes long."""
        yield Meter(already)


class LineReporter(Reporter):
    """Plain lines with rate and time left, at most one every ten seconds a stage: for logs and pipes.

    to: where they go, by default stderr.
    """

    def __init__(self, to: TextIO | None = None) -> None:
        self._to = to

    def say(self, text: str) -> None:
        print(text, file=self._to or sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, brief: bool = False, already: int = 0) -> Iterator[Meter]:
        meter = _LineMeter(self, name, total, unit, already)
        yield meter
        if not brief or meter.seconds >= PLAIN_LINE_SECONDS:
            meter.finish()


class _LineMeter(Meter):
    def __init__(self, reporter: LineReporter, name: str, total: int | None, unit: str, already: int) -> None:
        super().__init__(already)
        self._reporter, self._name, self._total, self._unit = reporter, name, total, unit
        self._last = 0.0

    def show(self, note: str) -> None:
        if self.seconds - self._last >= PLAIN_LINE_SECONDS:
            self._last = self.seconds
            left = f", {max(self._total - self.done, 0) / self.rate:.0f} s left" if self._total and self.rate else ""
            of = f" of {self._total}" if self._total else ""
            self._reporter.say(f"{self._name}: {self.done}{of} {self._unit}, {self.rate:.1f}/s{left}{_note(note)}")

    def finish(self) -> None:
        self._reporter.say(f"{self._name}: {self.done - self.already} {self._unit} in {self.seconds:.1f} s")


@dataclass(frozen=True)
class Progress:
    """How far a stage of a job is: one line of its log."""

    stage: str
    unit: str
    done: int
    total: int | None
    already: int
    seconds: float
    note: str = ""
    brief: bool = False
    ended: bool = False

    def line(self) -> str:
        return _RECORD_MARK + json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def of(cls, line: str) -> "Progress | None":
        """The record in a line of a log; None for any other line, a torn record among them."""
        if not line.startswith(_RECORD_MARK):
            return None
        try:
            return cls(**json.loads(line.removeprefix(_RECORD_MARK)))
        except (ValueError, TypeError):
            return None

    @property
    def rate(self) -> float:
        """What is done a second, in this start."""
        return (self.done - self.already) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        return max(self.total - self.done, 0) / self.rate if self.total and self.rate else None


class RecordReporter(LineReporter):
    """News as lines, progress as records, at most one in two seconds: what `epic-ray logs` and `status` read."""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, brief: bool = False, already: int = 0) -> Iterator[Meter]:
        meter = _RecordMeter(self, name, total, unit, brief, already)
        if not brief:
            meter.tell("")
        yield meter
        if not brief or meter.seconds >= PLAIN_LINE_SECONDS:
            meter.tell("", ended=True)


class _RecordMeter(Meter):
    def __init__(
        self, reporter: RecordReporter, name: str, total: int | None, unit: str, brief: bool, already: int
    ) -> None:
        super().__init__(already)
        self._reporter, self._name, self._total, self._unit, self._brief = reporter, name, total, unit, brief
        self._last, self._note = 0.0, ""

    def show(self, note: str) -> None:
        self._note = note
        if self.seconds - self._last >= RECORD_SECONDS:
            self._last = self.seconds
            self.tell(note)

    def tell(self, note: str, ended: bool = False) -> None:
        seconds = round(self.seconds, 3)
        progress = Progress(
            self._name,
            self._unit,
            self.done,
            self._total,
            self.already,
            seconds,
            note or self._note,
            self._brief,
            ended,
        )
        self._reporter.say(progress.line())


class BarReporter(Reporter):
    """One bar a stage, with rate and time left: for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, brief: bool = False, already: int = 0) -> Iterator[Meter]:
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
            yield _BarMeter(bars, bars.add_task(name, total=total, completed=already, note="", rate=""), already)


class _BarMeter(Meter):
    def __init__(self, bars: Any, task: Any, already: int) -> None:
        super().__init__(already)
        self._bars, self._task = bars, task

    def show(self, note: str) -> None:
        self._bars.update(self._task, completed=self.done, note=note, rate=f"{self.rate:.1f}/s")


def _note(note: str) -> str:
    return f" ({note})" if note else ""


def make_reporter(quiet: bool = False) -> Reporter:
    """Bars on a terminal, plain lines elsewhere, records in a submitted job, nothing if asked to be quiet."""
    if quiet:
        return Reporter()
    if os.environ.get(PROGRESS_VARIABLE) == RECORDS:
        return RecordReporter()
    return BarReporter() if sys.stderr.isatty() and "NO_COLOR" not in os.environ else LineReporter()


def quiet_ray() -> None:
    """Keeps Ray's own progress and start-up talk off the screen; its log files keep everything."""
    for name in _RAY_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
