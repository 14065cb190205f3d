"""Subscribing: many subscribers on one link, each with what it asked for."""

from __future__ import annotations

import warnings
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final, Literal, TypeVar, overload
from weakref import WeakSet

import anyio
from anyio.lowlevel import checkpoint

from . import _requests as requests
from ._channels import (
    Key,
    check_channel,
    check_group,
    check_source,
    check_whole,
    format_topic,
    levels,
    share,
    unix_seconds,
    unshare,
)
from ._conversation import DEFAULT, Timeout
from ._errors import (
    ConnectionLostError,
    EmitterError,
    RequestError,
    SubscriptionConflictError,
    UnauthorizedError,
)
from ._events import logger
from ._history import Historian, check_stored
from ._life import INTERRUPTED
from ._messages import EmitterMessage, Gap, ReplayedMessage, StoredMessage
from ._options import Options
from ._pending import Grant, Pending, Replay
from ._resuming import RENEWED, Watermark
from ._subscription import Entering, EventStream, Overflow, check_buffer

T = TypeVar("T")

_ALL: Final = 0xFFFFFFFF
"""As many stored messages as there are, a page at a time."""

_A_KEY: Final = "k" * 32
"""As long as the key that a function will give."""

_AGAIN: Final = "the link was lost again before the last gap was resumed: what was stored is there"


class Subscribing(Entering[EventStream[T]]):
    """What ``subscribe()`` returns: to be awaited, or entered with ``async with``, once."""

    def __init__(
        self,
        for_handlers: Callable[[], Coroutine[Any, Any, None]],
        entered: Callable[[], AbstractAsyncContextManager[EventStream[T]]],
    ) -> None:
        super().__init__(entered)
        self._for_handlers = for_handlers
        self._used = False

    def __await__(self) -> Generator[Any, Any, None]:
        self._use()
        return self._for_handlers().__await__()

    async def __aenter__(self) -> EventStream[T]:
        self._use()
        return await super().__aenter__()

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                "subscribe() did nothing: write 'await emitter.subscribe(…)' for messages to "
                "on('message'), or 'async with emitter.subscribe(…) as messages:' for a stream",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )

    def _use(self) -> None:
        if self._used:
            raise RuntimeError("a subscribe() is awaited or entered once: call it again")
        self._used = True


class Subscription:
    """
    What one subscriber has asked for.

    :param source: the key as the user gave it
    :param filter: the channel, with its group in front if it is shared
    :param stream: where its messages go; ``None`` is to the handlers
    """

    def __init__(
        self, source: Key, filter: str, stream: EventStream[EmitterMessage | Gap] | None
    ) -> None:
        self.source = source
        self.filter = filter
        self.channel = unshare(filter)[1]
        self.stream = stream
        self.mark_gaps = False
        self.watermark: Watermark | None = None
        self.resume_limit = 0
        self.grant: Grant | None = None
        self.held: Sequence[EventStream[Any]] = ()
        """What waits behind the stored messages that a gap would have lost."""
        self._scopes: WeakSet[anyio.CancelScope] = WeakSet()

    def scope(self) -> anyio.CancelScope:
        """Make a scope that ends with the subscription."""
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        return scope

    def let_through(self) -> None:
        """Hold back no longer what comes."""
        held, self.held = self.held, ()
        for stream in held:
            stream.release()

    def end(self) -> None:
        """End what is done for it."""
        self.let_through()
        for scope in self._scopes:
            scope.cancel()
        if self.watermark is not None:
            self.watermark.close()


class Subscriber(Historian):
    """The verbs ``subscribe`` and ``unsubscribe``."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._subscriptions: dict[Subscription, None] = {}
        self._awaited: dict[tuple[Key, str], Subscription] = {}
        self._restorers.append(self._restore_subscriptions)

    def _begin(self) -> None:
        super()._begin()
        self._subscriptions.clear()
        self._awaited.clear()

    def _finish(self) -> None:
        super()._finish()
        for subscription in self._awaited.values():
            self._forget(subscription)

    @overload
    def subscribe(
        self,
        key: Key,
        channel: str,
        last: int | None = None,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        group: str | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        resume: bool = False,
        resume_limit: int = 1000,
        mark_gaps: Literal[False] = False,
        timeout: Timeout = DEFAULT,
    ) -> Subscribing[EmitterMessage]: ...
    @overload
    def subscribe(
        self,
        key: Key,
        channel: str,
        last: int | None = None,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        group: str | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        resume: bool = False,
        resume_limit: int = 1000,
        mark_gaps: Literal[True],
        timeout: Timeout = DEFAULT,
    ) -> Subscribing[EmitterMessage | Gap]: ...
    def subscribe(
        self,
        key: Key,
        channel: str,
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
        timeout: Timeout = DEFAULT,
    ) -> Any:
        """
        Subscribe to a channel, and to all below it.

        **Awaited**, messages go to the handlers of ``on("message")``; doing it again is nothing
        new. **Entered** with ``async with``, it gives an :class:`EventStream` of its own, and ends
        when it is left, without waiting.

        When the link was lost, the next one has the subscription again before ``connect`` is
        emitted. What was published meanwhile is missing, unless ``resume`` reads back what of it
        was stored. If the broker refuses the subscription then, its stream raises that; for
        handlers it goes to ``on("error")``.

        :param key: a key with the permission to read (``r``); for a group, one that was made for
            ``$share/<group>/<channel>/`` itself; or a function as in :meth:`publish`
        :param channel: the channel; a level may be ``+``, which stands for any one. With the
            broker's default matcher nothing is ever delivered to ``#``, though it may be replayed
        :param last: replay so many stored messages first, if the key may load (``l``); 0 replays
            none; with ``None`` the broker replays the newest one. Beside an overlapping
            subscription the replay comes from a history request, to this subscriber alone: one
            that is stored meanwhile may come twice, and none is missed
        :param since: replay only what was stored since then: an aware ``datetime`` or unix
            seconds; without ``last``, still the newest one only
        :param until: replay only what was stored until then
        :param group: share the messages with the others of this group: each goes to one of them.
            Nothing is replayed to a group
        :param buffer: how many messages may wait in the stream, beside what is replayed
        :param overflow: what happens to more: ``"raise"`` (a :class:`SlowConsumerError` at the
            place of the gap), ``"drop_oldest"``, ``"drop_newest"`` or ``"block"``, which stops
            reading the link: whoever then awaits an answer while the own buffer is full waits for
            ever, and the broker closes a link that it cannot write to for 120 s
        :param resume: after a lost link, deliver what was stored meanwhile, in order and before
            the live messages, as far as the broker has it. Around the gap a message may come
            twice; what was read back has ``replayed`` set and an ``id``. The key needs ``l``
        :param resume_limit: read back so many messages at most, the newest; if there are more,
            that is logged, and a :class:`Gap` says so
        :param mark_gaps: put a :class:`Gap` into the stream wherever the link was away
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: to be awaited or entered, once
        :raises InvalidChannelError: if the broker would not take the channel, or could not resume
            it
        :raises UnauthorizedError: when awaited or entered, if the key does not open the channel,
            or may not load what ``resume`` needs
        :raises SubscriptionConflictError: when awaited or entered, if the broker could not keep
            it apart from another subscription of this link
        :raises ConnectionLostError: when awaited or entered, if the link was lost meanwhile

        Cancelled while being entered, the subscription is given back.
        """
        replay = Replay(
            check_whole("last", last), unix_seconds("since", since), unix_seconds("until", until)
        )
        filter = self._check_filter(key, channel, group, replay)
        check_buffer(buffer, overflow)
        limit = check_whole("resume_limit", resume_limit)
        if resume:
            check_stored(unshare(filter)[1])
        if unshare(filter)[0] is not None:
            if replay.insists:
                raise ValueError("Emitter replays nothing to a group: leave out last, since, until")
            if resume:
                raise ValueError(
                    "resume is not for a group: what was stored meanwhile, others of it have got"
                )
            replay = Replay(last=0)

        def make(stream: EventStream[EmitterMessage | Gap] | None) -> Subscription:
            made = Subscription(key, filter, stream)
            made.mark_gaps = mark_gaps
            if resume:
                made.watermark, made.resume_limit = Watermark(made.channel), limit or 0
            return made

        return Subscribing(
            partial(self._subscribe_for_handlers, make, key, filter, replay, timeout),
            partial(self._subscribed, make, filter, replay, buffer, overflow, timeout),
        )

    async def unsubscribe(
        self, key: Key, channel: str, *, group: str | None = None, timeout: Timeout = DEFAULT
    ) -> None:
        """
        End what an awaited :meth:`subscribe` began.

        The broker is told when nobody else uses the channel here.

        :param key: the key, or the function, that it was subscribed with
        :param channel: the channel
        :param group: the group that it was subscribed in, if any
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :raises RequestError: if the broker refused
        """
        filter = self._check_filter(key, channel, group, Replay())
        text = await self._key_of(key)
        await self._room()
        subscription = self._awaited.pop((key, filter), None)
        if subscription is not None:
            pending = self._give_back(subscription)
        elif self._session.in_use(filter):
            pending = None
        else:
            pending = self._session.unsubscribe(text, filter)
        if pending is None:
            await checkpoint()
        else:
            pending.awaited = True
            await self._answer(pending, timeout)

    def _check_filter(self, key: Key, channel: str, group: str | None, replay: Replay) -> str:
        text = check_source(key)
        checked = check_channel(channel, wildcards=True)
        filter = share(None if group is None else check_group(group), checked)
        topic = format_topic(text if isinstance(text, str) else _A_KEY, filter, replay.options)
        self._check_size(topic.encode(), b"", 1)
        return filter

    async def _subscribe(
        self, subscription: Subscription, replay: Replay, timeout: Timeout, key: str
    ) -> None:
        channel = subscription.channel
        watermark = subscription.watermark
        if watermark is not None:
            # Before the broker is asked to deliver, so that nothing stays between.
            watermark.begin(await self._newest_stored(key, channel))
        await self._room()
        while (other := self._session.replaying(channel)) is not None:
            # What is replayed to another one now would reach this one too.
            settled = anyio.Event()
            other.call_when_done(settled.set)
            await settled.wait()
            await self._room()
        if (
            replay.insists
            and levels(channel)[0] == "+"
            and self._session.overlapped(subscription.filter)
        ):
            raise SubscriptionConflictError(
                f"{channel!r}: beside an overlapping subscription a replay comes from a history "
                "request, which needs a literal first level; use last=0, or a second Emitter"
            )
        grant, by_history = self._session.subscribe(
            subscription.source, key, subscription.filter, replay
        )
        subscription.grant = grant
        self._subscriptions[subscription] = None
        for receiver in (watermark, subscription.stream):
            if receiver is not None:
                self._routers["message"].add(receiver, channel)
        try:
            await self._answer(grant.asked, timeout)
            if by_history:
                await self._replay(key, subscription, replay, timeout)
        except BaseException:
            self._give_back(subscription)
            raise
        if watermark is not None:
            assert self._tasks is not None
            scope = subscription.scope()
            self._tasks.start_soon(self._keep_watermark, subscription, watermark, grant, scope)

    def _give_back(self, subscription: Subscription) -> Pending[None] | None:
        self._forget(subscription)
        grant, subscription.grant = subscription.grant, None
        return None if grant is None else self._session.release(grant)

    def _forget(self, subscription: Subscription) -> None:
        self._subscriptions.pop(subscription, None)
        subscription.end()
        for receiver in (subscription.watermark, subscription.stream):
            if receiver is not None:
                self._routers["message"].discard(receiver)

    async def _replay(
        self, key: str, subscription: Subscription, replay: Replay, timeout: Timeout
    ) -> None:
        """Replay to one subscriber alone what the broker would replay to all of this link."""
        channel = subscription.channel
        last = 1 if replay.last is None else replay.last
        while last and levels(channel)[0] != "+":
            asked = requests.history(
                key, channel, last=last, since=replay.since, until=replay.until
            )
            try:
                stored = await self._request(asked, timeout)
            except UnauthorizedError:
                # As in a SUBSCRIBE: without the permission to load nothing is replayed.
                return
            except RequestError as exc:
                if exc.status is not None:
                    raise
                # Too large for the broker to send; its own replays are cut off at 64 KiB as well.
                last //= 2
                continue
            found = list(map(_replayed, stored))
            if subscription.stream is not None:
                subscription.stream.put_in_front(found)
            else:
                for message in found:
                    for handler in self._handler_streams("message", message):
                        await self._hand_over(handler, message)
            return

    async def _subscribe_for_handlers(
        self,
        make: Callable[[None], Subscription],
        source: Key,
        filter: str,
        replay: Replay,
        timeout: Timeout,
    ) -> None:
        if (source, filter) in self._awaited:
            await self._linked()
            await checkpoint()
            return
        subscription = make(None)
        if subscription.mark_gaps:
            subscription.end()
            raise ValueError(
                "mark_gaps is for a stream: handlers are told by on('disconnect') and on('connect')"
            )
        try:
            await self._keyed(source, partial(self._subscribe, subscription, replay, timeout))
        except BaseException:
            subscription.end()
            raise
        if (source, filter) in self._awaited:
            # Another task was quicker.
            self._give_back(subscription)
        else:
            self._awaited[source, filter] = subscription

    @asynccontextmanager
    async def _subscribed(
        self,
        make: Callable[[EventStream[EmitterMessage | Gap]], Subscription],
        filter: str,
        replay: Replay,
        buffer: int,
        overflow: Overflow,
        timeout: Timeout,
    ) -> AsyncGenerator[EventStream[EmitterMessage | Gap]]:
        stream: EventStream[EmitterMessage | Gap] = EventStream(
            f"subscribe({filter!r})", buffer, overflow
        )
        subscription = make(stream)
        try:
            await self._keyed(
                subscription.source, partial(self._subscribe, subscription, replay, timeout)
            )
            yield stream
        finally:
            self._give_back(subscription)
            self._leave_stream(stream)

    # When the link was lost

    def _link_lost(self) -> None:
        super()._link_lost()
        for receiver in (*self._routers["message"], *self._feeds):
            receiver.note_gap()
        for subscription in self._subscriptions:
            if subscription.watermark is not None:
                subscription.watermark.doubt()
                if not subscription.held:
                    # The gap is marked when it is resumed.
                    continue
            if subscription.mark_gaps and subscription.stream is not None:
                reason = _AGAIN if subscription.held else None
                subscription.stream.push(Gap(subscription.channel, reason=reason), extra=True)

    def _restore_subscriptions(self) -> Iterable[Callable[[], Awaitable[None]]]:
        for subscription in self._subscriptions:
            if subscription.watermark is not None and not subscription.held:
                # What is live waits behind what was stored meanwhile.
                stream = subscription.stream
                subscription.held = self._message_listeners() if stream is None else (stream,)
                for held in subscription.held:
                    held.hold()
        return [partial(self._restore_grant, grant) for grant in self._session.restore()]

    async def _restore_grant(self, grant: Grant) -> None:
        try:
            try:
                await self._answer(grant.asked, DEFAULT)
            except UnauthorizedError:
                key = await self._key_of(grant.source, grant.key)
                if key == grant.key or not grant.users:
                    raise
                self._session.ask_again(grant, key)
                await self._answer(grant.asked, DEFAULT)
        except INTERRUPTED:
            raise
        except Exception as exc:
            for subscription in self._users(grant):
                self._not_restored(subscription, exc)
        else:
            assert self._link_tasks is not None
            for subscription in self._users(grant):
                if (watermark := subscription.watermark) is not None:
                    # Cut short with the link: the next one does it all again.
                    scope = subscription.scope()
                    self._link_tasks.start_soon(self._resume, subscription, watermark, grant, scope)

    def _message_listeners(self) -> tuple[EventStream[Any], ...]:
        return tuple(one for one in self._routers["message"] if one in self._listeners)

    def _users(self, grant: Grant) -> list[Subscription]:
        return [one for one in self._subscriptions if one.grant is grant]

    def _not_restored(self, subscription: Subscription, error: Exception) -> None:
        logger.warning("%r could not be subscribed to again: %s", subscription.filter, error)
        self._forget(subscription)
        if subscription.stream is not None:
            subscription.stream.end(lambda: error)
        else:
            self._awaited.pop((subscription.source, subscription.filter), None)
            self._emit("error", error)

    async def _newest_stored(self, key: str, channel: str) -> StoredMessage | None:
        try:
            found = await self._request(requests.history(key, channel, last=1), DEFAULT)
        except RequestError as exc:
            if exc.status is None:
                # It is too large for the broker to send, and so would be any resuming behind it.
                return None
            raise
        return found[-1] if found else None

    async def _keep_watermark(
        self,
        subscription: Subscription,
        watermark: Watermark,
        grant: Grant,
        scope: anyio.CancelScope,
    ) -> None:
        with scope:
            while True:
                await watermark.stale.wait()
                await anyio.sleep(RENEWED)
                link = self._connection
                try:
                    newest = await self._newest_stored(grant.key, subscription.channel)
                except EmitterError:
                    # The older one will do, until there is a link again.
                    continue
                if link is self._connection and not subscription.held:
                    watermark.renew(newest)

    async def _resume(
        self,
        subscription: Subscription,
        watermark: Watermark,
        grant: Grant,
        scope: anyio.CancelScope,
    ) -> None:
        """Deliver what was stored while the link was away, and then what waits behind it."""
        with scope:
            found: list[StoredMessage] = []
            reason = None
            try:
                async with aclosing(self._stored_behind(grant, watermark)) as stored:
                    async for message in stored:
                        if len(found) == subscription.resume_limit:
                            reason = f"there are more than resume_limit={len(found)}"
                            break
                        found.append(message)
            except ConnectionLostError:
                # The next link does it all again.
                return
            except EmitterError as exc:
                reason = str(exc)
            found.reverse()
            watermark.resumed(found)
            self._put_resumed(subscription, found, reason)

    async def _stored_behind(
        self, grant: Grant, watermark: Watermark
    ) -> AsyncGenerator[StoredMessage]:
        pages = self._newest_first(grant.key, grant.channel, _ALL, watermark.since, None, DEFAULT)
        async with aclosing(pages):
            async for message in pages:
                if watermark.behind(message):
                    yield message

    def _put_resumed(
        self, subscription: Subscription, found: Sequence[StoredMessage], reason: str | None
    ) -> None:
        channel = subscription.channel
        if reason is None:
            logger.info("%r: resumed, with %d stored messages", channel, len(found))
        else:
            logger.warning("%r: resumed with a gap, since %s", channel, reason)
        if subscription.mark_gaps and subscription.stream is not None:
            gap = Gap(channel, len(found), reason is None, reason)
            subscription.stream.put_ahead([gap])
        for message in map(_replayed, found):
            streams = (
                self._handler_streams("message", message)
                if subscription.stream is None
                else (subscription.stream,)
            )
            for stream in streams:
                stream.put_ahead([message])
        subscription.let_through()


def _replayed(stored: StoredMessage) -> ReplayedMessage:
    return ReplayedMessage(stored.channel, stored.binary, stored.id)
