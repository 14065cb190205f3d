"""Keepalive: sending PINGREQs, and ending a connection on which the broker is silent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Final

from emitter_anyio._backend import LastHeard
from emitter_anyio._protocol.session import Session

from .timer import Due, Timer
from .writer import Writer

_LATE_SECONDS: Final = 0.05
"""A timeout that falls due later than this shows that the process stood still."""


class Keepalive(Due):
    """
    Sends a PINGREQ after ``seconds`` seconds without a byte in one of the two directions.

    :param timer: the timer of the connection
    :param writer: sends the PINGREQ
    :param session: makes the PINGREQ
    :param last_heard: when bytes last arrived
    :param held_up: returns whether the reader waits for a consumer, so that silence means nothing
    :param seconds: the keepalive period
    """

    judges: ClassVar = False

    def __init__(
        self,
        timer: Timer,
        writer: Writer,
        session: Session,
        last_heard: LastHeard,
        held_up: Callable[[], bool],
        seconds: float,
    ) -> None:
        self._timer = timer
        self._writer = writer
        self._session = session
        self._last_heard = last_heard
        self._held_up = held_up
        self._seconds = seconds
        self._excused = -math.inf
        """When bytes had last arrived, as a ping timeout last fell due late."""
        self.fall_due(-math.inf)

    @property
    def done(self) -> bool:
        return False

    def fall_due(self, now: float) -> None:
        when = min(self._last_heard.time, self._writer.last_sent) + self._seconds
        # The last PINGREQ left a little after it was due.
        if when <= now + _LATE_SECONDS:
            timeout = PingTimeout(
                self._timer, self._writer, self._last_heard, self._seconds, now, self._missed
            )
            self._timer.add(now + self._seconds * 0.5, timeout)
            self._session.ping(awaited=False)
            self._writer.call_when_left(timeout.begin)
            when = now + self._seconds
        self._timer.add(when, self)

    def _missed(self, late: bool, heard: float, words: str) -> None:
        if late and self._excused < heard:
            # The network might have stood still as well: the next PINGREQ decides.
            self._excused = heard
        elif not self._held_up():
            raise TimeoutError(words)


class PingTimeout(Due):
    """
    Ends a connection on which nothing is received after a PINGREQ.

    It falls due half a keepalive period after the PINGREQ has left, or one and a half periods after
    bytes last arrived, whichever is later. A PINGREQ that cannot leave has one and a half periods
    from when it was queued. If it falls due late because the process stood still, it ends nothing.

    :param missed: gets whether the timeout falls due late, when bytes last arrived, and the error
    """

    judges: ClassVar = True

    def __init__(
        self,
        timer: Timer,
        writer: Writer,
        last_heard: LastHeard,
        seconds: float,
        now: float,
        missed: Callable[[bool, float, str], None],
    ) -> None:
        self._timer = timer
        self._writer = writer
        self._last_heard = last_heard
        self._seconds = seconds
        self._missed = missed
        self._heard = last_heard.time
        self._has_left = False
        self._when = now + seconds * 1.5

    def begin(self) -> None:
        """Start the timeout: the PINGREQ has left."""
        self._has_left = True
        latest = max(self._writer.last_sent, self._heard + self._seconds)
        self._when = latest + self._seconds * 0.5

    @property
    def done(self) -> bool:
        return self._last_heard.time > self._heard

    def fall_due(self, now: float) -> None:
        if now < self._when:
            self._timer.add(self._when, self)
            return
        self._missed(
            now > self._when + _LATE_SECONDS,
            self._heard,
            f"the broker was silent for {round(now - self._heard, 2):g} s and did not "
            f"{'answer' if self._has_left else 'take'} a PINGREQ",
        )
