"""Streams with an overflow policy: what every consumer of messages and events holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from threading import get_ident
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

import anyio
from anyio import EndOfStream
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint

from ._backend import Owner
from ._buffer import Buffer, Overflow

T = TypeVar("T")

_PATIENCE: Final = 8
"""So many turns of the loop a full buffer is given to shrink: the consumer may go through some
checkpoints of its own, and on Trio those who are ready run in any order."""


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """
    Figures of one stream.

    :ivar buffered: how many items wait to be received
    :ivar buffered_bytes: how many bytes they weigh: the payload and the channel of each message,
        and 128 bytes for each item
    :ivar received: how many items have been received
    :ivar dropped: how many items were dropped because the buffer was full
    :ivar gaps: how many times the link was away, so that something may be missing
    """

    buffered: int
    buffered_bytes: int
    received: int
    dropped: int
    gaps: int


class EventStream(Buffer[T], ObjectReceiveStream[T], Generic[T]):
    """
    A stream of messages or events with a buffer of its own.

    Several tasks may receive from one stream; each item goes to one of them. An item stays in the
    buffer until its receiver runs, so that cancelling :meth:`receive` loses nothing. When the
    stream was left or the client has disconnected, it ends normally, behind what is buffered.

    :param what: what it is called in errors
    :param buffer: how many items wait at most, of 8 MiB
    :param overflow: what happens to more
    """

    def __init__(self, what: str, buffer: int, overflow: Overflow) -> None:
        super().__init__(what, buffer, overflow)
        self._stalled = -1
        self._dropped = 0
        self._gaps = 0

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open"
        return (
            f"<{type(self).__name__} {self._what}, {state}, {self.statistics().buffered} buffered>"
        )

    async def receive(self) -> T:
        """
        Wait for the next item; cancelling it loses none.

        It yields to other tasks at least at every 64th item.

        :raises SlowConsumerError: at the place of a gap, if the policy is ``"raise"``; what came
            after the gap follows
        :raises ~anyio.EndOfStream: if the stream has ended
        :raises ConnectionLostError: if it has ended because the link is gone for good
        :raises WrongLoopError: in another thread or event loop than the client's
        """
        if get_ident() != self._owner.thread:
            self._owner.check()
        if self._taken >= self._stop:
            await self._pause()
        while not self._ready:
            await self._more()
        self._taken += 1
        return self._ready.popleft()

    def __aiter__(self) -> Self:
        self._owner.check()
        return self

    async def __anext__(self) -> T:
        # Not by receive(), a call that each item would pay for. Who has asked for the iterator may
        # take what is ready; asking each time in which thread takes an eighth of all of this.
        if self._taken >= self._stop:
            await self._pause()
        try:
            while not self._ready:
                await self._more()
        except EndOfStream:
            raise StopAsyncIteration from None
        self._taken += 1
        return self._ready.popleft()

    def receive_nowait(self) -> T:
        """
        Take the next item without waiting.

        :raises ~anyio.WouldBlock: if there is none yet
        :raises SlowConsumerError: as :meth:`receive` does
        :raises ~anyio.EndOfStream: as :meth:`receive` does
        :raises WrongLoopError: as :meth:`receive` does
        """
        self._owner.check()
        if not self._ready:
            self._make_ready()
        self._depart()
        self._taken += 1
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Leave the stream: what is buffered is gone, and nothing more comes; never waits."""
        self.close()

    def close(self) -> None:
        """Do what :meth:`aclose` does."""
        self._owner.check()
        self.end()
        self._error = None
        self._count()
        self._weigh()
        self._ready.clear()
        self._queued = 0
        self._out.close()

    def statistics(self) -> StreamStatistics:
        """Return the figures of this stream."""
        return StreamStatistics(*self._waiting(), self._taken, self._dropped, self._gaps)

    # The side of the client

    @property
    def dropped(self) -> int:
        """How many items were dropped because the buffer was full."""
        return self._dropped

    @property
    def ended(self) -> bool:
        """Tell whether nothing more comes in."""
        return self._ended

    @property
    def blocks(self) -> bool:
        """Tell whether the link is to wait for this stream now."""
        return self._overflow == "block" and not self._holds and self._full

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
        while self.blocks:
            departure = self._departure = self._departure or anyio.Event()
            self._stop = self._taken
            await departure.wait()

    async def put(self, item: T) -> None:
        """Put an item in when there is room, or as the policy says."""
        if not self.push(item):
            await self.make_room()
            self.push_or_drop(item)

    def push_or_drop(self, item: T) -> None:
        """
        Put an item in; if there is no room, do as the policy says, and under ``"block"``, for which
        nobody waits here, as ``"raise"`` does.
        """
        while not self.push(item):
            self._dropped += 1
            if self._overflow == "drop_oldest":
                self._drop_oldest()
                continue
            if self._overflow != "drop_newest":
                self._note_missing()
            return

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """Let nothing more in; what is buffered can still be received, then comes the error."""
        if not self._ended:
            self._release_all()
            self._ended = True
            self._error = error
            self._in.close()
            self._wake_receivers()
            self._depart()

    def note_gap(self) -> None:
        """Note that something may be missing, since the link was away."""
        self._gaps += 1


class Entering(Generic[T]):
    """
    To be entered with ``async with``, once.

    :param owner: whose event loop it is to be entered and left in
    :param make: makes what is entered
    """

    def __init__(self, owner: Owner, make: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._owner = owner
        self._make = make
        self._entered: AbstractAsyncContextManager[T] | None = None

    async def __aenter__(self) -> T:
        if self._entered is not None:
            raise RuntimeError("this was entered before: call again for another one")
        self._owner.check()
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
        self._owner.check()
        await self._entered.__aexit__(exc_type, exc, traceback)
