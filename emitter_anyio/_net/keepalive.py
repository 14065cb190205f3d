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
"""The delay in seconds from which an expiring timeout shows that the process stood still."""


class Keepalive(TimerEntry):
    """
    The keepalive of a connection.

    It sends PINGREQ after ``seconds`` seconds without a byte in either direction.

    :param timer: the timer of the connection
    :param writer: the writer of the connection
    :param session: sends PINGREQ
    :param last_heard: the time at which bytes last arrived
    :param reading_paused: returns whether the reader waits for a consumer
    :param seconds: the keepalive period, in seconds
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
        """When bytes had last arrived before a ping timeout that expired late and was ignored."""
        self.expire(-math.inf)

    @property
    def done(self) -> bool:
        return False

    def expire(self, now: float) -> None:
        when = min(self._last_heard.time, self._writer.last_sent) + self._seconds
        # Allow for a PINGREQ that was sent slightly late.
        if when <= now + _LATE_SECONDS:
            timeout = PingTimeout(
                self._timer, self._writer, self._last_heard, self._seconds, now, self._on_timeout
            )
            self._timer.add(now + self._seconds * 0.5, timeout)
            self._session.ping(awaited=False)
            self._writer.call_when_sent(timeout.begin)
            when = now + self._seconds
        self._timer.add(when, self)

    def _on_timeout(self, late: bool, heard: float, message: str) -> None:
        if late and self._excused_since < heard:
            # If the machine was suspended, its network was too. Wait for the next PINGREQ.
            self._excused_since = heard
        elif not self._reading_paused():
            raise TimeoutError(message)


class PingTimeout(TimerEntry):
    """
    The timeout that follows a PINGREQ.

    It expires half a keepalive period after PINGREQ was sent, or one and a half periods after bytes
    last arrived, whichever is later. If PINGREQ cannot be sent, it expires one and a half periods
    after PINGREQ was queued.

    :param missed: called when nothing was received in time, with whether the timeout expired late
        because the process stood still, the time at which bytes last arrived, and an error message
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
        """Start the timeout after PINGREQ was sent."""
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
            f"ping timeout: nothing was received for {round(now - self._heard, 2):g} s, and "
            + ("the broker did not answer PINGREQ" if self._ping_sent else "PINGREQ was not sent"),
        )
