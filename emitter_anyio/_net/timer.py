"""One timer for everything that a connection waits for, and the deadlines of replies."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import ClassVar, Final, Protocol, TypeAlias

from anyio import CancelScope, sleep_forever
from anyio.lowlevel import checkpoint

from emitter_anyio._backend.tasks import is_cancelled

from .writer import Writer

_QUIET_TURNS: Final = 10
"""The reader has taken in what had arrived if it gets nothing in this many turns of the loop."""

_MAX_CATCH_UP_SECONDS: Final = 1.0
"""The most seconds that the reader is given for that, because more might arrive all the time."""

_SPARE_ENTRIES: Final = 64
"""The entries that are done and may be kept, beside as many as there are others."""

Reads: TypeAlias = Callable[[], int | None]
"""Returns how many times the reader has read, or ``None`` while it is handling what it has read."""


class TimerEntry(Protocol):
    """Something that falls due, unless it is done before."""

    needs_reader: ClassVar[bool]
    """Whether it ends something because of what has not arrived, so that the reader goes first."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether it need not fall due any more."""

    @abstractmethod
    def expire(self, now: float) -> None:
        """
        Do what is due; it may be added to the timer again.

        :param now: its time, or later
        """


class Timer:
    """
    Lets things fall due.

    Before one that needs the reader expires, the reader takes in what has arrived: if the process
    stood still (a debugger, a suspended machine, a blocking call), what was awaited might have
    arrived in time and wait in the socket.

    Nearly everything is done long before its time. So the task is not woken for each: it wakes at a
    time for which something was added, and then sleeps until that of the first that is not done.

    :param clock: returns the time of the event loop
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int, TimerEntry]] = []
        self._added = 0
        self._max_entries = _SPARE_ENTRIES
        self._wakes_at = -math.inf
        """When the task wakes; before everything else while it does not sleep."""
        self._scope = CancelScope()
        """The scope in which the task sleeps."""
        self._ended = False

    def add(self, when: float, due: TimerEntry) -> None:
        """
        Let something fall due.

        :param when: a time of the event loop's clock
        """
        heap = self._heap
        if len(heap) > self._max_entries:
            heap[:] = [entry for entry in heap if not entry[2].done]
            heapify(heap)
            self._max_entries = 2 * len(heap) + _SPARE_ENTRIES
        self._added += 1
        heappush(heap, (when, self._added, due))
        if when < self._wakes_at:
            self._wakes_at = self._scope.deadline = when

    async def run(self, failed: Callable[[Exception], None], reads: Reads) -> None:
        """
        Let things fall due until :meth:`end`.

        :param failed: gets what one of them raises, after which none falls due
        """
        try:
            # In a task group that was never left, Trio's scope catches cancellations that are not
            # its own.
            while not (self._ended or is_cancelled()):
                when = self._first()
                with CancelScope(deadline=when) as self._scope:
                    self._wakes_at = when
                    await sleep_forever()
                self._wakes_at = -math.inf
                now, caught_up = self.clock(), False
                while self._first() <= now:
                    if self._heap[0][2].needs_reader and not caught_up:
                        await self._let_catch_up(reads, now + _MAX_CATCH_UP_SECONDS)
                        caught_up = True
                    else:
                        heappop(self._heap)[2].expire(now)
        except Exception as exc:
            failed(exc)

    def end(self) -> None:
        """Let nothing fall due any more."""
        self._ended = True
        self._heap.clear()
        self._scope.cancel()

    def _first(self) -> float:
        heap = self._heap
        while heap and heap[0][2].done:
            heappop(heap)
        return heap[0][0] if heap else math.inf

    async def _let_catch_up(self, reads: Reads, until: float) -> None:
        quiet_turns, before = 0, reads()
        while quiet_turns < _QUIET_TURNS and self.clock() <= until:
            await checkpoint()
            count = reads()
            quiet_turns = quiet_turns + 1 if count is not None and count == before else 0
            before = count


class ReplyDeadline:
    """
    The deadline of one call that awaits a reply, counted from when the packet queued last is sent.

    :param expired: is called at the deadline, unless it is cancelled before; it returns a true
        value to set another deadline, ``seconds`` later
    :param seconds: the time for the reply
    :param timer: the timer of the connection
    :param writer: sends the packet
    """

    needs_reader: ClassVar = True

    __slots__ = ("_expired", "_seconds", "_timer", "_writer", "done")

    def __init__(
        self, expired: Callable[[], object], seconds: float, timer: Timer, writer: Writer
    ) -> None:
        self.done = False
        self._expired = expired
        self._seconds = seconds
        self._timer = timer
        self._writer = writer
        writer.call_when_sent(self._begin)

    def cancel(self) -> None:
        """End the deadline: the call awaits no reply any more."""
        self.done = True

    def expire(self, now: float) -> None:
        if self._expired():
            self._timer.add(now + self._seconds, self)

    def _begin(self) -> None:
        if not (self.done or self._writer.broken):
            self._timer.add(self._writer.last_sent + self._seconds, self)
