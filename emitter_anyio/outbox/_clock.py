"""The clock by which messages in an outbox age."""

from __future__ import annotations

from typing import Final, NamedTuple

_FIRST_PLAUSIBLE: Final = 1514764800.0
"""The earliest plausible Unix time (2018). Emitter rejects earlier times too."""


class Readings(NamedTuple):
    """
    The times of the system clocks.

    :ivar wall: the time of day in Unix seconds, which can be set and might be wrong
    :ivar steady: the seconds since an arbitrary moment, which never jump
    """

    wall: float
    steady: float


class Clock:
    """
    A clock that counts the seconds of the outbox, and never goes backwards.

    While the file is open, it follows the steady clock, so setting the time of day does not age
    messages. The time for which the file was closed is the difference between the times of day if
    both are plausible, and otherwise 0.

    :param time: the time of the outbox when the file was last written
    :param wall: the time of day when the file was last written
    :param now: the present readings
    """

    def __init__(self, time: float, wall: float, now: Readings) -> None:
        plausible = wall >= _FIRST_PLAUSIBLE and now.wall >= _FIRST_PLAUSIBLE
        closed_for = max(0.0, now.wall - wall) if plausible else 0.0
        self._offset = time + closed_for - now.steady

    def time(self, steady: float) -> float:
        """Return the time of the outbox."""
        return self._offset + steady
