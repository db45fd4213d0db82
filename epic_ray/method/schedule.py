"""How many prototypes per channel each round of a fit works with."""

import math
from collections.abc import Callable
from typing import Literal

Decay = Literal["linear", "exponential", "logarithmic"]


def prototypes_per_round(start: int, end: int, rounds: int, decay: Decay, exact_end: bool) -> tuple[int, ...]:
    """Prototypes per channel of each round, falling from `start` towards `end`, rounded down.

    n_t = start + (end - start) f(x), with f(0) = 0, f(1) = 1 and t = 0 .. rounds - 1:
      linear        f = x
      exponential   n falls by the same factor every round: n_t = start (end / start)^x
      logarithmic   f = 1 - log2(2 - x): slow at first, faster towards the end

    With `exact_end` false, x = t / rounds, so the last round stops short of `end`, as EPIC's published code does:
    100 -> 5 in 10 rounds ends at 14 (linear), 6 (exponential), 18 (logarithmic). Its linear numbers are known in
    full; of the two other shapes only these ends are, and the formulas are reconstructed from them (ours).
    With `exact_end` true, x = t / (rounds - 1), and the last round works with `end`. A single round works with
    `start`, or with `end` where `exact_end` is true.

    Raises:
        ValueError: not start >= end >= 1, no round, or an unknown decay.
    """
    if not start >= end >= 1:
        raise ValueError(f"prototypes per channel fall from start to end >= 1, not from {start} to {end}")
    if rounds < 1:
        raise ValueError(f"a fit has at least one round, not {rounds}")
    if decay not in _DECAYS:
        raise ValueError(f"decay is one of {', '.join(_DECAYS)}, not {decay!r}")
    if exact_end:
        progress = [t / (rounds - 1) for t in range(rounds)] if rounds > 1 else [1.0]
    else:
        progress = [t / rounds for t in range(rounds)]
    # The small term keeps whole numbers whole through floating point.
    return tuple(math.floor(_DECAYS[decay](start, end, x) + 1e-9) for x in progress)


def _linear(start: int, end: int, x: float) -> float:
    return start + (end - start) * x


def _exponential(start: int, end: int, x: float) -> float:
    return start * (end / start) ** x


def _logarithmic(start: int, end: int, x: float) -> float:
    return start + (end - start) * (1 - math.log2(2 - x))


_DECAYS: dict[str, Callable[[int, int, float], float]] = {
    "linear": _linear,
    "exponential": _exponential,
    "logarithmic": _logarithmic,
}
