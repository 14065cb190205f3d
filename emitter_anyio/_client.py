"""The public facade: :func:`connect` and :class:`Emitter`, with signatures and documentation."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    NoReturn,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

import anyio
from anyio.abc import TaskStatus

from emitter_anyio._backend.interrupts import uninterrupted
from emitter_anyio._features.calls import Calls, Serve
from emitter_anyio._features.consumer import Consumer, Consumers
from emitter_anyio._features.feed import PresenceFeed
from emitter_anyio._features.history import History
from emitter_anyio._features.keys import Keys
from emitter_anyio._features.links import Links
from emitter_anyio._features.pipeline import Pipeline, set_pipeline
from emitter_anyio._features.presence import Presence
from emitter_anyio._features.publisher import Publisher
from emitter_anyio._features.resumption import Resumption
from emitter_anyio._features.subscriptions import Subscribing, Subscriptions
from emitter_anyio._net.options import ConnectOptions, Options, make_options
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._runtime.background import Background
from emitter_anyio._runtime.dispatcher import Dispatcher
from emitter_anyio._runtime.events import Events
from emitter_anyio._runtime.guard import Guard
from emitter_anyio._runtime.holds import Holds
from emitter_anyio._runtime.key_ring import KeyRing
from emitter_anyio._runtime.lifecycle import Lifecycle
from emitter_anyio._runtime.opener import Opener
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._runtime.slot import Slot, State
from emitter_anyio._runtime.supervisor import Supervisor
from emitter_anyio._runtime.totals import Statistics, Totals
from emitter_anyio._runtime.trace import Trace
from emitter_anyio._values import requests
from emitter_anyio._values.channels import ChannelKey, Key
from emitter_anyio._values.checks import check_task_status
from emitter_anyio._values.errors import make_picklable
from emitter_anyio._values.messages import (
    DecodedMessage,
    EmitterMessage,
    Gap,
    Payload,
    StoredMessage,
)
from emitter_anyio._values.requests import Link, Me, PresenceEvent, PresenceStatus
from emitter_anyio._values.router import Routes
from emitter_anyio._values.templates import Channel

from ._streams import Entering, EventStream, Overflow, Receiver

T = TypeVar("T")

_ConnectionEvent: TypeAlias = Literal["connect", "disconnect"]
_OnConnection = TypeVar("_OnConnection", bound=Callable[[], object])
_OnMessage = TypeVar("_OnMessage", bound=Callable[[EmitterMessage], object])
_OnPresence = TypeVar("_OnPresence", bound=Callable[[PresenceEvent], object])
_OnKeygen = TypeVar("_OnKeygen", bound=Callable[[ChannelKey], object])
_OnKeyban = TypeVar("_OnKeyban", bound=Callable[[bool], object])
_OnLink = TypeVar("_OnLink", bound=Callable[[Link], object])
_OnMe = TypeVar("_OnMe", bound=Callable[[Me], object])
_OnError = TypeVar("_OnError", bound=Callable[[Exception], object])


_USAGE: Final = "write 'async with connect(...) as emitter:'"


class _Options(TypedDict, total=False):
    channel: str | Channel | None
    buffer: int
    overflow: Overflow


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """
    The current connection of a client.

    :ivar server: the server as a URL, without user name, password and query
    :ivar since: the time at which the broker accepted the connection (UTC, by the local clock)
    :ivar id: the broker's id of the connection; ``None`` until a call of :meth:`Emitter.me` or
        :meth:`Emitter.request` has requested it on this connection
    :ivar last_error: the cause of the last lost connection or failed attempt to connect, if any
    """

    server: str
    since: datetime
    id: str | None
    last_error: Exception | None

    def __reduce__(self) -> tuple[Any, ...]:
        error = None if self.last_error is None else make_picklable(self.last_error)
        return type(self), (self.server, self.since, self.id, error)


def connect(
    options: Mapping[str, object] | str | None = None, /, **keywords: Unpack[ConnectOptions]
) -> Emitter:
    """
    Create a client. It connects when it is entered.

    :param options: a URL, or a mapping of the options below as in the original SDK. The schemes are
        ``mqtt://`` (default port 8080), ``mqtts://`` (443), ``ws://`` (8080), ``wss://`` (443) and
        ``unix://``. A user name and password in the URL become ``username`` and ``password``. A
        WebSocket URL can have a path and a query; the query is not in logs, errors and reprs
    :param keywords: options (see :class:`ConnectOptions` for their types):

        - ``host``: a name, an IP address, or the absolute path of a Unix socket; default
          ``"api.emitter.io"``
        - ``port``: 1 to 65,535; default 443 with TLS and 8080 without
        - ``secure``: whether to use TLS; default ``True``
        - ``servers``: a sequence of URLs with the same scheme instead of ``host``, ``port`` and
          ``secure``; the client tries them in turn
        - ``keepalive``: 1 to 60 seconds; default 30. The broker closes a connection on which it
          receives nothing for 120 seconds
        - ``username``: shown to others in presence
        - ``password``: requires ``username``. Emitter ignores it; a proxy might not
        - ``client_id``: default ``""``
        - ``will``: a :class:`Will`, which the broker publishes when the connection ends
        - ``headers``: a mapping of additional HTTP headers for the WebSocket handshake, such as
          ``{"Authorization": "Bearer …"}``; only for ``ws://`` and ``wss://``
        - ``ssl_context``: a client's :class:`ssl.SSLContext`; by default the system's certificate
          authorities verify the broker
        - ``connect_timeout``: seconds, at least 0, or ``None`` for no limit; default 10. It covers
          name look-up, TCP, TLS, WebSocket and CONNACK together, separately for each server
        - ``request_timeout``: seconds, at least 0, or ``None`` for no limit; default 10. The time
          for each awaited reply, from when the request's bytes are written
        - ``disconnect_timeout``: seconds, at least 0; default 5. The time for the whole orderly
          close, and for :meth:`Emitter.reconnect` to wait for pending calls
        - ``reconnect``: a :class:`Backoff`; default ``Backoff()``. ``None`` or ``False``: one
          connection only. It applies after the first connection has been opened
        - ``retry_first_connect``: ``True``: entering the client keeps trying to connect, with the
          delays and the number of tries of ``reconnect``, until the caller cancels it; default
          ``False``: entering tries each server once
        - ``while_down``: what a call does between two connections: ``"wait"`` (the default) for the
          next one, or ``"raise"`` :class:`ConnectionLostError`
        - ``matcher``: how the broker is configured to match channels: ``"emitter"`` (the default)
          or ``"mqtt"``
        - ``max_message_size``: the largest packet in either direction, 1024 to 268,435,455 bytes;
          default 65,536, the broker's own limit
        - ``allow_collisions``: ``True`` for a broker that keeps channels with equal hashes apart;
          default ``False``
        - ``json_encoder``: a function that is called with each object that JSON cannot represent,
          and returns one that it can, as ``default`` of :func:`json.dumps`
        - ``connectable``: an :class:`anyio.abc.ByteStreamConnectable` to connect with instead of
          TCP. The client adds TLS and WebSocket as the URL's scheme or ``secure=True`` requires,
          and nothing otherwise
        - ``trace``: a function that is called with the name of each trace event and a mapping of
          its values
    :return: the client, to be entered
    :raises TypeError: if an option is unknown, has the wrong type, or has conflicting values
    :raises ValueError: if a value is malformed or out of range
    :raises MessageTooLargeError: if ``client_id``, ``username``, ``password`` and ``will`` together
        exceed ``max_message_size``
    :raises ImportError: if WebSocket is requested and ``wsproto`` is not installed

    Source: the broker's ``broker/conn.go`` (120 seconds); recorded conversations
    ``publish-too-large`` (65,536 bytes) and ``connect-credentials-ignored``.
    """
    return Emitter(make_options(options, keywords))


class _Default:
    """The default of each option in the signature that ``help(connect)`` shows."""

    def __repr__(self) -> str:
        return "..."


def _name_options(signature: inspect.Signature) -> inspect.Signature:
    """Replace ``**keywords`` in a signature by the names of the options."""
    positional, _ = signature.parameters.values()
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_Default())
        for name in ConnectOptions.__annotations__
    ]
    return signature.replace(parameters=[positional, *named])


# inspect.signature() and help() use it. Type checkers use the annotations.
vars(connect)["__signature__"] = _name_options(inspect.signature(connect))


class Emitter:
    """
    A client of an Emitter broker, made by :func:`connect`.

    The client is an asynchronous context manager, on asyncio and on Trio. The ``async with`` block
    starts connected. Leaving the block disconnects and stops all of the client's background tasks.
    ``await task_group.start(emitter.run)`` runs the client in your own task group or nursery
    instead. A client that has ended can be entered again.

    When a connection is lost, the client opens a new connection. It restores subscriptions, groups,
    presence feeds and links before it emits ``connect`` again:

    - A call that awaits a reply raises :class:`ConnectionLostError`. Whether it took effect is
      unknown.
    - A call that is made between two connections waits for the next one, or raises
      :class:`ConnectionLostError` with ``while_down="raise"``.
    - QoS 0 publishes that have not been written go out first on the next connection, in order.
      Those written partly or completely are not sent again; ``statistics().uncertain`` counts those
      that the broker might not have read.
    - When reconnecting has been given up (``reconnect=None``, or all ``tries`` have failed), the
      block is cancelled and raises :class:`ConnectionLostError`.

    Every method can be cancelled at any time: no packet is sent partially, and the client stays
    usable. Every awaited method is a checkpoint, except ``publish(qos=0)``, which checks for
    cancellation at least every 16 calls and yields at least every 64 calls.

    A client belongs to the thread and event loop (or Trio run) in which it is entered. Only
    :meth:`statistics` works elsewhere, and :meth:`on` and :meth:`off` before the client is entered.

    Every parameter for a key takes a ``str``, a :class:`ChannelKey`, or an ``async`` function
    without parameters that returns one of them. The client keeps the returned key until the broker
    refuses it, and then calls the function again. A call that the broker refused, or a subscription
    that it did not restore, is retried once with the new key. The method raises what the function
    raises; if the function awaited something that was cancelled, it raises an
    :class:`EmitterError`.

    :raises ConnectError: when entered, if no server could be reached, or if the key function of the
        will failed. With ``retry_first_connect``, only if all tries of ``reconnect`` have failed
    :raises ConnectRefusedError: when entered, if the last server that was tried refused CONNECT
    :raises ClosedError: when entered, if :meth:`disconnect` was called while the client was
        connecting
    :raises ConnectionLostError: when left, if reconnecting was given up
    :raises RuntimeError: if the client is already entered, or is left in a different task than the
        one that entered it and that task still runs
    :raises WrongLoopError: if the client is entered or left in another thread or event loop

    If entering is cancelled, the connection is closed. If the block is cancelled, the client sends
    DISCONNECT if the connection accepts it immediately, and waits for nothing.
    """

    def __init__(self, options: Options) -> None:
        # Each object is given only objects that were made before it, so that no cycle can form.
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
        self._requester = requester = Requester(slot, key_ring, options)
        self._publisher = publisher = Publisher(slot, requester, options, trace)
        holds = Holds()
        pipeline = Pipeline(slot, requester, key_ring, events, holds, options, trace)
        set_pipeline(self, pipeline)
        self._keys = Keys(requester)
        self._history = history = History(requester)
        resumption = Resumption(slot, requester, history, events, background)
        self._subscriptions = subscriptions = Subscriptions(
            slot, requester, wants, routes, events, totals, resumption
        )
        self._consumers = Consumers(slot, requester, history, subscriptions, options.matcher)
        self._presence = presence = Presence(
            slot, requester, wants, key_ring, routes, events, totals, background
        )
        self._links = links = Links(requester, publisher, subscriptions, events)
        self._calls = calls = Calls(
            slot, requester, subscriptions, key_ring, guard, background, totals, options
        )
        supervisor = Supervisor(
            *(slot, background, opener, dispatcher, requester, events, totals, wants, holds),
            options,
            restorers=(presence.restore, subscriptions.restore, links.restore),
            settlers=(calls.wait_replies,),
            loss_handlers=(subscriptions.note_loss, presence.note_loss),
        )
        self._lifecycle = Lifecycle(
            *(slot, background, supervisor, events, routes, options),
            finish=(subscriptions.finish, presence.finish, links.finish, calls.finish, wants.clear),
        )

    def __repr__(self) -> str:
        servers = ", ".join(map(str, self._options.servers))
        return f"<Emitter {servers}, {self.state}>"

    # Requests

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

        :param key: a key with the permission to write (``w``), or an ``async`` function that
            returns one (see :class:`Emitter`)
        :param channel: the channel, without wildcards
        :param message: bytes-like, or ``str`` (sent as UTF-8); any other object is sent as JSON
        :param ttl: seconds for which the broker stores the message, up to 2,147,483,647; ``None``
            or 0: it does not store it. Without the permission to store (``s``) in the key, the
            broker delivers the message and does not store it
        :param qos: 0: return when the message is queued, waiting only for space in the queue; 1:
            return when the broker has accepted the message, or raise its refusal
        :param retain: store the message for the broker's retention time, by default 30 days; needs
            ``s``. A ``ttl`` takes precedence
        :param echo: whether the message is also delivered to this connection
        :param timeout: with ``qos=1``, seconds to wait for the broker's reply, instead of
            ``request_timeout``; ``None`` waits without limit
        :raises TypeError: if an argument has the wrong type, or JSON cannot encode the message
        :raises ValueError: if an argument is out of range, or the key or the message is malformed
        :raises InvalidChannelError: if the broker would not accept the channel
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``, for which the
            broker would close the connection
        :raises UnauthorizedError: with ``qos=1``, if the key does not permit writing to the channel
        :raises RequestError: with ``qos=1``, if the broker refused for another reason
        :raises RequestTimeoutError: with ``qos=1``, if the broker did not reply in time; the
            message might have been published
        :raises ConnectionLostError: with ``qos=1``, if the connection was lost before the reply;
            the message might have been published. With any ``qos``, if reconnecting was given up;
            with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        A refused QoS 0 publish emits ``error``, or is logged if nothing handles that event;
        :meth:`flush` raises it too.

        If cancelled while it waits for queue space, the message was not queued. If cancelled later,
        with ``qos=1``, the message might be published; a late reply is dropped.

        Source: the broker refuses a publish before it acknowledges it, and acknowledges it in any
        case (``broker/conn.go``; recorded conversations ``publish-unknown-key-qos1``,
        ``store-needs-permission`` and ``store-retain``).
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
        Publish a message to the channel of an Emitter link.

        The broker uses the key and the options that were given to :meth:`link`.

        :param name: the name that was given to :meth:`link`
        :param message: as for :meth:`publish`
        :param qos: as for :meth:`publish`
        :param retain: as for :meth:`publish`
        :param timeout: with ``qos=1``, seconds to wait for the broker's reply, instead of
            ``request_timeout``; ``None`` waits without limit
        :raises TypeError: if an argument has the wrong type, or JSON cannot encode the message
        :raises ValueError: if an argument is out of range, or the name or the message is malformed
        :raises MessageTooLargeError: if channel and payload together exceed 65,528 bytes, which the
            broker would not deliver, or the packet exceeds ``max_message_size``
        :raises BadRequestError: with ``qos=1``, if ``name`` is unknown on this connection
        :raises UnauthorizedError: with ``qos=1``, if the key given to :meth:`link` does not permit
            writing to the channel
        :raises RequestError: with ``qos=1``, if the broker refused for another reason
        :raises RequestTimeoutError: with ``qos=1``, if the broker did not reply in time; the
            message might have been published
        :raises ConnectionLostError: as for :meth:`publish`
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        Cancelling it does what cancelling :meth:`publish` does.

        Source: above 65,528 bytes the broker closes the publisher's connection or drops the message
        (``broker/conn.go``).
        """
        await self._links.publish(name, message, qos, retain, timeout)

    async def flush(self, *, timeout: Timeout = DEFAULT) -> float:
        """
        Wait until the broker has processed everything that this client sent before.

        The client sends a PINGREQ, to which the broker replies in order.

        :param timeout: seconds to wait for the broker's reply, instead of ``request_timeout``;
            ``None`` waits without limit
        :return: the round trip in seconds
        :raises TypeError: if ``timeout`` has the wrong type
        :raises ValueError: if ``timeout`` is negative
        :raises RequestError: the first refusal of a QoS 0 publish since the last flush
        :raises RequestTimeoutError: if the broker did not reply in time
        :raises ConnectionLostError: if the connection was lost before the reply, or reconnecting
            was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled, it leaves the refusal for the next flush.

        Source: recorded conversation ``ping-is-a-barrier``.
        """
        return await self._requester.flush(timeout)

    @overload
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
        mark_gaps: Literal[False] = False,
        decode: None = None,
        timeout: Timeout = DEFAULT,
    ) -> Subscribing[EmitterMessage]: ...
    @overload
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
        mark_gaps: Literal[True],
        decode: None = None,
        timeout: Timeout = DEFAULT,
    ) -> Subscribing[EmitterMessage | Gap]: ...
    @overload
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
        mark_gaps: Literal[False] = False,
        decode: Callable[[bytes], T],
        timeout: Timeout = DEFAULT,
    ) -> Subscribing[DecodedMessage[T]]: ...
    @overload
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
        mark_gaps: Literal[True],
        decode: Callable[[bytes], T],
        timeout: Timeout = DEFAULT,
    ) -> Subscribing[DecodedMessage[T] | Gap]: ...
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
        decode: Callable[[bytes], T] | None = None,
        timeout: Timeout = DEFAULT,
    ) -> (
        Subscribing[EmitterMessage]
        | Subscribing[EmitterMessage | Gap]
        | Subscribing[DecodedMessage[T]]
        | Subscribing[DecodedMessage[T] | Gap]
    ):
        """
        Subscribe to a channel and to all channels below it.

        **Awaited**, the call sends messages to the handlers of ``on("message")``, until
        :meth:`unsubscribe`; awaiting it again has no effect. **Entered** with ``async with``, the
        call gives an :class:`EventStream`; leaving the block unsubscribes without waiting.

        After a reconnection, the subscription is restored before ``connect`` is emitted. Messages
        that were published between the two connections are missing, unless they were stored and
        ``resume`` reads them back. If the broker refuses to restore a subscription, its stream
        raises the refusal, or ``error`` is emitted if it was awaited.

        :param key: a key with the permission to read (``r``), or an ``async`` function that returns
            one (see :class:`Emitter`). A group needs a key that was made for
            ``$share/<group>/<channel>/``
        :param channel: the channel, which includes all channels below it, or a :class:`Channel`. A
            level can be ``+``, which matches any one level. Only with ``matcher="mqtt"`` can the
            last level be ``#``, because Emitter's default matcher delivers nothing to it
        :param last: the maximum number of stored messages to replay first, the newest ones, up to
            2,147,483,647 and 64 KiB, if the key has the permission to load (``l``). 0 replays none;
            ``None`` replays the newest one. If the subscription overlaps another subscription of
            this client, the client reads the messages by a history request, for this subscription
            alone; a message that is stored while it does so might arrive twice
        :param since: replay only messages stored at or after this time: an aware ``datetime`` or
            unix seconds, between 2018 and 2066. Without ``last``, only the newest one is replayed
        :param until: replay only messages stored at or before this time
        :param group: the name of a share group: each message goes to one of its members. Nothing is
            replayed to a group
        :param buffer: the maximum number of messages that wait in the stream, at least 1. The limit
            is also 8 MiB, where a message counts as its payload, its channel and 128 bytes.
            Replayed and resumed messages do not count. Ignored when awaited: each handler has its
            own buffer
        :param overflow: what happens when the buffer is full:

            - ``"raise"``: drop new messages, and raise a :class:`SlowConsumerError` in their place
            - ``"drop_oldest"``, ``"drop_newest"``: drop messages, and count them in
              ``statistics()``
            - ``"block"``: stop reading the connection, which delays every other stream and every
              reply. A task that awaits a reply while its own stream is full waits until its
              timeout, and the broker closes a connection that it cannot write to for 120 seconds.
              While the stream waits for ``resume``, it does what ``"raise"`` does
        :param resume: after a lost connection, read the missed messages back from the broker's
            storage and deliver them in order, before live messages. Messages from around the loss
            might arrive twice. A message that was read back has ``replayed`` set and an ``id``.
            Needs a key with ``l`` and a channel whose first level is not a wildcard; not for a
            group
        :param resume_limit: the maximum number of messages to read back, the newest ones, up to
            2,147,483,647; messages of earlier losses that are not yet received count. The limit is
            also 8 MiB. If more were stored, that is logged, and ``Gap.complete`` is ``False``
        :param mark_gaps: put a :class:`Gap` into the stream for each lost connection; not when
            awaited
        :param decode: a function that takes a payload and returns its value, such as
            ``msgspec.json.Decoder(Reading).decode``. The stream then contains
            :class:`DecodedMessage` objects. If the function raises an exception, the message is
            counted and skipped, and a :class:`DecodeError` is emitted as ``error``, or logged if
            nothing handles that event; not when awaited
        :param timeout: seconds to wait for each of the broker's replies, instead of
            ``request_timeout``; ``None`` waits without limit
        :return: an object to be awaited or entered, once
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if an argument is out of range, the key is malformed, or options exclude
            each other
        :raises InvalidChannelError: if the broker would not accept the channel, would deliver
            nothing to it, or could not resume it
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: when awaited or entered, if the key does not permit reading the
            channel, or lacks ``l`` for ``resume``
        :raises RequestError: when awaited or entered, if the broker refused for another reason
        :raises SubscriptionConflictError: when awaited or entered, if the broker could not keep the
            subscription apart from another subscription of this connection
        :raises RequestTimeoutError: when awaited or entered, if the broker did not reply in time
        :raises ConnectionLostError: when awaited or entered, if the connection was lost before the
            reply, or reconnecting was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: when awaited or entered, outside the block
        :raises RuntimeError: if the object is awaited or entered a second time
        :raises WrongLoopError: when awaited or entered, in another thread or event loop

        If cancelled while it is awaited or entered, the subscription is undone.

        Source: the broker's ``pubsub/subscribe.go`` and ``message/sub.go``; recorded conversations
        ``match-prefix``, ``store-replay-default-one``, ``share-needs-own-key`` and
        ``wildcard-subscribe-forms``.
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
            decode=decode,
            timeout=timeout,
        )

    async def unsubscribe(
        self,
        key: Key,
        channel: str | Channel,
        *,
        group: str | None = None,
        timeout: Timeout = DEFAULT,
    ) -> None:
        """
        End a subscription that an awaited :meth:`subscribe` made.

        The client sends UNSUBSCRIBE only if no other subscription of this client needs the channel.

        :param key: the key, or the function, that was given to :meth:`subscribe`
        :param channel: the channel that was given to :meth:`subscribe`
        :param group: the group that was given to :meth:`subscribe`, if any
        :param timeout: seconds to wait for the broker's reply, instead of ``request_timeout``;
            ``None`` waits without limit
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if an argument is out of range, or the key is malformed
        :raises InvalidChannelError: if the broker would not accept the channel
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises RequestError: if the broker refused, for example because the key has expired
        :raises RequestTimeoutError: if the broker did not reply in time
        :raises ConnectionLostError: if the connection was lost before the reply, or reconnecting
            was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled while it waits for queue space, the subscription stays. If cancelled later, the
        subscription has ended.
        """
        await self._subscriptions.unsubscribe(key, channel, group, timeout)

    async def keygen(
        self,
        key: Key,
        channel: str | Channel,
        permissions: str = "rw",
        ttl: int = 0,
        *,
        timeout: Timeout = DEFAULT,
    ) -> ChannelKey:
        """
        Make a key.

        :param key: the broker's secret key. With a key that has the permission to extend (``e``),
            the broker makes a private channel below the given one, and a key for it
        :param channel: the target of the key: ``a/b/`` is exactly that channel, ``a/#/`` is ``a/``
            and all channels below it. It can be a :class:`Channel`. It can have at most 23 levels.
            A target that ends in ``+/`` permits nothing, except ``+/`` alone
        :param permissions: any of the letters ``r`` (read), ``w`` (write), ``s`` (store), ``l``
            (load), ``p`` (presence), ``e`` (extend) and ``x`` (execute)
        :param ttl: seconds until the key expires, up to 2,147,483,647; 0: it does not expire
        :param timeout: seconds to wait for the broker's reply, instead of ``request_timeout``;
            ``None`` waits without limit
        :return: the key and its channel
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if an argument is out of range, ``permissions`` has an unknown letter,
            or the key is malformed
        :raises InvalidChannelError: if the broker would not make a key for the channel
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: if ``key`` does not permit making keys
        :raises RequestError: if the broker refused for another reason
        :raises RemoteProtocolError: if the reply was malformed
        :raises RequestTimeoutError: if the broker did not reply in time
        :raises ConnectionLostError: if the connection was lost before the reply, or reconnecting
            was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled after the request was sent, the broker might still make the key, and the reply
        is dropped.

        Source: the broker's ``security/key.go``; recorded conversations ``keygen``,
        ``keygen-too-deep`` and ``extend-private-channel``.
        """
        return await self._keys.keygen(key, channel, permissions, ttl, timeout)

    async def keyban(
        self, secret: Key, target: Key, banned: bool = True, *, timeout: Timeout = DEFAULT
    ) -> bool:
        """
        Ban a key, or lift a ban.

        A ban takes effect immediately, but existing subscriptions with the key continue. A lifted
        ban might take a minute to take effect. A broker that is configured without a cluster closes
        the connection instead.

        :param secret: the broker's secret key
        :param target: the key to ban
        :param banned: ``True`` to ban the key, ``False`` to lift the ban
        :param timeout: seconds to wait for the broker's reply, instead of ``request_timeout``;
            ``None`` waits without limit
        :return: whether the key is banned now
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if ``timeout`` is negative, or a key is malformed
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: if ``secret`` is not the secret key of the broker's licence
        :raises RequestError: if the broker refused for another reason
        :raises RemoteProtocolError: if the reply was malformed
        :raises RequestTimeoutError: if the broker did not reply in time
        :raises ConnectionLostError: if the connection was lost before the reply, or reconnecting
            was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled after the request was sent, the broker might still carry it out.

        Source: recorded conversation ``keyban``; the broker caches bans for 60 seconds
        (``crdt/durable.go``), and needs a cluster to ban (``keyban.go``).
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
        Create an Emitter link: a short name for a channel, for :meth:`publish_with_link`.

        The short name lasts as long as the client, is restored after a reconnection, and cannot be
        deleted. The broker checks the key only when the short name is used.

        :param key: a key with the permission to write (``w``), or an ``async`` function that
            returns one (see :class:`Emitter`)
        :param channel: the channel, without wildcards
        :param name: one or two ASCII letters or digits
        :param subscribe: whether to subscribe to the channel as well, as an awaited
            :meth:`subscribe` with ``last=0`` does; needs ``r``
        :param ttl: seconds for which the broker stores what is published with the short name, up to
            2,147,483,647; ``None`` or 0: it does not store it. Needs ``s``
        :param echo: whether what is published with the short name is also delivered to this
            connection
        :param timeout: seconds to wait for the broker's reply, instead of ``request_timeout``;
            ``None`` waits without limit
        :return: the name, and the channel with its options
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if an argument is out of range, or the key or the name is malformed
        :raises InvalidChannelError: if the broker would not accept the channel
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: with ``subscribe``, if the key does not permit reading the
            channel; the short name exists nevertheless
        :raises SubscriptionConflictError: with ``subscribe``, as for :meth:`subscribe`; the short
            name exists nevertheless
        :raises RequestError: if the broker refused for another reason
        :raises RemoteProtocolError: if the reply was malformed
        :raises RequestTimeoutError: if the broker did not reply in time
        :raises ConnectionLostError: if the connection was lost before the reply, or reconnecting
            was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled after the request was sent, this connection might have the short name, but the
        client does not restore it.

        Source: recorded conversations ``link``, ``link-options`` and ``link-bad-key``.
        """
        return await self._links.make(key, channel, name, subscribe, ttl, echo, timeout)

    async def me(self, *, timeout: Timeout = DEFAULT) -> Me:
        """
        Request this connection's id and its Emitter links.

        :param timeout: seconds to wait for the broker's reply, instead of ``request_timeout``;
            ``None`` waits without limit
        :return: the connection's id, which is new for each connection, and its Emitter links
        :raises TypeError: if ``timeout`` has the wrong type
        :raises ValueError: if ``timeout`` is negative
        :raises RequestError: if the broker refused
        :raises RemoteProtocolError: if the reply was malformed
        :raises RequestTimeoutError: if the broker did not reply in time
        :raises ConnectionLostError: if the connection was lost before the reply, or reconnecting
            was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled after the request was sent, a late reply is dropped.

        Source: recorded conversation ``me``.
        """
        return await self._requester.request(requests.me(), check_timeout(timeout))

    async def presence(
        self,
        key: Key,
        channel: str | Channel,
        *,
        changes: bool | None = None,
        timeout: Timeout = DEFAULT,
    ) -> PresenceStatus:
        """
        Request which clients would receive a message sent to a channel.

        These are the subscribers of the channel and of its parents, but not of channels below it.
        In a cluster the broker lists only the clients of the node to which this client is
        connected.

        :param key: a key with the permission for presence (``p``), or an ``async`` function that
            returns one (see :class:`Emitter`)
        :param channel: the channel, or a :class:`Channel`; a level can be ``+``
        :param changes: ``True`` starts sending changes, at the channel and below it, to
            ``on("presence")``, also after a reconnection; ``False`` stops that; ``None`` changes
            nothing
        :param timeout: seconds to wait for the broker's reply, instead of ``request_timeout``;
            ``None`` waits without limit
        :return: the current members
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if ``timeout`` is negative, or the key is malformed
        :raises InvalidChannelError: if the broker would not accept the channel
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: if the key does not permit presence on the channel
        :raises RequestError: if the broker refused for another reason. With ``status=None``: the
            reply, with about 1800 members, exceeded the 64 KiB that the broker can send
        :raises SubscriptionConflictError: with ``changes=True``, if the broker could not keep the
            feed apart from another feed of this connection
        :raises RemoteProtocolError: if the reply was malformed
        :raises RequestTimeoutError: if the broker did not reply in time
        :raises ConnectionLostError: if the connection was lost before the reply, or reconnecting
            was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled, it undoes a ``changes=True`` that had not been in effect before; a late reply
        is dropped.

        Source: recorded conversations ``presence-status``, ``presence-changes`` and
        ``presence-changes-off``.
        """
        return await self._presence.presence(key, channel, changes, timeout)

    def watch_presence(
        self,
        key: Key,
        channel: str | Channel,
        *,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        refresh: float | None = 60,
        timeout: Timeout = DEFAULT,
    ) -> Entering[PresenceFeed]:
        """
        Return a stream of presence changes, to be entered with ``async with``.

        The first item is the current status. Leaving the block ends the feed without waiting. If
        the broker later refuses a status or refuses to restore the feed, the stream raises the
        refusal.

        :param key: a key with the permission for presence (``p``), or an ``async`` function that
            returns one (see :class:`Emitter`)
        :param channel: the channel, whose changes include those below it, or a :class:`Channel`; a
            level can be ``+``
        :param buffer: the maximum number of events that wait in the stream, at least 1. The limit
            is also 8 MiB
        :param overflow: what happens when the buffer is full, as for :meth:`subscribe`
        :param refresh: seconds, above 0, after which the client requests a fresh status, because an
            event can be lost; ``None``: only after events that leave the members uncertain
        :param timeout: seconds to wait for the first status, instead of ``request_timeout``;
            ``None`` waits without limit
        :return: an object to be entered once, for a :class:`PresenceFeed`
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if an argument is out of range, or the key is malformed
        :raises InvalidChannelError: if the broker would not accept the channel, or would deliver
            nothing to it
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: when entered, if the key does not permit presence on the channel
        :raises RequestError: when entered, if the broker refused for another reason, or could not
            send the status, as for :meth:`presence`
        :raises SubscriptionConflictError: when entered, if the broker could not keep the feed apart
            from another feed of this connection
        :raises RemoteProtocolError: when entered, if the reply was malformed
        :raises RequestTimeoutError: when entered, if the broker did not reply in time
        :raises ConnectionLostError: when entered, if the connection was lost before the reply, or
            reconnecting was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: when entered, outside the block of the client
        :raises RuntimeError: if the object is entered a second time
        :raises WrongLoopError: when entered, in another thread or event loop

        If cancelled while it is entered, the feed is ended.

        Source: recorded conversation ``presence-changes``.
        """
        return self._presence.watch(key, channel, buffer, overflow, refresh, timeout)

    def history(
        self,
        key: Key,
        channel: str | Channel,
        last: int | None = None,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        after: str | StoredMessage | None = None,
        order: Literal["oldest", "newest"] = "oldest",
        timeout: Timeout = DEFAULT,
    ) -> AsyncIterator[StoredMessage]:
        """
        Read stored messages of a channel and of all channels below it.

        The messages are ordered by second, and within a second by the order in which each node of
        the broker stored them. The client reads as many as the broker can send in each reply.

        :param key: a key with the permission to load (``l``), or an ``async`` function that returns
            one (see :class:`Emitter`)
        :param channel: the channel, or a :class:`Channel`; any level except the first can be ``+``
        :param last: the maximum number of messages, up to 2,147,483,647: the newest ones, or with
            ``after`` the oldest ones. ``None``: 100, or with ``after`` no limit
        :param since: read only messages stored at or after this time: an aware ``datetime`` or unix
            seconds, between 2018 and 2066
        :param until: read only messages stored at or before this time
        :param after: read only messages after this position: a :class:`StoredMessage`, or the
            :attr:`~Consumer.cursor` of a :class:`Consumer`. Not with ``since`` or
            ``order="newest"``
        :param order: ``"oldest"`` yields the oldest message first, and holds at most 16 MiB in
            memory: larger histories are read twice. ``"newest"`` yields the newest first, with one
            page in memory at a time
        :param timeout: seconds to wait for each of the broker's replies, instead of
            ``request_timeout``; ``None`` waits without limit
        :return: an asynchronous iterator of :class:`StoredMessage`, which needs no closing. After
            an error or a cancellation, iteration can continue at the same place. Only one task at a
            time can iterate
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if an argument is out of range, or the key is malformed
        :raises InvalidChannelError: if the broker would not accept the channel, or its first level
            is a wildcard
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: when iterated, if the key does not permit loading from the
            channel
        :raises RequestError: when iterated, if the broker refused for another reason
        :raises HistoryIncompleteError: when iterated, in the place of stored messages that cannot
            be read
        :raises RemoteProtocolError: when iterated, if a reply was malformed
        :raises RequestTimeoutError: when iterated, if the broker did not reply in time
        :raises ConnectionLostError: when iterated, if the connection was lost before a reply, or
            reconnecting was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: when iterated, outside the block
        :raises WrongLoopError: when iterated, in another thread or event loop

        Source: the broker's ``message/id.go`` and ``provider/storage/ssd.go``; recorded
        conversation ``history``.
        """
        return self._history.read(key, channel, last, since, until, after, order, timeout)

    def consume(
        self,
        key: Key,
        channel: str | Channel,
        *,
        after: str | StoredMessage | None = None,
        timeout: Timeout = DEFAULT,
    ) -> Entering[Consumer]:
        """
        Return a durable consumer of stored messages, to be entered with ``async with``.

        A :class:`Consumer` returns every message of the channel, and of all channels below it, that
        is stored after a position, oldest first, and then waits for further ones. After a restart
        of the program, it continues at a saved :attr:`Consumer.cursor`. Messages that were
        published without ``ttl`` and ``retain`` are not stored and never appear.

        On one node of the broker, it returns each message once, and in order. In a cluster, it
        returns each message at least once, and messages of a node whose clock is more than 2 s
        behind arrive late. It holds at most 16 MiB in memory. Live messages only cause the client
        to read storage. Leaving the block ends the subscription to them without waiting.

        :param key: a key with the permissions to read and load (``rl``), or an ``async`` function
            that returns one (see :class:`Emitter`)
        :param channel: the channel, or a :class:`Channel`; any level except the first can be ``+``
        :param after: the position: a cursor, a :class:`StoredMessage`, ``"now"`` for messages that
            are stored after the consumer was entered, or ``None`` for the oldest stored message
        :param timeout: seconds to wait for each of the broker's replies, instead of
            ``request_timeout``; ``None`` waits without limit
        :return: an object to be entered once, for a :class:`Consumer`
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if an argument is out of range, or the key or the cursor is malformed
        :raises InvalidChannelError: if the broker would not accept the channel, its first level is
            a wildcard, or its last level is ``#`` with the default matcher
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: when entered or iterated, if the key does not permit reading and
            loading from the channel
        :raises RequestError: when entered or iterated, if the broker refused for another reason
        :raises SubscriptionConflictError: when entered, if the broker could not keep the
            subscription apart from another subscription of this connection
        :raises RemoteProtocolError: when entered or iterated, if a reply was malformed
        :raises RequestTimeoutError: when entered or iterated, if the broker did not reply in time
        :raises ConnectionLostError: when entered, if the connection was lost before a reply; when
            iterated, if reconnecting was given up; when entered with ``while_down="raise"``, also
            while disconnected
        :raises ~anyio.ClosedResourceError: when iterated, after its block was left
        :raises ClosedError: when entered, outside the block of the client
        :raises RuntimeError: if the object is entered a second time
        :raises WrongLoopError: when entered or iterated, in another thread or event loop

        Cancelling an iteration loses no message. If cancelled while it is entered, the subscription
        is ended.

        Source: the broker's ``message/id.go`` and ``provider/storage/ssd.go``.
        """
        return self._consumers.consume(key, channel, after, timeout)

    async def request(
        self, key: Key, channel: str, message: Payload, *, timeout: Timeout = DEFAULT
    ) -> EmitterMessage:
        """
        Send a request to the clients that :meth:`serve` a channel, and return the first reply.

        The request is published below the channel with QoS 1.

        :param key: a key with the permissions to read and write (``rw``) below the channel, such as
            a key for ``channel/#/``, or an ``async`` function that returns one (see
            :class:`Emitter`)
        :param channel: the channel that is served
        :param message: the request, encoded as for :meth:`publish`
        :param timeout: seconds to wait for the reply, instead of ``request_timeout``; ``None``
            waits without limit
        :return: the reply
        :raises TypeError: if an argument has the wrong type, or JSON cannot encode the message
        :raises ValueError: if an argument is out of range, or the key or the message is malformed
        :raises InvalidChannelError: if the broker would not accept the channel
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises ReplyError: if the handler that served the request raised
        :raises UnauthorizedError: if the key does not permit reading and writing below the channel
        :raises RequestError: if the broker refused for another reason
        :raises SubscriptionConflictError: if the broker could not keep the subscription to the
            replies apart from another subscription of this connection
        :raises RequestTimeoutError: if no reply arrived in time; the request might have taken
            effect
        :raises ConnectionLostError: if the connection was lost before the reply; the request might
            have taken effect. Also if reconnecting was given up, and with ``while_down="raise"``
            while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        Cancelling it, or a timeout, cancels the handler that serves the request.
        """
        return await self._calls.request(key, channel, message, timeout)

    def request_many(
        self,
        key: Key,
        channel: str,
        message: Payload,
        *,
        count: int | None = None,
        idle: float | None = None,
        buffer: int = 1024,
        timeout: Timeout = DEFAULT,
    ) -> Entering[EventStream[EmitterMessage]]:
        """
        Send a request to the clients that :meth:`serve` a channel, and return a stream of replies.

        Entering the stream with ``async with`` sends the request, as :meth:`request` does. The
        stream ends at the deadline, or earlier with ``count`` or ``idle``. Receiving raises a
        :class:`ReplyError` in the place of the reply of a handler that raised, and can continue.
        Because replies might then be missing, a lost connection ends the stream with
        :class:`ConnectionLostError`, and :meth:`disconnect` with :class:`ClosedError`.

        :param key: as for :meth:`request`
        :param channel: the channel that is served
        :param message: the request, encoded as for :meth:`publish`
        :param count: the number of replies, including errors of handlers, after which the stream
            ends, 1 to 2,147,483,647; ``None`` for no limit
        :param idle: seconds, above 0, without a reply after which the stream ends. The time starts
            with the first reply; ``None`` for no limit
        :param buffer: the maximum number of replies that wait in the stream, at least 1. The limit
            is also 8 MiB. Further replies are dropped, and a :class:`SlowConsumerError` is raised
            in their place
        :param timeout: seconds after which the stream ends, instead of ``request_timeout``, from
            when the request's bytes are written; ``None`` for no limit. It also limits the time for
            the broker's reply when the stream is entered
        :return: an object to be entered once, for an :class:`EventStream` of the replies
        :raises TypeError: if an argument has the wrong type, or JSON cannot encode the message
        :raises ValueError: if an argument is out of range, or the key or the message is malformed
        :raises InvalidChannelError: if the broker would not accept the channel
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: when entered, if the key does not permit reading and writing
            below the channel
        :raises RequestError: when entered, if the broker refused for another reason
        :raises SubscriptionConflictError: when entered, as for :meth:`request`
        :raises RequestTimeoutError: when entered, if the broker did not reply in time
        :raises ConnectionLostError: when entered, if the connection was lost before the broker's
            reply, or reconnecting was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: when entered, outside the block
        :raises RuntimeError: if the object is entered a second time
        :raises WrongLoopError: when entered, in another thread or event loop

        Leaving the block, or the end of the stream, cancels the handlers that still serve the
        request, unless ``count`` replies have arrived.
        """
        return self._calls.request_many(key, channel, message, count, idle, buffer, timeout)

    async def serve(
        self,
        key: Key,
        channel: str,
        handler: Serve,
        *,
        group: str | None = None,
        group_key: Key | None = None,
        concurrency: int = 64,
        buffer: int = 1024,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """
        Serve the requests on a channel until cancelled, each in its own task.

        It returns when the client is left.

        :param key: a key with the permissions to read and write (``rw``) below the channel, such as
            a key for ``channel/#/``, or an ``async`` function that returns one (see
            :class:`Emitter`)
        :param channel: the channel to serve
        :param handler: a function or coroutine function that takes the request and returns the
            reply, encoded as for :meth:`publish`. An exception of the handler is logged, and raised
            in the requesting client as a :class:`ReplyError`
        :param group: the name of a share group: each request goes to one of its members. In a
            cluster, a request might reach two members
        :param group_key: a key with the permission to read (``r``) that was made for
            ``$share/<group>/<channel>/`` (with ``matcher="mqtt"``, ``…/#/``); by default ``key``,
            which must then be made for ``#/``
        :param concurrency: the maximum number of requests that are handled at the same time, 1 to
            2,147,483,647; further requests wait
        :param buffer: the maximum number of waiting requests, at least 1. Further requests are
            dropped, which is logged, and raise :class:`RequestTimeoutError` in the requesting
            client
        :param task_status: what ``await task_group.start(...)`` passes, which then returns when
            requests are being served
        :raises TypeError: if an argument has the wrong type, or the handler is a generator function
        :raises ValueError: if an argument is out of range, or the key is malformed
        :raises InvalidChannelError: if the broker would not accept the channel, or would deliver
            nothing to it
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises UnauthorizedError: if the key does not permit reading the channel, also when the
            subscription is restored
        :raises RequestError: if the broker refused for another reason
        :raises SubscriptionConflictError: if the broker could not keep the subscription apart from
            another subscription of this connection
        :raises RequestTimeoutError: if the broker did not reply in time to SUBSCRIBE
        :raises ConnectionLostError: if the connection was lost during SUBSCRIBE, or reconnecting
            was given up; with ``while_down="raise"`` also while disconnected
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        Cancelling it unsubscribes and cancels the handlers; their requests get no reply. The
        cancellation of a request to a group reaches one of its members, which might not be the one
        that handles the request.
        """
        await self._calls.serve(
            key, channel, handler, group, group_key, concurrency, buffer, task_status
        )

    @overload
    def on(
        self, event: _ConnectionEvent, handler: _OnConnection, **options: Unpack[_Options]
    ) -> _OnConnection: ...
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
        self, event: _ConnectionEvent, **options: Unpack[_Options]
    ) -> Callable[[_OnConnection], _OnConnection]: ...
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
        channel: str | Channel | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
    ) -> Callable[..., object]:
        """
        Register a handler for an event, before or after the client is entered.

        Without ``handler``, the method returns a decorator. The client calls each handler in a task
        of the client, one value at a time, in the order of the events. It passes the event's value,
        or nothing for ``connect`` and ``disconnect``, and awaits the result if that is awaitable. A
        handler can await any method. An exception in a handler is emitted as ``error``, as a
        :class:`HandlerError` with its cause. If nothing handles ``error``, or if its handler
        raises, the exception ends the client and leaves the block.

        :param event: ``"connect"``, ``"disconnect"``, ``"message"``, ``"presence"``, ``"keygen"``,
            ``"keyban"``, ``"link"``, ``"me"`` or ``"error"``
        :param handler: a function or coroutine function
        :param channel: for ``message`` and ``presence``, a channel or :class:`Channel`, as for
            :meth:`subscribe`, to which the values are restricted. It does not subscribe to the
            channel
        :param buffer: the maximum number of values that wait for the handler, at least 1. The limit
            is also 8 MiB
        :param overflow: what happens when the buffer is full, as for :meth:`subscribe`; a
            :class:`SlowConsumerError` is emitted as ``error``, or logged if nothing handles that
            event
        :return: the handler
        :raises TypeError: if an argument has the wrong type, or the handler is a generator function
        :raises ValueError: if the event is unknown or has no channel, or an argument is out of
            range
        :raises InvalidChannelError: if the broker would not accept the channel, or would deliver
            nothing to it
        :raises WrongLoopError: in another thread or event loop, while the client is entered
        """
        return self._events.on(event, handler, channel, buffer, overflow)

    def off(self, event: str, handler: Callable[..., object]) -> None:
        """
        Unregister a handler, and drop the values that wait for it.

        :param event: the event for which the handler was registered
        :param handler: the handler
        :raises TypeError: if ``event`` is not a ``str``
        :raises ValueError: if the event is unknown, or the handler is not registered for it
        :raises WrongLoopError: in another thread or event loop, while the client is entered
        """
        self._events.off(event, handler)

    @overload
    def stream(
        self, event: _ConnectionEvent, **options: Unpack[_Options]
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
        channel: str | Channel | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
    ) -> Entering[EventStream[object]]:
        """
        Return a stream of the values that a handler of an event would get, for ``async with``.

        It can be entered before the client is. The values of ``connect`` and ``disconnect`` are
        ``None``.

        :param event: as for :meth:`on`
        :param channel: for ``message`` and ``presence``, a channel or :class:`Channel`, as for
            :meth:`subscribe`, to which the values are restricted. It does not subscribe to the
            channel
        :param buffer: the maximum number of values that wait in the stream, at least 1. The limit
            is also 8 MiB
        :param overflow: what happens when the buffer is full, as for :meth:`subscribe`
        :return: an object to be entered once, for an :class:`EventStream`
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if the event is unknown or has no channel, or an argument is out of
            range
        :raises InvalidChannelError: if the broker would not accept the channel, or would deliver
            nothing to it
        :raises RuntimeError: if the object is entered a second time
        :raises WrongLoopError: when entered, in another thread or event loop than the client's
        """
        return self._events.stream(event, channel, buffer, overflow)

    # Entering and leaving

    if not TYPE_CHECKING:
        # Type checkers reject these uses because the methods do not exist for them.

        def __await__(self) -> NoReturn:
            raise TypeError(f"cannot await an Emitter; {_USAGE}")

        def __enter__(self) -> NoReturn:
            raise TypeError(f"cannot enter an Emitter with 'with'; {_USAGE}")

        def __exit__(self, *_: object) -> None:
            """Exist, because ``with`` looks it up before it calls ``__enter__()``."""

    @uninterrupted
    async def __aenter__(self) -> Self:
        await self._lifecycle.enter()
        return self

    @uninterrupted
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Returns None, not bool, so that type checkers know that it suppresses no exception.
        await self._lifecycle.leave(exc)

    async def run(self, *, task_status: TaskStatus[Emitter] = anyio.TASK_STATUS_IGNORED) -> None:
        """
        Run the client in the caller's task, until it is disconnected.

        ``await task_group.start(emitter.run)`` returns the connected client.

        :param task_status: what ``await task_group.start(...)`` passes
        :raises TypeError: if ``task_status`` has no method ``started()``
        :raises ConnectError: if no server could be reached; with ``retry_first_connect``, only if
            all tries of ``reconnect`` have failed
        :raises ConnectRefusedError: if the last server that was tried refused CONNECT
        :raises ClosedError: if :meth:`disconnect` was called while the client was connecting
        :raises ConnectionLostError: if reconnecting was given up
        :raises RuntimeError: if the client is already entered
        :raises WrongLoopError: if the client is entered in another thread or event loop
        :raises Exception: the exception of a handler, if nothing handled ``error``

        Cancelling it disconnects: the client sends DISCONNECT if the connection accepts it
        immediately, and waits for nothing.
        """
        check_task_status(task_status)
        async with self:
            task_status.started(self)
            await self.wait_closed()

    async def disconnect(self) -> None:
        """
        Disconnect, and return when the connection is closed.

        Handlers finish the values that they have, queued packets are written and pending calls get
        their replies, then the client sends DISCONNECT, all within ``disconnect_timeout``. Streams
        yield what is buffered and then end. The ``async with`` block continues, and every method
        that needs the broker raises :class:`ClosedError`.

        It can be called by any task of the client's event loop, including a handler, any number of
        times. If the client is connecting for the first time, entering raises :class:`ClosedError`.

        :raises WrongLoopError: in another thread or event loop

        Cancelling it does not stop the client from disconnecting.
        """
        await self._lifecycle.disconnect()

    async def reconnect(self) -> None:
        """
        Replace the connection, and return when the client is connected again.

        Use it to drain a node of the broker, or to distribute clients among nodes. Pending calls
        get their replies and queued packets are written, within ``disconnect_timeout``. Then the
        client sends DISCONNECT and continues as after a lost connection, beginning with the next
        entry of ``servers``. Calls that are made in between use the next connection. Messages that
        are published between the two connections are missing from streams, as after a lost
        connection.

        :raises RuntimeError: if the client was created with ``reconnect=None``
        :raises ConnectionLostError: if reconnecting was given up
        :raises ClosedError: outside the block, or if the client was closed in the meantime
        :raises WrongLoopError: in another thread or event loop

        Cancelling it does not stop the client from reconnecting.
        """
        await self._lifecycle.reconnect()

    async def wait_connected(self) -> None:
        """
        Wait until the client is connected. It can be called before the client is entered.

        :raises ClosedError: if the client was left, or could not connect
        :raises ConnectionLostError: if reconnecting was given up
        :raises WrongLoopError: in another thread or event loop

        Cancelling it has no other effect.
        """
        await self._lifecycle.wait_connected()

    async def wait_closed(self) -> None:
        """
        Wait until the connection is closed; return immediately if the client is not entered.

        :raises WrongLoopError: in another thread or event loop

        Cancelling it has no other effect.
        """
        await self._lifecycle.wait_closed()

    # State and statistics

    @property
    def state(self) -> State:
        """
        The state of the client: ``"connecting"``, ``"connected"``, ``"closing"`` or ``"closed"``.

        ``"connecting"`` includes the time between two connections and restoring a new one. With
        :meth:`reconnect`, it begins before the connection is closed.
        """
        return self._slot.public_state

    @property
    def connection(self) -> ConnectionInfo | None:
        """The current connection; ``None`` while the client is not connected."""
        connection = self._slot.connection
        if connection is None or not self._slot.restored or self.state == "connecting":
            return None
        return ConnectionInfo(
            str(connection.server),
            connection.since,
            connection.session.connection_id,
            self._slot.last_error,
        )

    def statistics(self) -> Statistics:
        """
        Return the client's statistics. Any thread can call it.

        :return: the figures since the client was created, over all connections
        """
        return self._totals.statistics()
