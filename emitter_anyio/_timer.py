"""One timer for all that a link waits for."""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from typing import Protocol

from ._backend import asyncio_loop


class Waker(Protocol):
    """Wakes one timer, in the way that costs least on a backend."""

    def set(self, when: float) -> None:
        """Wake it then, and not at the time that it was set to."""

    def stop(self) -> None:
        """Wake it no more."""


class Due(Protocol):
    """Something that falls due, unless it is done before."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Tell whether it need not fall due any more."""

    @abstractmethod
    def fall_due(self, now: float) -> None:
        """Do what the time has come for; it may be put to the timer again."""


class LoopWaker:
    """Has the loop of asyncio wake one timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._wake = wake
        self._handle: asyncio.TimerHandle | None = None

    def set(self, when: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_at(when, self._wake)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


class Timer:
    """
    Lets things fall due, by one timer that is set to the first of them.

    Nearly all are done long before, so the timer is not put off for each: it wakes once, finds
    nothing to do, and is set to the next one that is not done.

    :param open_waker: makes what calls a function at its time
    :param clock: tells the time of the loop
    """

    def __init__(
        self, open_waker: Callable[[Callable[[], None]], Waker], clock: Callable[[], float]
    ) -> None:
        self._open_waker = open_waker
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
            self._when = when
            self._waker.set(when)

    def put_off(self) -> None:
        """Do not wake for what is done."""
        first = self._first()
        if -math.inf < self._when < first:
            self._when = first
            self._waker.set(first)

    def begin(self, failed: Callable[[Exception], None]) -> None:
        """
        Let them fall due from now on.

        :param failed: is told what one of them raises, behind which none falls due any more
        """
        self._failed = failed
        self._waker = self._open_waker(self._wake)
        self._wake()

    def end(self) -> None:
        """Let nothing fall due any more."""
        self._when = -math.inf
        self._heap.clear()
        self._waker.stop()
        # They know the link, and what it leaves behind waits for no garbage collector.
        del self._waker, self._failed

    def _wake(self) -> None:
        self._when = -math.inf
        now = self.clock()
        try:
            while (first := self._first()) <= now:
                heappop(self._heap)[2].fall_due(now)
        except Exception as exc:
            self._failed(exc)
        else:
            self._when = first
            self._waker.set(first)

    def _first(self) -> float:
        heap = self._heap
        while heap and heap[0][2].done:
            heappop(heap)
        return heap[0][0] if heap else math.inf


def open_timer() -> Timer:
    """Make one for the backend that runs."""
    loop = asyncio_loop()
    if loop is not None:
        return Timer(partial(LoopWaker, loop), loop.time)
    # Where Trio runs its import is done, and nobody else is to wait for it.
    import trio

    from ._alarm import AlarmWaker

    return Timer(AlarmWaker, trio.current_time)
