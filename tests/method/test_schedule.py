"""Prototypes per channel, round by round."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_ray.method.schedule import prototypes_per_round

decays = st.sampled_from(["linear", "exponential", "logarithmic"])


def test_the_published_linear_schedule():
    expected = (100, 90, 81, 71, 62, 52, 43, 33, 24, 14)
    assert prototypes_per_round(100, 5, 10, "linear", exact_end=False) == expected


@pytest.mark.parametrize(("decay", "last"), [("linear", 14), ("exponential", 6), ("logarithmic", 18)])
def test_the_published_schedules_stop_short_of_their_end(decay, last):
    assert prototypes_per_round(100, 5, 10, decay, exact_end=False)[-1] == last


@given(
    ends=st.tuples(st.integers(1, 500), st.integers(1, 500)).map(sorted),
    rounds=st.integers(1, 40),
    decay=decays,
    exact_end=st.booleans(),
)
def test_a_schedule_starts_at_start_never_rises_and_ends_where_it_says(ends, rounds, decay, exact_end):
    end, start = ends
    schedule = prototypes_per_round(start, end, rounds, decay, exact_end)
    assert len(schedule) == rounds
    assert list(schedule) == sorted(schedule, reverse=True)
    assert all(end <= n <= start for n in schedule)
    if rounds > 1 or not exact_end:
        assert schedule[0] == start
    if exact_end:
        assert schedule[-1] == end


def test_whole_steps_stay_whole():
    assert prototypes_per_round(100, 10, 10, "linear", exact_end=True) == tuple(range(100, 9, -10))
    # 78 - 77 * 9 / 11 is 15, and 14.999999999999993 in floating point
    assert prototypes_per_round(78, 1, 11, "linear", exact_end=False)[9] == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 100, 10, "linear"), "fall from start"),
        ((5, 0, 10, "linear"), "fall from start"),
        ((100, 5, 0, "linear"), "at least one round"),
        ((100, 5, 10, "cosine"), "decay"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    # the type of `decay` is checked before its value where type checks are on
    with pytest.raises((ValueError, TypeError), match=message):
        prototypes_per_round(*arguments, exact_end=False)
