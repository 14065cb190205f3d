"""The receive end of a stream, which users hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from threading import get_ident
from types import TracebackType
from typing import Any, Final, Generic, Literal, Self, TypeAlias, TypeVar
from warnings import warn

from anyio import ClosedResourceError, EndOfStream, WouldBlock
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint

from .send import Missing, Sender, StreamStatistics

T_co = TypeVar("T_co", covariant=True)


class _Skipped(Enum):
    """Stands for an item that no task is to receive."""

    SKIPPED = "skipped"


SKIPPED: Final = _Skipped.SKIPPED

_Item: TypeAlias = T_co | Literal[_Skipped.SKIPPED]

ITEMS_PER_TURN: Final = 64
"""The number of items that a receive end returns before it lets other tasks run."""


class EventStream(ObjectReceiveStream[T_co], Generic[T_co]):
    """
    A stream of messages or events, with the interface of AnyIO's memory object receive streams.

    Several tasks may receive from one stream or from its clones; each item goes to one of them.
    After the client has disconnected, a stream yields what is buffered and then ends. After
    reconnecting was given up, it yields what is buffered and then raises
    :class:`ConnectionLostError`. Leaving the block of a stream closes it and discards what is
    buffered, unless a clone is open.
    """

    # decode, if given, converts each received item. What it raises is raised in the place of the
    # item, and receiving can continue. If it returns SKIPPED, the next item is received instead.
    def __init__(
        self, send: Sender[Any], decode: Callable[[Any], _Item[T_co]] | None = None
    ) -> None:
        self._send = send
        self._decode = decode
        self._owner = send.owner
        self._items: deque[Any] = send.items
        self._quota = ITEMS_PER_TURN
        """The number of items to return before other tasks run; 0 after this end was closed."""
        self._closed = False
        send.open_receive_end()

    def __repr__(self) -> str:
        figures = self.statistics()
        state = "closed" if self._closed else "open" if figures.open_send_streams else "ended"
        buffered = figures.current_buffer_used
        return f"<{type(self).__name__} {self._send.what}, {state}, {buffered} buffered>"

    async def receive(self) -> T_co:
        """
        Wait for the next item, and return it. Other tasks run at least every 64 items.

        :return: the item
        :raises SlowConsumerError: in the place of items that were dropped with
            ``overflow="raise"``; receiving can continue
        :raises ReplyError: in the place of a reply of :meth:`Emitter.request_many`, if the handler
            that served the request raised; receiving can continue
        :raises ~anyio.EndOfStream: if the stream has ended
        :raises ConnectionLostError: if the stream has ended because reconnecting was given up
        :raises RequestError: if the stream has ended because the broker refused to restore its
            subscription
        :raises ~anyio.ClosedResourceError: if this end was closed
        :raises WrongLoopError: in another thread or event loop than the client's

        Cancelling it loses no item.
        """
        if get_ident() != self._owner.thread:
            self._owner.check()
        while True:
            while not (self._quota and self._items):
                await self._wait()
            self._quota -= 1
            item = self._take()
            if item is not SKIPPED:
                return item

    def receive_nowait(self) -> T_co:
        """
        Return the next item without waiting.

        :return: the item
        :raises ~anyio.WouldBlock: if no item is buffered
        :raises SlowConsumerError: as for :meth:`receive`
        :raises ReplyError: as for :meth:`receive`
        :raises ~anyio.EndOfStream: as for :meth:`receive`
        :raises ConnectionLostError: as for :meth:`receive`
        :raises RequestError: as for :meth:`receive`
        :raises ~anyio.ClosedResourceError: as for :meth:`receive`
        :raises WrongLoopError: as for :meth:`receive`
        """
        self._owner.check()
        while True:
            if self._closed:
                raise self._closed_error()
            if not self._items:
                self._send.check_end()
                raise WouldBlock
            item = self._take()
            if item is not SKIPPED:
                return item

    def __aiter__(self) -> Self:
        self._owner.check()
        return self

    async def __anext__(self) -> T_co:
        # Repeats receive() and _take(), because two more calls would make receiving a message 10 %
        # slower. __aiter__() has checked the thread.
        while True:
            try:
                while not (self._quota and self._items):
                    await self._wait()
            except EndOfStream:
                raise StopAsyncIteration from None
            self._quota -= 1
            item = self._items.popleft()
            if self._send.tasks_waiting:
                self._send.wake_senders()
            if item.__class__ is Missing:
                raise self._send.note_missing_received(item)
            decoded: _Item[T_co] = item if self._decode is None else self._decode(item)
            if decoded is not SKIPPED:
                return decoded

    def clone(self) -> EventStream[T_co]:
        """
        Return another receive end of the same stream, to be closed separately.

        :return: the receive end, which shares the buffer
        :raises ~anyio.ClosedResourceError: if this end was closed
        :raises WrongLoopError: in another thread or event loop than the client's
        """
        self._owner.check()
        if self._closed:
            raise self._closed_error()
        return EventStream(self._send, self._decode)

    def close(self) -> None:
        """
        Close this receive end without waiting.

        Receiving from it then raises :exc:`~anyio.ClosedResourceError`, also in a task that is
        already waiting. Clones still receive what is buffered. When the last receive end is closed,
        the client unsubscribes and discards what is buffered. Closing again has no effect.

        :raises WrongLoopError: in another thread or event loop than the client's
        """
        self._owner.check()
        if not self._closed:
            self._closed = True
            self._quota = 0
            self._send.close_receive_end()

    async def aclose(self) -> None:
        """
        Do what :meth:`close` does. It is not a checkpoint.

        :raises WrongLoopError: in another thread or event loop than the client's
        """
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
        """
        Return the statistics of the stream. Any thread can call it.

        :return: the figures, which all receive ends of the stream share
        """
        return self._send.statistics()

    def _closed_error(self) -> ClosedResourceError:
        return ClosedResourceError(f"{self._send.what}: this end of the stream is closed")

    async def _wait(self) -> None:
        """Let other tasks run, or wait until there is an item, which another task might take."""
        waiter = None
        try:
            self._owner.check()
            if not self._quota or (self._send.ended and not self._items):
                await checkpoint()
            if self._closed:
                raise self._closed_error()
            self._quota = ITEMS_PER_TURN
            if not self._items:
                self._send.check_end()
                waiter = self._send.expect_item()
                await waiter.wait()
        except BaseException:
            self._send.wake_another(waiter)
            raise

    def _take(self) -> _Item[T_co]:
        item = self._items.popleft()
        if self._send.tasks_waiting:
            self._send.wake_senders()
        if item.__class__ is Missing:
            raise self._send.note_missing_received(item)
        return item if self._decode is None else self._decode(item)
