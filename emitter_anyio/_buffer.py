"""What waits for a consumer: its places, its bytes, and whom to wake.

What comes in one go goes through all of this in one go, as each step for each message would cost as
much as to read it. What is taken is taken one by one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Final, Generic, Literal, TypeAlias, TypeVar, get_args

import anyio
from anyio import EndOfStream, WouldBlock
from anyio.lowlevel import checkpoint

from ._backend import Owner, Wakeup, wakeup_maker
from ._checks import is_whole
from ._errors import SlowConsumerError
from ._messages import ITEM_BYTES, EmitterMessage
from ._requests import PresenceEvent

T = TypeVar("T")

Overflow: TypeAlias = Literal["raise", "drop_oldest", "drop_newest", "block"]
"""What happens when a buffer is full."""

_TURN: Final = 64
"""At each so many items, others get a turn."""

MAX_BYTES: Final = 8 * 1024 * 1024
"""A buffer whose messages weigh so many bytes is full, however few they are."""


class _Missing:
    """The place in a buffer at which messages are missing."""

    def __init__(self) -> None:
        self.dropped = 0


_Batch: TypeAlias = tuple[list[T], int]
"""Items that came in one go, and how many bytes they weigh."""

_payload = attrgetter("binary")
_channel = attrgetter("channel")


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
        self._owner = Owner()
        self._owner.claim()
        self._ready: deque[T] = deque()
        """The items of the batches that have been taken out."""
        self._held: deque[T | _Missing] = deque()
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
        self._extra_bytes = 0
        """How many bytes they weighed at most."""
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
        :param each: how many bytes each of them weighs, if that is known
        :param extra: whether to let them in beside the buffer, as what the broker replays
        :return: how many are dealt with
        """
        if self._ended:
            return len(items)
        if extra:
            self._count()
        elif len(items) > self._room:
            items = items[: self._count()]
        size = weight_of(items) if each is None else each * len(items)
        if not extra and self._bytes + size >= MAX_BYTES + self._extra_bytes:
            items = self._with_bytes_to_spare(items)
            size = weight_of(items)
        if items:
            if extra:
                self._extra += len(items)
                self._extra_bytes += size
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
        """
        Hold back what comes from now on, until as many :meth:`release` have followed.

        What is held back is in the buffer like all else. No consumer can take it, so nothing waits
        for room meanwhile: ``"block"`` does what ``"raise"`` does.
        """
        self._holds += 1
        self._missing = None

    def release(self) -> None:
        """Let through what was held back, unless somebody else holds it, too."""
        self._holds = max(0, self._holds - 1)
        if not self._holds:
            self._release_all()

    def replace_held(self, old: T, new: T) -> None:
        """Put another item in the place of each held one that equals it."""
        self._held = deque(new if item == old else item for item in self._held)

    def put_ahead(self, items: Iterable[T]) -> None:
        """Put items behind what is buffered and before what is held, beside the buffer."""
        holds, self._holds = self._holds, 0
        missing = self._missing
        for item in items:
            self.push(item, extra=True)
        self._holds, self._missing = holds, missing

    def put_in_front(self, items: Sequence[T]) -> None:
        """Put items before what is buffered, beside the buffer."""
        if not self._ended:
            self._count()
            self._weigh()
            size = weight_of(items)
            self._extra += len(items)
            self._extra_bytes += size
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
        held, self._held, self._holds = self._held, deque(), 0
        for item in held:
            self._put(item if isinstance(item, _Missing) else ([item], weight_of([item])))

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
        self._owner.check()
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
            size = weight_of([self._ready.popleft()])
            self._ready_bytes -= size
        else:
            size = weight_of([self._held.popleft()])
        self._bytes -= size

    async def _more(self) -> None:
        """Make ready what is next, or wait for it; somebody else may take it."""
        self._owner.check()
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
        if self._count() <= 0:
            return True
        most = MAX_BYTES + self._extra_bytes
        return self._bytes >= most and self._weigh() >= most

    @property
    def beside(self) -> tuple[int, int]:
        """How many items wait beside the buffer, and how many bytes they weigh at most."""
        self._count()
        return self._extra, self._extra_bytes

    def _waiting(self) -> tuple[int, int]:
        """Give how many items wait, and their bytes; nothing changes: other threads may ask."""
        count = self._buffer - self._room + self._extra - (self._taken - self._counted)
        return count, self._bytes - self._ready_bytes + weight_of([*self._ready])

    def _count(self) -> int:
        """Give how many more may wait."""
        taken, self._counted = self._taken - self._counted, self._taken
        beside = min(taken, self._extra)
        self._extra -= beside
        if not self._extra:
            self._extra_bytes = 0
        self._room += taken - beside
        return self._room

    def _weigh(self) -> int:
        """Give how many bytes wait."""
        if self._weighed != self._taken:
            self._weighed = self._taken
            left = weight_of(self._ready)
            self._bytes -= self._ready_bytes - left
            self._ready_bytes = left
        return self._bytes

    def _with_bytes_to_spare(self, items: list[T]) -> list[T]:
        self._count()
        size, most, chosen = self._weigh(), MAX_BYTES + self._extra_bytes, list[T]()
        for item in items:
            if size >= most:
                break
            chosen.append(item)
            size += weight_of([item])
        return chosen


def weight_of(items: Collection[object]) -> int:
    """
    Give how many bytes items weigh: the payload and the channel of each message, what a change of
    presence says of each member, and for each item what Python keeps around it.
    """
    own = ITEM_BYTES * len(items)
    try:
        return own + sum(map(len, map(_payload, items))) + sum(map(len, map(_channel, items)))
    except AttributeError:
        return own + sum(map(_text_of, items))


def _text_of(item: object) -> int:
    if isinstance(item, EmitterMessage):
        return len(item.binary) + len(item.channel)
    if isinstance(item, PresenceEvent):
        return sum(ITEM_BYTES + len(one.id) + len(one.username or "") for one in item.who)
    return 0
