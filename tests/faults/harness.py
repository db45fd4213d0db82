"""Faults on purpose: a run that a test can stop at a point, processes to kill, and what must hold afterwards."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import CLASSES, COLOURS, draw_patch, small_settings
from PIL import Image
from typer.main import get_command

from epic_ray import pipeline
from epic_ray.cli import explain, train
from epic_ray.cli.app import app
from epic_ray.config import RunConfig, dump_config
from epic_ray.run_dir import RUN, RunDir
from epic_ray.storage import join

assert explain, train  # imported for the commands they add
assert pipeline  # imported here, so that Ray's loggers do not take the stderr of a start for theirs

REPOSITORY = Path(__file__).resolve().parents[2]
UNIT = 16
COUNTS = {"train": 48, "val": 20}  # images of each class: units of 9 + 4
UNITS = 13
SLOW_UNIT = ("train", 4)
_SLOW_PX, _SLOW_IMAGES = 5000, 3
_WAIT_SECONDS = 280  # on a busy machine a start alone may take a minute
_FRESH_THREADS = 2  # of a process that has done nothing yet; the last bits of a matrix product depend on them

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes by /proc")


# --- the images and the settings


def write_images(root: Path) -> Path:
    """204 small JPEGs in 13 units; three large ones in the unit `SLOW_UNIT` take a second to decode."""
    for number, (split, count) in enumerate(COUNTS.items()):
        for place, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                patch = draw_patch(COLOURS[name], 100_000 * number + 10_000 * place + index)
                patch.save(folder / f"{name}-{index:04d}.jpg", quality=90)
    large = io.BytesIO()
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (50, 50, 3), dtype=np.uint8))
    noise.resize((_SLOW_PX, _SLOW_PX), Image.Resampling.BICUBIC).save(large, "JPEG", quality=80)
    for index in range(_SLOW_IMAGES):
        place, row = divmod(SLOW_UNIT[1] * UNIT + index, COUNTS["train"])
        (root / "train" / CLASSES[place] / f"{CLASSES[place]}-{row:04d}.jpg").write_bytes(large.getvalue())
    return root


def fault_settings(images: Path | str, output: Path | str, points: Path, **sections: Any) -> RunConfig:
    """A run of seconds with 13 units and 8 rounds of adam; its processes pass the points armed in `points`."""
    ours: dict[str, Any] = {
        "model": {"architecture": "tests.faults.networks:faulty_net", "arguments": {"points": str(points)}},
        "features": {"unit_size": UNIT},
        "fit": {
            "solver": "adam",
            "workers": 0,
            "adam": {"epochs_per_round": 25, "batch_size": 64},
            "prototypes_per_channel": {"start": 12, "end": 5, "rounds": 8},
        },
        "resources": {"batch_size": UNIT, "feature_actors": 2},
    }
    merged = {name: {**ours.get(name, {}), **sections.get(name, {})} for name in {**ours, **sections}}
    return small_settings(images, output, **merged)


# --- points


class Points:
    """The points of a run, armed and met."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def arm(self, name: str, action: str, match: str = "", after: int = 1, torn: bool = True) -> None:
        """The first process that passes `name` for at least the `after`-th time will `hold`, `kill` itself or `raise`;
        with `kill every`, all that pass it. `match`: what the path of a file to publish must contain. `torn`: half of
        that file is there."""
        told = {"action": action, "match": match, "after": after, "torn": torn}
        draft = self.folder / f"draft-{name}"
        draft.write_text(json.dumps(told), encoding="ascii")
        draft.rename(self.folder / name)

    def met(self, name: str) -> int | None:
        """The process that met the point, or None."""
        return next((int(file.suffix.removeprefix(".taken-")) for file in self.folder.glob(f"{name}.taken-*")), None)

    def wait(self, name: str, start: "Start | None" = None) -> int:
        """The process that is held at a point, as soon as there is one."""
        wait_until(lambda: self.met(name), start)
        found = self.met(name)
        assert found
        return found

    def clear(self) -> None:
        """Lets go of who is held; nothing is armed any more."""
        for file in self.folder.iterdir():
            file.unlink(missing_ok=True)


def wait_until(condition: Callable[[], Any], start: "Start | None" = None, seconds: float = _WAIT_SECONDS) -> None:
    """Fails where the condition does not come true, or the process that should make it true ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if start and start.process.poll() is not None and not condition():
            pytest.fail(f"ended too early, with {start.process.returncode}: {start.stderr()}")
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds} s in vain" + (f": {start.stderr()}" if start else ""))
        time.sleep(0.005)


# --- processes


class Start:
    """A start of a run as a command of its own."""

    def __init__(self, arguments: list[str], exit_codes: list[int], **environment: str) -> None:
        self._exit_codes = exit_codes
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 a pipe that nobody reads would stop the command
        kept = {
            key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV")
        }
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env={**kept, "PYTHONPATH": str(REPOSITORY), **environment},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            # a process born in the background has Ctrl-C ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def raylets(self) -> list[int]:
        """Of `three_machines.py`: the processes of its raylets, the head's first."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(self.stderr())
        found: list[int] = json.loads(line)
        return found

    def stderr(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def end(self, seconds: float = _WAIT_SECONDS) -> int:
        """The exit code of the finished process."""
        try:
            self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.close()
            pytest.fail(f"did not end in {seconds} s: {self.stderr()}")
        self._exit_codes.append(self.process.returncode)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                kill(pid)
        self.process.communicate()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_gone(pid: int) -> None:
    """Waits for the end of a process: those of a killed driver outlive it for a moment, and may finish their unit."""
    wait_until(lambda: not processes().get(pid, (0, ""))[1])  # a dead one that nobody has asked for has no title


def processes() -> dict[int, tuple[int, str]]:
    """Parent and title of every process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(folder.name)] = (parent, title)
    return found


def descendants(pid: int, title: str = "") -> list[int]:
    """The processes below one whose title matches."""
    every = processes()

    def is_below(child: int) -> bool:
        while child in every and child != pid:
            child = every[child][0]
        return child == pid

    return [child for child, (_, name) in every.items() if child != pid and is_below(child) and re.search(title, name)]


# --- a run that is disturbed


class Outcome(NamedTuple):
    """How a start in this process ended."""

    exit_code: int
    stderr: str

    @property
    def first_line(self) -> str:
        return self.stderr.splitlines()[0] if self.stderr else ""


def start_here(run_file: Path) -> Outcome:
    """`epic-ray train run.yaml` in this process, on the Ray that it has."""
    out, err = io.StringIO(), io.StringIO()  # never closed: Ray's loggers may keep them
    threads = torch.get_num_threads()
    torch.set_num_threads(_FRESH_THREADS)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = get_command(app).main(["train", str(run_file), "--quiet"], standalone_mode=False)
    finally:
        torch.set_num_threads(threads)
    return Outcome(int(code or 0), err.getvalue())


class Disturbed:
    """A run with points, whose starts are counted."""

    def __init__(self, images: Path | str, folder: Path, output: Path | str | None = None, **sections: Any) -> None:
        self.points = Points(folder / "points")
        self.config = fault_settings(images, output or folder / "runs", self.points.folder, **sections)
        self.run_dir = RunDir(join(self.config.output.root, "small"))
        self.run_file = folder / "run.yaml"
        self.run_file.write_text(dump_config(self.config), encoding="utf-8")
        self.begun = time.monotonic()
        self.exit_codes: list[int] = []
        self._open: list[Start] = []

    def start(self, **environment: str) -> Start:
        """`epic-ray train run.yaml` as a process of its own."""
        return self.command("-m", "epic_ray", "train", str(self.run_file), "--quiet", **environment)

    def on_three_machines(self, **environment: str) -> Start:
        """The training job on a cluster of three raylets."""
        here = Path(__file__).with_name("three_machines.py")
        return self.command(str(here), str(self.run_file), str(REPOSITORY / "jobs" / "train.py"), **environment)

    def command(self, *arguments: str, **environment: str) -> Start:
        self._open.append(Start(list(arguments), self.exit_codes, **environment))
        return self._open[-1]

    def start_here(self) -> Outcome:
        """The same command in this process, on the Ray that it has."""
        outcome = start_here(self.run_file)
        self.exit_codes.append(outcome.exit_code)
        return outcome

    def committed(self) -> int:
        return len(self.run_dir.list("tables/images"))

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = self.run_dir.read_json(RUN)
        return record

    def redone(self) -> int:
        return int(self.record()["units"]["redone"])

    def close(self) -> None:
        self.points.clear()
        for start in self._open:
            start.close()


@contextmanager
def disturbed(
    images: Path | str, folder: Path, output: Path | str | None = None, **sections: Any
) -> Iterator[Disturbed]:
    run = Disturbed(images, folder, output, **sections)
    try:
        yield run
    finally:
        run.close()
