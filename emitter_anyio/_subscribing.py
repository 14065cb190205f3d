"""Subscribing: many subscribers on one link, each with what it asked for."""

from __future__ import annotations

import warnings
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Literal, TypeVar, overload

import anyio
from anyio.lowlevel import checkpoint

from . import _requests as requests
from ._backend import Owner
from ._buffer import Overflow, check_buffer
from ._channels import (
    A_KEY,
    Key,
    check_channel,
    check_group,
    check_source,
    format_topic,
    levels,
    share,
    unix_seconds,
    unshare,
)
from ._checks import check_flag, check_int, check_whole
from ._conversation import DEFAULT, Timeout, check_timeout
from ._errors import (
    RequestError,
    SubscriptionConflictError,
    UnauthorizedError,
)
from ._history import check_stored
from ._messages import EmitterMessage, Gap
from ._pending import Pending, Replay
from ._resuming import Resumer, Subscription, replayed
from ._subscription import Entering, EventStream
from ._watermark import Watermark

T = TypeVar("T")


class Subscribing(Entering[EventStream[T]]):
    """What ``subscribe()`` returns: to be awaited, or entered with ``async with``, once."""

    def __init__(
        self,
        owner: Owner,
        for_handlers: Callable[[], Coroutine[Any, Any, None]],
        entered: Callable[[], AbstractAsyncContextManager[EventStream[T]]],
    ) -> None:
        super().__init__(owner, entered)
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


class Subscriber(Resumer):
    """The verbs ``subscribe`` and ``unsubscribe``."""

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
        :param buffer: how many messages may wait in the stream, beside what is replayed or
            resumed; 8 MiB of them at most, where one weighs its payload, its channel and 128 bytes
        :param overflow: what happens to more: ``"raise"`` (a :class:`SlowConsumerError` at the
            place of the gap), ``"drop_oldest"``, ``"drop_newest"`` or ``"block"``, which stops
            reading the link: whoever then awaits an answer while the own buffer is full waits for
            ever, and the broker closes a link that it cannot write to for 120 s. While the stream
            waits for what ``resume`` reads back, ``"block"`` does what ``"raise"`` does
        :param resume: after a lost link, deliver what was stored meanwhile, in order and before
            the live messages, as far as the broker has it. Around the gap a message may come
            twice; what was read back has ``replayed`` set and an ``id``. The key needs ``l``
        :param resume_limit: read back so many messages at most, the newest, and 8 MiB; if there
            are more, that is logged, and a :class:`Gap` says so. Those of an earlier gap that have
            not been received yet count, too
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
        source, filter = self._check_filter(key, channel, group, replay)
        check_buffer(buffer, overflow)
        timeout = check_timeout(timeout)
        mark_gaps = check_flag("mark_gaps", mark_gaps)
        limit = check_int("resume_limit", resume_limit, 0)
        if check_flag("resume", resume):
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
            made = Subscription(source, filter, stream)
            made.mark_gaps = mark_gaps
            if resume:
                made.watermark, made.resume_limit = Watermark(made.channel), limit
            return made

        return Subscribing(
            self._owner,
            partial(self._subscribe_for_handlers, make, source, filter, replay, timeout),
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
        source, filter = self._check_filter(key, channel, group, Replay())
        timeout = check_timeout(timeout)
        text = await self._key_of(source)
        self._check_size(format_topic(text, filter).encode(), b"", 1)
        await self._room()
        subscription = self._awaited.pop((source, filter), None)
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

    def _check_filter(
        self, key: Key, channel: str, group: str | None, replay: Replay
    ) -> tuple[Key, str]:
        source = check_source(key)
        checked = check_channel(channel, wildcards=True)
        filter = share(None if group is None else check_group(group), checked)
        text = source if isinstance(source, str) else A_KEY
        self._check_size(format_topic(text, filter, replay.options).encode(), b"", 1)
        return source, filter

    async def _subscribe(
        self, subscription: Subscription, replay: Replay, timeout: Timeout, key: str
    ) -> None:
        channel = subscription.channel
        watermark = subscription.watermark
        self._check_size(format_topic(key, subscription.filter, replay.options).encode(), b"", 1)
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
            found = list(map(replayed, stored))
            if subscription.stream is not None:
                subscription.stream.put_in_front(found)
            else:
                for message in found:
                    for handler in self._handler_streams("message", message):
                        await handler.put(message)
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
