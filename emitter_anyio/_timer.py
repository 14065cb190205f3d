"""One timer for all that a link waits for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Protocol, TypeAlias

from ._reading import asyncio_loop


class _Call(Protocol):
    def cancel(self) -> None: ...


CallAt: TypeAlias = Callable[[float, Callable[[], None]], _Call]
"""Has a function called at a time of the loop's clock."""


class Due(ABC):
    """Something that falls due, unless it is done before."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Tell whether it need not fall due any more."""

    @abstractmethod
    def fall_due(self, now: float) -> None:
        """Do what the time has come for; it may be put to the timer again."""


class Timer:
    """
    Lets things fall due, by one timer that is set to the first of them.

    Nearly all are done long before, so the timer is not put off for each: it wakes once, finds
    nothing to do, and is set to the next one that is not done.

    :param call_at: wakes it
    :param clock: tells the time of the loop
    """

    def __init__(self, call_at: CallAt, clock: Callable[[], float]) -> None:
        self._call_at = call_at
        self.clock: Callable[[], float] = clock
        self._heap: list[tuple[float, int, Due]] = []
        self._count = 0
        self._when = -math.inf
        """When it wakes; before everything else while it is awake, or does not run."""

    def add(self, when: float, due: Due) -> None:
        """Have something fall due at a time of the loop's clock."""
        heap = self._heap
        while heap and heap[0][2].done:
            heappop(heap)
        self._count += 1
        heappush(heap, (when, self._count, due))
        if when < self._when:
            self._set(when)

    def put_off(self) -> None:
        """Do not wake for what is done."""
        first = self._first()
        if -math.inf < self._when < first:
            self._set(first)

    def begin(self, failed: Callable[[Exception], None]) -> None:
        """
        Let them fall due from now on.

        :param failed: is told what one of them raises, behind which none falls due any more
        """
        self._failed = failed
        self._when = self._wake()
        self._call = self._call_at(self._when, self._fire)

    def end(self) -> None:
        """Let nothing fall due any more."""
        self._when = -math.inf
        self._heap.clear()
        self._call.cancel()
        del self._failed

    def _set(self, when: float) -> None:
        # The other way round there would be a time without any.
        before, self._when = self._call, when
        self._call = self._call_at(when, self._fire)
        before.cancel()

    def _fire(self) -> None:
        try:
            self._set(self._wake())
        except Exception as exc:
            self._failed(exc)

    def _wake(self) -> float:
        """Let fall due what is to, and give the time of what comes next."""
        self._when = -math.inf
        now = self.clock()
        while (first := self._first()) <= now:
            heappop(self._heap)[2].fall_due(now)
        return first

    def _first(self) -> float:
        heap = self._heap
        while heap and heap[0][2].done:
            heappop(heap)
        return heap[0][0] if heap else math.inf


def open_timer() -> Timer:
    """Make one for the backend that runs."""
    loop = asyncio_loop()
    if loop is not None:
        return Timer(loop.call_at, loop.time)
    # Trio is there where it runs, and nobody else is to wait for its import.
    from ._alarm import current_time, open_alarm

    return Timer(open_alarm().call_at, current_time)
