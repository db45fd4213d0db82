"""From the files of a unit to the model's input, whatever the files do: some kill a decoder, some never let it end.

`decode_plainly` works in this process, which an image may take down with it. A unit that did not come through is given
to `decode_carefully`: a child process decodes, so that an image that ends or stalls it costs its own row alone.

The child is a fresh interpreter, no fork: a Ray worker is full of threads and locks. It imports numpy, Pillow and the
preprocessing, hears requests (a length, then the file) on its stdin and answers (`_HEAD`, then pixels or a reason) on
its stdout; whatever libraries print there goes to its stderr.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image

from epic_ray.errors import RunFailed
from epic_ray.method.preprocessing import ImageError, Preprocessing

GIB = 1024**3

SECONDS_PER_IMAGE = 60.0
"""Time for one image. The largest that is decoded, of `MAX_PIXELS`, takes 2 s (JPEG) to 30 s (JPEG 2000)."""

CHILD_MEMORY_BYTES = 4 * GIB
"""Memory for one image. The largest takes 1.4 GiB (JPEG) to 3.6 GiB (JPEG 2000)."""

_START_SECONDS = 60.0
_GRACE_SECONDS = 10.0  # by which the child outlives its time, where nobody is left to end it
_NOISE_BYTES = 8192
_STDERR = 2
_LENGTH = struct.Struct("<Q")
_HEAD = struct.Struct("<BiiI")  # status, width, height, bytes that follow
_READY, _DECODED, _REFUSED, _STARVED = range(4)
_LONGEST_REASON_BYTES = 65_536
_BOOTSTRAP = (
    "import json, sys; arguments = json.loads(sys.argv[1]); sys.path[:] = arguments['path']; "
    "from epic_ray.stages.decoding import serve; serve(arguments)"
)


class CarefulNeeded(Exception):
    """This process has not the memory for an image of the unit; `decode_carefully` has a limit for each."""


@dataclass
class Decoded:
    """A unit of n images. A row without a reason holds an image; the others are zeros.

    pixels: (n, h, w, 3) uint8, the model's input before normalisation. sizes_px: (n, 2) int32, (width, height) of the
    upright originals. reasons: one line each, or None.
    """

    pixels: np.ndarray
    sizes_px: np.ndarray
    reasons: list[str | None]

    @classmethod
    def blank(cls, count: int, preprocessing: Preprocessing) -> "Decoded":
        pixels = np.zeros((count, *preprocessing.crop, 3), np.uint8)
        return cls(pixels, np.zeros((count, 2), np.int32), [None] * count)


def decode_plainly(
    images: Iterator[bytes | OSError],
    count: int,
    preprocessing: Preprocessing,
    seconds_per_image: float = SECONDS_PER_IMAGE,
) -> Decoded:
    """The `count` images, decoded in this process one by one; an OSError stands for a file that could not be read.

    An image that takes longer than `seconds_per_image` ends the process with exit code 1 and a traceback on stderr:
    nothing else ends a decoder that hangs in C. The watchdog is the process's only one, so one call at a time.

    Raises CarefulNeeded where the memory does not suffice, ValueError unless there are `count` images.
    """
    decoded = Decoded.blank(count, preprocessing)
    for row, image in zip(range(count), images, strict=True):
        if isinstance(image, OSError):
            decoded.reasons[row] = _one_line(image)
            continue
        starved = False
        faulthandler.dump_traceback_later(seconds_per_image, exit=True, file=_STDERR)
        try:
            decoded.pixels[row], decoded.sizes_px[row] = preprocessing.load(image)
        except ImageError as error:
            decoded.reasons[row] = _one_line(error)
        except MemoryError:
            starved = True
        finally:
            faulthandler.cancel_dump_traceback_later()
        if starved:  # raised out here, without the traceback that holds the image's memory
            raise CarefulNeeded(f"image {row} of {count} ({len(image)} bytes) needs more memory than there is")
    return decoded


def decode_carefully(
    images: Iterator[bytes | OSError],
    count: int,
    preprocessing: Preprocessing,
    seconds_per_image: float = SECONDS_PER_IMAGE,
    memory_bytes: int = CHILD_MEMORY_BYTES,
    preload: Sequence[str] = (),
) -> Decoded:
    """The same images, equal to the bit, decoded in a child process that an image may end.

    The image in hand gets the reason: the signal that the decoder died of, more than `seconds_per_image`, or more than
    `memory_bytes`. A new child goes on with the next image. `preload` names modules that the child imports first, as
    those of Pillow plugins.

    Memory is address space (RLIMIT_AS) over what the child has mapped before its first image: the file counts, as do
    Pillow's images and the decoder's buffers. Without /proc (macOS) it is not limited. A few decoders (JPEG 2000,
    WebP, progressive JPEG) may report a lack of it as damage. The child dies with the thread that called (Linux),
    elsewhere ten seconds after the time of its last request.

    Raises RunFailed, with what the child says, where it cannot start; ValueError unless there are `count` images.
    """
    arguments = {
        "path": sys.path,
        "parent": os.getpid(),
        "preload": list(preload),
        "preprocessing": preprocessing.to_dict(),
        "seconds_per_image": seconds_per_image,
        "memory_bytes": memory_bytes,
    }
    decoded = Decoded.blank(count, preprocessing)
    child: _Child | None = None
    try:
        for row, image in zip(range(count), images, strict=True):
            if isinstance(image, OSError):
                decoded.reasons[row] = _one_line(image)
                continue
            child = child or _Child(arguments)
            try:
                decoded.reasons[row] = child.decode(image, decoded.pixels[row], decoded.sizes_px[row])
            except _ChildLost as lost:
                decoded.reasons[row] = str(lost)
                child.close()
                child = None
    finally:
        if child:
            child.close()
    return decoded


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- the parent's side


class _ChildLost(Exception):
    """The child is gone or no longer of use; the message is the reason for the image in hand."""


class _Child:
    """A decoding process. Raises RunFailed where it does not start; `close` it, whatever happens."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._seconds, self._memory_bytes = arguments["seconds_per_image"], arguments["memory_bytes"]
        self._selector = selectors.DefaultSelector()
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 a pipe that nobody reads would stop the child
        command = [sys.executable, "-P", "-X", "faulthandler", "-c", _BOOTSTRAP, json.dumps(arguments)]
        # threads that stand by for matrices take address space, and time to start
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self._noise, bufsize=0, env=environment
            )
        except OSError as error:
            raise RunFailed(f"{sys.executable}: cannot be started to decode images ({error})") from error
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        try:
            self._await_start()
        except BaseException:
            self.close()
            raise

    def decode(self, data: bytes, pixels: np.ndarray, size_px: np.ndarray) -> str | None:
        """Fills `pixels` (h, w, 3) and `size_px`, or gives the reason. Raises _ChildLost where the image ends it."""
        deadline = time.monotonic() + self._seconds
        try:
            head = self._exchange(deadline, _HEAD.size, [_LENGTH.pack(len(data)), data])
            status, width, height, length = _HEAD.unpack(head)
            if status == _DECODED and length == pixels.nbytes:
                body = self._exchange(deadline, length)
                pixels[:] = np.frombuffer(body, np.uint8).reshape(pixels.shape)
                size_px[:] = width, height
                return None
            if status == _REFUSED and length <= _LONGEST_REASON_BYTES:
                return self._exchange(deadline, length).decode(errors="replace")
        except TimeoutError:
            raise _ChildLost(f"took longer than {self._seconds:g} s to decode") from None
        except EOFError:
            raise _ChildLost(self._ending()) from None
        if status == _STARVED:
            raise _ChildLost(f"needs more than {self._memory_bytes / GIB:g} GiB to decode")
        raise _ChildLost("the decoder's answer makes no sense")

    def close(self) -> None:
        """Ends the process, reaps it, and passes on what it had to say."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._selector):
            if stream:
                stream.close()
        with self._noise:
            sys.stderr.write(self._said())

    def _await_start(self) -> None:
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        self._selector.register(self._answers, selectors.EVENT_READ)
        try:
            head = self._exchange(time.monotonic() + _START_SECONDS, _HEAD.size)
        except TimeoutError:
            what = f"is not ready after {_START_SECONDS:g} s"
        except EOFError:
            what = f"does not start: {self._ending()}"
        else:
            if _HEAD.unpack(head)[0] == _READY:
                return
            what = "does not start: it writes what it should not"
        raise RunFailed(
            f"the process that decodes images ({sys.executable}) {what}\n{self._said()}"
            "check that epic_ray.stages.decoding and the preloaded modules can be imported on that machine"
        )

    def _exchange(self, deadline: float, size: int, outgoing: Sequence[bytes] = ()) -> bytearray:
        """Sends, and receives `size` bytes meanwhile. Raises TimeoutError, and EOFError where the child has ended."""
        answer, pending = bytearray(), [memoryview(part) for part in outgoing if part]
        if pending:
            self._selector.register(self._requests, selectors.EVENT_WRITE)
        try:
            while len(answer) < size:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                for key, _ in self._selector.select(left):
                    if key.fd == self._answers:
                        part = os.read(self._answers, size - len(answer))
                        if not part:
                            raise EOFError
                        answer += part
                    elif not self._send(pending):
                        self._selector.unregister(self._requests)
        finally:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._requests)
        return answer

    def _send(self, pending: list[memoryview]) -> bool:
        """Writes what the pipe takes of `pending`; gives whether there is more."""
        try:
            sent = os.write(self._requests, pending[0])
        except BrokenPipeError:  # the end of its answers tells how it ended
            return False
        pending[0] = pending[0][sent:]
        if not pending[0]:
            pending.pop(0)
        return bool(pending)

    def _ending(self) -> str:
        try:
            code = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "the decoder closed its pipe"
        if code >= 0:
            return f"the decoder ended with exit code {code}"
        known = {number.value: f" ({number.name})" for number in signal.Signals}
        return f"the decoder died of signal {-code}{known.get(-code, '')}"

    def _said(self) -> str:
        self._noise.seek(max(0, self._noise.seek(0, os.SEEK_END) - _NOISE_BYTES))
        return self._noise.read().decode(errors="replace")


# --- the child's side


def serve(arguments: dict[str, Any]) -> None:
    """Decodes what stdin brings until it ends: the whole life of a child of `decode_carefully`."""
    _die_with(arguments["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to judge
    requests, answers = _take_pipes()
    Image.init()
    for name in arguments["preload"]:
        importlib.import_module(name)
    if avif := sys.modules.get("PIL.AvifImagePlugin"):
        # a thread for each core of a large machine would take the memory of the image
        avif.DEFAULT_MAX_THREADS = 1  # type: ignore[attr-defined]
    preprocessing = Preprocessing.from_dict(arguments["preprocessing"])
    _limit(arguments["memory_bytes"])
    _answer(answers, _READY)
    while length := requests.read(_LENGTH.size):
        faulthandler.dump_traceback_later(arguments["seconds_per_image"] + _GRACE_SECONDS, exit=True, file=_STDERR)
        try:
            pixels, size_px = preprocessing.load(requests.read(*_LENGTH.unpack(length)))
        except ImageError as error:
            _answer(answers, _REFUSED, body=_one_line(error).encode(errors="replace")[:_LONGEST_REASON_BYTES])
        except MemoryError:
            _answer(answers, _STARVED)
            return  # what is left of the memory may lie in pieces
        else:
            _answer(answers, _DECODED, size_px, pixels.tobytes())
        finally:
            faulthandler.cancel_dump_traceback_later()


def _answer(answers: IO[bytes], status: int, size_px: tuple[int, int] = (0, 0), body: bytes = b"") -> None:
    answers.write(_HEAD.pack(status, *size_px, len(body)) + body)
    answers.flush()


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The two pipes under numbers that no library writes to; stdin is empty then, and stdout leads to stderr."""
    requests, answers = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(_STDERR, 1)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before it could be tied to
        sys.exit("the parent is gone")


def _limit(memory_bytes: int) -> None:
    """No core files, and `memory_bytes` of address space over what is mapped by now."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = mapped + memory_bytes
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
