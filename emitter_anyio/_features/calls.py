"""Request and reply between clients.

A request is published to ``channel/<connection id of the requesting client>/<number>/``, as in
Emitter's Dart SDK. The serving client publishes the reply below that, to ``reply/`` or ``error/``,
and the requesting client can publish to ``cancel/``. The library adds nothing to the payloads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import anyio
from anyio import EndOfStream
from anyio.abc import TaskGroup, TaskStatus

from emitter_anyio._protocol.pending import Replay
from emitter_anyio._runtime.background import Background
from emitter_anyio._runtime.events import logger
from emitter_anyio._runtime.guard import Guard, UserCodeError
from emitter_anyio._runtime.key_ring import KeyRing
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._streams import EventStream, Receiver
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
from emitter_anyio._values.checks import check_function, check_int, check_task_status
from emitter_anyio._values.errors import (
    ConnectionLostError,
    EmitterError,
    ReplyError,
    RequestTimeoutError,
    SlowConsumerError,
)
from emitter_anyio._values.messages import EmitterMessage, Gap, Payload
from emitter_anyio._values.router import check_delivered
from emitter_anyio._values.text import make_printable

from .resumption import Subscription
from .subscriptions import Subscriptions

Serve: TypeAlias = Callable[[EmitterMessage], Payload | Awaitable[Payload]]

_REPLY: Final = "reply"
_ERROR: Final = "error"
_CANCEL: Final = "cancel"

_MAX_ERROR_BYTES: Final = 1024

_NO_ECHO: Final = (("me", 0),)


class _Reply:
    """A reply that a caller awaits."""

    def __init__(self) -> None:
        self.arrived = anyio.Event()
        self.kind = ""
        self.message: EmitterMessage | None = None

    def arrive(self, kind: str, message: EmitterMessage) -> None:
        """Store the reply, and wake the caller."""
        self.kind, self.message = kind, message
        self.arrived.set()


class _Replies(Receiver["EmitterMessage | Gap"]):
    """A receiver of the replies on one channel, which passes each to its caller."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.waiting: dict[str, _Reply] = {}
        self.ended = False

    def push(self, item: EmitterMessage | Gap, *, extra: bool = False) -> bool:
        """Pass a reply to its caller, or drop a late or unknown reply."""
        assert isinstance(item, EmitterMessage)
        path = levels(item.channel[len(self.channel) :] or "/")
        reply = self.waiting.get(path[0])
        if reply is not None and reply.message is None and path[1:] in ([_REPLY], [_ERROR]):
            reply.arrive(path[1], item)
        return True

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """Wake all callers, because no replies will arrive."""
        self.ended = True
        self.note_gap()

    def note_gap(self) -> None:
        """Wake all callers, because their replies might have been lost with the connection."""
        for reply in self.waiting.values():
            reply.arrived.set()


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
    """

    def __init__(
        self,
        slot: Slot,
        requester: Requester,
        subscriptions: Subscriptions,
        keys: KeyRing,
        guard: Guard,
        background: Background,
    ) -> None:
        self._slot = slot
        self._requester = requester
        self._subscriptions = subscriptions
        self._keys = keys
        self._guard = guard
        self._background = background
        self._replies: dict[tuple[KeySource, str], tuple[_Replies, Subscription]] = {}
        self._subscribe_lock: anyio.Lock | None = None
        self._request_count = 0
        self._serve_count = 0

    def finish(self) -> None:
        """End the subscriptions to replies, because the client has ended."""
        for replies, subscription in self._replies.values():
            self._subscriptions.forget(subscription)
            replies.end()
        self._replies.clear()
        self._subscribe_lock = None

    # Requests

    async def request(
        self, key: Key, channel: str, message: Payload, timeout: Timeout
    ) -> EmitterMessage:
        """Send a request, and return the first reply."""
        key = check_key_source(key)
        channel = check_channel(channel)
        payload = self._requester.encode(message)
        # The real topic is longer and is checked later. This check rejects a request that is too
        # large in any case, before the client subscribes to replies.
        topic = format_topic(key if isinstance(key, str) else PLACEHOLDER_KEY, channel)
        self._requester.check_size(topic.encode(), payload, 1)
        seconds = self._requester.seconds(check_timeout(timeout))
        await self._requester.connected()
        send_request = partial(self._send_request, key, channel, payload, seconds)
        return await self._requester.with_key(key, send_request)

    async def _send_request(
        self, source: KeySource, channel: str, payload: bytes, seconds: float | None, key: str
    ) -> EmitterMessage:
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
        reply = replies.waiting[number] = _Reply()
        sent = connection.session.publish_qos_1(topic, payload, key, where)
        deadline = None
        try:
            with anyio.CancelScope() as scope:
                deadline = requester.deadline(scope.cancel, connection, seconds)
                await requester.answer(connection, sent, None)
                await reply.arrived.wait()
        finally:
            if deadline is not None:
                deadline.cancel()
            del replies.waiting[number]
            if reply.message is None and sent.refusal is None:
                self._send(key, f"{where}{_CANCEL}/", b"")
        if reply.message is None:
            if not self._slot.usable(connection):
                raise self._lost(channel)
            raise RequestTimeoutError(
                f"request {channel!r}: no reply within {seconds:g} s; the request might have taken "
                "effect"
            )
        binary = reply.message.binary
        if reply.kind == _ERROR:
            words = make_printable(binary.decode(errors="replace"))
            raise ReplyError(f"request {channel!r}: {words}")
        return EmitterMessage(where, binary)

    def _lost(self, channel: str) -> Exception:
        slot = self._slot
        if slot.may_connect or slot.usable(slot.connection):
            return ConnectionLostError(
                f"request {channel!r}: the connection was lost before a reply arrived; the request "
                "might have taken effect"
            )
        return slot.gone()

    async def _replies_on(self, source: KeySource, channel: str) -> _Replies:
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
            replies = _Replies(f"{channel}{connection_id}/")
            subscription = Subscription(source, replies.channel, replies)
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
        concurrency: int,
        buffer: int,
        task_status: TaskStatus[None],
    ) -> None:
        """Serve requests until cancelled."""
        key = check_key_source(key)
        check_delivered(check_channel(channel, wildcards=True), "emitter")
        channel = check_channel(channel)
        check_function("handler", handler)
        concurrency = check_int("concurrency", concurrency, 1)
        check_task_status(task_status)
        failure: Exception | None = None
        async with (
            self._subscriptions.subscribe(key, channel, 0, buffer=buffer) as requests,
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
            kind, payload = _REPLY, b""
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
                kind, payload = _ERROR, words.encode(errors="replace")[:_MAX_ERROR_BYTES]
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
        self._requester.check_size(self._topic(key, f"{message.channel}{_REPLY}/"), payload, 0)
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
