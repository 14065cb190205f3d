"""The client that users hold: signatures, documentation and delegation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypedDict, TypeVar, Unpack, overload

import anyio
from anyio.abc import TaskStatus

from emitter_anyio._features.calls import Calls, Serve
from emitter_anyio._features.feed import PresenceFeed
from emitter_anyio._features.history import History
from emitter_anyio._features.keys import Keys
from emitter_anyio._features.links import Links
from emitter_anyio._features.presence import Presence
from emitter_anyio._features.publisher import Publisher
from emitter_anyio._features.resumption import Resumption
from emitter_anyio._features.subscriptions import Subscribing, Subscriptions
from emitter_anyio._net.options import Options, make_options
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._runtime.background import Background
from emitter_anyio._runtime.dispatcher import Dispatcher
from emitter_anyio._runtime.events import Events
from emitter_anyio._runtime.guard import Guard
from emitter_anyio._runtime.key_ring import KeyRing
from emitter_anyio._runtime.lifecycle import Lifecycle
from emitter_anyio._runtime.opener import Opener
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._runtime.slot import Slot, State
from emitter_anyio._runtime.supervisor import Supervisor
from emitter_anyio._runtime.totals import Statistics, Totals
from emitter_anyio._runtime.trace import Trace
from emitter_anyio._values import requests
from emitter_anyio._values.channels import Key
from emitter_anyio._values.checks import check_task_status
from emitter_anyio._values.errors import make_picklable
from emitter_anyio._values.messages import EmitterMessage, Gap, Payload, StoredMessage
from emitter_anyio._values.requests import ChannelKey, Link, Me, PresenceEvent, PresenceStatus
from emitter_anyio._values.router import Routes

from ._streams import Entering, EventStream, Overflow, Receiver

_LifeEvent: TypeAlias = Literal["connect", "disconnect"]
_OnLife = TypeVar("_OnLife", bound=Callable[[], object])
_OnMessage = TypeVar("_OnMessage", bound=Callable[[EmitterMessage], object])
_OnPresence = TypeVar("_OnPresence", bound=Callable[[PresenceEvent], object])
_OnKeygen = TypeVar("_OnKeygen", bound=Callable[[ChannelKey], object])
_OnKeyban = TypeVar("_OnKeyban", bound=Callable[[bool], object])
_OnLink = TypeVar("_OnLink", bound=Callable[[Link], object])
_OnMe = TypeVar("_OnMe", bound=Callable[[Me], object])
_OnError = TypeVar("_OnError", bound=Callable[[Exception], object])


class _Options(TypedDict, total=False):
    channel: str | None
    buffer: int
    overflow: Overflow


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """
    What is known of the present link.

    :ivar server: where it goes, as a URL without user and password
    :ivar since: when the broker acknowledged it
    :ivar id: the connection's id, once ``me()`` has asked for it on this link
    :ivar last_error: why the link before it ended, if one has broken
    """

    server: str
    since: datetime
    id: str | None
    last_error: Exception | None

    def __reduce__(self) -> tuple[Any, ...]:
        error = None if self.last_error is None else make_picklable(self.last_error)
        return type(self), (self.server, self.since, self.id, error)


def connect(options: Mapping[str, Any] | str | None = None, /, **keywords: Any) -> Emitter:
    """
    Make a client; nothing happens until it is entered.

    :param options: a mapping of options, as in the original SDK, or a URL: ``mqtt://`` (port 8080
        unless said), ``mqtts://`` (port 443), ``unix://`` or, with wsproto, ``ws://`` (8080) and
        ``wss://`` (443), which may have a path
    :param keywords: options; ``host`` (``"api.emitter.io"``), ``port`` (443, or 8080 if not
        secure), ``secure`` (``True``), ``servers`` (URLs to try in turn, instead), ``keepalive``
        (30 s, from 1 to 60), ``username``, ``password``, ``client_id``, ``will`` (a
        :class:`Will`), ``ssl_context`` (verified by the system's authorities),
        ``connect_timeout`` (10 s for each server), ``request_timeout`` (10 s for each awaited
        answer; ``None`` never), ``disconnect_timeout`` (5 s), ``matcher`` (``"emitter"`` or
        ``"mqtt"``, as the broker is configured), ``max_message_size`` (65536 bytes),
        ``allow_collisions`` (``False``; for brokers that keep channels of equal hashes apart),
        ``connectable`` (an ``anyio.abc.ByteStreamConnectable`` instead of TCP; TLS and WebSocket
        are added as the URL's scheme or ``secure=True`` requires),
        ``reconnect`` (``Backoff()``: a link that is lost comes back; ``None``: one link only),
        ``while_down`` (``"wait"`` until it is back, or ``"raise"``: what a call does meanwhile),
        ``trace`` (a function that gets the name of each event of the client, and a mapping of what
        is known of it)
    :return: a client to be entered
    :raises TypeError: if an option is unknown, of the wrong kind, or said twice with two values
    :raises ValueError: if a value is out of its range
    :raises ImportError: if WebSocket is wanted, and wsproto is not there
    """
    return Emitter(make_options(options, keywords))


class Emitter:
    """
    A client of an Emitter broker; :func:`connect` makes one.

    It lives inside ``async with``, or in a task group by ``await task_group.start(emitter.run)``,
    on asyncio and on Trio. The body starts connected. Entering it again after it ended is fine.

    A link that is lost comes back, with subscriptions, groups, presence and links confirmed before
    ``connect`` is emitted again. Calls that waited for an answer raise
    :class:`ConnectionLostError`, as their outcome is unknown; calls made meanwhile wait. Publishes
    of ``qos=0`` of which no byte was handed over go out first on the next link, in order; those
    handed over are never sent again, and ``statistics().uncertain`` counts them. When the link is
    gone for good (``reconnect=None``, or its tries used up), the body is cancelled and the block
    raises :class:`ConnectionLostError`.

    Every verb may be cancelled at any time: there is never half a packet on the wire, and the
    client stays usable. Every awaited verb is a checkpoint, but ``publish(qos=0)``, which notices
    cancellation at least at every 16th call and yields at least at every 64th.
    """

    def __init__(self, options: Options) -> None:
        # Each object gets only objects that were made before it.
        self._options = options
        self._slot = slot = Slot(options)
        background = Background()
        guard = Guard()
        routes: Routes[Receiver[Any]] = Routes(options.matcher)
        self._totals = totals = Totals(slot, routes)
        self._events = events = Events(slot, routes, background, guard, totals)
        trace = Trace(options.trace)
        key_ring = KeyRing(guard)
        wants = Wants(options.matcher, allow_collisions=options.allow_collisions)
        dispatcher = Dispatcher(routes, events, totals, key_ring.forget, trace)
        opener = Opener(options, key_ring, wants, trace)
        self._requester = requester = Requester(slot, key_ring, options, trace)
        self._publisher = publisher = Publisher(slot, requester, options, trace)
        self._keys = Keys(requester)
        self._history = history = History(requester)
        resumption = Resumption(slot, requester, history, events, background)
        self._subscriptions = subscriptions = Subscriptions(
            slot, requester, wants, routes, events, totals, resumption
        )
        self._presence = presence = Presence(
            slot, requester, wants, key_ring, routes, events, totals, background
        )
        self._links = links = Links(requester, publisher, subscriptions, events)
        self._calls = calls = Calls(slot, requester, subscriptions, key_ring, guard, background)
        supervisor = Supervisor(
            *(slot, background, opener, dispatcher, requester, events, totals, wants, options),
            restorers=(presence.restore, subscriptions.restore, links.restore),
            losers=(subscriptions.lose, presence.lose),
        )
        self._lifecycle = Lifecycle(
            *(slot, background, supervisor, events, routes),
            finish=(subscriptions.finish, presence.finish, links.finish, calls.finish, wants.clear),
        )

    def __repr__(self) -> str:
        servers = ", ".join(map(str, self._options.servers))
        return f"<Emitter {servers}, {self.state}>"

    # Asking the broker

    async def publish(
        self,
        key: Key,
        channel: str,
        message: Payload,
        ttl: int | None = None,
        *,
        qos: Literal[0, 1] = 0,
        retain: bool = False,
        echo: bool = True,
        timeout: Timeout = DEFAULT,
    ) -> None:
        """
        Publish a message.

        :param key: a key with the permission to write (``w``); or, as wherever a key is taken, an
            ``async`` function that returns one. Its answer is kept, and when the broker refuses
            it, here or after a lost link, the function is asked for another one
        :param channel: the channel, without wildcards
        :param message: bytes-like or ``str`` (as UTF-8); anything else is sent as JSON
        :param ttl: store it for so many seconds; ``None`` or 0 does not. Without the permission to
            store (``s``) the broker delivers it and does not store it
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
        :raises WrongLoopError: in another thread or event loop than the client's, as every verb

        Cancelled while it waits for room, nothing was queued; cancelled later, with ``qos=1``, the
        message may have been sent. A refused publish of ``qos=0`` goes to ``on("error")``.
        """
        waiting = self._publisher.put(key, channel, message, ttl, qos, retain, echo, timeout)
        if waiting is not None:
            await waiting

    async def publish_with_link(
        self,
        name: str,
        message: Payload,
        *,
        qos: Literal[0, 1] = 0,
        retain: bool = False,
        timeout: Timeout = DEFAULT,
    ) -> None:
        """
        Publish through a link, with the options that it was made with.

        :param name: the name that :meth:`link` gave it
        :param message: as in :meth:`publish`
        :param qos: as in :meth:`publish`
        :param retain: as in :meth:`publish`
        :param timeout: seconds for the broker to answer with ``qos=1``, instead of
            ``request_timeout``; ``None`` never
        :raises BadRequestError: with ``qos=1``, if this connection has no link of that name
        :raises UnauthorizedError: with ``qos=1``, if the link's key does not open its channel
        :raises MessageTooLargeError: if the broker could not send it on: over 65528 bytes of
            channel and payload it closes the link or drops the message (its ``conn.go``)
        """
        await self._links.publish(name, message, qos, retain, timeout)

    async def flush(self, *, timeout: Timeout = DEFAULT) -> float:
        """
        Wait until the broker has taken all that was sent before.

        It is a PINGREQ, which the broker answers in its place behind the rest.

        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the round trip in seconds
        :raises RequestError: the first refusal of a publish of ``qos=0`` since the last flush
        :raises RequestTimeoutError: if the broker did not answer in time
        :raises ConnectionLostError: if the link is lost
        """
        return await self._requester.flush(timeout)

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
        return self._subscriptions.subscribe(
            key,
            channel,
            last,
            since=since,
            until=until,
            group=group,
            buffer=buffer,
            overflow=overflow,
            resume=resume,
            resume_limit=resume_limit,
            mark_gaps=mark_gaps,
            timeout=timeout,
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
        await self._subscriptions.unsubscribe(key, channel, group, timeout)

    async def keygen(
        self,
        key: Key,
        channel: str,
        permissions: str = "rw",
        ttl: int = 0,
        *,
        timeout: Timeout = DEFAULT,
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
        return await self._keys.keygen(key, channel, permissions, ttl, timeout)

    async def keyban(
        self, secret: Key, target: Key, banned: bool = True, *, timeout: Timeout = DEFAULT
    ) -> bool:
        """
        Ban a key, or take that back.

        A banned key is refused at once; what was subscribed with it goes on. The broker may take
        a minute to believe that it is banned no more.

        :param secret: the broker's master secret
        :param target: the key
        :param banned: whether it is to be banned
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: whether it is banned now
        :raises UnauthorizedError: if ``secret`` may not ban
        """
        return await self._keys.keyban(secret, target, banned, timeout)

    async def link(
        self,
        key: Key,
        channel: str,
        name: str,
        *,
        subscribe: bool = False,
        ttl: int | None = None,
        echo: bool = True,
        timeout: Timeout = DEFAULT,
    ) -> Link:
        """
        Make a short name for a channel, to publish to with :meth:`publish_with_link`.

        It cannot be taken back, and lasts as long as the client: a new connection gets it, too.
        The broker looks at the key only when the name is used.

        :param key: a key with the permission to write (``w``), or a function as in
            :meth:`publish`
        :param channel: the channel
        :param name: one or two letters or digits
        :param subscribe: whether to subscribe to the channel too, as an awaited
            :meth:`subscribe` with ``last=0`` does; it needs ``r``
        :param ttl: store what is published through it for so many seconds (needs ``s``)
        :param echo: whether what is published through it is delivered to this connection, too
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the name, and the channel with its options
        :raises UnauthorizedError: with ``subscribe``, if the key may not read; the link is there
        """
        return await self._links.make(key, channel, name, subscribe, ttl, echo, timeout)

    async def me(self, *, timeout: Timeout = DEFAULT) -> Me:
        """
        Ask the broker who this connection is.

        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: the connection's id, and its links
        """
        return await self._requester.request(requests.me(), check_timeout(timeout))

    async def presence(
        self,
        key: Key,
        channel: str,
        *,
        changes: bool | None = None,
        timeout: Timeout = DEFAULT,
    ) -> PresenceStatus:
        """
        Ask whom a message to a channel would reach.

        :param key: a key with the permission for presence (``p``)
        :param channel: the channel; who is subscribed below it is not there
        :param changes: ``True`` has the broker tell ``on("presence")`` of changes, at the channel
            and below it, from now on; ``False`` ends that; ``None`` leaves it as it is
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: who is there now
        :raises UnauthorizedError: if the key may not
        :raises RequestError: without a status, if the answer was too large for the broker to send
        """
        return await self._presence.presence(key, channel, changes, timeout)

    def watch_presence(
        self,
        key: Key,
        channel: str,
        *,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        refresh: float | None = 60,
        timeout: Timeout = DEFAULT,
    ) -> Entering[PresenceFeed]:
        """
        Watch who comes and goes; entered with ``async with``.

        :param key: a key with the permission for presence (``p``)
        :param channel: the channel; what happens below it is told too
        :param buffer: how many events may wait in the stream
        :param overflow: what happens to more, as in :meth:`subscribe`
        :param refresh: every so many seconds a fresh status is asked for; ``None`` never
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: to be entered, for a :class:`PresenceFeed`
        :raises UnauthorizedError: when entered, if the key may not
        """
        return self._presence.watch(key, channel, buffer, overflow, refresh, timeout)

    def history(
        self,
        key: Key,
        channel: str,
        last: int | None = None,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        order: Literal["oldest", "newest"] = "oldest",
        timeout: Timeout = DEFAULT,
    ) -> AsyncIterator[StoredMessage]:
        """
        Read back stored messages of a channel, and of all channels below it.

        They come in the order of time: by the second, and within a second in the order of the ids
        of each node of the broker. They are requested in pages, each as large as the broker can
        send.

        :param key: a key with the permission to load (``l``)
        :param channel: the channel; any level except the first may be ``+``
        :param last: the number of messages at most, the newest ones; 100 unless given
        :param since: the time, as an aware ``datetime`` or unix seconds, before which none is read
        :param until: the time after which none is read
        :param order: ``"oldest"`` gives the oldest message first, and gathers all before that;
            ``"newest"`` gives the newest first, and holds one page at a time
        :param timeout: seconds for the broker to answer each page, instead of
            ``request_timeout``
        :return: an asynchronous iterator of :class:`StoredMessage`. It needs no closing. After an
            error, or when it was cancelled, iterating further continues at the same place
        :raises InvalidChannelError: if the broker would not take the channel
        :raises UnauthorizedError: when iterated, if the key may not load
        :raises HistoryIncompleteError: when iterated, at the place where stored messages cannot be
            read
        """
        return self._history.read(key, channel, last, since, until, order, timeout)

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
        return await self._calls.request(key, channel, message, timeout)

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
        await self._calls.serve(key, channel, handler, concurrency, buffer, task_status)

    @overload
    def on(self, event: _LifeEvent, handler: _OnLife, **options: Unpack[_Options]) -> _OnLife: ...
    @overload
    def on(
        self, event: Literal["message"], handler: _OnMessage, **options: Unpack[_Options]
    ) -> _OnMessage: ...
    @overload
    def on(
        self, event: Literal["presence"], handler: _OnPresence, **options: Unpack[_Options]
    ) -> _OnPresence: ...
    @overload
    def on(
        self, event: Literal["keygen"], handler: _OnKeygen, **options: Unpack[_Options]
    ) -> _OnKeygen: ...
    @overload
    def on(
        self, event: Literal["keyban"], handler: _OnKeyban, **options: Unpack[_Options]
    ) -> _OnKeyban: ...
    @overload
    def on(
        self, event: Literal["link"], handler: _OnLink, **options: Unpack[_Options]
    ) -> _OnLink: ...
    @overload
    def on(self, event: Literal["me"], handler: _OnMe, **options: Unpack[_Options]) -> _OnMe: ...
    @overload
    def on(
        self, event: Literal["error"], handler: _OnError, **options: Unpack[_Options]
    ) -> _OnError: ...
    @overload
    def on(
        self, event: _LifeEvent, **options: Unpack[_Options]
    ) -> Callable[[_OnLife], _OnLife]: ...
    @overload
    def on(
        self, event: Literal["message"], **options: Unpack[_Options]
    ) -> Callable[[_OnMessage], _OnMessage]: ...
    @overload
    def on(
        self, event: Literal["presence"], **options: Unpack[_Options]
    ) -> Callable[[_OnPresence], _OnPresence]: ...
    @overload
    def on(
        self, event: Literal["keygen"], **options: Unpack[_Options]
    ) -> Callable[[_OnKeygen], _OnKeygen]: ...
    @overload
    def on(
        self, event: Literal["keyban"], **options: Unpack[_Options]
    ) -> Callable[[_OnKeyban], _OnKeyban]: ...
    @overload
    def on(
        self, event: Literal["link"], **options: Unpack[_Options]
    ) -> Callable[[_OnLink], _OnLink]: ...
    @overload
    def on(self, event: Literal["me"], **options: Unpack[_Options]) -> Callable[[_OnMe], _OnMe]: ...
    @overload
    def on(
        self, event: Literal["error"], **options: Unpack[_Options]
    ) -> Callable[[_OnError], _OnError]: ...
    def on(
        self,
        event: str,
        handler: Callable[..., object] | None = None,
        *,
        channel: str | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
    ) -> Any:
        """
        Register a handler, before or after entering; or, without one, decorate it.

        A handler is called with the event's value, and without any for ``connect`` and
        ``disconnect``; what it returns is awaited if it can be. Its calls come in order, in a task
        of the client's; it may await any verb. What it raises goes to ``on("error")`` as
        :class:`HandlerError`; where nobody handles that, it ends the client and leaves bare.

        :param event: ``"connect"``, ``"disconnect"``, ``"message"``, ``"presence"``,
            ``"keygen"``, ``"keyban"``, ``"link"``, ``"me"`` or ``"error"``
        :param handler: a function or coroutine function
        :param channel: for ``message`` and ``presence``: only what this channel reaches; it
            subscribes to nothing
        :param buffer: how many values may wait for the handler
        :param overflow: what happens to more; a :class:`SlowConsumerError` goes to ``on("error")``
        :return: the handler
        :raises TypeError: if an argument has the wrong type, or the handler is a generator function
        :raises ValueError: if there is no such event
        :raises WrongLoopError: once the client is entered, in another thread or event loop
        """
        return self._events.on(event, handler, channel, buffer, overflow)

    def off(self, event: str, handler: Callable[..., object]) -> None:
        """
        Take a handler away; what waits for it is dropped.

        :raises ValueError: if it is not registered for this event
        :raises WrongLoopError: once the client is entered, in another thread or event loop
        """
        self._events.off(event, handler)

    @overload
    def stream(
        self, event: _LifeEvent, **options: Unpack[_Options]
    ) -> Entering[EventStream[None]]: ...
    @overload
    def stream(
        self, event: Literal["message"], **options: Unpack[_Options]
    ) -> Entering[EventStream[EmitterMessage]]: ...
    @overload
    def stream(
        self, event: Literal["presence"], **options: Unpack[_Options]
    ) -> Entering[EventStream[PresenceEvent]]: ...
    @overload
    def stream(
        self, event: Literal["keygen"], **options: Unpack[_Options]
    ) -> Entering[EventStream[ChannelKey]]: ...
    @overload
    def stream(
        self, event: Literal["keyban"], **options: Unpack[_Options]
    ) -> Entering[EventStream[bool]]: ...
    @overload
    def stream(
        self, event: Literal["link"], **options: Unpack[_Options]
    ) -> Entering[EventStream[Link]]: ...
    @overload
    def stream(
        self, event: Literal["me"], **options: Unpack[_Options]
    ) -> Entering[EventStream[Me]]: ...
    @overload
    def stream(
        self, event: Literal["error"], **options: Unpack[_Options]
    ) -> Entering[EventStream[Exception]]: ...
    def stream(
        self,
        event: str,
        *,
        channel: str | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
    ) -> Any:
        """
        Give what a handler would be given as a stream, entered with ``async with``.

        :param event: as in :meth:`on`
        :param channel: for ``message`` and ``presence``: only what this channel reaches; it
            subscribes to nothing
        :param buffer: how many values may wait in the stream
        :param overflow: what happens to more
        :return: to be entered, for an :class:`EventStream`
        :raises ValueError: if there is no such event
        """
        return self._events.stream(event, channel, buffer, overflow)

    # Entering and leaving

    async def __aenter__(self) -> Self:
        await self._lifecycle.enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # It swallows nothing, and its type says so to type checkers.
        await self._lifecycle.leave(exc)

    async def run(self, *, task_status: TaskStatus[Any] = anyio.TASK_STATUS_IGNORED) -> None:
        """
        Live in a task of the caller's: ``await task_group.start(emitter.run)``.

        :param task_status: is told the client once it is connected
        :raises ConnectError: if no link could be opened
        :raises ConnectionLostError: if the link is gone for good
        """
        check_task_status(task_status)
        async with self:
            task_status.started(self)
            await self.wait_closed()

    async def disconnect(self) -> None:
        """
        Leave now; returns when the link is closed.

        It may be called from any task of the client's event loop, any number of times. Handlers
        finish what waits for them, what is queued is sent, then comes DISCONNECT, all within
        ``disconnect_timeout``. Streams end behind what is buffered; the body of the ``async with``
        goes on, and finds every verb raising :class:`ClosedError`. Cancelling it does not stop the
        leaving.
        """
        await self._lifecycle.disconnect()

    async def wait_connected(self) -> None:
        """
        Wait until there is a link; for a client that has not been entered yet, too.

        :raises ClosedError: if the client was left, or could not connect
        :raises ConnectionLostError: if the link is gone for good
        """
        await self._lifecycle.wait_connected()

    async def wait_closed(self) -> None:
        """Wait until the link is closed; returns at once when there is none."""
        await self._lifecycle.wait_closed()

    # What it is doing

    @property
    def state(self) -> State:
        """
        ``"connecting"`` (between two links, too), ``"connected"``, ``"closing"`` or ``"closed"``.
        """
        return self._slot.public_state

    @property
    def connection(self) -> ConnectionInfo | None:
        """What is known of the present link; ``None`` when there is none."""
        connection = self._slot.connection
        if connection is None or not self._slot.restored:
            return None
        return ConnectionInfo(
            str(connection.server),
            connection.since,
            connection.session.connection_id,
            self._slot.last_error,
        )

    def statistics(self) -> Statistics:
        """Return the figures of this client."""
        return self._totals.statistics()
