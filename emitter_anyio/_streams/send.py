"""The send end of a stream, with the buffer and the overflow policies."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Final, Generic, Literal, TypeAlias, TypeVar, get_args

import anyio
from anyio import EndOfStream
from anyio.lowlevel import checkpoint

from emitter_anyio._backend import Owner, Wakeup, current_backend
from emitter_anyio._values.checks import is_int
from emitter_anyio._values.errors import SlowConsumerError

from .queue import MAX_BYTES, Queue, cumulative_weights, weight_of

T = TypeVar("T")

Overflow: TypeAlias = Literal["raise", "drop_oldest", "drop_newest", "block"]
"""The policy for a full buffer."""

PATIENCE_TURNS: Final = 8
"""
The number of turns of the event loop that a full buffer gets to shrink before items are dropped.

One turn is not enough: a busy consumer might pass several checkpoints before it receives again, and
Trio runs the tasks that are ready in any order.
"""


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """
    Statistics of a stream. The first six have the names of AnyIO's memory object streams.

    :ivar current_buffer_used: the number of items in the buffer
    :ivar max_buffer_size: the maximum number of items in the buffer, not counting replayed and
        resumed messages
    :ivar open_send_streams: 1 until the stream has ended, then 0
    :ivar open_receive_streams: the number of open receive ends: the stream and its clones
    :ivar tasks_waiting_send: the number of tasks that wait for space in the buffer
    :ivar tasks_waiting_receive: the number of tasks that wait for an item
    :ivar buffered_bytes: the weight of the items in the buffer: the payload and the channel of each
        message, and 128 bytes for each item
    :ivar received: the number of items that were received
    :ivar dropped: the number of items that were dropped because the buffer was full
    :ivar gaps: the number of lost connections, after each of which messages might be missing
    :ivar peak: the largest number of items that were in the buffer at the same time
    :ivar waiting_since: when the next item to be received was put into the buffer, in UTC, or
        ``None`` if nothing can be received; the time since then is how far the consumer is behind
    :ivar undecoded: the number of received messages that ``decode`` could not decode
    """

    current_buffer_used: int
    max_buffer_size: int
    open_send_streams: int
    open_receive_streams: int
    tasks_waiting_send: int
    tasks_waiting_receive: int
    buffered_bytes: int
    received: int
    dropped: int
    gaps: int
    peak: int
    waiting_since: datetime | None
    undecoded: int


class Missing:
    """
    A marker in a buffer, in the place of dropped items.

    :ivar dropped: the number of dropped items
    """

    def __init__(self) -> None:
        self.dropped: int = 1

    def add_one(self) -> None:
        """Count one more dropped item."""
        self.dropped += 1


def check_buffer(buffer: int, overflow: Overflow) -> None:
    """
    Check the arguments ``buffer`` and ``overflow``.

    :raises TypeError: if ``buffer`` is not an int
    :raises ValueError: if ``buffer`` is less than 1, or the policy is unknown
    """
    if not is_int(buffer):
        raise TypeError(f"buffer must be an int, not {type(buffer).__name__}")
    if buffer < 1:
        raise ValueError(f"buffer must be at least 1, not {buffer}")
    if overflow not in get_args(Overflow):
        policies = ", ".join(map(repr, get_args(Overflow)))
        raise ValueError(f"overflow must be one of {policies}, not {overflow!r}")


class Sender(Generic[T]):
    """
    The send end of a stream, which owns the buffer that all receive ends share.

    An item stays in the buffer until the task that receives it runs, so that cancelling that task
    in the same turn loses nothing.

    :param what: the name of the stream in errors
    :param buffer: the maximum number of items in the buffer, in addition to the limit of 8 MiB
    :param overflow: the policy for a full buffer
    :param on_leave: called once with the send end, when the last receive end is closed or the
        user's block is left

    :ivar items: the items that can be received, with a :class:`Missing` where items were dropped;
        receive ends remove them
    :ivar owner: the thread and event loop in which items are received
    :ivar ended: whether the stream accepts nothing more
    :ivar tasks_waiting: the number of tasks that wait for space
    """

    def __init__(
        self,
        what: str,
        buffer: int,
        overflow: Overflow,
        on_leave: Callable[[Sender[T]], object] | None = None,
    ) -> None:
        self.what = what
        self.owner: Owner = Owner()
        self.owner.claim()
        self._buffer = buffer
        self._overflow: Overflow = overflow
        self._on_leave = on_leave
        self._queue: Queue[T | Missing] = Queue()
        self.items: deque[T | Missing] = self._queue.items
        self._held: deque[tuple[T | Missing, int]] = deque()
        """The items that are held back, with their weights in bytes."""
        self._held_bytes = 0
        self._holds = 0
        self._missing_count = 0
        """The number of :class:`Missing` markers that are buffered or held back."""
        self._accepted = 0
        """The number of accepted items, without those that were dropped later."""
        self._extra_until = 0
        """The number of received items at which all items that need no space have been received."""
        self._extra_bytes = 0
        self._dropped = 0
        self._gaps = 0
        self._peak = 0
        self._undecoded = 0
        self._stalled_at: int | None = None
        """The number of received items when the consumer last received none in its turns."""
        self.ended: bool = False
        self._error: Callable[[], Exception] | None = None
        self._receive_ends = 0
        self._make_wakeup: Callable[[], Wakeup] | None = None
        self._waiters: deque[Wakeup] = deque()
        self._space_event: anyio.Event | None = None
        self.tasks_waiting: int = 0

    # Accepting items

    def push(self, item: T, *, extra: bool = False) -> bool:
        """
        Accept one item.

        :param extra: whether the item needs no space, like a message that the broker replays
        :return: whether there was space; ``True`` after the end
        """
        if self.ended:
            return True
        weight = weight_of(item)
        waiting = self._waiting()
        if extra:
            self._add_extra(1, weight)
        elif self._is_full(waiting):
            return False
        self._accepted += 1
        if waiting >= self._peak:
            self._peak = waiting + 1
        if self._holds:
            self._hold(item, weight)
        else:
            self._queue.append(item, weight)
            self._wake(1)
        return True

    def push_many(self, items: Sequence[T], each: int | None = None) -> int:
        """
        Accept items in order, as many as there is space for.

        :param items: the items, which must not be changed afterwards
        :param each: the weight of each item, in bytes; ``None`` if the weights differ
        :return: the number of accepted items; all of them after the end
        """
        if self.ended:
            return len(items)
        if self._holds:
            return sum(1 for _ in takewhile(self.push, items))
        extra, extra_bytes = self.extra
        waiting = self._waiting()
        space = self._buffer + extra - waiting
        if len(items) > space:
            items = items[:space]
        sums: Sequence[int]
        sums = cumulative_weights(items) if each is None else range(0, each * len(items) + 1, each)
        space = MAX_BYTES + extra_bytes - self._queue.weigh()
        if sums[-1] >= space:
            # An item fits if the items before it leave at least one byte.
            fits = min(bisect_left(sums, space), len(items))
            items, sums = items[:fits], sums[: fits + 1]
        self._accepted += len(items)
        if waiting + len(items) > self._peak:
            self._peak = waiting + len(items)
        self._queue.extend(items, sums)
        self._wake(len(items))
        return len(items)

    def push_or_drop(self, item: T) -> None:
        """
        Accept one item, or apply the overflow policy.

        ``"block"`` does what ``"raise"`` does, because this method does not wait.
        """
        while not self.push(item):
            self._dropped += 1
            if self._overflow == "drop_oldest":
                self._drop_oldest()
                continue
            if self._overflow != "drop_newest":
                self._note_missing()
            return

    async def put(self, item: T) -> None:
        """Accept one item when there is space, or apply the overflow policy."""
        if not self.push(item):
            await self.wait_for_space()
            self.push_or_drop(item)

    async def wait_for_space(self) -> None:
        """
        Give a busy consumer several turns to make space; with ``"block"``, wait until it does.
        """
        while self._is_full(self._waiting()) and self._stalled_at != (received := self.received):
            for _ in range(PATIENCE_TURNS):
                await checkpoint()
                if self.received != received:
                    break
            else:
                # The consumer awaits something else. It gets turns again after it has received.
                self._stalled_at = received
        while self.blocks:
            space_event = self._space_event = self._space_event or anyio.Event()
            self.tasks_waiting += 1
            try:
                await space_event.wait()
            finally:
                self.tasks_waiting -= 1

    @property
    def blocks(self) -> bool:
        """Whether the reader must now wait for this stream."""
        return self._overflow == "block" and not self._holds and self._is_full(self._waiting())

    def put_in_front(self, items: Sequence[T]) -> None:
        """Put items before the buffered ones. They need no space."""
        if items and not self.ended:
            self._queue.extend_left(items, self._add_extras(items))
            self._wake(len(items))

    # Holding back

    def hold(self) -> None:
        """
        Hold back new items until :meth:`release` has been called the same number of times.

        Items that are held back need space in the buffer. Waiting for space would never end,
        because no consumer can receive them, so ``"block"`` does what ``"raise"`` does.
        """
        self._holds += 1

    def release(self) -> None:
        """Undo one call of :meth:`hold`."""
        self._holds = max(0, self._holds - 1)
        if not self._holds:
            self._release_all()

    def put_ahead(self, items: Sequence[T]) -> None:
        """Put items after the buffered ones and before those held back. They need no space."""
        if items and not self.ended:
            self._queue.extend(items, self._add_extras(items))
            self._wake(len(items))

    def replace_held(self, old: T, new: T) -> None:
        """Replace an item that is held back, in each of its places, by one of the same weight."""
        for index, (item, weight) in enumerate(self._held):
            if item is old:
                self._held[index] = new, weight

    # The end

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """
        Accept nothing more. The buffered items can still be received.

        :param error: makes the exception that receiving raises after them; ``None`` ends the stream
            normally
        """
        if not self.ended:
            self._release_all()
            self.ended = True
            self._error = error
            self._wake(len(self._waiters))
            self.wake_senders()

    def leave(self) -> None:
        """Accept nothing more, because the user has left the stream."""
        self.end()
        on_leave, self._on_leave = self._on_leave, None
        if on_leave is not None:
            on_leave(self)

    def drain(self) -> list[T]:
        """Remove and return the items that can no longer be received: none while an end is open."""
        if self._receive_ends:
            return []
        items = [item for item in self.items if not isinstance(item, Missing)]
        self.items.clear()
        self._accepted -= len(items)
        self._missing_count = 0
        return items

    # Methods for receive ends

    def open_receive_end(self) -> None:
        """Count a new receive end."""
        self._receive_ends += 1

    def close_receive_end(self) -> None:
        """Count a closed receive end, and wake all tasks that wait for an item."""
        self._receive_ends -= 1
        self._wake(len(self._waiters))
        if not self._receive_ends:
            self.leave()
            self.drain()

    def check_end(self) -> None:
        """
        Raise the end of the stream, if it has ended.

        :raises ~anyio.EndOfStream: after a normal end
        :raises Exception: the exception that was passed to :meth:`end`
        """
        if self.ended:
            raise EndOfStream if self._error is None else self._error()

    def expect_item(self) -> Wakeup:
        """Return a wakeup that the calling task must await, because no item is buffered."""
        if self._make_wakeup is None:
            self._make_wakeup = current_backend().make_wakeup
        waiter = self._make_wakeup()
        self._waiters.append(waiter)
        return waiter

    def wake_another(self, waiter: Wakeup | None) -> None:
        """Wake another task, because the calling task will not take the item that it awaited."""
        if waiter is not None and waiter in self._waiters:
            self._waiters.remove(waiter)
        elif self.items:
            self._wake(1)

    def wake_senders(self) -> None:
        """Wake the tasks that wait for space, so that they check again."""
        if self._space_event is not None:
            self._space_event.set()
            self._space_event = None

    def note_missing_received(self, missing: Missing) -> SlowConsumerError:
        """Return the error to raise in the place of a marker that was received."""
        self._missing_count -= 1
        return SlowConsumerError(
            f"{self.what}: dropped {missing.dropped} here, because the buffer was full "
            f"(buffer={self._buffer}, 8 MiB); receive again to continue, or use a larger buffer= "
            "or another overflow=",
            dropped=missing.dropped,
        )

    # Statistics

    @property
    def dropped(self) -> int:
        """The number of items that were dropped because the buffer was full."""
        return self._dropped

    @property
    def gaps(self) -> int:
        """The number of lost connections."""
        return self._gaps

    @property
    def received(self) -> int:
        """The number of items that were received."""
        return self._accepted - self._waiting()

    @property
    def extra(self) -> tuple[int, int]:
        """The number of buffered items that need no space, and their maximum weight in bytes."""
        count = max(0, self._extra_until - self.received)
        return count, self._extra_bytes if count else 0

    def note_gap(self) -> None:
        """Note that the connection was lost, so that messages might be missing."""
        self._gaps += 1

    def note_undecoded(self) -> None:
        """Count a received message that could not be decoded."""
        self._undecoded += 1

    def statistics(self) -> StreamStatistics:
        """Return the statistics; any thread may call this."""
        weight, since = self._queue.measure()
        return StreamStatistics(
            current_buffer_used=self._waiting(),
            max_buffer_size=self._buffer,
            open_send_streams=int(not self.ended),
            open_receive_streams=self._receive_ends,
            tasks_waiting_send=self.tasks_waiting,
            tasks_waiting_receive=len(self._waiters),
            buffered_bytes=weight + self._held_bytes,
            received=self.received,
            dropped=self._dropped,
            gaps=self._gaps,
            peak=self._peak,
            waiting_since=None if since is None else datetime.fromtimestamp(since, UTC),
            undecoded=self._undecoded,
        )

    def _waiting(self) -> int:
        return len(self.items) + len(self._held) - self._missing_count

    def _is_full(self, waiting: int) -> bool:
        if self.ended:
            return False
        bytes = self._queue.weigh() + self._held_bytes
        if waiting < self._buffer and bytes < MAX_BYTES:
            return False
        extra, extra_bytes = self.extra
        return waiting - extra >= self._buffer or bytes - extra_bytes >= MAX_BYTES

    def _add_extra(self, count: int, weight: int) -> None:
        waiting, bytes = self.extra
        self._extra_until = self.received + waiting + count
        self._extra_bytes = bytes + weight

    def _add_extras(self, items: Sequence[T]) -> Sequence[int]:
        sums = cumulative_weights(items)
        self._add_extra(len(items), sums[-1])
        self._accepted += len(items)
        self._peak = max(self._peak, self._waiting() + len(items))
        return sums

    def _hold(self, item: T | Missing, weight: int) -> None:
        self._held.append((item, weight))
        self._held_bytes += weight

    def _release_all(self) -> None:
        for item, weight in self._held:
            self._queue.append(item, weight)
        self._wake(len(self._held))
        self._held.clear()
        self._held_bytes = self._holds = 0

    def _drop_oldest(self) -> None:
        self._accepted -= 1
        if self.items:
            self.items.popleft()
        else:
            self._held_bytes -= self._held.popleft()[1]

    def _note_missing(self) -> None:
        if self._holds:
            last = self._held[-1][0] if self._held else None
        else:
            last = self.items[-1] if self.items else None
        if isinstance(last, Missing):
            last.add_one()
            return
        self._missing_count += 1
        if self._holds:
            self._hold(Missing(), 0)
        else:
            self._queue.append(Missing(), 0)
            self._wake(1)

    def _wake(self, count: int) -> None:
        """Wake as many tasks as there are new items."""
        while count > 0 and self._waiters:
            self._waiters.popleft().set()
            count -= 1
