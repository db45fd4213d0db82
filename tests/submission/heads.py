"""Real heads of Ray on loopback, with raylets beside them: started and killed process by process.

with start_head(folder, workers=2) as head: epic_ray("list", "--address", head.address)
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_START_SECONDS = 90
_OBJECT_STORE_BYTES = 200 * 1024**2
_BIN = Path(sys.executable).parent


def open_directly(what: str | urllib.request.Request) -> Any:
    """What an address answers, by no proxy: `urlopen` keeps that of the first call in the process for ever."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(what, timeout=5)


@dataclass
class Head:
    """A head and its raylets, each a `ray start --block` that leads a session of its own."""

    folder: Path
    port: int
    dashboard_port: int
    environment: dict[str, str]
    token: str | None = None
    processes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start(self, workers: int, cpus: int, head_cpus: int, gpus: int = 0) -> None:
        self.run(
            "--head", f"--port={self.port}", f"--dashboard-port={self.dashboard_port}", "--dashboard-host=127.0.0.1",
            "--node-ip-address=127.0.0.1", "--include-dashboard=true", f"--num-cpus={head_cpus}", f"--num-gpus={gpus}",
        )  # fmt: skip
        _await(self.is_up, "the dashboard answers")
        for number in range(1, workers + 1):  # one after the other: those that start at once share a session's files
            own = ("--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--num-gpus=0")
            self.run(f"--address=127.0.0.1:{self.port}", *own)
            _await(lambda number=number: self.count_nodes() == 1 + number, f"raylet {number} has joined")

    def run(self, *words: str, prefix: Sequence[str] = ()) -> None:
        log = (self.folder / f"ray-{len(self.processes)}.log").open("wb")
        command = [*prefix, str(_BIN / "ray"), "start", "--block", "--disable-usage-stats", *words]
        # another Ray of this machine may have the port that agents listen on by default
        command += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--dashboard-agent-listen-port=0"]
        if "--head" in words:
            command.append(f"--temp-dir={self.folder / 't'}")
        self.processes.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )

    def is_up(self) -> bool:
        return self._get("/api/version") is not None

    def count_nodes(self) -> int:
        answer = self._get("/nodes?view=summary")
        nodes = answer["data"]["summary"] if answer else []
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def _get(self, path: str) -> dict | None:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.address + path, headers=headers)
        with suppress(OSError, ValueError), open_directly(request) as answer:
            return json.loads(answer.read())
        return None

    def kill(self) -> None:
        """Takes everything away at once, as a spot machine goes."""
        for process in self.processes:
            for child in (*_descendants(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.wait()
        self.processes.clear()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


@contextmanager
def start_head(
    workers: int = 0, cpus: int = 2, head_cpus: int = 4, gpus: int = 0, token: str | None = None
) -> Iterator[Head]:
    """A head with its raylets. `head_cpus=0`: the head drives, and all work is elsewhere."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:  # names of sockets are short
        head = Head(Path(folder), free_port(), free_port(), ray_environment(token), token)
        try:
            head.start(workers, cpus, head_cpus, gpus)
            yield head
        finally:
            head.kill()


def ray_environment(token: str | None = None) -> dict[str, str]:
    """The environment of a machine of the cluster: the tests' Python, and nothing of Ray's but the token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept["PATH"] = f"{_BIN}{os.pathsep}{kept['PATH']}"
    kept["RAY_AUTH_MODE"] = "token" if token else "disabled"
    kept["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    return kept | ({"RAY_AUTH_TOKEN": token} if token else {})


def epic_ray(
    *words: str, folder: Path, environment: dict[str, str] | None = None, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """The command line as a person calls it in a folder."""
    return subprocess.run(
        command(*words), cwd=folder, env=environment or client_environment(), capture_output=True, text=True,
        timeout=seconds, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "epic_ray", *words]


def client_environment(token: str | None = None) -> dict[str, str]:
    """The environment of the laptop."""
    return ray_environment(token) | {"PYTHONPATH": str(REPOSITORY)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(is_so, what: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"within {_START_SECONDS} s it is not so that {what}")
        time.sleep(0.5)
