"""Request and reply between clients.

A request goes to ``channel/<connection id of the requester>/<number>/``, as in Emitter's Dart SDK.
Below that follow ``reply/``, ``error/`` and, from the requester, ``cancel/``. The payloads are the
users' own.
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
from emitter_anyio._values import requests as asking
from emitter_anyio._values.channels import (
    PLACEHOLDER_KEY,
    Key,
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
from emitter_anyio._values.messages import EmitterMessage, Gap, Payload, encode_payload
from emitter_anyio._values.text import make_printable

from .resumption import Subscription
from .subscriptions import Subscriptions

Serve: TypeAlias = Callable[[EmitterMessage], "Payload | Awaitable[Payload]"]

_REPLY: Final = "reply"
_ERROR: Final = "error"
_CANCEL: Final = "cancel"

_MAX_ERROR_BYTES: Final = 1024

_NO_ECHO: Final = (("me", 0),)


class _Reply:
    """A reply that a caller awaits."""

    def __init__(self) -> None:
        self.came = anyio.Event()
        self.kind = ""
        self.message: EmitterMessage | None = None

    def arrive(self, kind: str, message: EmitterMessage) -> None:
        """Take the reply."""
        self.kind, self.message = kind, message
        self.came.set()


class _Replies(Receiver["EmitterMessage | Gap"]):
    """Receives the replies on one channel, and gives each to its caller."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.waiting: dict[str, _Reply] = {}
        self.ended = False

    def push(self, item: EmitterMessage | Gap, *, extra: bool = False) -> bool:
        """Give a reply to its caller; drop a late or unknown one."""
        assert isinstance(item, EmitterMessage)
        path = levels(item.channel[len(self.channel) :] or "/")
        reply = self.waiting.get(path[0])
        if reply is not None and reply.message is None and path[1:] in ([_REPLY], [_ERROR]):
            reply.arrive(path[1], item)
        return True

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """Wake all callers: there will be no replies."""
        self.ended = True
        self.note_gap()

    def note_gap(self) -> None:
        """Wake all callers: the connection was lost, perhaps with their replies."""
        for reply in self.waiting.values():
            reply.came.set()


@dataclass(eq=False)
class _Service:
    """
    The state of one ``serve()``.

    :ivar concurrency: the most requests that are handled at the same time
    :ivar running: the requests that are being handled
    :ivar waiting: the requests that wait, oldest first, each with the key for its reply
    :ivar drops: whether the last request was dropped, which is logged once
    """

    handler: Serve
    concurrency: int
    tasks: TaskGroup
    running: dict[str, anyio.CancelScope] = field(default_factory=dict)
    waiting: dict[str, tuple[str, EmitterMessage]] = field(default_factory=dict)
    drops: bool = False

    def note_drop(self, *, dropped: bool) -> bool:
        """Note whether a request was dropped; return whether it is the first one in a row."""
        first = dropped and not self.drops
        self.drops = dropped
        return first


class Calls:
    """
    Makes requests to other clients, and serves theirs.

    :param slot: the present connection
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
        self._replies: dict[tuple[Key, str], tuple[_Replies, Subscription]] = {}
        self._subscribing: anyio.Lock | None = None
        self._requests = 0
        self._served = 0

    def finish(self) -> None:
        """End the subscriptions to replies, because the client has ended."""
        for replies, subscription in self._replies.values():
            self._subscriptions.forget(subscription)
            replies.end()
        self._replies.clear()
        self._subscribing = None

    # Requests

    async def request(
        self, key: Key, channel: str, message: Payload, timeout: Timeout
    ) -> EmitterMessage:
        """Send a request, and return the first reply."""
        key = check_key_source(key)
        channel = check_channel(channel)
        payload = encode_payload(message)
        # The topic that is sent is longer; but a request that is too large in any case must not
        # subscribe to replies.
        topic = format_topic(key if isinstance(key, str) else PLACEHOLDER_KEY, channel)
        self._requester.check_size(topic.encode(), payload, 1)
        seconds = self._requester.seconds(check_timeout(timeout))
        await self._requester.connected()
        ask = partial(self._ask, key, channel, payload, seconds)
        return await self._requester.with_key(key, ask)

    async def _ask(
        self, source: Key, channel: str, payload: bytes, seconds: float | None, key: str
    ) -> EmitterMessage:
        requester = self._requester
        replies = await self._replies_on(source, channel)
        # One counter for all: two keys of one channel have their replies in the same place.
        self._requests += 1
        number = str(self._requests)
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
                await reply.came.wait()
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
                f"request {channel!r}: nobody replied within {seconds:g} s; whether it took "
                "effect is unknown"
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
                f"request {channel!r}: the link was lost before a reply came; whether it took "
                "effect is unknown"
            )
        return slot.gone()

    async def _replies_on(self, source: Key, channel: str) -> _Replies:
        if self._subscribing is None:
            self._subscribing = anyio.Lock()
        async with self._subscribing:
            known = self._replies.get((source, channel))
            # One that has ended could not be restored on a new connection: subscribe once more.
            if known is not None and not known[0].ended:
                return known[0]
            connection = await self._requester.connected()
            connection_id = connection.session.connection_id
            if connection_id is None:
                connection_id = (await self._requester.request(asking.me(), DEFAULT)).id
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
        task_status: TaskStatus[Any],
    ) -> None:
        """Serve requests until cancelled."""
        key = check_key_source(key)
        channel = check_channel(channel)
        check_function("handler", handler)
        concurrency = check_int("concurrency", concurrency, 1)
        check_task_status(task_status)
        failure: Exception | None = None
        async with (
            self._subscriptions.subscribe(key, channel, 0, buffer=buffer) as requests,
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
                full = len(waiting) == buffer
                if service.note_drop(dropped=full):
                    logger.warning(
                        "serving %r: dropping requests, because %d are being handled and %d "
                        "wait; give a larger concurrency= or buffer=",
                        channel,
                        len(running),
                        buffer,
                    )
                if not full:
                    waiting[asked] = await self._keys.get(key), message
                    self._serve_waiting(service)
            elif len(path) == 3 and path[2] == _CANCEL:
                # Also while all are busy, because this may end one of them.
                asked = asked.removesuffix(f"{_CANCEL}/")
                waiting.pop(asked, None)
                if asked in running:
                    running[asked].cancel()

    def _serve_waiting(self, service: _Service) -> None:
        while service.waiting and len(service.running) < service.concurrency:
            asked = next(iter(service.waiting))
            key, message = service.waiting.pop(asked)
            scope = service.running[asked] = anyio.CancelScope()
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
                logger.warning("serving %r raised", make_printable(message.channel), exc_info=error)
                words = f"the handler that served it raised {type(error).__name__}: {error}"
                kind, payload = _ERROR, words.encode(errors="replace")[:_MAX_ERROR_BYTES]
            with suppress(EmitterError):  # without a connection, the requester is told that
                await self._requester.space()
                self._send(key, f"{message.channel}{kind}/", payload)
        del service.running[message.channel]
        self._serve_waiting(service)

    async def _reply_of(self, handler: Serve, key: str, message: EmitterMessage) -> bytes:
        reply: Any = handler(message)
        if isinstance(reply, Awaitable):
            reply = await reply
        payload = encode_payload(reply)
        self._requester.check_size(self._topic(key, f"{message.channel}{_REPLY}/"), payload, 0)
        return payload

    def _send(self, key: str, channel: str, payload: bytes) -> None:
        # Without waiting, because the caller may be cancelled.
        connection = self._slot.connection
        if connection is not None and self._slot.usable(connection):
            connection.session.publish(self._topic(key, channel), payload)

    def _topic(self, key: str, channel: str) -> bytes:
        # Only a client that both makes and serves requests has to receive its own.
        options = () if self._served and self._replies else _NO_ECHO
        return format_topic(key, channel, options).encode()
