"""A classifier whose processes may be stopped, killed or failed at a chosen point; importable in Ray's processes too.

A test arms a point by a file in the folder that the run file names; the first process that comes there takes the file
by renaming it, so that a fault happens once. Processes that load no classifier (decode tasks) know no points.
"""

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from epic_ray.demo import DigitNet

BATCH = 16
_HOLD_SECONDS = 180
_fsync = os.fsync
_folders: list[Path] = []
_passed: Counter[str] = Counter()


class FaultyNet(DigitNet):
    """The demo's network; a full batch passes the point `forward`."""

    def __init__(self, class_count: int, points: str) -> None:
        super().__init__(class_count)
        self._points = Path(points)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, class_count) of normalised images (B, 3, 32, 32)."""
        if len(images) == BATCH:  # not the images that prove the split
            _pass_point(self._points, "forward")
        return super().forward(images)


def faulty_net(points: str, class_count: int = 3) -> nn.Module:
    """The factory that run files name. Its process passes the point `publish` at every file that it publishes, when
    the temporary file is written and not yet renamed."""
    folder = Path(points)
    if folder not in _folders:
        _folders.append(folder)
    os.fsync = _fsync_with_points
    return FaultyNet(class_count, points)


def forget_points() -> None:
    """Makes this process an ordinary one again."""
    os.fsync = _fsync
    _folders.clear()


def _fsync_with_points(handle: int) -> None:
    _fsync(handle)
    path = os.readlink(f"/proc/self/fd/{handle}")
    if "/.tmp-" not in path:
        return
    published = re.sub(r"/\.tmp-[0-9a-f]+-", "/", path)
    for folder in _folders:
        _pass_point(folder, "publish", published, lambda: os.truncate(path, os.stat(path).st_size // 2))


def _pass_point(folder: Path, name: str, what: str = "", tear: Callable[[], None] | None = None) -> None:
    """`tear` leaves the file in hand as a process does that dies while it writes."""
    _passed[name] += 1
    try:
        armed = json.loads((folder / name).read_text(encoding="ascii"))
    except FileNotFoundError:
        return
    if _passed[name] < armed["after"] or not re.search(armed["match"], what):
        return
    if armed["action"] == "kill every":
        os.kill(os.getpid(), signal.SIGKILL)
    taken = folder / f"{name}.taken-{os.getpid()}"
    try:
        (folder / name).rename(taken)
    except FileNotFoundError:  # another process was faster
        return
    if tear and armed["torn"]:
        tear()
    if armed["action"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if armed["action"] == "raise":
        raise RuntimeError("a fault that a test has asked for")
    end = time.monotonic() + _HOLD_SECONDS
    while taken.exists() and time.monotonic() < end:
        time.sleep(0.01)
