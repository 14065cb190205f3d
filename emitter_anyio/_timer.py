"""One timer for all that a link waits for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from heapq import heappop, heappush

import anyio


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

    Nearly all are done long before, so the timer is not put off for those: it wakes once, finds
    nothing to do, and is set to the next one that is not done.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Due]] = []
        self._count = 0
        self._scope = anyio.CancelScope()
        self._set_for = math.inf

    def add(self, when: float, due: Due) -> None:
        """Have something fall due at a time of the loop's clock."""
        heap = self._heap
        while heap and heap[0][2].done:
            heappop(heap)
        self._count += 1
        heappush(heap, (when, self._count, due))
        if when < self._set_for:
            self._set_for = self._scope.deadline = when

    async def run(self) -> None:
        """Let them fall due, until cancelled; what that raises ends it."""
        while True:
            self._set_for = self._next()
            with anyio.CancelScope(deadline=self._set_for) as self._scope:
                await anyio.sleep_forever()
            now = anyio.current_time()
            while self._heap and self._heap[0][0] <= now:
                due = heappop(self._heap)[2]
                if not due.done:
                    due.fall_due(now)

    def _next(self) -> float:
        while self._heap and self._heap[0][2].done:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf
