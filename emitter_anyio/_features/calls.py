"""Request and reply between clients.

A request is published to ``channel/<connection id of the requesting client>/<number>/``, as in
Emitter's Dart SDK. The serving client publishes the reply below that, to ``reply/`` or ``error/``,
and the requesting client can publish to ``cancel/``. The library adds nothing to the payloads.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import anyio
from anyio import EndOfStream
from anyio.abc import TaskGroup, TaskStatus

from emitter_anyio._net.connection import Connection
from emitter_anyio._net.options import Options
from emitter_anyio._net.timer import IdleTimeout
from emitter_anyio._protocol.pending import Pending, Replay
from emitter_anyio._runtime.background import Background
from emitter_anyio._runtime.events import logger
from emitter_anyio._runtime.guard import Guard, UserCodeError
from emitter_anyio._runtime.key_ring import KeyRing
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._runtime.totals import Totals
from emitter_anyio._streams import Entering, EventStream, Sender, check_buffer
from emitter_anyio._values import requests as broker_requests
from emitter_anyio._values.channels import (
    PLACEHOLDER_KEY,
    Key,
    KeySource,
    check_channel,
    check_key_source,
    format_topic,
    levels,
)
from emitter_anyio._values.checks import check_function, check_int, check_seconds, check_task_status
from emitter_anyio._values.errors import (
    ConnectionLostError,
    EmitterError,
    ReplyError,
    RequestTimeoutError,
    SlowConsumerError,
)
from emitter_anyio._values.messages import EmitterMessage, Payload
from emitter_anyio._values.router import check_delivered
from emitter_anyio._values.text import make_printable

from .replies import ERROR, REPLY, Call, Gathering, OneReply, Replies, unwrap
from .resumption import Subscription
from .subscriptions import Subscriptions

Serve: TypeAlias = Callable[[EmitterMessage], Payload | Awaitable[Payload]]

_CANCEL: Final = "cancel"

_MAX_ERROR_BYTES: Final = 1024

_NO_ECHO: Final = (("me", 0),)


@dataclass(frozen=True, slots=True)
class _Sent:
    """
    A request that was sent.

    :ivar key: the key that it was sent with
    :ivar number: its number, by which ``replies`` finds its call
    """

    replies: Replies
    key: str = field(repr=False)
    number: str
    connection: Connection
    publish: Pending[None]


@dataclass(eq=False)
class _Service:
    """
    The state of a ``serve()`` call.

    :ivar concurrency: the maximum number of requests that are handled at the same time
    :ivar running: the requests that are being handled, by channel
    :ivar waiting: the requests that wait, oldest first, with the keys for their replies
    :ivar dropping: whether the last request was dropped, because only the first one is logged
    """

    handler: Serve
    concurrency: int
    tasks: TaskGroup
    running: dict[str, anyio.CancelScope] = field(default_factory=dict)
    waiting: dict[str, tuple[str, EmitterMessage]] = field(default_factory=dict)
    dropping: bool = False

    def note_drop(self, *, dropped: bool) -> bool:
        """Note whether a request was dropped, and return whether it is the first in a row."""
        first = dropped and not self.dropping
        self.dropping = dropped
        return first


class Calls:
    """
    The requests to other clients, and the services for requests of other clients.

    :param slot: the current connection
    :param requester: sends requests to the broker
    :param subscriptions: subscribes to requests and replies
    :param keys: the keys that functions have returned
    :param guard: calls the handlers
    :param background: runs tasks
    :param totals: counts what closed streams have dropped
    :param options: the client's options
    """

    def __init__(
        self,
        slot: Slot,
        requester: Requester,
        subscriptions: Subscriptions,
        keys: KeyRing,
        guard: Guard,
        background: Background,
        totals: Totals,
        options: Options,
    ) -> None:
        self._slot = slot
        self._requester = requester
        self._subscriptions = subscriptions
        self._keys = keys
        self._guard = guard
        self._background = background
        self._totals = totals
        # With the matcher "mqtt", a subscription does not include the channels below its own.
        self._below = "#/" if options.matcher == "mqtt" else ""
        self._replies: dict[tuple[KeySource, str], tuple[Replies, Subscription]] = {}
        self._subscribe_lock: anyio.Lock | None = None
        self._request_count = 0
        self._request_ended: anyio.Event | None = None
        self._serve_count = 0

    def finish(self) -> None:
        """End the subscriptions to replies, because the client has ended."""
        for replies, subscription in self._replies.values():
            self._subscriptions.forget(subscription)
            replies.end()
        self._replies.clear()
        self._subscribe_lock = None

    async def wait_replies(self) -> None:
        """Wait until no call awaits a reply of another client."""
        while any(replies.waiting for replies, _ in self._replies.values()):
            self._request_ended = anyio.Event()
            await self._request_ended.wait()

    # Requests

    async def request(
        self, key: Key, channel: str, message: Payload, timeout: Timeout
    ) -> EmitterMessage:
        """Send a request, and return the first reply."""
        key, channel, payload = self._check(key, channel, message)
        timeout = check_timeout(timeout)
        await self._requester.connected()
        ask = partial(self._ask_one, key, channel, payload, timeout)
        return await self._requester.with_key(key, ask)

    def request_many(
        self,
        key: Key,
        channel: str,
        message: Payload,
        count: int | None,
        idle: float | None,
        buffer: int,
        timeout: Timeout,
    ) -> Entering[EventStream[EmitterMessage]]:
        """Check every argument, and return a stream of replies to be entered."""
        key, channel, payload = self._check(key, channel, message)
        count = None if count is None else check_int("count", count, 1)
        if idle is not None and not check_seconds("idle", idle):
            raise ValueError("idle must be more than 0 seconds, or None to disable it, not 0")
        check_buffer(buffer, "raise")
        timeout = check_timeout(timeout)
        return Entering(
            self._slot.owner,
            partial(self._gather, key, channel, payload, count, idle, buffer, timeout),
        )

    def _check(self, key: Key, channel: str, message: Payload) -> tuple[KeySource, str, bytes]:
        source = check_key_source(key)
        channel = check_channel(channel)
        payload = self._requester.encode(message)
        # The real topic is longer and is checked later. This check rejects a request that is too
        # large in any case, before the client subscribes to replies.
        topic = format_topic(source if isinstance(source, str) else PLACEHOLDER_KEY, channel)
        self._requester.check_size(topic.encode(), payload, 1)
        return source, channel, payload

    async def _ask_one(
        self, source: KeySource, channel: str, payload: bytes, timeout: Timeout, key: str
    ) -> EmitterMessage:
        requester = self._requester
        call = OneReply()
        sent = await self._send_request(call, source, channel, payload, key)
        deadline = None
        try:
            with anyio.CancelScope() as scope:
                deadline = requester.deadline(scope.cancel, sent.connection, timeout)
                await requester.answer(sent.connection, sent.publish, None)
                await call.over.wait()
        finally:
            if deadline is not None:
                deadline.cancel()
            self._end_request(call, sent)
        if call.reply is None:
            if not self._slot.usable(sent.connection):
                raise self._gone(channel)
            raise RequestTimeoutError(
                f"request {channel!r}: no reply within {requester.seconds(timeout):g} s; the "
                "request might have taken effect"
            )
        return unwrap(call.reply)

    @asynccontextmanager
    async def _gather(
        self,
        key: KeySource,
        channel: str,
        payload: bytes,
        count: int | None,
        idle: float | None,
        buffer: int,
        timeout: Timeout,
    ) -> AsyncGenerator[EventStream[EmitterMessage]]:
        send: Sender[EmitterMessage | ReplyError] = Sender(
            f"request_many({channel!r})", buffer, "raise", self._totals.leave_stream
        )
        call = Gathering(send, count)
        await self._requester.connected()
        ask = partial(self._ask_many, call, key, channel, payload, idle, timeout)
        try:
            with EventStream(send, unwrap) as stream:
                await self._requester.with_key(key, ask)
                yield stream
        finally:
            call.end()
            send.leave()

    async def _ask_many(
        self,
        call: Gathering,
        source: KeySource,
        channel: str,
        payload: bytes,
        idle: float | None,
        timeout: Timeout,
        key: str,
    ) -> None:
        requester = self._requester
        sent = await self._send_request(call, source, channel, payload, key)
        connection = sent.connection
        with ExitStack() as cleanup:
            cleanup.callback(self._end_request, call, sent)
            deadline = requester.deadline(call.end, connection, timeout)
            if deadline is not None:
                cleanup.callback(deadline.cancel)
            idle_timeout = None
            if idle is not None:
                idle_timeout = IdleTimeout(call.end, idle, connection.timer)
                cleanup.callback(idle_timeout.cancel)
            call.begin(idle_timeout, cleanup)
            await requester.answer(connection, sent.publish, timeout)
            call.begin(idle_timeout, cleanup.pop_all())

    async def _send_request(
        self, call: Call, source: KeySource, channel: str, payload: bytes, key: str
    ) -> _Sent:
        requester = self._requester
        replies = await self._replies_on(source, channel)
        # One counter for all requests, because the replies for two keys can share a channel.
        self._request_count += 1
        number = str(self._request_count)
        where = f"{replies.channel}{number}/"
        topic = self._topic(key, where)
        requester.check_size(topic, payload, 1)
        requester.check_size(self._topic(key, f"{where}{_CANCEL}/"), b"", 0)
        connection = await requester.space()
        replies.waiting[number] = call
        publish = connection.session.publish_qos_1(topic, payload, key, where)
        return _Sent(replies, key, number, connection, publish)

    def _end_request(self, call: Call, sent: _Sent) -> None:
        del sent.replies.waiting[sent.number]
        if self._request_ended is not None:
            self._request_ended.set()
            self._request_ended = None
        if not call.complete and sent.publish.refusal is None:
            self._send(sent.key, f"{sent.replies.channel}{sent.number}/{_CANCEL}/", b"")

    def _gone(self, channel: str) -> Exception:
        slot = self._slot
        if slot.may_connect or slot.usable(slot.connection):
            return _lost(channel)
        return slot.gone()

    async def _replies_on(self, source: KeySource, channel: str) -> Replies:
        if self._subscribe_lock is None:
            self._subscribe_lock = anyio.Lock()
        async with self._subscribe_lock:
            known = self._replies.get((source, channel))
            # A subscription has ended if the broker refused to restore it. Subscribe again.
            if known is not None and not known[0].ended:
                return known[0]
            connection = await self._requester.connected()
            connection_id = connection.session.connection_id
            if connection_id is None:
                connection_id = (await self._requester.request(broker_requests.me(), DEFAULT)).id
            replies = Replies(channel, connection_id, partial(self._gone, channel))
            subscription = Subscription(source, replies.channel + self._below, replies)
            add = partial(self._subscriptions.add, subscription, Replay(last=0), DEFAULT)
            await self._requester.with_key(source, add)
            self._replies[source, channel] = replies, subscription
            return replies

    # Serving

    async def serve(
        self,
        key: Key,
        channel: str,
        handler: Serve,
        group: str | None,
        group_key: Key | None,
        concurrency: int,
        buffer: int,
        task_status: TaskStatus[None],
    ) -> None:
        """Serve requests until cancelled."""
        key = check_key_source(key)
        check_delivered(check_channel(channel, wildcards=True), "emitter")
        if group_key is None:
            group_key = key
        elif group is None:
            raise ValueError("cannot use group_key without group")
        channel = check_channel(channel)
        check_function("handler", handler)
        concurrency = check_int("concurrency", concurrency, 1)
        check_task_status(task_status)
        failure: Exception | None = None
        async with (
            self._subscriptions.subscribe(
                group_key, channel + self._below, 0, group=group, buffer=buffer
            ) as requests,
            anyio.create_task_group() as tasks,
        ):
            self._serve_count += 1
            try:
                task_status.started()
                service = _Service(handler, concurrency, tasks)
                await self._serve_all(key, channel, requests, buffer, service)
            except Exception as exc:  # raised below, so that no ExceptionGroup wraps it
                failure = exc
            finally:
                self._serve_count -= 1
                tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _serve_all(
        self,
        key: KeySource,
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
                logger.warning("dropped requests to %r: %s", channel, exc)
                continue
            request_channel = message.channel
            path = levels(request_channel[len(channel) :] or "/")
            if len(path) == 2 and request_channel not in running and request_channel not in waiting:
                full = len(waiting) == buffer
                if service.note_drop(dropped=full):
                    logger.warning(
                        "dropped requests to %r, because serve() is busy (concurrency=%d, "
                        "buffer=%d); use larger values",
                        channel,
                        service.concurrency,
                        buffer,
                    )
                if not full:
                    waiting[request_channel] = await self._keys.get(key), message
                    self._serve_waiting(service)
            elif len(path) == 3 and path[2] == _CANCEL:
                # Even if serve() is busy, because a cancellation makes it less busy.
                request_channel = request_channel.removesuffix(f"{_CANCEL}/")
                waiting.pop(request_channel, None)
                if request_channel in running:
                    running[request_channel].cancel()

    def _serve_waiting(self, service: _Service) -> None:
        while service.waiting and len(service.running) < service.concurrency:
            request_channel = next(iter(service.waiting))
            key, message = service.waiting.pop(request_channel)
            scope = service.running[request_channel] = anyio.CancelScope()
            arguments = service, key, message, scope
            service.tasks.start_soon(self._background.run, self._serve_one, *arguments)

    async def _serve_one(
        self, service: _Service, key: str, message: EmitterMessage, scope: anyio.CancelScope
    ) -> None:
        with scope:
            kind, payload = REPLY, b""
            try:
                payload = await self._guard.call(self._reply_of, service.handler, key, message)
            except UserCodeError as exc:
                error = exc.error
                logger.warning(
                    "serve() handler for %r raised an exception",
                    make_printable(message.channel),
                    exc_info=error,
                )
                words = f"the handler raised {type(error).__name__}: {error}"
                kind, payload = ERROR, words.encode(errors="replace")[:_MAX_ERROR_BYTES]
            with suppress(EmitterError):  # the requesting client learns of a lost connection itself
                await self._requester.space()
                self._send(key, f"{message.channel}{kind}/", payload)
        del service.running[message.channel]
        self._serve_waiting(service)

    async def _reply_of(self, handler: Serve, key: str, message: EmitterMessage) -> bytes:
        reply: Any = handler(message)
        if isinstance(reply, Awaitable):
            reply = await reply
        payload = self._requester.encode(reply)
        self._requester.check_size(self._topic(key, f"{message.channel}{REPLY}/"), payload, 0)
        return payload

    def _send(self, key: str, channel: str, payload: bytes) -> None:
        # Does not wait, because the caller might be cancelled.
        connection = self._slot.connection
        if connection is not None and self._slot.usable(connection):
            connection.session.publish(self._topic(key, channel), payload)

    def _topic(self, key: str, channel: str) -> bytes:
        # Only a client that both sends and serves requests needs to receive its own messages.
        options = () if self._serve_count and self._replies else _NO_ECHO
        return format_topic(key, channel, options).encode()


def _lost(channel: str) -> ConnectionLostError:
    return ConnectionLostError(
        f"request {channel!r}: the connection was lost before a reply arrived; the request might "
        "have taken effect"
    )
