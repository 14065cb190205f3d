"""Subscribing: many subscribers on one link, each with what it asked for."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from . import _requests as requests
from ._channels import (
    check_channel,
    check_group,
    check_key,
    check_whole,
    format_topic,
    levels,
    share,
    unix_seconds,
    unshare,
)
from ._conversation import DEFAULT, Conversation, Timeout
from ._errors import RequestError, SubscriptionConflictError, UnauthorizedError
from ._messages import EmitterMessage
from ._options import Options
from ._pending import Grant, Replay
from ._subscription import Entering, EventStream, Overflow, check_buffer


class Subscribing(Entering[EventStream[EmitterMessage]]):
    """What ``subscribe()`` returns: to be awaited, or entered with ``async with``, once."""

    def __init__(
        self,
        for_handlers: Callable[[], Coroutine[Any, Any, None]],
        entered: Callable[[], AbstractAsyncContextManager[EventStream[EmitterMessage]]],
    ) -> None:
        super().__init__(entered)
        self._for_handlers = for_handlers
        self._used = False

    def __await__(self) -> Generator[Any, Any, None]:
        self._use()
        return self._for_handlers().__await__()

    async def __aenter__(self) -> EventStream[EmitterMessage]:
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


class Subscriber(Conversation):
    """The verbs ``subscribe`` and ``unsubscribe``."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._awaited: dict[tuple[str, str], Grant] = {}

    def _begin(self) -> None:
        super()._begin()
        self._awaited.clear()

    def subscribe(
        self,
        key: str,
        channel: str,
        last: int | None = None,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        group: str | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        timeout: Timeout = DEFAULT,
    ) -> Subscribing:
        """
        Subscribe to a channel, and to all below it.

        **Awaited**, messages go to the handlers of ``on("message")``; doing it again is nothing
        new. **Entered** with ``async with``, it gives an :class:`EventStream` of its own, and ends
        when it is left, without waiting.

        :param key: a key with the permission to read (``r``); for a group, one that was made for
            ``$share/<group>/<channel>/`` itself
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
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: to be awaited or entered, once
        :raises InvalidChannelError: if the broker would not take the channel
        :raises UnauthorizedError: when awaited or entered, if the key does not open the channel
        :raises SubscriptionConflictError: when awaited or entered, if the broker could not keep
            it apart from another subscription of this link

        Cancelled while being entered, the subscription is given back.
        """
        replay = Replay(
            check_whole("last", last), unix_seconds("since", since), unix_seconds("until", until)
        )
        filter = self._check_filter(key, channel, group, replay)
        check_buffer(buffer, overflow)
        if unshare(filter)[0] is not None:
            if replay.insists:
                raise ValueError("Emitter replays nothing to a group: leave out last, since, until")
            replay = Replay(last=0)
        return Subscribing(
            partial(self._subscribe_for_handlers, key, filter, replay, timeout),
            partial(self._subscribed, key, filter, replay, buffer, overflow, timeout),
        )

    async def unsubscribe(
        self, key: str, channel: str, *, group: str | None = None, timeout: Timeout = DEFAULT
    ) -> None:
        """
        End what an awaited :meth:`subscribe` began.

        The broker is told when nobody else uses the channel here.

        :param key: the key that it was subscribed with
        :param channel: the channel
        :param group: the group that it was subscribed in, if any
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :raises RequestError: if the broker refused
        """
        filter = self._check_filter(key, channel, group, Replay())
        await self._room()
        grant = self._awaited.pop((key, filter), None)
        if grant is not None:
            pending = self._session.release(grant)
        elif self._session.in_use(filter):
            pending = None
        else:
            pending = self._session.unsubscribe(key, filter)
        if pending is None:
            await checkpoint()
        else:
            pending.awaited = True
            await self._answer(pending, timeout)

    def _check_filter(self, key: str, channel: str, group: str | None, replay: Replay) -> str:
        check_key(key)
        checked = check_channel(channel, wildcards=True)
        filter = share(None if group is None else check_group(group), checked)
        self._check_size(format_topic(key, filter, replay.options).encode(), b"", 1)
        return filter

    async def _subscribe(
        self,
        key: str,
        filter: str,
        replay: Replay,
        stream: EventStream[EmitterMessage] | None,
        timeout: Timeout,
    ) -> Grant:
        _, channel = unshare(filter)
        await self._room()
        while (other := self._session.replaying(channel)) is not None:
            # What is replayed to another one now would reach this one too.
            settled = anyio.Event()
            other.call_when_done(settled.set)
            await settled.wait()
            await self._room()
        if replay.insists and levels(channel)[0] == "+" and self._session.overlapped(filter):
            raise SubscriptionConflictError(
                f"{channel!r}: beside an overlapping subscription a replay comes from a history "
                "request, which needs a literal first level; use last=0, or a second Emitter"
            )
        grant, by_history = self._session.subscribe(key, filter, replay)
        if stream is not None:
            self._routers["message"].add(stream, channel)
        try:
            await self._answer(grant.asked, timeout)
            if by_history:
                await self._replay(key, channel, replay, stream, timeout)
        except BaseException:
            self._give_back(grant, stream)
            raise
        return grant

    def _give_back(self, grant: Grant, stream: EventStream[EmitterMessage] | None) -> None:
        if stream is not None:
            self._routers["message"].discard(stream)
            self._leave_stream(stream)
        if self._connection is not None:
            self._session.release(grant)

    async def _replay(
        self,
        key: str,
        channel: str,
        replay: Replay,
        stream: EventStream[EmitterMessage] | None,
        timeout: Timeout,
    ) -> None:
        """Replay to one subscriber alone what the broker would replay to all of this link."""
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
            found = [EmitterMessage(message.channel, message.binary) for message in stored]
            if stream is not None:
                stream.put_in_front(found)
            else:
                for message in found:
                    for handler in self._handler_streams("message", message):
                        await self._hand_over(handler, message)
            return

    async def _subscribe_for_handlers(
        self, key: str, filter: str, replay: Replay, timeout: Timeout
    ) -> None:
        if (key, filter) in self._awaited:
            self._link()
            await checkpoint()
            return
        grant = await self._subscribe(key, filter, replay, None, timeout)
        if (key, filter) in self._awaited:
            # Another task was quicker.
            self._give_back(grant, None)
        else:
            self._awaited[key, filter] = grant

    @asynccontextmanager
    async def _subscribed(
        self,
        key: str,
        filter: str,
        replay: Replay,
        buffer: int,
        overflow: Overflow,
        timeout: Timeout,
    ) -> AsyncGenerator[EventStream[EmitterMessage]]:
        stream: EventStream[EmitterMessage] = EventStream(
            f"subscribe({filter!r})", buffer, overflow
        )
        try:
            grant = await self._subscribe(key, filter, replay, stream, timeout)
        except BaseException:
            stream.close()
            raise
        try:
            yield stream
        finally:
            self._give_back(grant, stream)
