"""One timer for all that a link waits for."""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final, Protocol, TypeAlias

from ._backend import asyncio_loop, clock_of

_QUIET_TURNS: Final = 10
"""The reader has taken in what had arrived if it gets nothing in this many turns of the loop."""

_LONGEST_LOOK: Final = 1.0
"""The most seconds that the reader is given for that, because more might arrive all the time."""

Reads: TypeAlias = Callable[[], int | None]
"""Returns how many times the reader has read, or ``None`` while it is handling what it has read."""

Start: TypeAlias = Callable[..., object]
"""Starts a task that ends by itself."""


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


class Deadline(Due, Protocol):
    """Something that fails if it is not done in time."""

    @abstractmethod
    def judge(self, now: float) -> None:
        """
        Fail, unless it may be put to the timer again.

        :param now: the time by which it was to be done, or later. The reader has taken in what had
            arrived by then
        """


class _Look(Due):
    """
    Has the reader take in what has arrived before a deadline is judged.

    If the process stood still (a debugger, a suspended machine, a blocking call), what was awaited
    might have arrived in time and wait in the socket.
    """

    def __init__(self, timer: Timer, reads: Reads, deadline: Deadline, now: float) -> None:
        self._timer = timer
        self._reads = reads
        self._deadline = deadline
        self._since = now
        self._last_reads = reads()
        self._turns = 0

    @property
    def done(self) -> bool:
        return self._deadline.done

    def fall_due(self, now: float) -> None:
        reads = self._reads()
        quiet = reads is not None and reads == self._last_reads
        self._turns = self._turns + 1 if quiet else 0
        self._last_reads = reads
        if self._turns > _QUIET_TURNS or now > self._since + _LONGEST_LOOK:
            self._deadline.judge(self._since)
        else:
            self._timer.add(math.nextafter(now, math.inf), self)


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
        assert self._handle is not None
        self._handle.cancel()


class Timer:
    """
    Lets things fall due, by one timer that is set to the first of them.

    Nearly all are done long before, so the timer is not put off for each: it wakes once, finds
    nothing to do, and is set to the next one that is not done.

    :param open_waker: makes what calls a function at its time, in a task if there is no other way
    :param clock: tells the time of the loop
    """

    def __init__(
        self,
        open_waker: Callable[[Callable[[], None], Start], Waker],
        clock: Callable[[], float],
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

    def judge(self, deadline: Deadline, now: float) -> None:
        """Judge a deadline that has fallen due, after the reader has taken in what has arrived."""
        _Look(self, self._reads, deadline, now).fall_due(now)

    def begin(self, failed: Callable[[Exception], None], reads: Reads, start: Start) -> None:
        """
        Let them fall due from now on.

        :param failed: is told what one of them raises, behind which none falls due any more
        :param start: starts a task, which ends with the timer
        """
        self._failed = failed
        self._reads = reads
        self._waker = self._open_waker(self._wake, start)
        self._when = self._first()
        self._waker.set(self._when)

    def end(self) -> None:
        """Let nothing fall due any more."""
        self._when = -math.inf
        self._heap.clear()
        self._waker.stop()
        # They know the link, and what it leaves behind waits for no garbage collector.
        del self._waker, self._failed, self._reads

    def _wake(self) -> None:
        self._when = -math.inf
        now = self.clock()
        try:
            while self._heap and self._heap[0][0] <= now:
                due = heappop(self._heap)[2]
                if not due.done:
                    due.fall_due(now)
        except Exception as exc:
            self._failed(exc)
        else:
            self._when = self._first()
            self._waker.set(self._when)

    def _first(self) -> float:
        heap = self._heap
        while heap and heap[0][2].done:
            heappop(heap)
        return heap[0][0] if heap else math.inf


def open_timer() -> Timer:
    """Make one for the backend that runs."""
    loop = asyncio_loop()
    if loop is not None:
        return Timer(lambda wake, _: LoopWaker(loop, wake), clock_of(loop))
    # Where Trio runs its import is done, and nobody else is to wait for it.
    from ._alarm import AlarmWaker

    return Timer(AlarmWaker, clock_of(loop))
