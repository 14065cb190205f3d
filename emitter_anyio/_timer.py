"""One timer for all that a link waits for, in the way that costs least on each backend."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from heapq import heappop, heappush

import anyio
from anyio.abc import TaskGroup

from ._reading import asyncio_loop


class Due(ABC):
    """Something that falls due, unless it is done before."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Tell whether it need not fall due any more."""

    @abstractmethod
    def fall_due(self, now: float) -> None:
        """Do what the time has come for; it may be put to the timer again."""


class Timer(ABC):
    """
    Lets things fall due, by one timer that is set to the first of them.

    Nearly all are done long before, so the timer is not put off for each: it wakes once, finds
    nothing to do, and is set to the next one that is not done.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Due]] = []
        self._count = 0
        self._when = -math.inf
        """When it wakes; before everything else while it is awake, or has not begun."""

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

    @abstractmethod
    def begin(self, tasks: TaskGroup, failed: Callable[[Exception], None]) -> None:
        """
        Let them fall due from now on.

        :param tasks: a group that ends with the link
        :param failed: is told what one of them raises, behind which none falls due any more
        """

    def end(self) -> None:
        """Let nothing fall due any more."""
        self._when = -math.inf
        self._heap.clear()

    @abstractmethod
    def _set(self, when: float) -> None:
        """Be woken then, and not at the time that it was set to."""

    def _wake(self) -> float:
        """Let fall due what is to, and give the time of what comes next."""
        self._when = -math.inf
        now = anyio.current_time()
        while (first := self._first()) <= now:
            heappop(self._heap)[2].fall_due(now)
        return first

    def _first(self) -> float:
        heap = self._heap
        while heap and heap[0][2].done:
            heappop(heap)
        return heap[0][0] if heap else math.inf


class SleepingTimer(Timer):
    """Sleeps in a task of its own."""

    def begin(self, tasks: TaskGroup, failed: Callable[[Exception], None]) -> None:
        tasks.start_soon(self._run, failed)

    def _set(self, when: float) -> None:
        self._when = self._scope.deadline = when

    async def _run(self, failed: Callable[[Exception], None]) -> None:
        # anyio.sleep_forever() has a deadline of its own, which costs as much again.
        never = anyio.Event()
        while True:
            try:
                self._when = self._wake()
            except Exception as exc:
                return failed(exc)
            with anyio.CancelScope(deadline=self._when) as self._scope:
                await never.wait()


class CalledTimer(Timer):
    """Is called by the loop of asyncio, which costs a tenth of what a task does."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop

    def begin(self, tasks: TaskGroup, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._when = self._wake()
        self._handle = self._loop.call_at(self._when, self._fire)

    def end(self) -> None:
        super().end()
        self._handle.cancel()
        del self._failed

    def _set(self, when: float) -> None:
        self._handle.cancel()
        self._when = when
        self._handle = self._loop.call_at(when, self._fire)

    def _fire(self) -> None:
        try:
            self._set(self._wake())
        except Exception as exc:
            self._failed(exc)


def open_timer() -> Timer:
    """Make what suits the backend that runs."""
    loop = asyncio_loop()
    return SleepingTimer() if loop is None else CalledTimer(loop)
