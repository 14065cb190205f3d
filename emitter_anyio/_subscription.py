"""Streams with an overflow policy: what every consumer of messages and events holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Generic, Literal, TypeAlias, TypeVar, get_args

import anyio
from anyio import EndOfStream, WouldBlock
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint

from ._backend import Wakeup, wakeup_maker
from ._channels import is_whole
from ._errors import SlowConsumerError
from ._messages import EmitterMessage

T = TypeVar("T")

Overflow: TypeAlias = Literal["raise", "drop_oldest", "drop_newest", "block"]
"""What happens when a buffer is full."""

MAX_BYTES: Final = 8 * 1024 * 1024
"""A buffer that holds so many bytes of payload is full, however few its messages are."""

_TURN: Final = 64

_PATIENCE: Final = 8
"""So many turns of the loop a full buffer is given to shrink: the consumer may go through some
checkpoints of its own, and on Trio those who are ready run in any order."""


class _Missing:
    """The place in a buffer at which messages are missing."""

    def __init__(self) -> None:
        self.dropped = 0


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """
    Figures of one stream.

    :ivar buffered: how many items wait to be received
    :ivar buffered_bytes: how many bytes of payload they have
    :ivar received: how many items have been received
    :ivar dropped: how many items were dropped because the buffer was full
    :ivar gaps: how many times the link was away, so that something may be missing
    """

    buffered: int
    buffered_bytes: int
    received: int
    dropped: int
    gaps: int


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


class EventStream(ObjectReceiveStream[T], Generic[T]):
    """
    A stream of messages or events with a buffer of its own.

    Several tasks may receive from one stream; each item goes to one of them. An item stays in the
    buffer until its receiver runs, so that cancelling :meth:`receive` loses nothing. When the
    stream was left or the client has disconnected, it ends normally, behind what is buffered.

    :param what: what it is called in errors
    :param buffer: how many items wait at most, beside 8 MiB of payload
    :param overflow: what happens to more
    """

    def __init__(self, what: str, buffer: int, overflow: Overflow) -> None:
        # An item is put into the memory-object stream and taken out at once or not at all: its own
        # waiting receive() hands an item over a turn early, where a cancellation can lose it.
        self._in, self._out = anyio.create_memory_object_stream["T | _Missing"](math.inf)
        self._what = what
        self._buffer = buffer
        self._overflow: Overflow = overflow
        self._room = buffer
        """How many more items may wait."""
        self._extra = 0
        """How many wait beside those."""
        self._bytes = 0
        self._taken = 0
        self._stalled = -1
        self._dropped = 0
        self._missing: _Missing | None = None
        self._arrivals: list[Wakeup] = []
        self._departure: anyio.Event | None = None
        self._gaps = 0
        self._holds = 0
        self._held: list[T | _Missing] = []
        self._ended = False
        self._left = False
        self._error: Callable[[], Exception] | None = None

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open"
        return f"<{type(self).__name__} {self._what}, {state}, {self._count} buffered>"

    async def receive(self) -> T:
        """
        Wait for the next item; cancelling it loses none.

        It yields to other tasks at least at every 64th item.

        :raises SlowConsumerError: at the place of a gap, if the policy is ``"raise"``; what came
            after the gap follows
        :raises ~anyio.EndOfStream: if the stream has ended
        :raises ConnectionLostError: if it has ended because the link is gone for good
        """
        if self._taken % _TURN == _TURN - 1:
            await checkpoint()
        while True:
            try:
                return self.receive_nowait()
            except WouldBlock:
                await self._news()

    async def __anext__(self) -> T:
        # Not by receive(), a coroutine that each item would pay for.
        if self._taken % _TURN == _TURN - 1:
            await checkpoint()
        while True:
            try:
                return self.receive_nowait()
            except WouldBlock:
                await self._news()
            except EndOfStream:
                raise StopAsyncIteration from None

    def receive_nowait(self) -> T:
        """
        Take the next item without waiting.

        :raises ~anyio.WouldBlock: if there is none yet
        :raises SlowConsumerError: as :meth:`receive` does
        :raises ~anyio.EndOfStream: as :meth:`receive` does
        """
        if self._left:
            raise EndOfStream
        try:
            item = self._out.receive_nowait()
        except EndOfStream:
            if self._error is not None:
                raise self._error() from None
            raise
        if isinstance(item, EmitterMessage):
            self._bytes -= len(item.binary)
        elif isinstance(item, _Missing):
            if item is self._missing:
                self._missing = None
            raise SlowConsumerError(
                f"{self._what}: the buffer of {self._buffer} was full and {item.dropped} were "
                "dropped here; receive again for what follows, or give a larger buffer= or "
                "another overflow=",
                dropped=item.dropped,
            )
        self._taken += 1
        if self._extra:
            self._extra -= 1
        else:
            self._room += 1
        if self._departure is not None:
            self._departure.set()
            self._departure = None
        return item

    async def aclose(self) -> None:
        """Leave the stream: what is buffered is gone, and nothing more comes; never waits."""
        self.close()

    def close(self) -> None:
        """Do what :meth:`aclose` does."""
        self.end()
        self._left = True
        self._out.close()

    def statistics(self) -> StreamStatistics:
        """Return the figures of this stream."""
        return StreamStatistics(self._count, self._bytes, self._taken, self._dropped, self._gaps)

    # The side of the client

    @property
    def dropped(self) -> int:
        """How many items were dropped because the buffer was full."""
        return self._dropped

    def push(self, item: T, *, extra: bool = False) -> bool:
        """
        Put an item in, if there is room.

        :param extra: whether to let it in beside the buffer, as what the broker replays
        :return: whether it is dealt with
        """
        if self._ended:
            return True
        if extra or (self._holds and (self._overflow == "block" or self._bytes < MAX_BYTES)):
            # What is held back cannot be taken by the best of consumers, nor may it keep the link
            # from bringing what it waits for.
            self._extra += 1
        elif self._room <= 0 or self._bytes >= MAX_BYTES:
            return False
        else:
            self._room -= 1
        if isinstance(item, EmitterMessage):
            self._bytes += len(item.binary)
        if self._holds or self._arrivals:
            self._put(item)
        else:
            self._in.send_nowait(item)
        self._missing = None
        return True

    async def make_room(self) -> None:
        """
        Give a consumer that is merely busy its turn; under ``"block"`` wait as long as it takes.
        """
        while self._full and self._stalled != self._taken:
            taken = self._taken
            for _ in range(_PATIENCE):
                await checkpoint()
                if self._taken != taken:
                    break
            else:
                # It waits for something else. Until it comes back, it costs the link no time.
                self._stalled = taken
        while self._full and self._overflow == "block":
            departure = self._departure = self._departure or anyio.Event()
            await departure.wait()

    @property
    def ended(self) -> bool:
        """Tell whether nothing more comes in."""
        return self._ended

    @property
    def blocks(self) -> bool:
        """Tell whether the link is to wait for this stream now."""
        return self._overflow == "block" and self._full

    def push_or_drop(self, item: T) -> None:
        """Put an item in; if there is no room, do as the policy says."""
        while not self.push(item):
            if self._overflow == "block":
                self.push(item, extra=True)
                return
            self._dropped += 1
            if self._overflow == "drop_oldest":
                self._forget(self._take_oldest())
                continue
            if self._overflow == "raise":
                if self._missing is None:
                    self._missing = _Missing()
                    self._put(self._missing)
                self._missing.dropped += 1
            return

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """Let nothing more in; what is buffered can still be received, then comes the error."""
        if not self._ended:
            self._release_all()
            self._ended = True
            self._error = error
            self._in.close()
            self._wake()

    def drain(self) -> list[T]:
        """Take out all that is buffered."""
        items = [item for item in self._take_all() if not isinstance(item, _Missing)]
        for item in items:
            self._forget(item)
        return items

    def note_gap(self) -> None:
        """Note that something may be missing, since the link was away."""
        self._gaps += 1

    def hold(self) -> None:
        """Hold back what comes from now on, until as many :meth:`release` have followed."""
        self._holds += 1

    def release(self) -> None:
        """Let through what was held back, unless somebody else holds it, too."""
        self._holds = max(0, self._holds - 1)
        if not self._holds:
            self._release_all()

    def put_ahead(self, items: Iterable[T]) -> None:
        """Put items behind what is buffered and before what is held, beside the buffer."""
        holds, self._holds = self._holds, 0
        for item in items:
            self.push(item, extra=True)
        self._holds = holds

    def _release_all(self) -> None:
        held, self._held, self._holds = self._held, [], 0
        for item in held:
            self._put(item)

    def _take_oldest(self) -> T | _Missing:
        try:
            return self._out.receive_nowait()
        except WouldBlock:
            return self._held.pop(0)

    def put_in_front(self, items: Iterable[T]) -> None:
        """Put items before what is buffered, beside the buffer."""
        if self._ended:
            return
        buffered, missing = self._take_all(), self._missing
        self.put_ahead(items)
        for later in buffered:
            self._in.send_nowait(later)
        self._missing = missing

    def _take_all(self) -> list[T | _Missing]:
        items: list[T | _Missing] = []
        with suppress(WouldBlock, EndOfStream):
            while True:
                items.append(self._out.receive_nowait())
        return items

    @property
    def _full(self) -> bool:
        return not self._ended and (self._room <= 0 or self._bytes >= MAX_BYTES)

    @property
    def _count(self) -> int:
        return self._buffer - self._room + self._extra

    def _put(self, item: T | _Missing) -> None:
        if self._holds:
            self._held.append(item)
            return
        self._in.send_nowait(item)
        self._wake_receivers()

    def _forget(self, item: T | _Missing) -> None:
        self._room += 1
        if isinstance(item, EmitterMessage):
            self._bytes -= len(item.binary)

    async def _news(self) -> None:
        arrival = wakeup_maker()()
        self._arrivals.append(arrival)
        try:
            await arrival.wait()
        finally:
            if arrival in self._arrivals:
                self._arrivals.remove(arrival)

    def _wake_receivers(self) -> None:
        for arrival in self._arrivals:
            arrival.set()
        self._arrivals.clear()

    def _wake(self) -> None:
        self._wake_receivers()
        if self._departure is not None:
            self._departure.set()
            self._departure = None


class Entering(Generic[T]):
    """
    To be entered with ``async with``, once.

    :param make: makes what is entered
    """

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._make = make
        self._entered: AbstractAsyncContextManager[T] | None = None

    async def __aenter__(self) -> T:
        if self._entered is not None:
            raise RuntimeError("this was entered before: call again for another one")
        self._entered = self._make()
        return await self._entered.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # It swallows nothing, and says so by its type, for the sake of type checkers.
        assert self._entered is not None
        await self._entered.__aexit__(exc_type, exc, traceback)
