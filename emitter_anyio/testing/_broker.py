"""A development broker with real sockets, MQTT, and Emitter's semantics and keys."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self, get_args

from anyio import (
    TASK_STATUS_IGNORED,
    CancelScope,
    Event,
    create_task_group,
    create_tcp_listener,
    sleep,
)
from anyio.abc import (
    ByteStream,
    ByteStreamConnectable,
    SocketAttribute,
    SocketStream,
    TaskStatus,
)
from anyio.from_thread import BlockingPortalProvider
from anyio.streams.stapled import MultiListener

from emitter_anyio._backend.interrupts import uninterrupted
from emitter_anyio._backend.tasks import Tasks

from ._cluster import Cluster
from ._connection import Client, SlowClients
from ._exchange import SURVEY_TIMEOUT_SECONDS, Exchange
from ._faults import Faults, WithheldPackets
from ._keys import License
from ._matching import Matcher
from ._memory import MemoryConnectable, MemoryListener
from ._peer import Kind
from ._refusals import RefusedError
from ._service import Service
from ._sockets import keep_accepting
from ._stats import Gauges, Stats
from ._topics import Topic, parse
from ._virtual_time import virtual_clock

_ACKNOWLEDGEMENTS: tuple[Kind, ...] = ("puback", "suback", "unsuback")

logger = logging.getLogger("emitter_anyio.testing")


class Shared(NamedTuple):
    """
    The state that the nodes of a cluster share, apart from the licence.

    :ivar event_loop: the event loop in a thread in which a ``BlockingBroker`` runs a node
    """

    cluster: Cluster[Exchange]
    slow_clients: SlowClients
    event_loop: BlockingPortalProvider


def _new_cluster() -> Shared:
    # In Trio, because blockbuster reports blocking calls in each thread that runs asyncio.
    return Shared(Cluster(), SlowClients(), BlockingPortalProvider("trio"))


class Run(NamedTuple):
    """
    The time from the start of a node until it stops.

    :ivar scope: cancels its tasks
    :ivar ended: set when its tasks have ended
    :ivar memory: accepts connections in memory
    """

    scope: CancelScope
    ended: Event
    memory: MemoryListener


class Broker:
    """
    A broker for development and tests with Emitter's semantics, not for production::

        async with Broker() as broker, connect(broker.url) as emitter:
            key = broker.keygen("chat/", "rwls")

    The broker accepts MQTT over TCP and, on the same port and any path, over WebSocket. WebSocket
    requires wsproto (the extra ``websocket``). ``GET /health`` returns 200.

    Entering the broker starts listening; leaving it disconnects all clients. The broker can be
    entered again and keeps its stored messages. Like Emitter, it limits packets to 64 KiB, closes a
    connection after 120 seconds without a packet, and makes publishers wait for slow subscribers.
    Unlike Emitter, it disconnects a subscriber that reads nothing for a second while 1 MiB is
    queued, so that it does not delay the others.

    :param host: the address to listen on
    :param port: the port, or 0 for a free one
    :param license: an Emitter licence of version 1, 2 or 3, or ``None`` to generate one; brokers
        with the same licence accept each other's keys
    :param ssl_context: the context to serve TLS with
    :param matcher: ``"emitter"`` to deliver a message to the subscribers of its channel and of all
        channels above it, or ``"mqtt"`` to deliver to channels below a subscription only if it ends
        in ``#/``; use the matcher that your production broker is configured with
    :param coalesce: whether to limit writes like Emitter: to each client, 60 packets immediately,
        60 more per second, and the rest together once per second. A reply after many others is then
        delayed by up to a second, and is lost if its client disconnects before
    :param cluster: a broker whose cluster this one joins as a node; the nodes share the licence and
        the clock, but not clients and stored messages
    :param patience: the seconds that a node waits for other nodes that do not reply to a request
        for stored messages; it waits half as long before each presence status
    :param stats_interval: the seconds between two messages with the figures of this node, which it
        publishes to ``stats/<node>/`` like Emitter; ``None`` for none. See
        :func:`emitter_anyio.decode_stats`
    :raises ValueError: if ``license`` is malformed or is not that of ``cluster``, ``matcher`` is
        unknown, or ``stats_interval`` is not positive
    :raises OSError: on entering, if the port is in use

    :ivar license: the licence
    :ivar secret_key: a secret key of the licence, for ``keygen`` and ``keyban``
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        license: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        matcher: Matcher = "emitter",
        coalesce: bool = False,
        cluster: Broker | None = None,
        patience: float = SURVEY_TIMEOUT_SECONDS,
        stats_interval: float | None = 1.0,
    ) -> None:
        if matcher not in get_args(Matcher):
            raise ValueError(
                f"invalid matcher {matcher!r}: expected one of {', '.join(get_args(Matcher))}"
            )
        if stats_interval is not None and not stats_interval > 0:
            raise ValueError(f"invalid stats_interval: expected more than 0, got {stats_interval}")
        if cluster is not None:
            if license not in (None, cluster.license):
                raise ValueError("invalid license: all nodes of a cluster need the same licence")
            license = cluster.license
        licence = License.new() if license is None else License.parse(license)
        self.license: str = licence.text
        self.secret_key: str = licence.secret_key()
        self._address = host, port
        self._port = port
        self._ssl_context = ssl_context
        self._coalesce = coalesce
        self._shared = _new_cluster() if cluster is None else cluster.shared
        self._cluster, self._slow_clients, _ = self._shared
        self._exchange: Exchange = Exchange(licence, matcher, self._cluster, patience)
        self._stats = Stats(self._exchange.name[:6])
        self._stats_interval = stats_interval
        self._faults = Faults()
        self._clients: dict[Client, None] = {}
        self._current_run: Run | None = None
        self._service = Service(type(self).__name__, self._start, self._end)

    @uninterrupted
    async def __aenter__(self) -> Self:
        await self._service.__aenter__()
        return self

    @uninterrupted
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._service.__aexit__(exc_type, exc, traceback)

    async def run(self, *, task_status: TaskStatus[Broker] = TASK_STATUS_IGNORED) -> None:
        """
        Run the broker in a task until it is cancelled: ``await task_group.start(broker.run)``.

        :param task_status: receives this object when the broker is listening
        """
        await self._service.run(partial(task_status.started, self))

    async def _start(self, tasks: Tasks) -> None:
        await self._listen(tasks, self._address[1])

    async def _end(self, tasks: Tasks) -> None:
        self._halt()
        tasks.stop()
        await tasks.stopped()

    async def _listen(self, tasks: Tasks, port: int) -> None:
        """Listen and serve clients until :meth:`_halt`."""
        listener = await create_tcp_listener(local_host=self.host, local_port=port)
        self._port = listener.extra(SocketAttribute.local_port)
        self._cluster.follow(virtual_clock())
        self._cluster.start(self._exchange)
        self._stats.start(self._exchange.now())
        self._current_run = Run(CancelScope(), Event(), MemoryListener())
        tasks.start_soon(self._serve_all, listener, self._current_run)

    @uninterrupted
    async def _serve_all(self, listener: MultiListener[SocketStream], run: Run) -> None:
        try:
            with run.scope:
                async with listener, create_task_group() as task_group:
                    task_group.start_soon(self._publish_stats)
                    for each in listener.listeners:
                        serve = partial(each.serve, self._serve, task_group)
                        task_group.start_soon(keep_accepting, serve)
                    task_group.start_soon(run.memory.serve, self._serve, task_group)
        finally:
            run.memory.close()
            run.ended.set()

    @uninterrupted
    async def _publish_stats(self) -> None:
        while self._stats_interval is not None:
            await sleep(self._stats_interval)
            await self._faults.wait_resumed()
            gauges = Gauges(
                len(self._clients),
                self._exchange.subscription_count,
                len(self._cluster.reached(self._exchange)),
            )
            snapshot = self._stats.snapshot(
                self._exchange.now(), f"{self.host}:{self.port}", gauges
            )
            await self.publish(self._stats.channel, snapshot)

    def _halt(self) -> Event | None:
        """Stop listening and return an event that is set when the port is free."""
        if self._current_run is None:
            return None
        run, self._current_run = self._current_run, None
        self._cluster.stop(self._exchange)
        for client in self._clients:
            self._exchange.abandon(client.peer)
        self._faults.resume()
        run.scope.cancel()
        return run.ended

    @property
    def host(self) -> str:
        """The address that the broker listens on."""
        return self._address[0]

    @property
    def port(self) -> int:
        """The port that the broker listens on."""
        return self._port

    @property
    def url(self) -> str:
        """The URL for ``connect()``: ``mqtt://``, or ``mqtts://`` with TLS."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtt' if self._ssl_context is None else 'mqtts'}://{host}:{self.port}"

    def connectable(self) -> ByteStreamConnectable:
        """
        Return an object that opens connections to this broker in memory, without sockets.

        Pass it to ``connect(connectable=...)``, in the event loop in which the broker runs. It
        remains valid when the broker is restarted or entered again. Connecting raises
        ``ConnectionRefusedError`` while the broker is not running, and
        :class:`~emitter_anyio.WrongLoopError` in another thread or event loop.
        """
        return MemoryConnectable(self._memory_listener)

    @property
    def shared(self) -> Shared:
        """The state shared with the other nodes of the cluster, for ``Broker(cluster=...)``."""
        return self._shared

    @property
    def clients(self) -> list[Client]:
        """
        The connected clients whose CONNECT was accepted, in the order of their connections.

        Each has ``id``, ``client_id``, ``username``, ``subscriptions`` and ``wait_closed()``.
        """
        return [client for client in self._clients if client.connected]

    def keygen(self, channel: str, permissions: str = "rw", ttl: int = 0) -> str:
        """
        Generate a channel key without a request from a client.

        :param channel: the target, such as ``a/b/`` or ``a/#/``
        :param permissions: letters out of ``rwslpex``
        :param ttl: the lifetime of the key in seconds, or 0 for an unlimited one
        :return: the key
        :raises ValueError: if the channel is not a valid target
        """
        try:
            return self._exchange.keygen(channel, permissions, ttl)
        except RefusedError as refusal:
            raise ValueError(refusal.message) from None

    async def publish(self, channel: str, payload: bytes | str, *, ttl: int = 0) -> None:
        """
        Publish a message without a key.

        Returns when the message is queued for all of its receivers.

        :param channel: a channel without wildcards, with a trailing slash
        :param payload: the message; text is encoded as UTF-8
        :param ttl: the seconds to store the message for, or 0 not to store it
        :raises ValueError: if the channel is invalid

        If cancelled while it waits for slow subscribers, the message is still delivered.
        """
        topic = self._topic(channel)
        self._exchange.store_and_send(
            topic, payload.encode() if isinstance(payload, str) else payload, ttl
        )
        await self._slow_clients.wait()

    async def drop(self, client: Client | str | None = None) -> None:
        """
        Close connections like a network failure: discard queued packets, and publish wills.

        Returns when the connections are closed.

        :param client: a client, its id, or a client id, which several clients may share; ``None``
            closes all connections
        :raises LookupError: if no such client is connected

        If cancelled, the connections are closed nevertheless.
        """
        chosen = list(self._clients)
        if client is not None:
            chosen = [each for each in chosen if client in (each, each.id, each.client_id)]
            if not chosen:
                raise LookupError("cannot drop the client: no such client is connected")
        for each in chosen:
            each.cut()
        for each in chosen:
            await each.wait_closed()

    def advance(self, seconds: float) -> None:
        """
        Advance the broker's clock, by which messages and keys expire.

        The idle timeout of connections is unaffected, because it uses the clock of the event loop.
        In virtual time, the broker's clock advances with the event loop's.

        :param seconds: the seconds to advance by, at least 0
        :raises ValueError: if ``seconds`` is negative
        """
        if seconds < 0:
            raise ValueError(f"invalid seconds: expected at least 0, got {seconds:g}")
        self._cluster.advance(seconds)

    async def stop(self) -> None:
        """
        Stop this node like SIGKILL, but keep its stored messages.

        The node disconnects its clients and discards their wills. The other nodes detect the stop:
        they no longer send requests to it, and each sends an ``unsubscribe`` event for its
        subscribers to those who watch presence. As in Emitter, these events contain ids that are
        not those of the subscribers, and might be those of clients of the other node.

        Returns when the port is free. Stopping the node again has no effect. If cancelled, the node
        stops nevertheless.
        """
        if ended := self._halt():
            await ended.wait()

    async def restart(self, *, forget: bool = False) -> None:
        """
        Stop this node if it is running, and start it again on the same port.

        The ids of messages that it stores from now on contain another node number. The nodes that
        knew it before still request its stored messages, but do not reply to its requests, so it
        waits for them until they are restarted too. Subscribers on those nodes receive messages
        published on this one only after they have reconnected or subscribed again. Emitter behaves
        like this in most restarts.

        :param forget: whether to delete the stored messages, like a node that stores in memory
        :raises OSError: if the port is in use
        :raises RuntimeError: outside the ``async with`` block

        If cancelled, the node might be stopped; restart it again.
        """
        tasks = self._service.tasks
        if tasks is None:
            raise RuntimeError("cannot restart the broker: it is not running; use 'async with'")
        await self.stop()
        self._exchange.restart(forget)
        await self._listen(tasks, self._port)

    def pause(self) -> None:
        """
        Stop handling packets, like a process after SIGSTOP, until :meth:`resume`.

        Connections stay open, but the node reads nothing from clients. Messages from other nodes
        wait. Other nodes wait for its replies until their ``patience`` has passed.

        :raises RuntimeError: if the node is not running
        """
        self._require_run("pause")
        self._cluster.pause(self._exchange)
        self._faults.pause()

    def resume(self) -> None:
        """
        Handle everything that has arrived since :meth:`pause`, and continue.

        :raises RuntimeError: if the node is not running
        """
        self._require_run("resume")
        self._cluster.resume(self._exchange)
        self._faults.resume()

    def cut(self) -> None:
        """
        Cut the connections between this node and the others until :meth:`heal`.

        Its clients stay connected. Each side takes the other's nodes for stopped: it sends them no
        messages and requests, does not wait for their replies, and announces to those who watch
        presence that their subscribers have left, with wrong ids as after :meth:`stop`.

        :raises RuntimeError: if the node is not running
        """
        self._require_run("cut")
        self._cluster.cut(self._exchange, True)

    def heal(self) -> None:
        """
        Restore the connections to the other nodes, and exchange bans.

        Messages that were lost since :meth:`cut` are not sent again. As in Emitter, the two sides
        send each other only messages for subscriptions made since :meth:`cut`, so subscribers must
        reconnect or subscribe again. A node gets no replies from the other side to requests for
        stored messages, and waits for them, until all nodes have been stopped and started again.

        :raises RuntimeError: if the node is not running
        """
        self._require_run("heal")
        self._cluster.cut(self._exchange, False)

    @contextmanager
    def hold(self, *kinds: Kind) -> Iterator[None]:
        """
        Withhold packets to all clients, and send them when the block ends.

        Packets of other kinds are sent without delay, and so before the withheld ones.

        :param kinds: ``"connack"``, ``"puback"``, ``"suback"``, ``"unsuback"``, ``"pingresp"``,
            ``"reply"`` (the reply to a request), ``"error"`` (on ``emitter/error/``) or
            ``"message"`` (messages and presence events); by default PUBACK, SUBACK and UNSUBACK
        """
        held = WithheldPackets(kinds or _ACKNOWLEDGEMENTS)
        try:
            with self._faults.withhold(held):
                yield
        finally:
            held.release()

    @contextmanager
    def lose(self, *kinds: Kind) -> Iterator[None]:
        """
        Discard packets to all clients until the block ends.

        ``lose("reply")`` behaves like Emitter with a reply larger than 64 KiB, which discards the
        reply but sends the PUBACK.

        :param kinds: as for :meth:`hold`
        """
        with self._faults.withhold(WithheldPackets(kinds or _ACKNOWLEDGEMENTS)):
            yield

    @contextmanager
    def refuse(self, code: int = 5) -> Iterator[None]:
        """
        Refuse each CONNECT until the block ends.

        :param code: the return code of CONNACK: 1 protocol version, 2 client id, 3 server
            unavailable, 4 bad user name or password, 5 not authorized
        """
        with self._faults.refuse(code):
            yield

    @contextmanager
    def throttle(self, requests_per_second: float) -> Iterator[None]:
        """
        Handle at most this many requests per second until the block ends.

        A CONNECT, PUBLISH, SUBSCRIBE or UNSUBSCRIBE packet is a request; pings and acknowledgements
        are not. The requests of all clients wait in one queue, in the order in which the broker
        reads them, at most one of each client. As on an overloaded server, the request of a client
        that has disconnected keeps its place in the queue.

        :param requests_per_second: the requests that the broker handles in a second
        :raises ValueError: if ``requests_per_second`` is not greater than 0
        """
        if not requests_per_second > 0:
            raise ValueError(
                f"invalid requests_per_second: expected more than 0, got {requests_per_second:g}"
            )
        with self._faults.throttle(1 / requests_per_second):
            yield

    def _memory_listener(self) -> MemoryListener | None:
        return None if self._current_run is None else self._current_run.memory

    def _require_run(self, action: str) -> None:
        if self._current_run is None:
            raise RuntimeError(f"cannot {action} the broker: it is not running")

    def _topic(self, channel: str) -> Topic:
        try:
            topic = parse(f"broker/{channel}")
        except RefusedError:
            topic = None
        if topic is None or topic.wild or topic.options:
            raise ValueError(
                f"invalid channel {channel!r}: expected one such as 'a/b/', without wildcards"
            )
        return topic

    @uninterrupted
    async def _serve(self, stream: ByteStream) -> None:
        client = Client(
            self._exchange,
            self._faults,
            self._slow_clients,
            self._stats,
            stream,
            ssl_context=self._ssl_context,
            coalesce=self._coalesce,
        )
        self._clients[client] = None
        try:
            await client.serve()
        except Exception:  # a defect that one client triggers must not stop the broker
            logger.exception("handling of client %s failed", client.id)
        finally:
            del self._clients[client]
