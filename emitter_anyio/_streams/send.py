"""The send end of a stream: its buffer, and what happens when it is full."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Generic, Literal, TypeAlias, TypeVar, get_args

import anyio
from anyio import EndOfStream
from anyio.lowlevel import checkpoint

from emitter_anyio._backend import Owner, Wakeup, current_backend
from emitter_anyio._values.checks import is_int
from emitter_anyio._values.errors import SlowConsumerError

from .queue import MAX_BYTES, Queue, sums_of_weights, weight_of

T = TypeVar("T")

Overflow: TypeAlias = Literal["raise", "drop_oldest", "drop_newest", "block"]
"""What happens when a buffer is full."""

PATIENCE_TURNS: Final = 8
"""How many turns of the event loop a full buffer gets to shrink. The consumer might go through a
few checkpoints of its own, and Trio runs the tasks that are ready in any order."""


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """
    Figures of one stream; those of AnyIO's memory object streams come first.

    :ivar current_buffer_used: how many items wait to be received
    :ivar max_buffer_size: how many items can wait, beside those that were replayed or resumed
    :ivar open_send_streams: 1 while more items might come, else 0
    :ivar open_receive_streams: how many receive ends are open: the stream and its clones
    :ivar tasks_waiting_send: how many tasks wait for space in the buffer
    :ivar tasks_waiting_receive: how many tasks wait for an item
    :ivar buffered_bytes: how many bytes the items weigh that wait: the payload and the channel of
        each message, and 128 bytes for each item
    :ivar received: how many items have been received
    :ivar dropped: how many items were dropped because the buffer was full
    :ivar gaps: how many times the connection was lost, so that messages might be missing
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


class Missing:
    """
    A place in a buffer at which items are missing.

    :ivar dropped: how many
    """

    def __init__(self) -> None:
        self.dropped: int = 1

    def add_one(self) -> None:
        """Count one more."""
        self.dropped += 1


def check_buffer(buffer: int, overflow: Overflow) -> None:
    """
    Check the size and the policy of a buffer.

    :raises TypeError: if ``buffer`` is not an int
    :raises ValueError: if it is less than 1, or the policy is unknown
    """
    if not is_int(buffer):
        raise TypeError(f"buffer is a whole number of messages, not {type(buffer).__name__}")
    if buffer < 1:
        raise ValueError(f"buffer is at least 1 message, not {buffer}")
    if overflow not in get_args(Overflow):
        policies = ", ".join(map(repr, get_args(Overflow)))
        raise ValueError(f"overflow is one of {policies}, not {overflow!r}")


class Sender(Generic[T]):
    """
    The send end of a stream, which owns the buffer. There is one for all receive ends.

    An item stays in the buffer until the task that receives it runs, so that cancelling that task
    in the same turn loses nothing.

    :param what: the name of the stream in errors
    :param buffer: how many items can wait, of at most 8 MiB
    :param overflow: what happens to more
    :param left: is called once with the send end, when the last receive end was closed or the
        user's block was left

    :ivar items: what can be received, with a :class:`Missing` where items were dropped. Receive
        ends take items out
    :ivar owner: the thread and event loop in which items are received
    :ivar ended: whether nothing more comes in
    :ivar tasks_waiting: how many tasks wait for space
    """

    def __init__(
        self,
        what: str,
        buffer: int,
        overflow: Overflow,
        left: Callable[[Sender[T]], object] | None = None,
    ) -> None:
        self.what = what
        self.owner: Owner = Owner()
        self.owner.claim()
        self._buffer = buffer
        self._overflow: Overflow = overflow
        self._left = left
        self._queue: Queue[T | Missing] = Queue()
        self.items: deque[T | Missing] = self._queue.items
        self._held: deque[tuple[T | Missing, int]] = deque()
        """What is held back, each with its weight."""
        self._held_bytes = 0
        self._holds = 0
        self._places = 0
        """How many :class:`Missing` are buffered or held back."""
        self._accepted = 0
        """How many items have come in and have not been dropped since."""
        self._extra_until = 0
        """How many items will have been received when none of those that need no space is left."""
        self._extra_bytes = 0
        self._dropped = 0
        self._gaps = 0
        self._stalled_at: int | None = None
        """How many items had been received when the consumer last used none of its turns."""
        self.ended: bool = False
        self._error: Callable[[], Exception] | None = None
        self._receive_ends = 0
        self._make_wakeup: Callable[[], Wakeup] | None = None
        self._receivers: deque[Wakeup] = deque()
        self._departure: anyio.Event | None = None
        self.tasks_waiting: int = 0

    # Putting in

    def push(self, item: T, *, extra: bool = False) -> bool:
        """
        Put in one item.

        :param extra: whether it needs no space, as a message that the broker replays
        :return: whether there was space; ``True`` after the end
        """
        if self.ended:
            return True
        weight = weight_of(item)
        if extra:
            self._add_extra(1, weight)
        elif self._is_full():
            return False
        self._accepted += 1
        if self._holds:
            self._hold(item, weight)
        else:
            self._queue.append(item, weight)
            self._wake(1)
        return True

    def push_many(self, items: Sequence[T], each: int | None = None) -> int:
        """
        Put in items, from the first to as many as there is space for.

        :param items: must not be changed afterwards
        :param each: how many bytes each of them weighs; ``None`` if they differ
        :return: for how many there was space; all after the end
        """
        if self.ended:
            return len(items)
        if self._holds:
            return sum(1 for _ in takewhile(self.push, items))
        extra, extra_bytes = self.extra
        space = self._buffer + extra - self._waiting()
        if len(items) > space:
            items = items[:space]
        sums: Sequence[int]
        sums = sums_of_weights(items) if each is None else range(0, each * len(items) + 1, each)
        space = MAX_BYTES + extra_bytes - self._queue.weigh()
        if sums[-1] >= space:
            # An item fits if those before it leave a byte.
            fits = min(bisect_left(sums, space), len(items))
            items, sums = items[:fits], sums[: fits + 1]
        self._accepted += len(items)
        self._queue.extend(items, sums)
        self._wake(len(items))
        return len(items)

    def push_or_drop(self, item: T) -> None:
        """
        Put in an item. If the buffer is full, do what the policy demands; ``"block"`` does what
        ``"raise"`` does, because this method does not wait.
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
        """Put in an item when there is space, or do what the policy demands."""
        if not self.push(item):
            await self.make_room()
            self.push_or_drop(item)

    async def make_room(self) -> None:
        """
        Give a consumer that is merely busy its turns; with ``"block"`` wait until there is space.
        """
        while self._is_full() and self._stalled_at != (received := self.received):
            for _ in range(PATIENCE_TURNS):
                await checkpoint()
                if self.received != received:
                    break
            else:
                # It waits for something else. It gets its turns again after it has received.
                self._stalled_at = received
        while self.blocks:
            departure = self._departure = self._departure or anyio.Event()
            self.tasks_waiting += 1
            try:
                await departure.wait()
            finally:
                self.tasks_waiting -= 1

    @property
    def blocks(self) -> bool:
        """Whether the connection must wait for this stream now."""
        return self._overflow == "block" and not self._holds and self._is_full()

    def put_in_front(self, items: Sequence[T]) -> None:
        """Put items before what is buffered, where they need no space."""
        if items and not self.ended:
            self._queue.extend_left(items, self._add_extras(items))
            self._wake(len(items))

    # Holding back

    def hold(self) -> None:
        """
        Hold back what comes from now on, until :meth:`release` was called as many times.

        What is held back takes its space in the buffer. No consumer can receive it, so nothing
        waits for space: ``"block"`` does what ``"raise"`` does.
        """
        self._holds += 1

    def release(self) -> None:
        """Undo one :meth:`hold`."""
        self._holds = max(0, self._holds - 1)
        if not self._holds:
            self._release_all()

    def put_ahead(self, items: Sequence[T]) -> None:
        """Put items after what is buffered and before what is held, where they need no space."""
        if items and not self.ended:
            self._queue.extend(items, self._add_extras(items))
            self._wake(len(items))

    def replace_held(self, old: T, new: T) -> None:
        """Put another item of the same weight in each place where one object is held."""
        for index, (item, weight) in enumerate(self._held):
            if item is old:
                self._held[index] = new, weight

    # The end

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """
        Take in nothing more. What is buffered can still be received.

        :param error: makes what receiving raises after that; ``None`` is a normal end
        """
        if not self.ended:
            self._release_all()
            self.ended = True
            self._error = error
            self._wake(len(self._receivers))
            self.note_departure()

    def leave(self) -> None:
        """Take in nothing more, because the user has left the stream."""
        self.end()
        left, self._left = self._left, None
        if left is not None:
            left(self)

    def drain(self) -> list[T]:
        """Take out what no receive end can receive any more: nothing while one is open."""
        if self._receive_ends:
            return []
        items = [item for item in self.items if not isinstance(item, Missing)]
        self.items.clear()
        self._accepted -= len(items)
        self._places = 0
        return items

    # What receive ends call

    def open_receive_end(self) -> None:
        """Note that one was opened."""
        self._receive_ends += 1

    def close_receive_end(self) -> None:
        """Note that one was closed, and have all tasks that wait for an item look again."""
        self._receive_ends -= 1
        self._wake(len(self._receivers))
        if not self._receive_ends:
            self.leave()
            self.drain()

    def check_end(self) -> None:
        """
        Do nothing while items might come.

        :raises ~anyio.EndOfStream: after a normal end
        :raises Exception: what :meth:`end` was given
        """
        if self.ended:
            raise EndOfStream if self._error is None else self._error()

    def expect_item(self) -> Wakeup:
        """Return what the calling task must wait for because there is no item."""
        if self._make_wakeup is None:
            self._make_wakeup = current_backend().make_wakeup
        receiver = self._make_wakeup()
        self._receivers.append(receiver)
        return receiver

    def wake_another(self, receiver: Wakeup | None) -> None:
        """Wake another task, because the calling task does not take the item that it waited for."""
        if receiver is not None and receiver in self._receivers:
            self._receivers.remove(receiver)
        elif self.items:
            self._wake(1)

    def note_departure(self) -> None:
        """Have the tasks that wait for space look again."""
        if self._departure is not None:
            self._departure.set()
            self._departure = None

    def note_missing_received(self, missing: Missing) -> SlowConsumerError:
        """Return the error for the place at which items are missing, which was taken out."""
        self._places -= 1
        return SlowConsumerError(
            f"{self.what}: the buffer of {self._buffer} was full and {missing.dropped} were "
            "dropped here; receive again for what follows, or give a larger buffer= or "
            "another overflow=",
            dropped=missing.dropped,
        )

    # Figures

    @property
    def dropped(self) -> int:
        """How many items were dropped because the buffer was full."""
        return self._dropped

    @property
    def gaps(self) -> int:
        """How many times the connection was lost."""
        return self._gaps

    @property
    def received(self) -> int:
        """How many items have been received."""
        return self._accepted - self._waiting()

    @property
    def extra(self) -> tuple[int, int]:
        """How many items wait that need no space, and how many bytes they weigh at most."""
        count = max(0, self._extra_until - self.received)
        return count, self._extra_bytes if count else 0

    def note_gap(self) -> None:
        """Note that the connection was lost, so that messages might be missing."""
        self._gaps += 1

    def statistics(self) -> StreamStatistics:
        """Return the figures; any thread may call this."""
        return StreamStatistics(
            current_buffer_used=self._waiting(),
            max_buffer_size=self._buffer,
            open_send_streams=int(not self.ended),
            open_receive_streams=self._receive_ends,
            tasks_waiting_send=self.tasks_waiting,
            tasks_waiting_receive=len(self._receivers),
            buffered_bytes=self._queue.total() + self._held_bytes,
            received=self.received,
            dropped=self._dropped,
            gaps=self._gaps,
        )

    def _waiting(self) -> int:
        return len(self.items) + len(self._held) - self._places

    def _is_full(self) -> bool:
        if self.ended:
            return False
        waiting = self._waiting()
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
        sums = sums_of_weights(items)
        self._add_extra(len(items), sums[-1])
        self._accepted += len(items)
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
        self._places += 1
        if self._holds:
            self._hold(Missing(), 0)
        else:
            self._queue.append(Missing(), 0)
            self._wake(1)

    def _wake(self, count: int) -> None:
        """Wake as many tasks as there are new items."""
        while count > 0 and self._receivers:
            self._receivers.popleft().set()
            count -= 1
