"""Subscribing and unsubscribing: several subscribers share one connection."""

from __future__ import annotations

import warnings
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio._backend import Owner
from emitter_anyio._protocol.pending import Grant, Pending, Replay
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._runtime.events import Events
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._runtime.supervisor import Restoration, Restoring
from emitter_anyio._runtime.totals import Totals
from emitter_anyio._streams import (
    SKIPPED,
    Entering,
    EventStream,
    Overflow,
    Receiver,
    Sender,
    check_buffer,
)
from emitter_anyio._values import requests
from emitter_anyio._values.channels import (
    PLACEHOLDER_KEY,
    Key,
    KeySource,
    check_group,
    check_key_source,
    format_topic,
    levels,
    share,
    unix_seconds,
    unshare,
)
from emitter_anyio._values.checks import (
    check_flag,
    check_int,
    check_optional_int,
    check_sync_function,
)
from emitter_anyio._values.errors import (
    RequestError,
    SubscriptionConflictError,
    UnauthorizedError,
    make_decode_error,
)
from emitter_anyio._values.messages import DecodedMessage, EmitterMessage, Gap
from emitter_anyio._values.router import Routes, check_delivered
from emitter_anyio._values.templates import Channel, check_pattern

from .history import check_stored
from .resumption import Resumption, Subscription, make_replayed
from .watermark import Watermark

T = TypeVar("T")

_Make = Callable[["Sender[EmitterMessage | Gap] | None"], Subscription]


class Subscribing(Entering[EventStream[T]], Generic[T]):
    """
    The result of :meth:`Emitter.subscribe`, to be awaited or entered, once.

    :param owner: the thread and event loop in which it must be used
    :param subscribe_handlers: subscribes when the object is awaited
    :param make: makes the context manager that subscribes when the object is entered
    """

    def __init__(
        self,
        owner: Owner,
        subscribe_handlers: Callable[[], Coroutine[Any, Any, None]],
        make: Callable[[], AbstractAsyncContextManager[EventStream[T]]],
    ) -> None:
        super().__init__(owner, make)
        self._subscribe_handlers = subscribe_handlers
        self._used = False

    def __await__(self) -> Generator[Any, Any, None]:
        self._use()
        return self._subscribe_handlers().__await__()

    async def __aenter__(self) -> EventStream[T]:
        self._use()
        return await super().__aenter__()

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                "subscribe() was not awaited or entered: use 'await emitter.subscribe(…)' for "
                "handlers, or 'async with emitter.subscribe(…) as messages:' for a stream",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )

    def _use(self) -> None:
        if self._used:
            raise RuntimeError(
                "cannot await or enter the same subscribe() twice: call subscribe() again"
            )
        self._used = True


class Subscriptions:
    """
    The subscriptions of a client, which each new connection restores.

    :param slot: the current connection
    :param requester: sends requests
    :param wants: what the client requests on every connection
    :param routes: the receivers of each channel's messages
    :param events: the streams of handlers; emits errors
    :param totals: counts the items that closed streams have dropped
    :param resumption: reads stored messages after a lost connection
    """

    def __init__(
        self,
        slot: Slot,
        requester: Requester,
        wants: Wants,
        routes: Routes[Receiver[Any]],
        events: Events,
        totals: Totals,
        resumption: Resumption,
    ) -> None:
        self._slot = slot
        self._requester = requester
        self._wants = wants
        self._routes = routes
        self._events = events
        self._totals = totals
        self._resumption = resumption
        self._subscriptions: dict[Subscription, None] = {}
        self._awaited: dict[tuple[KeySource, str], Subscription] = {}
        """The awaited subscriptions, by key and filter."""

    def finish(self) -> None:
        """End the awaited subscriptions, because the client has ended."""
        for subscription in self._awaited.values():
            self.forget(subscription)
        self._awaited.clear()

    def subscribe(
        self,
        key: Key,
        channel: str | Channel,
        last: int | None = None,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        group: str | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        resume: bool = False,
        resume_limit: int = 1000,
        mark_gaps: bool = False,
        decode: Callable[[bytes], object] | None = None,
        timeout: Timeout = DEFAULT,
    ) -> Subscribing[Any]:
        """Check every argument, and return an object to be awaited or entered."""
        replay = Replay(
            check_optional_int("last", last),
            unix_seconds("since", since),
            unix_seconds("until", until),
        )
        source, filter = self._check_filter(key, channel, group, replay)
        check_delivered(check_pattern(channel), self._wants.matcher)
        check_buffer(buffer, overflow)
        timeout = check_timeout(timeout)
        mark_gaps = check_flag("mark_gaps", mark_gaps)
        limit = check_int("resume_limit", resume_limit, 0)
        if decode is not None:
            check_sync_function("decode", decode)
        if check_flag("resume", resume):
            check_stored(unshare(filter)[1])
        if unshare(filter)[0] is not None:
            if replay.is_explicit:
                raise ValueError(
                    "cannot use last, since or until with group: Emitter does not replay messages "
                    "to a group"
                )
            if resume:
                raise ValueError(
                    "cannot use resume with group: other members might have received the stored "
                    "messages"
                )
            replay = Replay(last=0)

        def make(send: Sender[EmitterMessage | Gap] | None) -> Subscription:
            watermark = Watermark() if resume else None
            return Subscription(
                *(source, filter, send),
                mark_gaps=mark_gaps,
                watermark=watermark,
                resume_limit=limit,
            )

        return Subscribing(
            self._slot.owner,
            partial(self._subscribe_handlers, make, source, filter, replay, decode, timeout),
            partial(self._stream, make, filter, replay, buffer, overflow, decode, timeout),
        )

    async def unsubscribe(
        self, key: Key, channel: str | Channel, group: str | None, timeout: Timeout
    ) -> None:
        """End an awaited subscription."""
        requester = self._requester
        source, filter = self._check_filter(key, channel, group, Replay())
        timeout = check_timeout(timeout)
        text = await requester.key_of(source)
        requester.check_size(format_topic(text, filter).encode(), b"", 1)
        connection = await requester.space()
        subscription = self._awaited.pop((source, filter), None)
        if subscription is not None:
            pending = self.end(subscription)
        elif self._wants.is_subscribed(filter):
            pending = None
        else:
            pending = connection.session.unsubscribe(text, filter)
        if pending is None:
            await checkpoint()
        else:
            await requester.answer(connection, pending, timeout)

    async def add(
        self, subscription: Subscription, replay: Replay, timeout: Timeout, key: str
    ) -> None:
        """Subscribe one subscriber, and wait until the broker has accepted it."""
        requester = self._requester
        channel, filter = subscription.channel, subscription.filter
        requester.check_size(format_topic(key, filter, replay.options).encode(), b"", 1)
        await self._resumption.prepare(subscription, key)
        connection = await requester.space()
        while (other := connection.session.replaying(channel)) is not None:
            # Messages that are being replayed to another subscriber would reach this one as well.
            acknowledged = anyio.Event()
            other.call_when_done(acknowledged.set)
            await acknowledged.wait()
            connection = await requester.space()
        if replay.is_explicit and levels(channel)[0] == "+" and self._wants.overlaps(filter):
            raise SubscriptionConflictError(
                f"cannot replay {channel!r}: it overlaps another subscription, so the replay needs "
                "a history request and therefore a literal first level; use last=0 or a second "
                "Emitter"
            )
        grant, by_history = connection.session.subscribe(subscription.source, key, filter, replay)
        subscription.set_grant(grant)
        self._subscriptions[subscription] = None
        for receiver in subscription.receivers:
            self._routes.add("message", receiver, channel)
        try:
            await requester.answer(connection, grant.asked, timeout)
            if by_history:
                await self._replay(key, subscription, replay, timeout)
        except BaseException:
            self.end(subscription)
            raise
        self._resumption.start(subscription, grant)

    def end(self, subscription: Subscription) -> Pending[None] | None:
        """
        End one subscriber.

        :return: the UNSUBSCRIBE, if this was the last subscriber of its filter
        """
        self.forget(subscription)
        grant = subscription.clear_grant()
        unused = [] if grant is None else self._wants.leave(grant)
        session = self._slot.session
        # The broker has forgotten the subscriptions of earlier connections.
        return None if session is None else session.unsubscribe_unused(unused)

    def forget(self, subscription: Subscription) -> None:
        """End one subscriber without sending UNSUBSCRIBE."""
        self._subscriptions.pop(subscription, None)
        subscription.end()
        for receiver in subscription.receivers:
            self._routes.discard("message", receiver)

    def _check_filter(
        self, key: Key, channel: str | Channel, group: str | None, replay: Replay
    ) -> tuple[KeySource, str]:
        source = check_key_source(key)
        checked = check_pattern(channel)
        filter = share(None if group is None else check_group(group), checked)
        text = source if isinstance(source, str) else PLACEHOLDER_KEY
        topic = format_topic(text, filter, replay.options)
        self._requester.check_size(topic.encode(), b"", 1)
        return source, filter

    async def _replay(
        self, key: str, subscription: Subscription, replay: Replay, timeout: Timeout
    ) -> None:
        """Replay to one subscriber alone; the broker would replay to all of this connection."""
        channel = subscription.channel
        last = 1 if replay.last is None else replay.last
        while last and levels(channel)[0] != "+":
            request = requests.history(
                key, channel, last=last, since=replay.since, until=replay.until
            )
            try:
                stored = await self._requester.request(request, timeout)
            except UnauthorizedError:
                # Without the permission to load, the broker replays nothing after SUBSCRIBE either.
                return
            except RequestError as exc:
                if exc.status is not None:
                    raise
                # The reply was too large. The broker limits its own replays to 64 KiB as well.
                last //= 2
                continue
            found = list(map(make_replayed, stored))
            if subscription.send is not None:
                subscription.send.put_in_front(found)
            else:
                for message in found:
                    for handler in self._events.message_listeners(message):
                        await handler.put(message)
            return

    async def _subscribe_handlers(
        self,
        make: _Make,
        source: KeySource,
        filter: str,
        replay: Replay,
        decode: Callable[[bytes], object] | None,
        timeout: Timeout,
    ) -> None:
        if decode is not None:
            raise ValueError(
                "cannot use decode with an awaited subscribe(): handlers get an EmitterMessage; "
                "use message.as_type(decode) in the handler"
            )
        if (source, filter) in self._awaited:
            await self._requester.connected()
            await checkpoint()
            return
        subscription = make(None)
        if subscription.mark_gaps:
            subscription.end()
            raise ValueError(
                "cannot use mark_gaps with an awaited subscribe(): handlers get no Gap; use "
                "on('disconnect') and on('connect')"
            )
        try:
            add = partial(self.add, subscription, replay, timeout)
            await self._requester.with_key(source, add)
        except BaseException:
            subscription.end()
            raise
        if (source, filter) in self._awaited:
            # Another task has subscribed to the same filter in the meantime.
            self.end(subscription)
        else:
            self._awaited[source, filter] = subscription

    @asynccontextmanager
    async def _stream(
        self,
        make: _Make,
        filter: str,
        replay: Replay,
        buffer: int,
        overflow: Overflow,
        decode: Callable[[bytes], object] | None,
        timeout: Timeout,
    ) -> AsyncGenerator[EventStream[EmitterMessage | Gap]]:
        def leave(send: Sender[EmitterMessage | Gap]) -> None:
            self.end(subscription)
            self._totals.leave_stream(send)

        send: Sender[EmitterMessage | Gap] = Sender(
            f"subscribe({filter!r})", buffer, overflow, leave
        )
        subscription = make(send)
        add = partial(self.add, subscription, replay, timeout)
        decode_item = None if decode is None else partial(self._decode, send, decode)
        try:
            with EventStream[EmitterMessage | Gap](send, decode_item) as stream:
                await self._requester.with_key(subscription.source, add)
                yield stream
        finally:
            send.leave()

    def _decode(
        self,
        send: Sender[EmitterMessage | Gap],
        decode: Callable[[bytes], object],
        item: EmitterMessage | Gap,
    ) -> Any:
        if isinstance(item, Gap):
            return item
        try:
            return DecodedMessage(item, decode(item.binary))
        except Exception as exc:
            send.note_undecoded()
            self._events.report(make_decode_error(send.what, item, exc))
            return SKIPPED

    # Lost and new connections

    def note_loss(self) -> None:
        """Note in every stream of messages that the connection was lost."""
        for receiver in self._routes.messages:
            receiver.note_gap()
        for subscription in self._subscriptions:
            self._resumption.note_loss(subscription)

    def restore(self, restoring: Restoring) -> Iterable[Restoration]:
        """Request every subscription on a new connection."""
        for subscription in self._subscriptions:
            self._resumption.hold(subscription)
        session = restoring.connection.session
        for grant in session.restore():
            yield Restoration(
                f"the subscription to {grant.filter!r}",
                partial(self._await_restored, restoring, grant),
                partial(self._refused, session, grant),
            )

    async def _await_restored(self, restoring: Restoring, grant: Grant) -> None:
        connection, requester = restoring.connection, restoring.requester
        try:
            await requester.answer(connection, grant.asked, DEFAULT)
        except UnauthorizedError:
            key = await requester.key_of(grant.source, grant.key)
            if key == grant.key or not grant.users:
                raise
            connection.session.subscribe_again(grant, key)
            await requester.answer(connection, grant.asked, DEFAULT)
        for subscription in self._users(grant):
            self._resumption.resume(restoring, subscription, grant)

    def _refused(self, session: Session, grant: Grant, error: Exception) -> None:
        session.unsubscribe_unused(self._wants.remove(grant))
        for subscription in self._users(grant):
            self.forget(subscription)
            if subscription.receiver is not None:
                subscription.receiver.end(lambda: error)
            else:
                self._awaited.pop((subscription.source, subscription.filter), None)
                self._events.emit("error", error)

    def _users(self, grant: Grant) -> list[Subscription]:
        return [one for one in self._subscriptions if one.grant is grant]
