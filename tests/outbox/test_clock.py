"""The clock of an outbox: it never goes backwards, and jumps of the time of day do not move it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio.outbox._clock import Clock, Readings

NOW = 1_800_000_000.0
times = st.floats(0, 1e9)
walls = st.floats(0, 4e9)


def test_time_while_file_is_closed_counts() -> None:
    clock = Clock(100, NOW, Readings(NOW + 60, 5))
    assert clock.time(5) == 160
    assert clock.time(7) == 162


def test_time_of_day_earlier_than_file_counts_as_no_time() -> None:
    assert Clock(100, NOW, Readings(NOW - 60, 5)).time(5) == 100


def test_time_of_day_that_was_not_set_counts_as_no_time() -> None:
    # A machine without a battery starts in 1970.
    assert Clock(100, 30, Readings(NOW, 5)).time(5) == 100
    assert Clock(100, NOW, Readings(30, 5)).time(5) == 100


@given(times, walls, walls, times, st.lists(st.floats(0, 1e6)))
def test_clock_never_goes_backwards(
    time: float, wall: float, now: float, steady: float, steps: list[float]
) -> None:
    clock = Clock(time, wall, Readings(now, steady))
    last = time - 1e-3
    for step in steps:
        assert clock.time(steady) >= last
        last, steady = clock.time(steady), steady + step
