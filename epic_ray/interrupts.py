"""Signals: Ctrl-C and SIGTERM end a command in good order, whatever becomes of the exception on its way.

A handler's exception may be lost: raised inside gc or `__del__` Python prints and drops it, and Ray, which is waiting
most of the time, lets through a KeyboardInterrupt alone, and that without its kind. So what came is remembered.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from epic_ray.errors import INTERRUPTED_EXIT_CODE, TERMINATED_EXIT_CODE


class Terminated(KeyboardInterrupt):
    """SIGTERM: a spot notice, a stopped job; exit code 143.

    A KeyboardInterrupt, since `ray.get` waits to its end on any other and then fails with a SystemError.
    """


_KINDS: dict[int, tuple[type[KeyboardInterrupt], int]] = {
    signal.SIGINT: (KeyboardInterrupt, INTERRUPTED_EXIT_CODE),
    signal.SIGTERM: (Terminated, TERMINATED_EXIT_CODE),
}
_caught: list[int] = []  # empty outside of `catch_signals`
_came: int | None = None


@contextmanager
def catch_signals() -> Iterator[None]:
    """Within it SIGINT raises KeyboardInterrupt and SIGTERM raises Terminated, both remembered (see `check`).

    A second signal ends the process at once. Signals that the caller of the process ignores stay ignored, and outside
    of the main thread nothing is changed.
    """
    global _came
    if _caught or threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in _KINDS}
    _came = None
    try:
        _caught.extend(number for number in _KINDS if old[number] is not signal.SIG_IGN)
        rearm()
        yield
    except KeyboardInterrupt as error:
        if _came is not None and type(error) is not _KINDS[_came][0]:
            raise _KINDS[_came][0] from None
        raise
    finally:
        _restore(old)
        _came = None


def _restore(old: dict[int, Any]) -> None:
    for number in _caught:
        signal.signal(number, old[number] or signal.SIG_DFL)
    _caught.clear()


def rearm() -> None:
    """Installs the handlers again: `ray.init` and the fit of Ray Train put their own in their place."""
    if threading.current_thread() is threading.main_thread():
        for number in _caught:
            signal.signal(number, _interrupt)


def check() -> None:
    """Raises again what came and was lost on its way."""
    if _came is not None:
        raise _KINDS[_came][0]


def ending(interrupt: KeyboardInterrupt) -> tuple[str, int]:
    """What an interrupt is for a person and for a script: a message and an exit code."""
    kept = "what is finished is kept, the same command goes on from there"
    if isinstance(interrupt, Terminated):
        return f"stopped by SIGTERM; {kept}", TERMINATED_EXIT_CODE
    return f"interrupted; {kept}", INTERRUPTED_EXIT_CODE


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _came
    kind, exit_code = _KINDS[number]
    if _came is not None:
        os._exit(exit_code)
    _came = number
    raise kind
