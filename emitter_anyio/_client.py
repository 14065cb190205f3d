"""The client: its public verbs."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from . import _requests as requests
from ._channels import (
    check_channel,
    check_key,
    check_target,
    check_whole,
    format_topic,
    levels,
    unix_seconds,
)
from ._errors import (
    EmitterError,
    MessageTooLargeError,
    RequestError,
    RequestTimeoutError,
    SubscriptionConflictError,
    UnauthorizedError,
)
from ._life import Life
from ._messages import EmitterMessage, Payload, encode_payload
from ._options import Options, make_options
from ._presence import PresenceFeed
from ._requests import ChannelKey, Me, PresenceStatus, Request
from ._session import Grant, Pending, Replay
from ._subscription import EventStream, Overflow, check_buffer

T = TypeVar("T")


class _Default(Enum):
    """Stands for the client's own ``request_timeout``."""

    TIMEOUT = "request_timeout"


DEFAULT: Final = _Default.TIMEOUT

_TOPICS: Final = 1024
"""So many topics are kept ready to be published to."""


def connect(options: Mapping[str, Any] | str | None = None, /, **keywords: Any) -> Emitter:
    """
    Make a client; nothing happens until it is entered.

    :param options: a mapping of options, as in the original SDK, or a URL: ``mqtt://`` (port 8080
        unless said), ``mqtts://`` (port 443) or ``unix://``
    :param keywords: options; ``host`` (``"api.emitter.io"``), ``port`` (443, or 8080 if not
        secure), ``secure`` (``True``), ``servers`` (URLs to try in turn, instead), ``keepalive``
        (30 s, from 1 to 60), ``username``, ``password``, ``client_id``, ``will`` (a
        :class:`Will`), ``ssl_context`` (verified by the system's authorities),
        ``connect_timeout`` (10 s for each server), ``request_timeout`` (10 s for each awaited
        answer; ``None`` never), ``disconnect_timeout`` (5 s), ``matcher`` (``"emitter"`` or
        ``"mqtt"``, as the broker is configured), ``max_message_size`` (65536 bytes),
        ``allow_collisions`` (``False``; for brokers that keep channels of equal hashes apart),
        ``connectable`` (an ``anyio.abc.ByteStreamConnectable`` instead of host and TLS),
        ``reconnect`` (``None``: one link)
    :return: a client to be entered
    :raises TypeError: if an option is unknown, of the wrong kind, or said twice with two values
    :raises ValueError: if a value is out of its range
    """
    return Emitter(make_options(options, keywords))


class Emitter(Life):
    """
    A client of an Emitter broker; :func:`connect` makes one.

    It lives inside ``async with``, or in a task group by ``await task_group.start(emitter.run)``,
    on asyncio and on Trio. The body starts connected. When the link is gone for good, the body is
    cancelled and the block raises :class:`ConnectionLostError`. Entering it again after it ended
    is fine.

    Every verb may be cancelled at any time: there is never half a packet on the wire, and the
    client stays usable. Every awaited verb is a checkpoint, but ``publish(qos=0)``, which notices
    cancellation at least at every 16th call and yields at least at every 64th.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._topics: dict[tuple[object, ...], bytes] = {}
        self._publishes = 0
        self._awaited: dict[tuple[str, str], Grant] = {}
        self._presence_wanted: set[str] = set()

    def _begin(self) -> None:
        super()._begin()
        self._awaited.clear()
        self._presence_wanted.clear()

    def __repr__(self) -> str:
        servers = ", ".join(map(str, self._options.servers))
        return f"<Emitter {servers}, {self._state}>"

    async def publish(
        self,
        key: str,
        channel: str,
        message: Payload,
        ttl: int | None = None,
        *,
        qos: Literal[0, 1] = 0,
        retain: bool = False,
        echo: bool = True,
        timeout: float | None | _Default = DEFAULT,
    ) -> None:
        """
        Publish a message.

        :param key: a key with the permission to write (``w``)
        :param channel: the channel, without wildcards
        :param message: bytes-like or ``str`` (as UTF-8); anything else is sent as JSON
        :param ttl: store it for so many seconds; the key needs the permission to store (``s``),
            or the broker delivers and does not store
        :param qos: 0 returns when the message is queued, and waits only for room; 1 returns when
            the broker has accepted it, and raises what it refused
        :param retain: store it for as long as the broker keeps messages, 30 days by default
            (needs ``s``)
        :param echo: whether it is delivered to this connection, too
        :param timeout: seconds for the broker to answer with ``qos=1``, instead of
            ``request_timeout``; ``None`` never
        :raises InvalidChannelError: if the broker would not take the channel
        :raises MessageTooLargeError: if the packet has more than ``max_message_size`` bytes, for
            which the broker would close the link
        :raises UnauthorizedError: with ``qos=1``, if the key does not open the channel
        :raises RequestTimeoutError: with ``qos=1``, if the broker did not answer in time
        :raises ConnectionLostError: if the link is lost; with ``qos=1`` the outcome is unknown
        :raises ClosedError: outside the block

        Cancelled while it waits for room, nothing was queued; cancelled later, with ``qos=1``, the
        message may have been sent. A refused publish of ``qos=0`` goes to ``on("error")``.
        """
        try:
            topic = self._topics[key, channel, ttl, echo]
        except (KeyError, TypeError):
            topic = self._make_topic(key, channel, ttl, echo)
        payload = message if type(message) is bytes else encode_payload(message)
        self._check_size(topic, payload, qos)
        if qos == 0:
            self._publishes += 1
            if not self._publishes & 15:
                await (checkpoint() if not self._publishes & 63 else checkpoint_if_cancelled())
            if self._connection is None or not self._connection.writer.has_room:
                await self._room()
            self._session.publish(topic, payload, retain=retain)
        elif qos == 1:
            await self._room()
            pending = self._session.publish_confirmed(
                topic, payload, key=key, channel=channel, retain=retain
            )
            await self._answer(pending, timeout)
        else:
            raise ValueError(
                f"qos is 0 or 1, not {qos!r}: Emitter answers QoS 2 as though it were 1"
            )

    async def flush(self, *, timeout: float | None | _Default = DEFAULT) -> float:
        """
        Wait until the broker has taken all that was sent before.

        It is a PINGREQ, which the broker answers in its place behind the rest.

        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the round trip in seconds
        :raises RequestError: the first refusal of a publish of ``qos=0`` since the last flush
        :raises RequestTimeoutError: if the broker did not answer in time
        :raises ConnectionLostError: if the link is lost
        """
        await self._room()
        start = anyio.current_time()
        refusal = await self._answer(self._session.ping(), timeout)
        if refusal is not None:
            raise refusal
        return anyio.current_time() - start

    def subscribe(
        self,
        key: str,
        channel: str,
        last: int | None = None,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        timeout: float | None | _Default = DEFAULT,
    ) -> Subscribing:
        """
        Subscribe to a channel, and to all below it.

        **Awaited**, messages go to the handlers of ``on("message")``; doing it again is nothing
        new. **Entered** with ``async with``, it gives an :class:`EventStream` of its own, and ends
        when it is left, without waiting.

        :param key: a key with the permission to read (``r``)
        :param channel: the channel; a level may be ``+``, which stands for any one. With the
            broker's default matcher nothing is ever delivered to ``#``
        :param last: replay so many stored messages first, if the key may load (``l``); 0 replays
            none; with ``None`` the broker replays the newest one
        :param since: replay only what was stored since then: an aware ``datetime`` or unix seconds
        :param until: replay only what was stored until then
        :param buffer: how many messages may wait in the stream, beside what is replayed
        :param overflow: what happens to more: ``"raise"`` (a :class:`SlowConsumerError` at the
            place of the gap), ``"drop_oldest"``, ``"drop_newest"`` or ``"block"``, which stops
            reading the link: whoever then awaits an answer while the own buffer is full waits for
            ever
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: to be awaited or entered, once
        :raises InvalidChannelError: if the broker would not take the channel
        :raises UnauthorizedError: when awaited or entered, if the key does not open the channel
        :raises SubscriptionConflictError: when awaited or entered, if the broker could not keep
            it apart from another subscription of this link

        Cancelled while being entered, the subscription is given back.
        """
        check_key(key)
        channel = check_channel(channel, wildcards=True)
        check_buffer(buffer, overflow)
        replay = Replay(
            check_whole("last", last), unix_seconds("since", since), unix_seconds("until", until)
        )
        self._check_size(format_topic(key, channel, replay.options).encode(), b"", 1)
        return Subscribing(
            partial(self._subscribe_for_handlers, key, channel, replay, timeout),
            partial(self._subscribed, key, channel, replay, buffer, overflow, timeout),
        )

    async def unsubscribe(
        self, key: str, channel: str, *, timeout: float | None | _Default = DEFAULT
    ) -> None:
        """
        End what an awaited :meth:`subscribe` began.

        The broker is told when nobody else uses the channel here.

        :param key: the key that it was subscribed with
        :param channel: the channel
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :raises RequestError: if the broker refused
        """
        check_key(key)
        channel = check_channel(channel, wildcards=True)
        self._check_size(format_topic(key, channel).encode(), b"", 1)
        await self._room()
        grant = self._awaited.pop((key, channel), None)
        if grant is not None:
            pending = self._session.release(grant)
        elif self._session.in_use(channel):
            pending = None
        else:
            pending = self._session.unsubscribe(key, channel)
        if pending is None:
            await checkpoint()
        else:
            pending.awaited = True
            await self._answer(pending, timeout)

    async def keygen(
        self,
        key: str,
        channel: str,
        permissions: str = "rw",
        ttl: int = 0,
        *,
        timeout: float | None | _Default = DEFAULT,
    ) -> ChannelKey:
        """
        Have the broker make a key.

        :param key: the broker's master secret; with a key that may extend (``e``) a private
            channel is made, below the given one
        :param channel: what the key opens: ``a/b/`` just that, ``a/#/`` all below ``a/``; at most
            23 levels. A target that ends in ``+/``, but for ``+/`` alone, opens nothing
        :param permissions: letters: ``r`` read, ``w`` write, ``s`` store, ``l`` load,
            ``p`` presence, ``e`` extend, ``x`` execute
        :param ttl: for how many seconds it opens; 0 is for ever
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the key and its channel
        :raises UnauthorizedError: if ``key`` may not make keys
        """
        check_key(key)
        channel = check_target(channel)
        check_whole("ttl", ttl)
        if not isinstance(permissions, str):
            raise TypeError(f"permissions is a str, not {type(permissions).__name__}")
        if unknown := set(permissions) - set("rwslpex"):
            raise ValueError(
                f"permissions has {', '.join(sorted(map(repr, unknown)))}, which Emitter does not "
                "know; there are r, w, s, l, p, e and x"
            )
        return await self._request(requests.keygen(key, channel, permissions, ttl), timeout)

    async def me(self, *, timeout: float | None | _Default = DEFAULT) -> Me:
        """
        Ask the broker who this connection is.

        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the connection's id, and its links
        """
        return await self._request(requests.me(), timeout)

    async def presence(
        self,
        key: str,
        channel: str,
        *,
        changes: bool | None = None,
        timeout: float | None | _Default = DEFAULT,
    ) -> PresenceStatus:
        """
        Ask who is subscribed to a channel, or to one below it.

        :param key: a key with the permission for presence (``p``)
        :param channel: the channel
        :param changes: ``True`` has the broker tell ``on("presence")`` of changes from now on,
            ``False`` ends that; ``None`` leaves it as it is
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: who is there now
        :raises UnauthorizedError: if the key may not
        :raises RequestError: without a status, if the answer was too large for the broker to send
        """
        check_key(key)
        channel = check_channel(channel, wildcards=True)
        fresh = changes is True and channel not in self._presence_wanted
        if fresh:
            self._session.watch(key, channel)
            self._presence_wanted.add(channel)
        try:
            told = changes
            if changes is False:
                told = False if self._unwant_presence(channel) else None
            status = await self._request(
                requests.presence(key, channel, status=True, changes=told), timeout
            )
        except BaseException:
            if fresh:
                self._unwant_presence(channel)
            raise
        assert status is not None
        return status

    def _unwant_presence(self, channel: str) -> bool:
        """Take back ``changes=True``; tells whether nobody else needs the feed."""
        if channel not in self._presence_wanted:
            return not self._session.watched(channel)
        self._presence_wanted.discard(channel)
        return self._session.unwatch(channel)

    def watch_presence(
        self,
        key: str,
        channel: str,
        *,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        refresh: float | None = 60,
        timeout: float | None | _Default = DEFAULT,
    ) -> AbstractAsyncContextManager[PresenceFeed]:
        """
        Watch who comes and goes; entered with ``async with``.

        :param key: a key with the permission for presence (``p``)
        :param channel: the channel; what happens below it is told too
        :param buffer: how many events may wait in the stream
        :param overflow: what happens to more, as in :meth:`subscribe`
        :param refresh: every so many seconds a fresh status is asked for; ``None`` never
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: an asynchronous context manager of a :class:`PresenceFeed`
        :raises UnauthorizedError: when entered, if the key may not
        """
        check_key(key)
        channel = check_channel(channel, wildcards=True)
        check_buffer(buffer, overflow)
        if refresh is not None and not refresh > 0:
            raise ValueError(f"refresh is a number of seconds above 0, or None, not {refresh!r}")
        return self._watching(key, channel, buffer, overflow, refresh, timeout)

    # How

    async def _room(self) -> None:
        """Wait until a packet may be queued; nothing may be awaited before it is."""
        writer = self._link().writer
        if not writer.has_room:
            await writer.room()
        while self._session.full:
            freed = anyio.Event()
            self._session.call_when_free(freed.set)
            await freed.wait()
        self._link()

    async def _request(self, request: Request[T], timeout: float | None | _Default) -> T:
        self._check_size(request.topic.encode(), request.body, 1)
        await self._room()
        return await self._answer(self._session.request(request), timeout)

    async def _answer(self, pending: Pending[T], timeout: float | None | _Default) -> T:
        """Wait for what the broker says, from the time that the question has left."""
        seconds = self._options.request_timeout if timeout is DEFAULT else timeout
        if pending.done:
            await checkpoint()
            return pending.result()
        done = anyio.Event()
        pending.call_when_done(done.set)
        writer = self._link().writer
        pending.waiters += 1
        try:
            await writer.left(writer.queued)
            with anyio.move_on_after(seconds):
                await done.wait()
        finally:
            pending.waiters -= 1
            pending.awaited = bool(pending.waiters)
        if not pending.done:
            where = "" if pending.channel is None else f" {pending.channel!r}"
            raise RequestTimeoutError(
                f"{pending.operation}{where}: the broker did not answer within {seconds:g} s; "
                "whether it took effect is unknown"
            )
        return pending.result()

    def _make_topic(self, key: str, channel: str, ttl: int | None, echo: bool) -> bytes:
        check_key(key)
        checked = check_channel(channel)
        check_whole("ttl", ttl, minimum=1)
        options = (("ttl", ttl), ("me", None if echo else 0))
        topic = format_topic(key, checked, options).encode()
        if len(self._topics) >= _TOPICS:
            self._topics.clear()
        self._topics[key, channel, ttl, echo] = topic
        return topic

    def _check_size(self, topic: bytes, payload: bytes, qos: int) -> None:
        size = 2 + len(topic) + len(payload) + (2 if qos else 0)
        if size > self._options.max_message_size:
            raise MessageTooLargeError(
                f"the packet would have {size} bytes, {len(payload)} of them payload; the broker "
                f"closes the link at more than {self._options.max_message_size} "
                "(max_message_size)"
            )

    async def _subscribe(
        self,
        key: str,
        channel: str,
        replay: Replay,
        stream: EventStream[EmitterMessage] | None,
        timeout: float | None | _Default,
    ) -> Grant:
        await self._room()
        while (other := self._session.replaying(channel)) is not None:
            # What is replayed to another one now would reach this one too.
            settled = anyio.Event()
            other.call_when_done(settled.set)
            await settled.wait()
            await self._room()
        if replay.insists and levels(channel)[0] == "+" and self._session.overlapped(channel):
            raise SubscriptionConflictError(
                f"{channel!r}: beside an overlapping subscription a replay comes from a history "
                "request, which needs a literal first level; use last=0, or a second Emitter"
            )
        grant, by_history = self._session.subscribe(key, channel, replay)
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
        timeout: float | None | _Default,
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
        self, key: str, channel: str, replay: Replay, timeout: float | None | _Default
    ) -> None:
        if (key, channel) in self._awaited:
            self._link()
            await checkpoint()
            return
        grant = await self._subscribe(key, channel, replay, None, timeout)
        if (key, channel) in self._awaited:
            # Another task was quicker.
            self._give_back(grant, None)
        else:
            self._awaited[key, channel] = grant

    @asynccontextmanager
    async def _subscribed(
        self,
        key: str,
        channel: str,
        replay: Replay,
        buffer: int,
        overflow: Overflow,
        timeout: float | None | _Default,
    ) -> AsyncGenerator[EventStream[EmitterMessage]]:
        stream: EventStream[EmitterMessage] = EventStream(
            f"subscribe({channel!r})", buffer, overflow
        )
        try:
            grant = await self._subscribe(key, channel, replay, stream, timeout)
        except BaseException:
            stream.close()
            raise
        try:
            yield stream
        finally:
            self._give_back(grant, stream)

    @asynccontextmanager
    async def _watching(
        self,
        key: str,
        channel: str,
        buffer: int,
        overflow: Overflow,
        refresh: float | None,
        timeout: float | None | _Default,
    ) -> AsyncGenerator[PresenceFeed]:
        self._link()
        self._session.watch(key, channel)
        feed = PresenceFeed(channel, buffer, overflow)
        self._feeds.add(feed, channel)
        healing = anyio.CancelScope()
        try:
            status, _ = await self._status(feed, key, channel, timeout, changes=True)
            feed.put_in_front([status])
            assert self._tasks is not None
            self._tasks.start_soon(self._heal, feed, key, channel, refresh, healing)
            yield feed
        finally:
            healing.cancel()
            self._feeds.discard(feed)
            self._leave_stream(feed)
            if self._session.unwatch(channel) and self._connection is not None:
                self._session.request(
                    requests.presence(key, channel, status=False, changes=False), awaited=False
                )

    async def _status(
        self,
        feed: PresenceFeed,
        key: str,
        channel: str,
        timeout: float | None | _Default = DEFAULT,
        *,
        changes: bool | None = None,
    ) -> tuple[PresenceStatus, bool]:
        feed.asking()
        status = await self._request(
            requests.presence(key, channel, status=True, changes=changes), timeout
        )
        assert status is not None
        return status, feed.correct(status)

    async def _heal(
        self,
        feed: PresenceFeed,
        key: str,
        channel: str,
        refresh: float | None,
        scope: anyio.CancelScope,
    ) -> None:
        with scope:
            while self._connection is not None:
                await feed.doubted(refresh)
                try:
                    status, new = await self._status(feed, key, channel)
                except RequestError as exc:
                    refusal = exc
                    feed.end(lambda: refusal)
                    return
                except RequestTimeoutError as exc:
                    self._report(exc)
                except EmitterError:
                    # The link is gone, and the feed has been told so.
                    return
                else:
                    if new:
                        await self._hand_over(feed, status)


class Subscribing:
    """What ``subscribe()`` returns: to be awaited, or entered with ``async with``, once."""

    def __init__(
        self,
        for_handlers: Callable[[], Coroutine[Any, Any, None]],
        entered: Callable[[], AbstractAsyncContextManager[EventStream[EmitterMessage]]],
    ) -> None:
        self._for_handlers = for_handlers
        self._entered = entered
        self._used = False
        self._manager: AbstractAsyncContextManager[EventStream[EmitterMessage]] | None = None

    def __await__(self) -> Generator[Any, Any, None]:
        self._use()
        return self._for_handlers().__await__()

    async def __aenter__(self) -> EventStream[EmitterMessage]:
        self._use()
        self._manager = self._entered()
        return await self._manager.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        assert self._manager is not None
        return await self._manager.__aexit__(exc_type, exc, traceback)

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
