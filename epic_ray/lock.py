"""One start at a time writes to a run folder, wherever it lies; a start that has died does not hold it for ever.

Every start publishes a claim, waits until each earlier claim must be to be seen, and looks: the earliest one that lives
owns the run. Times are those the storage gives its files, so the clocks of hosts do not matter. A claim lives while its
process does, where that can be seen, and while its heartbeat, a file beside it, is young.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import fs

from epic_ray.errors import ConfigError, InputError, ResultError, RunFailed
from epic_ray.run_dir import LOCKS, RunDir

_BEAT_SECONDS, _SILENT_SECONDS, _MISSED_BEATS = 10.0, 60.0, 2
# A claim that was published within `_PROMPT` of its time is seen by all who look `_SETTLE` after theirs; the times of
# stores are whole seconds. Slower ones own only where there is no other.
_PROMPT_SECONDS, _SETTLE_SECONDS = 0.03, 0.05
_PROMPT_SECONDS_STORE, _SETTLE_SECONDS_STORE = 0.4, 1.5
_TRIES = 5
_WAITING, _OWNER = b"waiting", b"owner"
_CLAIM, _BEAT = ".json", ".beat"


@contextmanager
def hold(run_dir: RunDir, what: str) -> Iterator["Lock"]:
    """Holds a run for one start of the command `what`.

    Raises ConfigError where another start holds it, InputError where the run cannot be written, RunFailed where its
    storage is full or away.
    """
    lock = Lock(run_dir, what)
    try:
        lock.take()
        yield lock
    finally:
        lock.release()


def living_claims(run_dir: RunDir) -> list[str]:
    """Who is writing to the run, in words: as far as this host can tell, by its own clock. Writes nothing."""
    claims = _read_claims(Lock(run_dir, "look")._look())
    return [str(claim) for claim in claims if not claim.cause_of_death(time.time_ns())]


class Lock:
    """A claim to a run. `freed` says, in sentences, which claims of the dead it has removed."""

    def __init__(self, run_dir: RunDir, what: str) -> None:
        self.freed: list[str] = []
        self._run_dir, self._what, self._process = run_dir, what, os.getpid()
        self._token = ""
        self._lost = False
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="epic-ray-lock", daemon=True)

    def take(self) -> None:
        """Owns the run from here on. Raises ConfigError where another start does."""
        for _ in range(_TRIES):
            prompt = self._claim()
            claims = self._living()
            owner = min(claims, key=lambda claim: (not claim.owns, claim.made_ns, claim.token))
            if owner.token != self._token:
                if self._waits_for_end(owner):
                    self._withdraw()
                    continue
                advice = "wait for it, stop it, or choose another name"
                raise ConfigError(f"{self._run_dir}: {owner} is writing to it; {advice}")
            if prompt or len(claims) == 1:
                self._publish(_BEAT, _OWNER)
                self._heart.start()
                return
            self._withdraw()
        raise ConfigError(f"{self._run_dir}: several starts claim it at once; start again, one after the other")

    def _waits_for_end(self, owner: "_Claim") -> bool:
        """Whether an owner that has missed two heartbeats is dead: waits until it is, or is heard of again."""
        own = self._look().get(f"{self._token}{_BEAT}")
        silent = _seconds(owner.heard_ns, own.made_ns) if own else 0.0
        if silent < _MISSED_BEATS * _BEAT_SECONDS:
            return False
        end = time.monotonic() + _SILENT_SECONDS - silent + 1.0
        while time.monotonic() < end:
            time.sleep(1.0)
            beat = self._times().get(f"{owner.token}{_BEAT}")
            if beat is None:
                return True
            if beat > owner.heard_ns:
                return False
        return True

    def demand(self) -> None:
        """Raises RunFailed if another start has taken the run over, because this one was silent for too long."""
        if not self._lost:
            with suppress(ResultError):
                self._run_dir.read_bytes(self._file(_CLAIM))
                return
        raise RunFailed(
            f"{self._run_dir}: another start has taken it over, because nothing was heard of this one for "
            f"{_SILENT_SECONDS:.0f} s (suspended, or cut off from its storage?); start again when the other has ended"
        )

    def release(self) -> None:
        if os.getpid() != self._process:  # a fork has a copy of the lock, but not the run
            return
        self._released.set()
        if self._heart.is_alive():
            self._heart.join(timeout=_SETTLE_SECONDS_STORE)
        self._withdraw()
        if self._run_dir.is_local:
            with suppress(OSError):  # a start that was refused leaves no empty folder behind
                os.rmdir(self._run_dir.path(LOCKS))
                os.rmdir(self._run_dir.path(""))

    # --- this start's own files

    def _file(self, ending: str) -> str:
        return f"{LOCKS}/{self._token}{ending}"

    def _publish(self, ending: str, content: bytes) -> None:
        self._run_dir.publish(self._file(ending), lambda stream: stream.write(content) and None, durable=False)

    def _claim(self) -> bool:
        """Publishes a new claim and waits until those before it are seen; whether it was prompt."""
        local = self._run_dir.is_local
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = _place() | {"pid": os.getpid(), "started": _started(os.getpid()), "what": self._what, "since": since}
        self._token = uuid.uuid4().hex
        start = time.monotonic()
        self._publish(_CLAIM, json.dumps(facts, indent=2).encode())
        prompt = time.monotonic() - start < (_PROMPT_SECONDS if local else _PROMPT_SECONDS_STORE)
        time.sleep(_SETTLE_SECONDS if local else _SETTLE_SECONDS_STORE)
        self._publish(_BEAT, _WAITING)  # tells the time, and makes a network disk forget what it knew of the folder
        return prompt

    def _withdraw(self) -> None:
        """Deletes the own files, without patience: what stays is dead with its process, or soon for its silence."""
        with suppress(OSError):
            for ending in (_CLAIM, _BEAT):
                with suppress(FileNotFoundError):
                    self._run_dir.filesystem.delete_file(self._run_dir.path(self._file(ending)))

    def _beat_on(self) -> None:
        filesystem, path = self._run_dir.filesystem, self._run_dir.path
        while not self._released.wait(_BEAT_SECONDS):
            with suppress(OSError):  # a store that is away, a full disk: the next beat may succeed
                self._lost = filesystem.get_file_info(path(self._file(_CLAIM))).type != fs.FileType.File
                if self._lost:  # a beat may have come between the end of the claim and that of its heartbeat
                    with suppress(FileNotFoundError):
                        filesystem.delete_file(path(self._file(_BEAT)))
                    return
                with filesystem.open_output_stream(path(self._file(_BEAT))) as stream:
                    stream.write(_OWNER)

    # --- what others claim

    def _living(self) -> list["_Claim"]:
        """All claims that live, the own among them; what the dead left is removed."""
        found = self._look()
        if not {f"{self._token}{_CLAIM}", f"{self._token}{_BEAT}"} <= set(found):
            raise RunFailed(f"{self._run_dir}: its claim in {LOCKS}/ was removed while it was made; start again")
        now = found[f"{self._token}{_BEAT}"].made_ns
        claims = _read_claims(found)
        dead = {claim.token: cause for claim in claims if (cause := claim.cause_of_death(now))}
        living = [claim for claim in claims if claim.token not in dead]
        kept = {claim.token for claim in living}
        left = [
            name
            for name, file in found.items()
            if (token := os.path.splitext(name)[0]) in dead
            or (token not in kept and _seconds(file.made_ns, now) > _SILENT_SECONDS)
        ]
        self._run_dir.delete(f"{LOCKS}/{name}" for name in sorted(left, key=lambda name: not name.endswith(_CLAIM)))
        for claim in claims:
            if claim.token in dead:
                self.freed.append(f"{self._run_dir}: freed of {claim}: {dead[claim.token]}")
        return living

    def _look(self) -> dict[str, "_File"]:
        """The files in `locks/` by their names, temporary ones too."""
        contents = {name: self._content(name) for name in self._times()}  # a network disk tells times anew once opened
        return {name: _File(contents[name], made) for name, made in self._times().items() if name in contents}

    def _times(self) -> dict[str, int]:
        filesystem = self._run_dir.filesystem
        selector = fs.FileSelector(self._run_dir.path(LOCKS), allow_not_found=True)
        infos = self._run_dir.ask(LOCKS, lambda: filesystem.get_file_info(selector))
        return {info.base_name: info.mtime_ns for info in infos if info.type == fs.FileType.File}

    def _content(self, name: str) -> bytes:
        file = f"{LOCKS}/{name}"

        def read() -> bytes:
            # not mapped to memory: a heartbeat may be shorter the next moment
            with self._run_dir.filesystem.open_input_file(self._run_dir.path(file)) as stream:
                return bytes(stream.read())

        try:
            return self._run_dir.ask(file, read)
        except (FileNotFoundError, InputError):  # removed meanwhile, or not ours to read: its times count all the same
            return b""


class _File(NamedTuple):
    content: bytes
    made_ns: int


@dataclass(frozen=True)
class _Claim:
    """A claim as it is found: the times of its file and of its last sign of life, and what it says of its process."""

    token: str
    made_ns: int
    heard_ns: int
    owns: bool
    facts: dict[str, Any]

    def __str__(self) -> str:
        if not self.facts:
            return "another process (its claim cannot be read)"
        what, pid, host, since = (self.facts.get(name) for name in ("what", "pid", "host", "since"))
        return f"`{what}` (process {pid} on host {host}, since {since})"

    def cause_of_death(self, now_ns: int) -> str | None:
        if _has_ended(self.facts):
            return "its process has ended"
        silent = _seconds(self.heard_ns, now_ns)
        return f"nothing was heard of it for {silent:.0f} s" if silent > _SILENT_SECONDS else None


def _read_claims(found: dict[str, _File]) -> list[_Claim]:
    claims = []
    for name, file in found.items():
        token, ending = os.path.splitext(name)
        if ending == _CLAIM and not name.startswith("."):
            beat = found.get(f"{token}{_BEAT}", _File(b"", file.made_ns))
            heard = max(file.made_ns, beat.made_ns)
            claims.append(_Claim(token, file.made_ns, heard, beat.content == _OWNER, _facts(file.content)))
    return claims


def _seconds(earlier_ns: int, later_ns: int) -> float:
    return (later_ns - earlier_ns) / 1e9


def _facts(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


# --- processes, where /proc tells of them


def _place() -> dict[str, str | None]:
    """Where process numbers have their meaning: None for what is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return {"host": socket.gethostname(), "boot": None, "namespace": None}
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; -1 for one that has ended, None where it is not told."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in brackets may hold anything
    return -1 if fields[0] in "ZX" else int(fields[19])


def _has_ended(facts: dict[str, Any]) -> bool:
    """Whether the process of a claim is known to be gone; where this host cannot know it, it is not."""
    place, pid = _place(), facts.get("pid")
    if None in place.values() or any(facts.get(name) != value for name, value in place.items()):
        return False
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's: it is there; no number of a process
        pass
    started = _started(pid)
    return started is not None and started != facts.get("started")
