"""How long one waits for an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from ._session import Session
from ._timer import Timer
from ._writer import Writer


class Limit:
    """
    The time of one who waits.

    :param wake: is called when it is over, unless it is ``done``
    """

    __slots__ = ("done", "wake", "when")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.done = False
        self.when = 0.0


class Limits:
    """
    A ``Due``: the times of all who wait equally long on one link, each from the moment at which
    what he has asked has left.

    They begin, and so end, one after the other: the timer has to know of the first only.

    :param seconds: how long
    :param session: all that is restored is asked at once, and Emitter answers one after the other:
        as long as this one is answered anything, nothing is late
    """

    done: Final = False

    def __init__(
        self, seconds: float, timer: Timer, writer: Writer, session: Session | None = None
    ) -> None:
        self.seconds = seconds
        self._timer = timer
        self._writer = writer
        self._session = session
        self._answered = 0
        self._asked: deque[tuple[int, Limit]] = deque()
        """Those whose question has not left yet, and what has to leave for that."""
        self._waiting: deque[Limit] = deque()
        self._timed = False
        """Whether the timer knows of it."""

    def add(self, wake: Callable[[], None]) -> Limit:
        """Have a function called when the time is over for the packet that was queued last."""
        limit, writer = Limit(wake), self._writer
        mark = writer.queued
        if writer.sent >= mark:
            self._begin((limit,), writer.last_sent)
        else:
            if not self._asked:
                writer.call_when_left(mark, self._left)
            self._asked.append((mark, limit))
        return limit

    def fall_due(self, now: float) -> None:
        self._timed = False
        waiting, session = self._waiting, self._session
        while waiting and (waiting[0].done or waiting[0].when <= now):
            limit = waiting.popleft()
            if limit.done:
                continue
            if session is not None and self._answered < session.answered:
                self._begin((limit,), now)
            else:
                limit.wake()
        self._have_timed()

    def _left(self) -> None:
        asked, writer = self._asked, self._writer
        left = []
        while asked and asked[0][0] <= writer.sent:
            left.append(asked.popleft()[1])
        self._begin(left, writer.last_sent)
        if asked and not writer.broken:
            writer.call_when_left(asked[0][0], self._left)

    def _begin(self, limits: Iterable[Limit], now: float) -> None:
        when = now + self.seconds
        if self._session is not None:
            self._answered = self._session.answered
        waiting = self._waiting
        while waiting and waiting[0].done:
            waiting.popleft()
        for limit in limits:
            limit.when = when
            waiting.append(limit)
        self._have_timed()

    def _have_timed(self) -> None:
        if self._waiting and not self._timed:
            self._timed = True
            self._timer.add(self._waiting[0].when, self)
