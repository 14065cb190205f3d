"""The worker thread of an outbox. Concurrent calls share a transaction."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Generic, TypeVar

import anyio
from anyio import CancelScope, CapacityLimiter, to_thread
from anyio.lowlevel import checkpoint_if_cancelled

from emitter_anyio._values.errors import ClosedError
from emitter_anyio._values.text import format_count

from ._schedule import Fetch, Fetched
from ._signal import Signal
from ._store import Change, Figures, Outcome, Parking, Reason, Store, Work
from ._values import (
    MessageParkedError,
    MessagesGivenUpError,
    OutboxError,
    OutboxStatistics,
    Record,
    Stored,
)

T = TypeVar("T")

_RECORDS_PER_TRANSACTION: Final = 1000
_BYTES_PER_TRANSACTION: Final = 8 * 1024 * 1024
_CHANGES_PER_TRANSACTION: Final = 256
"""The number of changes that are written without delay."""
_DELAY_SECONDS: Final = 0.05
"""The time for which a change waits for others, so that they share a transaction."""
_RETRY_SECONDS: Final = 1.0
"""The time after which changes that could not be written are written again."""
_SWEEP_SECONDS: Final = 60.0
"""The interval at which messages that are too old are given up."""


class _Entry:
    """A record that a caller waits for."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.error: Exception | None = None
        self.cancelled = False
        self._done = anyio.Event()

    async def wait(self) -> None:
        try:
            await self._done.wait()
        except BaseException:
            self.cancelled = True
            raise

    def finish(self, error: Exception | None) -> None:
        self.error = error
        self._done.set()


class _Call(Generic[T]):
    """A call of the store whose result a caller waits for."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: T | None = None
        self._error: Exception | None = None
        self._done = anyio.Event()

    def run(self) -> None:
        """Call the function, in the worker thread."""
        try:
            self._result = self._function()
        except OutboxError as exc:
            self._error = exc

    def finish(self, error: Exception | None = None) -> None:
        """Wake the caller."""
        self._error = error or self._error
        self._done.set()

    async def wait(self) -> T:
        """Wait for the result."""
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # run() has put a T there


class Journal:
    """
    A worker thread that writes messages and their outcomes, and reads messages.

    :param store: the file
    :param name: the path of the file, for messages
    :param report: passes on errors that no call can raise
    :param wanted: returns what to read now, if anything; called with whether messages are about to
        be stored
    :param fetched: called with what was read, or ``None`` if reading failed
    :param changed: called when the figures have changed
    """

    def __init__(
        self,
        store: Store,
        name: str,
        report: Callable[[Exception], None],
        wanted: Callable[[bool], Fetch | None],
        fetched: Callable[[Fetch, Fetched | None], None],
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._name = name
        self._report = report
        self._wanted = wanted
        self._fetched = fetched
        self._changed = changed
        self._figures = Figures()
        self._limiter = CapacityLimiter(1)
        self._signal = Signal()
        self._incoming: list[_Entry] = []
        self._writing: list[_Entry] = []
        self._calls: list[_Call[Any]] = []
        self._changes: dict[int, tuple[Stored, Change]] = {}
        """The outcomes of messages that are not on disk yet."""
        self._refusals: dict[int, Exception] = {}
        """The refusals of messages that are being parked."""
        self._due = math.inf
        """The time at which the changes are written, even if there is nothing else to do."""
        self._next_sweep = math.inf
        self._read_at = -math.inf
        """The time from which messages are read."""
        self._grown = False
        """Whether messages might have been stored since reading was last possible."""
        self._reported: set[str] = set()
        """The texts of the errors that were reported since the last success."""
        self._end: Exception | None = None

    # Callers

    async def open(self) -> str | None:
        """Open the file; see :meth:`Store.open`."""
        self._next_sweep = anyio.current_time() + _SWEEP_SECONDS
        aside = await self._in_thread(self._store.open)
        self._figures = self._store.figures
        return aside

    async def write(self, record: Record) -> None:
        """
        Store a message, and wait until it is on disk.

        :raises OutboxError: if it is not
        """
        if self._end is not None:
            raise self._end
        await checkpoint_if_cancelled()
        entry = _Entry(record)
        self._incoming.append(entry)
        self._signal.set()
        await entry.wait()
        if entry.error is not None:
            raise entry.error

    async def call(self, function: Callable[[], T]) -> T:
        """
        Call a method of the store, and return its result.

        :raises OutboxError: if the method does
        """
        if self._end is not None:
            raise self._end
        call = _Call(function)
        self._calls.append(call)
        self._signal.set()
        return await call.wait()

    def wake(self) -> None:
        """Read from disk, if anything is wanted."""
        self._signal.set()

    # Outcomes of messages

    def accept(self, message: Stored) -> None:
        """Note that the broker has accepted a message."""
        self._change(message, "accepted")

    def give_up(self, message: Stored, reason: Reason) -> None:
        """Note that a message is not sent."""
        self._change(message, reason)

    def park(self, message: Stored, refusal: Exception) -> None:
        """Note that a message was refused."""
        self._refusals[message.id] = refusal
        status = getattr(refusal, "status", None)
        self._change(message, Parking(str(refusal), status))

    def _change(self, message: Stored, change: Change) -> None:
        if not self._changes:
            self._due = anyio.current_time() + _DELAY_SECONDS
            self._signal.set()
        self._changes[message.id] = message, change
        if len(self._changes) >= _CHANGES_PER_TRANSACTION:
            self._due = min(self._due, anyio.current_time())
            self._signal.set()

    # Figures

    @property
    def waiting(self) -> int:
        """The number of waiting messages, including those that are being stored."""
        stored = max(0, self._figures.waiting - len(self._changes))
        return stored + len(self._incoming) + len(self._writing)

    def now(self) -> float:
        """Return the time by the clock of the outbox."""
        return self._store.now()

    def statistics(self) -> OutboxStatistics:
        """Return the figures."""
        figures = self._figures
        waiting = max(0, figures.waiting - len(self._changes))
        parked, given_up, size = figures.parked, figures.given_up, figures.size
        for message, change in list(self._changes.values()):  # any thread might be calling
            if isinstance(change, Parking):
                parked += 1
            else:
                size -= message.weight
                given_up += change != "accepted"
        oldest = None
        if waiting and figures.oldest is not None:
            oldest = max(0.0, self.now() - figures.oldest)
        return OutboxStatistics(waiting, oldest, parked, given_up, size)

    # The task

    async def run(self) -> None:
        """Write and read until cancelled."""
        going_on = True
        while going_on:
            while self._calls:
                if self._changes:
                    await self._apply(self._take(None))
                await self._run_call(self._calls.pop(0))
            work, seconds = self._collect()
            if work is None:
                going_on = await self._signal.wait(seconds)
            else:
                await self._apply(work)

    def end(self, error: Exception) -> None:
        """Raise an error from all waiting and future calls."""
        self._end = error
        incoming, self._incoming = self._incoming, []
        calls, self._calls = self._calls, []
        for entry in incoming:
            entry.finish(error)
        for call in calls:
            call.finish(error)

    async def _run_call(self, call: _Call[Any]) -> None:
        try:
            await self._in_thread(call.run)
        except BaseException:
            call.finish(self._make_unknown())
            raise
        self._figures = self._store.figures
        self._grown = True
        self._changed()
        call.finish()

    async def close(self) -> None:
        """Write everything that is not on disk yet, if possible, and close the file."""
        try:
            if self._changes:
                await self._apply(self._take(None))
            while self._incoming:
                await self._apply(self._take(None))
        finally:
            self.end(ClosedError(f"the outbox {self._name!r} was left during the call"))
            await self._close_file()

    async def _close_file(self) -> None:
        """Close the file, even if ``Task.cancel()`` keeps the worker thread from starting."""
        cancelled: BaseException | None = None
        while True:
            try:
                await self._in_thread(self._store.close)
            except anyio.get_cancelled_exc_class() as exc:
                cancelled = exc
            else:
                break
        if cancelled is not None:
            raise cancelled

    def _collect(self) -> tuple[Work | None, float]:
        """Return what to do now, or the seconds for which there is nothing to do."""
        now = anyio.current_time()
        self._grown = self._grown or bool(self._incoming)
        fetch = None
        if self._read_at <= now:
            fetch = self._wanted(self._grown)
            self._grown = False
        due = min(self._due, self._next_sweep)
        if not (self._incoming or fetch is not None or due <= now):
            return None, (due if self._read_at <= now else min(due, self._read_at)) - now
        if self._next_sweep <= now:
            self._next_sweep = now + _SWEEP_SECONDS
        return self._take(fetch), 0

    def _take(self, fetch: Fetch | None) -> Work:
        size = number = 0
        self._incoming = [entry for entry in self._incoming if not entry.cancelled]
        for entry in self._incoming[:_RECORDS_PER_TRANSACTION]:
            if number and size > _BYTES_PER_TRANSACTION:
                break
            number, size = number + 1, size + entry.record.weight
        self._writing, self._incoming = self._incoming[:number], self._incoming[number:]
        return Work([entry.record for entry in self._writing], dict(self._changes), fetch)

    async def _apply(self, work: Work) -> None:
        entries = self._writing
        try:
            outcome = await self._in_thread(partial(self._store.apply, work))
        except BaseException:
            for entry in entries:
                entry.finish(self._make_unknown())
            raise
        finally:
            self._writing = []
        self._record_changes(work, outcome)
        self._figures = self._store.figures
        self._changed()
        for entry, result in zip(entries, outcome.errors, strict=True):
            entry.finish(result)
        if work.fetch is not None:
            self._record_fetch(work.fetch, outcome)

    def _record_changes(self, work: Work, outcome: Outcome) -> None:
        now = anyio.current_time()
        if outcome.write_error is not None:
            if work.changes or not work.records:
                self._due = now + _RETRY_SECONDS
                self._report_once(outcome.write_error)
            return
        self._reported.clear()
        for id in work.changes:
            self._changes.pop(id, None)
        self._due = now + _DELAY_SECONDS if self._changes else math.inf
        for message in outcome.parked:
            error = MessageParkedError(
                f"parked a message to {message.channel!r} in the outbox {self._name!r}: "
                f"{message.reason}",
                message=message,
            )
            error.__cause__ = self._refusals.get(message.id)
            self._report(error)
        for id in work.changes.keys() & self._refusals.keys():
            del self._refusals[id]
        for reason, count in outcome.given_up.items():
            self._report(
                MessagesGivenUpError(
                    f"gave up {format_count(count, 'message', 'messages')} in the outbox "
                    f"{self._name!r}: {reason}",
                    count=count,
                )
            )

    def _record_fetch(self, fetch: Fetch, outcome: Outcome) -> None:
        if outcome.read_error is not None:
            self._read_at = anyio.current_time() + _RETRY_SECONDS
            self._report_once(outcome.read_error)
        self._fetched(fetch, outcome.fetched)

    def _make_unknown(self) -> OutboxError:
        return OutboxError(
            f"the task that writes the outbox {self._name!r} was cancelled: whether the call took "
            "effect is unknown"
        )

    def _report_once(self, error: OutboxError) -> None:
        if str(error) not in self._reported:
            self._reported.add(str(error))
            self._report(error)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        results: list[T] = []
        # Shielded, so that only Task.cancel() leaves open whether the function was called.
        with CancelScope(shield=True):
            results.append(await to_thread.run_sync(function, limiter=self._limiter))
        return results[0]
