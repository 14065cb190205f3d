"""The timer of a connection, and the deadlines of replies."""

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
"""The number of event-loop turns without a read after which the reader has caught up."""

_MAX_CATCH_UP_SECONDS: Final = 1.0
"""The maximum time in seconds for the reader to catch up, because more might keep arriving."""

_SPARE_ENTRIES: Final = 64
"""The number of completed entries to keep, in addition to as many as there are pending ones."""

Reads: TypeAlias = Callable[[], int | None]
"""Returns the number of reads so far, or ``None`` while the reader handles received bytes."""


class TimerEntry(Protocol):
    """A timeout that expires unless it is done before."""

    needs_reader: ClassVar[bool]
    """Whether it reports that something has not arrived, so that the reader must catch up first."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether it no longer needs to expire."""

    @abstractmethod
    def expire(self, now: float) -> None:
        """
        Handle the timeout, which may add the entry to the timer again.

        :param now: the current time, which is the entry's time or later
        """


class Timer:
    """
    A task that runs timeouts.

    Before a timeout that needs the reader expires, the reader handles everything that has arrived.
    If the process stood still (a debugger, a suspended machine, a blocking call), the awaited bytes
    might have arrived in time and still be in the socket.

    Most entries are done long before their time, so completing one does not wake the task. It wakes
    at the time of an entry, and then sleeps until that of the first pending one.

    :param clock: returns the time of the event loop
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int, TimerEntry]] = []
        self._added = 0
        self._max_entries = _SPARE_ENTRIES
        self._wakes_at = -math.inf
        """When the task wakes; minus infinity while it does not sleep."""
        self._scope: CancelScope | None = None
        """The scope in which the task sleeps."""
        self._ended = False

    def add(self, when: float, due: TimerEntry) -> None:
        """
        Add an entry.

        :param when: the time at which it expires, on the event loop's clock
        """
        heap = self._heap
        if len(heap) > self._max_entries:
            heap[:] = [entry for entry in heap if not entry[2].done]
            heapify(heap)
            self._max_entries = 2 * len(heap) + _SPARE_ENTRIES
        self._added += 1
        heappush(heap, (when, self._added, due))
        if when < self._wakes_at and self._scope is not None:
            self._wakes_at = self._scope.deadline = when

    async def run(self, failed: Callable[[Exception], None], reads: Reads) -> None:
        """
        Run the timer until :meth:`end`.

        :param failed: called with the exception that an entry raises, which ends the timer
        :param reads: returns the number of reads
        """
        try:
            # If the task group is never left, Trio cancels the task at the end of the run, and the
            # scope below would absorb that cancellation.
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
        """Stop the timer; nothing expires any more."""
        self._ended = True
        self._heap.clear()
        if self._scope is not None:
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
    The deadline of a call that awaits a reply.

    The time starts when the last packet in the queue has been sent.

    :param expired: called at the deadline; a true result extends the deadline by ``seconds``
    :param seconds: the time for the reply, in seconds
    :param timer: the timer of the connection
    :param writer: the writer of the connection
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
        """Cancel the deadline, because the call no longer awaits a reply."""
        self.done = True

    def expire(self, now: float) -> None:
        if self._expired():
            self._timer.add(now + self._seconds, self)

    def _begin(self) -> None:
        if not (self.done or self._writer.broken):
            self._timer.add(self._writer.last_sent + self._seconds, self)


class IdleTimeout:
    """
    A timeout that expires when nothing has happened for some time.

    It does not run before the first call of :meth:`restart`.

    :param expired: called when it expires
    :param seconds: the idle time, in seconds
    :param timer: the timer of the connection
    """

    needs_reader: ClassVar = True

    __slots__ = ("_at", "_expired", "_seconds", "_timer", "done")

    def __init__(self, expired: Callable[[], object], seconds: float, timer: Timer) -> None:
        self.done = False
        self._expired = expired
        self._seconds = seconds
        self._timer = timer
        self._at: float | None = None

    def restart(self) -> None:
        """Begin to count the idle time again."""
        begin = self._at is None
        self._at = self._timer.clock() + self._seconds
        if begin:
            self._timer.add(self._at, self)

    def cancel(self) -> None:
        """Cancel the timeout."""
        self.done = True

    def expire(self, now: float) -> None:
        assert self._at is not None
        if now < self._at:
            # The entry stays in the timer while the timeout is restarted, so that it is cheap.
            self._timer.add(self._at, self)
        else:
            self._expired()
