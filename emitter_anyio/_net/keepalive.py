"""Keepalive: sending PINGREQs, and ending a connection on which the broker is silent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Final

from emitter_anyio._backend import LastHeard
from emitter_anyio._protocol.session import Session

from .timer import Timer, TimerEntry
from .writer import Writer

_LATE_SECONDS: Final = 0.05
"""A timeout that falls due later than this shows that the process stood still."""


class Keepalive(TimerEntry):
    """
    Sends a PINGREQ after ``seconds`` seconds without a byte in one of the two directions.

    :param timer: the timer of the connection
    :param writer: sends the PINGREQ
    :param session: makes the PINGREQ
    :param last_heard: when bytes last arrived
    :param reading_paused: returns whether the reader waits for a consumer
    :param seconds: the keepalive period
    """

    needs_reader: ClassVar = False

    def __init__(
        self,
        timer: Timer,
        writer: Writer,
        session: Session,
        last_heard: LastHeard,
        reading_paused: Callable[[], bool],
        seconds: float,
    ) -> None:
        self._timer = timer
        self._writer = writer
        self._session = session
        self._last_heard = last_heard
        self._reading_paused = reading_paused
        self._seconds = seconds
        self._excused_since = -math.inf
        """When bytes had last arrived, as a ping timeout last fell due late."""
        self.expire(-math.inf)

    @property
    def done(self) -> bool:
        return False

    def expire(self, now: float) -> None:
        when = min(self._last_heard.time, self._writer.last_sent) + self._seconds
        # The last PINGREQ left a little after it was due.
        if when <= now + _LATE_SECONDS:
            timeout = PingTimeout(
                self._timer, self._writer, self._last_heard, self._seconds, now, self._on_timeout
            )
            self._timer.add(now + self._seconds * 0.5, timeout)
            self._session.ping(awaited=False)
            self._writer.call_when_sent(timeout.begin)
            when = now + self._seconds
        self._timer.add(when, self)

    def _on_timeout(self, late: bool, heard: float, words: str) -> None:
        if late and self._excused_since < heard:
            # The network might have stood still as well: the next PINGREQ decides.
            self._excused_since = heard
        elif not self._reading_paused():
            raise TimeoutError(words)


class PingTimeout(TimerEntry):
    """
    Ends a connection on which nothing is received after a PINGREQ.

    It falls due half a keepalive period after the PINGREQ has left, or one and a half periods after
    bytes last arrived, whichever is later. A PINGREQ that cannot leave has one and a half periods
    from when it was queued. If it falls due late because the process stood still, it ends nothing.

    :param missed: gets whether the timeout falls due late, when bytes last arrived, and the error
    """

    needs_reader: ClassVar = True

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
        self._on_timeout = missed
        self._heard = last_heard.time
        self._ping_sent = False
        self._when = now + seconds * 1.5

    def begin(self) -> None:
        """Start the timeout: the PINGREQ has left."""
        self._ping_sent = True
        latest = max(self._writer.last_sent, self._heard + self._seconds)
        self._when = latest + self._seconds * 0.5

    @property
    def done(self) -> bool:
        return self._last_heard.time > self._heard

    def expire(self, now: float) -> None:
        if now < self._when:
            self._timer.add(self._when, self)
            return
        self._on_timeout(
            now > self._when + _LATE_SECONDS,
            self._heard,
            f"the broker was silent for {round(now - self._heard, 2):g} s and did not "
            f"{'answer' if self._ping_sent else 'take'} a PINGREQ",
        )
