"""The receive end of a stream: what users hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import get_ident
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar
from warnings import warn

from anyio import ClosedResourceError, EndOfStream, WouldBlock
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint

from emitter_anyio._values.errors import DecodeError

from .send import Missing, Sender, StreamStatistics

T_co = TypeVar("T_co", covariant=True)

ITEMS_PER_TURN: Final = 64
"""How many items a receive end gives before it lets other tasks run."""


class EventStream(ObjectReceiveStream[T_co], Generic[T_co]):
    """
    A stream of messages or events, with the interface of AnyIO's memory object receive streams.

    Several tasks may receive from one stream or from its clones; each item goes to one of them.
    Cancelling :meth:`receive` loses no item. After the subscription was left or the client has
    disconnected, a stream gives what is buffered and then ends.
    """

    # decode is called with each item that is received. If it raises, receiving raises a DecodeError
    # in the place of the item, and can go on.
    def __init__(self, send: Sender[Any], decode: Callable[[Any], T_co] | None = None) -> None:
        self._send = send
        self._decode = decode
        self._owner = send.owner
        self._items: deque[Any] = send.items
        self._quota = ITEMS_PER_TURN
        """How many items can be received before other tasks run; 0 when this end is closed."""
        self._closed = False
        send.open_receive_end()

    def __repr__(self) -> str:
        figures = self.statistics()
        state = "closed" if self._closed else "open" if figures.open_send_streams else "ended"
        buffered = figures.current_buffer_used
        return f"<{type(self).__name__} {self._send.what}, {state}, {buffered} buffered>"

    async def receive(self) -> T_co:
        """
        Wait for the next item and return it. It lets other tasks run at least every 64 items.

        :raises SlowConsumerError: in the place of items that were dropped, with the policy
            ``"raise"``; receiving can go on
        :raises ~anyio.EndOfStream: if the stream has ended
        :raises ConnectionLostError: if it has ended because the connection was lost for good
        :raises ~anyio.ClosedResourceError: if this end was closed
        :raises WrongLoopError: in another thread or event loop than the client's

        Cancelling it loses no item.
        """
        if get_ident() != self._owner.thread:
            self._owner.check()
        while not (self._quota and self._items):
            await self._wait()
        self._quota -= 1
        return self._take()

    def receive_nowait(self) -> T_co:
        """
        Return the next item without waiting.

        :raises ~anyio.WouldBlock: if there is none yet
        :raises SlowConsumerError: as :meth:`receive` does
        :raises ~anyio.EndOfStream: as :meth:`receive` does
        :raises ConnectionLostError: as :meth:`receive` does
        :raises ~anyio.ClosedResourceError: as :meth:`receive` does
        :raises WrongLoopError: as :meth:`receive` does
        """
        self._owner.check()
        if self._closed:
            raise self._closed_error()
        if not self._items:
            self._send.check_end()
            raise WouldBlock
        return self._take()

    def __aiter__(self) -> Self:
        self._owner.check()
        return self

    async def __anext__(self) -> T_co:
        # This repeats receive() and _take(), because two more calls would cost 10 % of receiving a
        # message. __aiter__() has checked the thread.
        try:
            while not (self._quota and self._items):
                await self._wait()
        except EndOfStream:
            raise StopAsyncIteration from None
        self._quota -= 1
        item = self._items.popleft()
        if self._send.tasks_waiting:
            self._send.note_departure()
        if item.__class__ is Missing:
            raise self._send.note_missing_received(item)
        return item if self._decode is None else self._decoded(item)

    def clone(self) -> EventStream[T_co]:
        """
        Return another receive end of the same stream, which is closed separately.

        :raises ~anyio.ClosedResourceError: if this end was closed
        :raises WrongLoopError: in another thread or event loop than the client's
        """
        self._owner.check()
        if self._closed:
            raise self._closed_error()
        return EventStream(self._send, self._decode)

    def close(self) -> None:
        """
        Close this receive end; it never waits.

        Receiving from it raises :exc:`~anyio.ClosedResourceError`, also in a task that waits.
        Its clones still get what is buffered. After the last one was closed, the client
        unsubscribes, and drops what is buffered.

        :raises WrongLoopError: in another thread or event loop than the client's
        """
        self._owner.check()
        if not self._closed:
            self._closed = True
            self._quota = 0
            self._send.close_receive_end()

    async def aclose(self) -> None:
        """Do what :meth:`close` does."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warn(f"unclosed stream {self!r}", ResourceWarning, stacklevel=1, source=self)

    def statistics(self) -> StreamStatistics:
        """Return the figures of the stream, the same at each of its ends, in any thread."""
        return self._send.statistics()

    def _closed_error(self) -> ClosedResourceError:
        return ClosedResourceError(f"{self._send.what}: this end of the stream was closed")

    async def _wait(self) -> None:
        """Let other tasks run, or wait for an item, which another task might take."""
        receiver = None
        try:
            self._owner.check()
            if not self._quota and not self._closed:
                await checkpoint()
            if self._closed:
                raise self._closed_error()
            self._quota = ITEMS_PER_TURN
            if not self._items:
                self._send.check_end()
                receiver = self._send.expect_item()
                await receiver.wait()
        except BaseException:
            self._send.wake_another(receiver)
            raise

    def _take(self) -> T_co:
        item = self._items.popleft()
        if self._send.tasks_waiting:
            self._send.note_departure()
        if item.__class__ is Missing:
            raise self._send.note_missing_received(item)
        return item if self._decode is None else self._decoded(item)

    def _decoded(self, item: Any) -> T_co:
        assert self._decode is not None
        try:
            return self._decode(item)
        except Exception as exc:
            raise DecodeError(
                f"{self._send.what}: decode raised {type(exc).__name__}: {exc}",
                message=item,
            ) from exc
