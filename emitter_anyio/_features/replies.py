"""The calls that await replies of other clients, and the receiver of these replies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, Protocol

import anyio

from emitter_anyio._net.timer import IdleTimeout
from emitter_anyio._streams import Receiver, Sender
from emitter_anyio._values.channels import levels
from emitter_anyio._values.errors import ReplyError
from emitter_anyio._values.messages import EmitterMessage, Gap
from emitter_anyio._values.text import make_printable

REPLY: Final = "reply"
ERROR: Final = "error"


class Call(Protocol):
    """A call that awaits replies."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the handlers that still serve the request need not be cancelled."""

    @abstractmethod
    def take(self, reply: EmitterMessage | ReplyError) -> None:
        """Take a reply, or the error of a handler."""

    @abstractmethod
    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """
        Take no more replies.

        :param error: makes the error of the connection or subscription; ``None`` is a normal end
        """


class OneReply:
    """The call of ``request()``: it awaits one reply."""

    def __init__(self) -> None:
        self.over = anyio.Event()
        self.reply: EmitterMessage | ReplyError | None = None

    @property
    def complete(self) -> bool:
        return self.reply is not None

    def take(self, reply: EmitterMessage | ReplyError) -> None:
        if self.reply is None:
            self.reply = reply
            self.over.set()

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        self.over.set()


class Gathering:
    """
    The call of ``request_many()``: it puts replies into a stream.

    :param send: the send end of the stream
    :param count: the number of replies after which the stream ends; ``None`` for no limit
    """

    def __init__(self, send: Sender[EmitterMessage | ReplyError], count: int | None) -> None:
        self.complete = False
        self._send = send
        self._missing = count
        self._idle: IdleTimeout | None = None
        self._cleanup = ExitStack()

    def begin(self, idle: IdleTimeout | None, cleanup: ExitStack) -> None:
        """
        Note that the request was sent.

        :param idle: the timeout that restarts with each reply
        :param cleanup: closed at the end
        """
        self._idle, self._cleanup = idle, cleanup

    def take(self, reply: EmitterMessage | ReplyError) -> None:
        self._send.push_or_drop(reply)
        if self._idle is not None:
            self._idle.restart()
        if self._missing is not None:
            self._missing -= 1
            if not self._missing:
                self.complete = True
                self.end()

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        self._send.end(error)
        self._cleanup.close()


class Replies(Receiver["EmitterMessage | Gap"]):
    """
    A receiver of the replies on one channel, which passes each to its call.

    :param service: the channel that is served
    :param connection_id: the id of the connection, which is a part of the channel of the replies
    :param gone: makes the error of a call whose replies might have been lost
    """

    def __init__(self, service: str, connection_id: str, gone: Callable[[], Exception]) -> None:
        self.channel = f"{service}{connection_id}/"
        self.waiting: dict[str, Call] = {}
        self.ended = False
        self._service = service
        self._gone = gone

    def push(self, item: EmitterMessage | Gap, *, extra: bool = False) -> bool:
        """Pass a reply to its call, or drop a late or unknown reply."""
        assert isinstance(item, EmitterMessage)
        path = levels(item.channel[len(self.channel) :] or "/")
        call = self.waiting.get(path[0])
        if call is None:
            return True
        if path[1:] == [REPLY]:
            call.take(EmitterMessage(f"{self.channel}{path[0]}/", item.binary))
        elif path[1:] == [ERROR]:
            words = make_printable(item.binary.decode(errors="replace"))
            call.take(ReplyError(f"request {self._service!r}: {words}"))
        return True

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """End all calls, because no replies will arrive."""
        self.ended = True
        for call in tuple(self.waiting.values()):
            call.end(error or self._gone)

    def note_gap(self) -> None:
        """End all calls, because their replies might have been lost with the connection."""
        for call in tuple(self.waiting.values()):
            call.end(self._gone)


def unwrap(reply: EmitterMessage | ReplyError) -> EmitterMessage:
    """Return a reply, or raise the error of a handler."""
    if isinstance(reply, ReplyError):
        raise reply
    return reply
