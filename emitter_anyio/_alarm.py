"""One task of a run of Trio that calls functions at their time, as asyncio's loop does itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Final

import trio
from trio import current_time as current_time

_KEPT: Final = 64
"""So many calls that were cancelled may wait for their time, and as many as those that were not."""


class Call:
    """What is to be called, unless it is cancelled."""

    __slots__ = ("_alarm", "function")

    def __init__(self, alarm: Alarm, function: Callable[[], None]) -> None:
        self._alarm = alarm
        self.function: Callable[[], None] | None = function

    def cancel(self) -> None:
        """Do not call it; it may have been called."""
        if self.function is not None:
            self.function = None
            self._alarm.forget()


class Alarm:
    """
    Calls functions at their time.

    To begin and to end a task takes a fifth of a link's life on Trio. So the task serves all, and
    ends when it wakes and finds that there is nothing left, or with the run.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Call]] = []
        self._count = 0
        self._runs = False
        self._scope = trio.CancelScope()
        self.active = 0
        """How many calls are to come."""

    def call_at(self, when: float, function: Callable[[], None]) -> Call:
        """
        Have a function called, which raises nothing.

        :param when: the time of Trio's clock
        """
        call = Call(self, function)
        self._count += 1
        self.active += 1
        if len(self._heap) > 2 * self.active + _KEPT:
            self._heap = [entry for entry in self._heap if entry[2].function is not None]
            heapify(self._heap)
        heappush(self._heap, (when, self._count, call))
        if not self._runs:
            self._runs = True
            trio.lowlevel.spawn_system_task(self._run, name="emitter_anyio timer")
        # While the task is awake this changes nothing: it looks itself before it sleeps.
        elif (first := self._first()) != self._scope.deadline:
            self._scope.deadline = first
        return call

    def forget(self) -> None:
        """Expect one call less."""
        self.active -= 1
        if not self.active:
            self._scope.cancel()

    async def _run(self) -> None:
        try:
            while (first := self._first()) < math.inf:
                with trio.CancelScope(deadline=first) as self._scope:
                    await trio.sleep_forever()
                self._call_due()
        finally:
            self._runs = False

    def _call_due(self) -> None:
        now = current_time()
        while self._first() <= now:
            call = heappop(self._heap)[2]
            function = call.function
            call.cancel()
            assert function is not None
            function()

    def _first(self) -> float:
        heap = self._heap
        while heap and heap[0][2].function is None:
            heappop(heap)
        return heap[0][0] if heap else math.inf


_ALARM: Final[trio.lowlevel.RunVar[Alarm]] = trio.lowlevel.RunVar("emitter_anyio alarm")


def open_alarm() -> Alarm:
    """Give that of the present run."""
    try:
        return _ALARM.get()
    except LookupError:
        alarm = Alarm()
        _ALARM.set(alarm)
        return alarm
