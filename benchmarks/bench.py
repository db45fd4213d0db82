"""What the benchmarks share: the machine in one line, two things timed side by side, tables in Markdown."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:  # the scripts work on this copy of the code, installed or not
    sys.path.insert(0, str(REPOSITORY))


def heading() -> str:
    """Date, command, commit, versions and machine: what a figure is worth nothing without."""
    import torch

    command = " ".join(["python", os.path.relpath(sys.argv[0], REPOSITORY), *sys.argv[1:]])
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "pyarrow", "numpy") if _has(name))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    machine = f"{cores()} cores of {_processor()}, {memory:.0f} GiB{gpu}, load {_load()}"
    python = platform.python_version()
    return f"`{command}`, {time.strftime('%Y-%m-%d')}, {_commit()}; Python {python}, {libraries}; {machine}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_folder() -> Path:
    """The folder of real photos and weights beside the repository; ends the script where there is none."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data" / "README.md").exists():
        sys.exit("this benchmark works on the shared photos and weights, which are not part of the project")
    return folder


@dataclass(frozen=True)
class Pairs:
    """Seconds of two things that were run in turn, pair by pair."""

    ours: list[float]
    baseline: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours over the baseline, of each pair."""
        return [ours / base for ours, base in zip(self.ours, self.baseline, strict=True)]

    def row(self, name: str) -> dict[str, Any]:
        """The medians, and the ratio with its range, as a row of a table."""
        ratios = self.ratios
        return {
            "what": name,
            "ours s": f"{statistics.median(self.ours):.3g}",
            "baseline s": f"{statistics.median(self.baseline):.3g}",
            "ratio": f"{statistics.median(ratios):.2f}",
            "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
            "runs": len(ratios),
        }


def side_by_side(ours: Callable[[], Any], baseline: Callable[[], Any], repeats: int = 5, warm_up: int = 1) -> Pairs:
    """Times both in turn, one after the other, so that a change of the machine's speed hits both."""
    for _ in range(warm_up):
        ours(), baseline()
    pairs = [(_seconds(ours), _seconds(baseline)) for _ in range(repeats)]
    return Pairs([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; the first row names the columns."""
    rows = list(rows)
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def verdict(name: str, demanded: str, found: str, reached: bool) -> dict[str, str]:
    """A demand and what was found, as a row of a table."""
    return {"": name, "demanded": demanded, "found": found, "reached": "yes" if reached else "**no**"}


def conclude(verdicts: Iterable[Mapping[str, Any]]) -> None:
    """Prints the rows of `verdict`; ends the script with exit code 1 where a demand is not reached."""
    rows = list(verdicts)
    print("\n" + table(rows), flush=True)
    if any(row["reached"] != "yes" for row in rows):
        sys.exit(1)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _commit() -> str:
    asked = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "no commit"
    except OSError:  # no git here
        return "no commit"


def _load() -> str:
    """Processes that wanted a core during the last minute: a busy machine shows."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _has(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
