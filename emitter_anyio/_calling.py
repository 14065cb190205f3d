"""Request and reply between clients.

A request goes to ``channel/<id of the asker's connection>/<number>/``, as in Emitter's Dart SDK;
what is said about it goes below that: ``reply/``, ``error/`` and, from the asker, ``cancel/``.
The payloads are the users' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import anyio
from anyio import EndOfStream
from anyio.abc import TaskGroup, TaskStatus

from . import _requests as asking
from ._channels import A_KEY, Key, check_channel, check_source, format_topic, levels
from ._checks import check_function, check_int, check_task_status
from ._conversation import DEFAULT, Timeout, check_timeout
from ._errors import (
    ConnectionLostError,
    EmitterError,
    ReplyError,
    RequestTimeoutError,
    SlowConsumerError,
    readable,
)
from ._events import logger
from ._guard import Guard
from ._messages import EmitterMessage, Gap, Payload, encode_payload
from ._options import Options
from ._pending import Replay
from ._resuming import Subscription
from ._subscribing import Subscriber
from ._subscription import EventStream

Serve: TypeAlias = Callable[[EmitterMessage], "Payload | Awaitable[Payload]"]

_REPLY: Final = "reply"
_ERROR: Final = "error"
_CANCEL: Final = "cancel"

_QUIET: Final = (("me", 0),)


class _Reply:
    """A reply that somebody waits for."""

    def __init__(self) -> None:
        self.came = anyio.Event()
        self.kind = ""
        self.message: EmitterMessage | None = None


class _Replies(EventStream["EmitterMessage | Gap"]):
    """Where the replies on one channel come in, each to the one who waits for it."""

    def __init__(self, channel: str) -> None:
        super().__init__(f"replies on {channel!r}", 1, "drop_newest")
        self.channel = channel
        self.waiting: dict[str, _Reply] = {}
        self.subscription: Subscription | None = None

    def push_many(
        self, items: list[EmitterMessage | Gap], each: int | None = None, *, extra: bool = False
    ) -> int:
        """Hand replies over; a late one, or one to nobody, is dropped."""
        for item in items:
            assert isinstance(item, EmitterMessage)
            path = levels(item.channel[len(self.channel) :] or "/")
            reply = self.waiting.get(path[0])
            if reply is not None and reply.message is None and path[1:] in ([_REPLY], [_ERROR]):
                reply.kind, reply.message = path[1], item
                reply.came.set()
        return len(items)

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """Let go those who wait."""
        super().end(error)
        self.let_go()

    def note_gap(self) -> None:
        """Let go those who wait: a reply may have been lost with the link."""
        super().note_gap()
        self.let_go()

    def let_go(self) -> None:
        """Have those who wait look why nothing came."""
        for reply in self.waiting.values():
            reply.came.set()


@dataclass(eq=False)
class _Service:
    """
    What one :meth:`Caller.serve` does.

    :ivar concurrency: how many requests are handled at the same time
    :ivar running: the requests that are being handled
    :ivar waiting: those that are not yet, the oldest first, each with the key for its reply
    :ivar drops: whether the last request found no place, which is logged once
    """

    handler: Serve
    concurrency: int
    tasks: TaskGroup
    running: dict[str, anyio.CancelScope] = field(default_factory=dict)
    waiting: dict[str, tuple[str, EmitterMessage]] = field(default_factory=dict)
    drops: bool = False


class Caller(Subscriber):
    """The verbs ``request`` and ``serve``."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._replies: dict[tuple[Key, str], _Replies] = {}
        self._requests = 0
        self._served = 0

    def _begin(self) -> None:
        super()._begin()
        self._replies = {}
        self._replies_lock: anyio.Lock | None = None

    def _finish(self) -> None:
        super()._finish()
        for replies in self._replies.values():
            assert replies.subscription is not None
            self._forget(replies.subscription)
            replies.close()
        self._replies = {}

    async def request(
        self, key: Key, channel: str, message: Payload, *, timeout: Timeout = DEFAULT
    ) -> EmitterMessage:
        """
        Ask those who :meth:`serve` a channel, and wait for the first reply.

        :param key: a key with the permissions to read and write (``rw``) below the channel, such
            as one for ``channel/#/``
        :param channel: the channel that is served
        :param message: what to ask, as in :meth:`publish`
        :param timeout: seconds for the reply, instead of ``request_timeout``; ``None`` never
        :return: the reply
        :raises ReplyError: if the handler that served it raised
        :raises RequestTimeoutError: if no reply came in time
        :raises UnauthorizedError: if the key may not

        Cancelling it, or a timeout, cancels the handler that serves it.
        """
        key = check_source(key)
        channel = check_channel(channel)
        payload = encode_payload(message)
        # What goes on the wire is longer; but what cannot be sent must not subscribe to replies.
        topic = format_topic(key if isinstance(key, str) else A_KEY, channel)
        self._check_size(topic.encode(), payload, 1)
        seconds = self._seconds(check_timeout(timeout))
        await self._linked()
        return await self._keyed(key, partial(self._ask, key, channel, payload, seconds))

    async def _ask(
        self, source: Key, channel: str, payload: bytes, seconds: float | None, key: str
    ) -> EmitterMessage:
        replies = await self._replies_on(source, channel)
        # One count for all: two keys of one channel have their replies in the same place.
        self._requests += 1
        number = str(self._requests)
        where = f"{replies.channel}{number}/"
        topic = self._topic(key, where)
        self._check_size(topic, payload, 1)
        self._check_size(self._topic(key, f"{where}{_CANCEL}/"), b"", 0)
        await self._room()
        link = self._connection
        assert link is not None
        reply = replies.waiting[number] = _Reply()
        sent = self._send_confirmed(topic, payload, key, where)
        try:
            with anyio.CancelScope() as scope:
                limit = self._own_limit(scope.cancel, link, seconds)
                await self._answer(sent, None)
                await reply.came.wait()
        finally:
            if limit is not None:
                limit.done = True
            del replies.waiting[number]
            if reply.message is None and sent.refusal is None:
                self._say(key, f"{where}{_CANCEL}/", b"")
        if reply.message is None:
            if link is not self._connection or not self._usable(link):
                raise self._reply_lost(channel)
            raise RequestTimeoutError(
                f"request {channel!r}: nobody replied within {seconds:g} s; whether it took "
                "effect is unknown"
            )
        if reply.kind == _ERROR:
            words = readable(reply.message.binary.decode(errors="replace"))
            raise ReplyError(f"request {channel!r}: {words}")
        return EmitterMessage(where, reply.message.binary)

    def _reply_lost(self, channel: str) -> Exception:
        if self._may_come() or self._usable(self._connection):
            return ConnectionLostError(
                f"request {channel!r}: the link was lost before a reply came; whether it took "
                "effect is unknown"
            )
        return self._gone()

    async def serve(
        self,
        key: Key,
        channel: str,
        handler: Serve,
        *,
        concurrency: int = 64,
        buffer: int = 1024,
        task_status: TaskStatus[Any] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """
        Serve the requests on a channel, each in a task of its own, until cancelled.

        :param key: a key with the permissions to read and write (``rw``) below the channel
        :param channel: the channel to serve
        :param handler: is called with each request, and returns the reply, or an awaitable of it.
            What it raises is logged, and raised where it was asked as :class:`ReplyError`
        :param concurrency: how many requests are handled at the same time; others wait
        :param buffer: how many requests may wait. More are dropped, which is logged, and whoever
            made them gets a :class:`RequestTimeoutError`
        :param task_status: is told when requests are served: ``await task_group.start(...)``
        :raises UnauthorizedError: if the key may not
        :raises ConnectionLostError: if the link is gone for good
        """
        key = check_source(key)
        channel = check_channel(channel)
        check_function("handler", handler)
        concurrency = check_int("concurrency", concurrency, 1)
        check_task_status(task_status)
        failure: Exception | None = None
        async with (
            self.subscribe(key, channel, 0, buffer=buffer) as requests,
            anyio.create_task_group() as tasks,
        ):
            self._served += 1
            try:
                task_status.started()
                service = _Service(handler, concurrency, tasks)
                await self._serve_all(key, channel, requests, buffer, service)
            except Exception as exc:  # leaves bare, and not in the group
                failure = exc
            finally:
                self._served -= 1
                tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _serve_all(
        self,
        key: Key,
        channel: str,
        requests: EventStream[EmitterMessage],
        buffer: int,
        service: _Service,
    ) -> None:
        running, waiting = service.running, service.waiting
        while True:
            try:
                message = await requests.receive()
            except EndOfStream:
                return
            except SlowConsumerError as exc:  # pragma: no cover - this loop waits for nothing else
                logger.warning("serving %r: %s", channel, exc)
                continue
            asked = message.channel
            path = levels(asked[len(channel) :] or "/")
            if len(path) == 2 and asked not in running and asked not in waiting:
                if len(waiting) == buffer:
                    if not service.drops:
                        logger.warning(
                            "serving %r: dropping requests, because %d are being handled and %d "
                            "wait; give a larger concurrency= or buffer=",
                            channel,
                            len(running),
                            buffer,
                        )
                    service.drops = True
                    continue
                service.drops = False
                waiting[asked] = await self._keys.get(key), message
                self._serve_waiting(service)
            elif len(path) == 3 and path[2] == _CANCEL:
                # While all are busy, too: this may be what ends one of them.
                asked = asked.removesuffix(f"{_CANCEL}/")
                waiting.pop(asked, None)
                if asked in running:
                    running[asked].cancel()

    def _serve_waiting(self, service: _Service) -> None:
        while service.waiting and len(service.running) < service.concurrency:
            asked = next(iter(service.waiting))
            key, message = service.waiting.pop(asked)
            scope = service.running[asked] = anyio.CancelScope()
            assert self._tasks is not None
            arguments = service, key, message, scope
            service.tasks.start_soon(self._tasks.run, self._serve_one, *arguments)

    async def _serve_one(
        self, service: _Service, key: str, message: EmitterMessage, scope: anyio.CancelScope
    ) -> None:
        guard = Guard()
        with scope:
            try:
                reply = service.handler(message)
                if inspect.isawaitable(reply):
                    reply = await reply
                kind, payload = _REPLY, encode_payload(reply)
                self._check_size(self._topic(key, f"{message.channel}{kind}/"), payload, 0)
            except BaseException as exc:
                if not guard.is_of_user(exc):
                    raise
                logger.warning("serving %r raised", readable(message.channel), exc_info=exc)
                words = f"the handler that served it raised {type(exc).__name__}: {exc}"
                kind, payload = _ERROR, words.encode(errors="replace")[:1024]
            with suppress(EmitterError):  # the link is gone, as the asker will be told
                await self._room()
                self._say(key, f"{message.channel}{kind}/", payload)
        del service.running[message.channel]
        self._serve_waiting(service)

    async def _replies_on(self, source: Key, channel: str) -> _Replies:
        if self._replies_lock is None:
            self._replies_lock = anyio.Lock()
        async with self._replies_lock:
            replies = self._replies.get((source, channel))
            if replies is not None and replies.ended:
                # It could not be subscribed to again when the link was lost: ask once more.
                replies.close()
                replies = None
            if replies is None:
                connection_id = self._session.connection_id
                if connection_id is None:
                    connection_id = (await self._request(asking.me(), DEFAULT)).id
                replies = _Replies(f"{channel}{connection_id}/")
                replies.subscription = Subscription(source, replies.channel, replies)
                ask = partial(self._subscribe, replies.subscription, Replay(last=0), DEFAULT)
                try:
                    await self._keyed(source, ask)
                except BaseException:
                    replies.close()
                    raise
                self._replies[source, channel] = replies
            return replies

    def _say(self, key: str, channel: str, payload: bytes) -> None:
        # Without waiting, since it may be said under cancellation.
        if self._usable(self._connection):
            self._send_publish(self._topic(key, channel), payload)

    def _topic(self, key: str, channel: str) -> bytes:
        # Only who asks and serves, both, has to hear what it says itself.
        options = () if self._served and self._replies else _QUIET
        return format_topic(key, channel, options).encode()
