"""How long one waits for an answer, from the moment at which the question has left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from ._session import Session
from ._timer import Timer
from ._writer import Writer

_DONE: Final = 64
"""So many that are done may be kept, and as many as there are others."""


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


class OwnLimit(Limit):
    """
    A ``Deadline``: the time of one who waits as long as he says, for the packet queued last.

    :param session: all that is restored is asked at once, and Emitter answers one after the other:
        as long as this one is answered anything, nothing is late
    """

    __slots__ = ("_answered", "_seconds", "_session", "_timer", "_writer")

    def __init__(
        self,
        wake: Callable[[], None],
        seconds: float,
        timer: Timer,
        writer: Writer,
        session: Session | None = None,
    ) -> None:
        super().__init__(wake)
        self._seconds, self._timer, self._writer, self._session = seconds, timer, writer, session
        # A broker that has just come back has much to do: the first time it is put off anyway.
        self._answered = -1
        writer.call_when_left(self._begin)

    def _begin(self) -> None:
        if not self._writer.broken:
            self._timer.add(self._writer.last_sent + self._seconds, self)

    def fall_due(self, now: float) -> None:
        self._timer.judge(self, now)

    def judge(self, now: float) -> None:
        if self._session is not None and self._answered < self._session.answered:
            self._answered = self._session.answered
            self._timer.add(now + self._seconds, self)
        else:
            self.wake()


class Limits:
    """
    A ``Deadline``: the times of all who wait equally long on one link.

    They begin in the order of the questions, and end in the same, so that the timer has to know of
    the first only: that takes half of what a confirmed publish would pay for its time.
    """

    def __init__(self, seconds: float, timer: Timer, writer: Writer) -> None:
        self._seconds = seconds
        self._timer = timer
        self._writer = writer
        self._asked: deque[tuple[int, Limit]] = deque()
        """Those whose question has not left yet, and what has to leave for that."""
        self._waiting: deque[Limit] = deque()
        self._most = _DONE
        """With more than so many, those are dropped that are done behind one who waits."""
        self._timed = False
        """Whether the timer knows of it."""

    @property
    def done(self) -> bool:
        """Whether nobody waits any more. The timer, which asks, forgets it then."""
        self._drop_done()
        self._timed = bool(self._waiting)
        return not self._timed

    def add(self, wake: Callable[[], None]) -> Limit:
        """Have a function called when the time is over for the packet that was queued last."""
        limit, writer = Limit(wake), self._writer
        mark = writer.queued
        if writer.sent >= mark:
            self._begin((limit,))
        else:
            if not self._asked:
                writer.call_when_left(self._left, mark)
            self._asked.append((mark, limit))
        return limit

    def fall_due(self, now: float) -> None:
        if self._waiting[0].when <= now:
            self._timer.judge(self, now)
        else:
            self._set_timer()

    def judge(self, now: float) -> None:
        self._timed = False
        waiting = self._waiting
        while waiting and (waiting[0].done or waiting[0].when <= now):
            limit = waiting.popleft()
            if not limit.done:
                limit.wake()
        self._set_timer()

    def _left(self) -> None:
        asked, writer = self._asked, self._writer
        if writer.broken:
            # Nobody waits any more: the loss of the link is an answer, too.
            asked.clear()
            return
        left = []
        while asked and asked[0][0] <= writer.sent:
            left.append(asked.popleft()[1])
        self._begin(left)
        if asked:
            writer.call_when_left(self._left, asked[0][0])

    def _begin(self, limits: Iterable[Limit]) -> None:
        when = self._writer.last_sent + self._seconds
        self._drop_done()
        for limit in limits:
            limit.when = when
            self._waiting.append(limit)
        if not self._timed:
            self._set_timer()

    def _drop_done(self) -> None:
        waiting = self._waiting
        while waiting and waiting[0].done:
            waiting.popleft()
        if len(waiting) > self._most:
            self._waiting = deque(limit for limit in waiting if not limit.done)
            self._most = 2 * len(self._waiting) + _DONE

    def _set_timer(self) -> None:
        if self._waiting:
            self._timed = True
            self._timer.add(self._waiting[0].when, self)
