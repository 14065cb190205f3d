"""What waits for a consumer: its places, its bytes, and whom to wake.

What comes in one go goes through all of this in one go, as each step for each message would cost as
much as to read it. What is taken is taken one by one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Final, Generic, Literal, TypeAlias, TypeVar, get_args

import anyio
from anyio import EndOfStream, WouldBlock
from anyio.lowlevel import checkpoint

from ._backend import Wakeup, wakeup_maker
from ._channels import is_whole
from ._errors import SlowConsumerError
from ._messages import EmitterMessage

T = TypeVar("T")

Overflow: TypeAlias = Literal["raise", "drop_oldest", "drop_newest", "block"]
"""What happens when a buffer is full."""

_TURN: Final = 64
"""At each so many items, others get a turn."""

MAX_BYTES: Final = 8 * 1024 * 1024
"""A buffer that holds so many bytes of payload is full, however few its messages are."""


class _Missing:
    """The place in a buffer at which messages are missing."""

    def __init__(self) -> None:
        self.dropped = 0


_Batch: TypeAlias = tuple[list[T], int]
"""Items that came in one go, and how many bytes of payload they have."""

_payload = attrgetter("binary")


def check_buffer(buffer: int, overflow: Overflow) -> None:
    """
    Check what the user says of a buffer.

    :raises TypeError: if ``buffer`` is no whole number
    :raises ValueError: if it is less than 1, or the policy is unknown
    """
    if not is_whole(buffer):
        raise TypeError(f"buffer is a whole number of messages, not {type(buffer).__name__}")
    if buffer < 1:
        raise ValueError(f"buffer is at least 1 message, not {buffer}")
    if overflow not in get_args(Overflow):
        policies = ", ".join(map(repr, get_args(Overflow)))
        raise ValueError(f"overflow is one of {policies}, not {overflow!r}")


class Buffer(Generic[T]):
    """
    What an :class:`~emitter_anyio.EventStream` has of its buffer.

    :param what: what it is called in errors
    :param buffer: how many items wait at most
    :param overflow: what happens to more
    """

    def __init__(self, what: str, buffer: int, overflow: Overflow) -> None:
        # It is used without waiting alone: its own receive() hands an item over a turn early, where
        # a cancellation can lose it.
        self._in, self._out = anyio.create_memory_object_stream["_Batch[T] | _Missing"](math.inf)
        self._queued = 0
        """How many batches and gaps are in it."""
        self._ready: deque[T] = deque()
        """The items of the batches that have been taken out."""
        self._held: list[T | _Missing] = []
        self._holds = 0
        self._missing: _Missing | None = None
        """The gap behind which nothing has come yet."""
        self._what = what
        self._buffer = buffer
        self._overflow: Overflow = overflow
        self._taken = 0
        self._stop = _TURN - 1
        """At so many taken, who takes one more sees to others first."""
        self._counted = 0
        """How many had been taken when what waits was last counted."""
        self._room = buffer
        """How many more might wait then."""
        self._extra = 0
        """How many waited beside the buffer then."""
        self._weighed = 0
        """How many had been taken when what waits was last weighed."""
        self._bytes = 0
        """How many bytes waited then."""
        self._ready_bytes = 0
        """How many of them were ready."""
        self._make_wakeup: Callable[[], Wakeup] | None = None
        self._arrivals: list[Wakeup] = []
        self._departure: anyio.Event | None = None
        self._ended = False
        self._error: Callable[[], Exception] | None = None

    # Putting in

    def push(self, item: T, *, extra: bool = False) -> bool:
        """Put one item in, as :meth:`push_many` does; tells whether it is dealt with."""
        return bool(self.push_many([item], extra=extra))

    def push_many(self, items: list[T], each: int | None = None, *, extra: bool = False) -> int:
        """
        Put items in, as many as there is room for.

        :param items: the list is not to be changed any more
        :param each: how many bytes of payload each of them has, if that is known
        :param extra: whether to let them in beside the buffer, as what the broker replays
        :return: how many are dealt with
        """
        if self._ended:
            return len(items)
        # What is held back cannot be taken by the best of consumers, nor may it keep the link
        # from bringing what it waits for.
        beside = extra or bool(self._holds)
        if beside:
            self._count()
        elif len(items) > self._room:
            items = items[: self._count()]
        size = _bytes_of(items) if each is None else each * len(items)
        unlimited = extra or (self._holds and self._overflow == "block")
        if self._bytes + size >= MAX_BYTES and not unlimited:
            items = self._with_bytes_to_spare(items)
            size = _bytes_of(items)
        if items:
            if beside:
                self._extra += len(items)
            else:
                self._room -= len(items)
            self._bytes += size
            self._missing = None
            if self._holds:
                self._held += items
            else:
                self._put((items, size))
        return len(items)

    def hold(self) -> None:
        """Hold back what comes from now on, until as many :meth:`release` have followed."""
        self._holds += 1

    def release(self) -> None:
        """Let through what was held back, unless somebody else holds it, too."""
        self._holds = max(0, self._holds - 1)
        if not self._holds:
            self._release_all()

    def replace_held(self, old: T, new: T) -> None:
        """Put another item in the place of each held one that equals it."""
        self._held = [new if item == old else item for item in self._held]

    def put_ahead(self, items: Iterable[T]) -> None:
        """Put items behind what is buffered and before what is held, beside the buffer."""
        holds, self._holds = self._holds, 0
        for item in items:
            self.push(item, extra=True)
        self._holds = holds

    def put_in_front(self, items: Sequence[T]) -> None:
        """Put items before what is buffered, beside the buffer."""
        if not self._ended:
            self._count()
            self._weigh()
            size = _bytes_of(items)
            self._extra += len(items)
            self._bytes += size
            self._ready_bytes += size
            self._ready.extendleft(reversed(items))
            self._wake_receivers()

    def _note_missing(self) -> None:
        if self._missing is None:
            self._missing = _Missing()
            if self._holds:
                self._held.append(self._missing)
            else:
                self._put(self._missing)
        self._missing.dropped += 1

    def _release_all(self) -> None:
        held, self._held, self._holds = self._held, [], 0
        for item in held:
            self._put(item if isinstance(item, _Missing) else ([item], _bytes_of([item])))

    def _put(self, batch: _Batch[T] | _Missing) -> None:
        self._in.send_nowait(batch)
        self._queued += 1
        if self._arrivals:
            self._wake_receivers()

    def _wake_receivers(self) -> None:
        for arrival in self._arrivals:
            arrival.set()
        self._arrivals.clear()

    # Taking out

    def drain(self) -> list[T]:
        """Take out all that is buffered."""
        while self._queued:
            with suppress(SlowConsumerError):
                self._make_ready()
        items = [*self._ready]
        self._ready.clear()
        self._room += len(items)
        self._bytes -= self._ready_bytes
        self._ready_bytes = 0
        return items

    async def _pause(self) -> None:
        """See to others before one is taken: so each item asks one question, not two."""
        if self._taken % _TURN == _TURN - 1:
            await checkpoint()
        self._stop = self._taken + _TURN - (self._taken + 1) % _TURN
        self._depart()

    def _depart(self) -> None:
        """Tell who waits for it that there is room, or will be no need of it; the one who is about
        to take an item says so, and does it before anybody else has a turn."""
        if self._departure is not None:
            self._departure.set()
            self._departure = None

    def _drop_oldest(self) -> None:
        self._room += 1
        if self._queued and not self._ready:
            self._make_ready()
        if self._ready:
            size = _bytes_of([self._ready.popleft()])
            self._ready_bytes -= size
        else:
            size = _bytes_of([self._held.pop(0)])
        self._bytes -= size

    async def _more(self) -> None:
        """Make ready what is next, or wait for it; somebody else may take it."""
        if self._queued or self._ended:
            self._make_ready()
        else:
            if self._make_wakeup is None:
                self._make_wakeup = wakeup_maker()
            arrival = self._make_wakeup()
            self._arrivals.append(arrival)
            try:
                await arrival.wait()
            finally:
                if arrival in self._arrivals:
                    self._arrivals.remove(arrival)
        self._depart()

    def _make_ready(self) -> None:
        if not self._queued:
            if not self._ended:
                raise WouldBlock
            raise EndOfStream if self._error is None else self._error()
        self._queued -= 1
        batch = self._out.receive_nowait()
        if isinstance(batch, _Missing):
            if batch is self._missing:
                self._missing = None
            raise SlowConsumerError(
                f"{self._what}: the buffer of {self._buffer} was full and {batch.dropped} were "
                "dropped here; receive again for what follows, or give a larger buffer= or "
                "another overflow=",
                dropped=batch.dropped,
            )
        items, size = batch
        if not self._ready:
            self._bytes -= self._ready_bytes
            self._ready_bytes = 0
        self._ready_bytes += size
        self._ready.extend(items)

    # How much there is: it is not counted at each item that is taken, which would pay for it

    @property
    def _full(self) -> bool:
        if self._ended:
            return False
        return self._count() <= 0 or (self._bytes >= MAX_BYTES and self._weigh() >= MAX_BYTES)

    def _count(self) -> int:
        """Give how many more may wait."""
        taken, self._counted = self._taken - self._counted, self._taken
        beside = min(taken, self._extra)
        self._extra -= beside
        self._room += taken - beside
        return self._room

    def _weigh(self) -> int:
        """Give how many bytes wait."""
        if self._weighed != self._taken:
            self._weighed = self._taken
            left = _bytes_of(self._ready)
            self._bytes -= self._ready_bytes - left
            self._ready_bytes = left
        return self._bytes

    def _with_bytes_to_spare(self, items: list[T]) -> list[T]:
        size, chosen = self._weigh(), list[T]()
        for item in items:
            if size >= MAX_BYTES:
                break
            chosen.append(item)
            size += _bytes_of([item])
        return chosen


def _bytes_of(items: Iterable[object]) -> int:
    """Add up the payloads; what is no message has none."""
    try:
        return sum(map(len, map(_payload, items)))
    except AttributeError:
        return sum(len(item.binary) for item in items if isinstance(item, EmitterMessage))
