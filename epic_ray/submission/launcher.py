"""Clusters of Ray's own launcher: found, reached through a tunnel, brought up and taken down.

Ray's launcher prints what it does, asks and may end its process; so all of it but one question runs in processes of its
own, whose output goes to stderr.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

from epic_ray.errors import ClusterError, ConfigError
from epic_ray.submission.target import Target

_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_TUNNEL_SECONDS = 120.0
_GRACE_SECONDS, _REOPEN_SECONDS = 5.0, 2.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ERROR_LINE = re.compile(r"\b(?:PANIC|ERR|ERROR) \S+ -- (\w.*)")
_PROVIDER_PACKAGES = {"aws": "boto3", "gcp": "google-api-python-client", "azure": "azure-identity"}


def head_address(target: Target) -> str:
    """The address of the head's machine, without a port. Raises ClusterError where the cluster is not up."""
    from click import ClickException
    from ray.autoscaler import sdk

    try:
        with redirect_stdout(sys.stderr):
            return sdk.get_head_node_ip(_file(target))
    except ImportError as error:
        raise ClusterError(f"{target.origin}: {_missing(target, error)}") from None
    except RuntimeError as error:
        if "not found" not in str(error):
            raise ClusterError(f"{target.origin}: cannot tell the head's address ({_one_line(error)})") from None
        raise ClusterError(
            f"{target.origin}: the cluster `{target.name}` is not up; bring it up with --up, or by `ray up "
            f"{target.path}`"
        ) from None
    except (Exception, ClickException, SystemExit) as error:
        raise ClusterError(f"{target.origin}: cannot tell the head's address ({_one_line(error)})") from None


@contextmanager
def reach(target: Target, seconds: float = _TUNNEL_SECONDS) -> Iterator[str]:
    """The dashboard's address for as long as it is needed: the file's own, the head's, or through a tunnel."""
    if target.address is not None:
        yield target.address
    elif not target.tunnel:
        yield f"http://{head_address(target)}:{target.dashboard_port}"
    else:
        with tunnel(target, seconds) as address:
            yield address


@contextmanager
def tunnel(target: Target, seconds: float = _TUNNEL_SECONDS) -> Iterator[str]:
    """A local address that leads to the head's dashboard through ssh; the tunnel ends with the block.

    Raises ClusterError where the cluster is not up, or nothing answers within `seconds`.
    """
    head_address(target)
    port = _free_port()
    command = [*_RAY, "dashboard", _file(target), "-p", str(port), "--remote-port", str(target.dashboard_port)]
    with tempfile.TemporaryFile() as output, _Tunnel(command, output) as made:
        _await(made.process, port, seconds, output, target)
        made.keep_open()
        yield f"http://127.0.0.1:{port}"


class _Tunnel:
    """The process of a tunnel. Once it is kept open, one that breaks off is begun anew on the same port: ssh gives up
    after some seconds without a network."""

    def __init__(self, command: list[str], output: IO[bytes]) -> None:
        self._command, self._output = command, output
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="epic-ray-tunnel", daemon=True)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # a session of its own: Ctrl-C in the terminal is ours to pass on, and ssh ends with it
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def keep_open(self) -> None:
        self._watcher.start()

    def _watch(self) -> None:
        while not self._ended.wait(_REOPEN_SECONDS):
            if self.process.poll() is not None:
                _end(self.process)  # what it has left in its session
                self.process = self._start()

    def __enter__(self) -> "_Tunnel":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()
        _end(self.process)


def demand_launcher(target: Target) -> None:
    """Raises ConfigError for what is no launcher file: there is nothing that could be started or ended."""
    if target.kind != "launcher":
        raise ConfigError(
            f"{target.origin}: is no launcher file (cluster_name, provider), so there is nothing to start or end; "
            "a KubeRay cluster is created and deleted by kubectl"
        )


def up(target: Target) -> None:
    """Starts the cluster, or updates it without restarting Ray on it. Raises ClusterError."""
    _launch(target, f"sdk.create_or_update_cluster({_file(target)!r}, no_restart=True)", "brought up")


def down(target: Target) -> None:
    """Ends every machine of the cluster. Raises ClusterError."""
    _launch(target, f"sdk.teardown_cluster({_file(target)!r})", "taken down")


def _file(target: Target) -> str:
    assert target.path is not None, "a launcher is named by a file"
    return str(target.path.absolute())


def _launch(target: Target, call: str, done: str) -> None:
    """One call of Ray's launcher in a process of its own; its output goes to stderr line by line."""
    command = [sys.executable, "-u", "-c", f"from ray.autoscaler import sdk; {call}"]
    last: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                sys.stderr.write(line)
                last.append(line)
            status = process.wait()
        except BaseException:
            _end(process, group=False)
            raise
    if status:
        raise ClusterError(f"{target.origin}: the cluster `{target.name}` was not {done}: {_cause(target, last)}")


def _cause(target: Target, lines: Iterable[str]) -> str:
    """What of a launcher's output says why, in one line."""
    told = [line for line in (_COLOURS.sub("", line).strip() for line in lines) if line]
    for line in reversed(told):
        if line.startswith("ModuleNotFoundError"):
            return _missing(target, line)
    # of Ray's log lines those that are errors and hold words: not its rules of `!!!`, nor its records in braces
    errors = [found[1] for line in told if (found := _ERROR_LINE.search(line))]
    if errors:
        return "; ".join(dict.fromkeys(errors[-3:]))
    return told[-1] if told else "Ray's launcher said nothing"


def _missing(target: Target, error: object) -> str:
    provider = str((target.document.get("provider") or {}).get("type"))
    package = _PROVIDER_PACKAGES.get(provider)
    hint = f"; pip install {package}" if package else ""
    return f"Ray's launcher lacks a package for provider {provider} ({_one_line(error)}){hint}"


def _one_line(error: object) -> str:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(process: subprocess.Popen[bytes], port: int, seconds: float, output: IO[bytes], target: Target) -> None:
    """Waits until something answers HTTP at the tunnel's end."""
    deadline = time.monotonic() + seconds
    while not _answers(port):
        if process.poll() is not None:
            raise ClusterError(f"{target.origin}: the tunnel to the head broke off\n{_tail(output)}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{target.origin}: nothing answered through the tunnel within {seconds:.0f} s; does Ray's dashboard "
                f"listen on port {target.dashboard_port} of the head (metadata.epic_ray: dashboard_port)?\n"
                f"{_tail(output)}"
            )
        time.sleep(0.1)


def _answers(port: int) -> bool:
    """Whether an HTTP server is behind the port; ssh takes connections before there is one."""
    opener = build_opener(ProxyHandler({}))  # a proxy of the environment has no business on loopback
    try:
        opener.open(f"http://127.0.0.1:{port}/api/version", timeout=5).close()
    except HTTPError:
        return True  # 401 and 404 are answers
    except (URLError, OSError, ValueError):
        return False
    except Exception:  # http.client's own, of a connection cut off mid-answer
        return False
    return True


def _tail(output: IO[bytes], lines: int = 8) -> str:
    output.seek(0)
    told = [line.rstrip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in told[-lines:]) or "  (it said nothing)"


def _end(process: subprocess.Popen[Any], group: bool = True) -> None:
    """Ends a process that was started here, with its session if it leads one."""

    def send(number: int) -> None:
        with suppress(ProcessLookupError):
            if group:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)

    send(signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    else:
        if not group:
            return
    send(signal.SIGKILL)
    process.wait()
