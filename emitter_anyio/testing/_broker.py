"""A development broker: real sockets, real MQTT, Emitter's own semantics and keys."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, get_args

from anyio import (
    TASK_STATUS_IGNORED,
    CancelScope,
    Event,
    create_task_group,
    create_tcp_listener,
)
from anyio.abc import ByteStream, SocketAttribute, SocketStream, TaskStatus
from anyio.streams.stapled import MultiListener

from emitter_anyio._backend.tasks import Tasks

from ._cluster import Cluster
from ._connection import Client, Crowd
from ._exchange import PATIENCE, Exchange
from ._faults import Diversion, Faults
from ._keys import License
from ._matching import Matcher
from ._refusals import RefusedError
from ._service import Service
from ._sockets import keep_accepting
from ._topics import Topic, parse

if TYPE_CHECKING:
    from ._peer import Kind

_ACKNOWLEDGEMENTS: tuple[Kind, ...] = ("puback", "suback", "unsuback")

logger = logging.getLogger("emitter_anyio.testing")


class Shared(NamedTuple):
    """What the nodes of a cluster have in common, beside the licence."""

    cluster: Cluster[Exchange]
    crowd: Crowd


class Broker:
    """
    An Emitter broker to develop and test against, not for production::

        async with Broker() as broker, connect(broker.url) as emitter:
            key = broker.keygen("chat/", "rwls")

    MQTT is spoken over TCP and, on the same port and any path, over WebSocket; the latter needs
    wsproto, which ``pip install 'emitter_anyio[websocket]'`` brings. ``GET /health`` answers 200.

    It listens from entering on, and leaving cuts every client; it can be entered again, and keeps
    what it stored. As with the real one, a packet has at most 64 KiB, a link that is silent for 120
    seconds is closed, and publishers wait for a subscriber who is slow. But one who takes nothing
    for a second, with 1 MiB queued for it, is cut: a subscriber never stalls the others for long.

    :param host: the address to listen on
    :param port: the port, or 0 for one that is free
    :param license: an Emitter licence of version 1, 2 or 3; keys made by a real broker with the
        same licence work here, and the other way round. A new one is made unless given
    :param ssl_context: serve TLS with this
    :param matcher: as a real broker is configured: with ``"emitter"`` a channel reaches its
        subscribers and those of every channel above it, with ``"mqtt"`` only ``#`` does that
    :param coalesce: write to each client as the real broker does: 60 packets at once and 60 more a
        second, the others once a second. An answer behind many others takes a second then, and one
        that waits when its client leaves is lost
    :param cluster: another broker, of whose cluster this one becomes a node: the licence and
        the clock are the same, the clients and the stored messages are not
    :param patience: seconds that a node waits for other nodes that do not answer a request for
        stored messages; it waits half as long before each status of presence
    :raises ValueError: if ``license`` is none, or not the one of the ``cluster``, or there is no
        such ``matcher``
    :raises OSError: on entering, if the port is taken

    :ivar license: the licence
    :ivar secret_key: a master key of the licence, for ``keygen`` and ``keyban``
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
        patience: float = PATIENCE,
    ) -> None:
        if matcher not in get_args(Matcher):
            raise ValueError(f"no matcher {matcher!r}: there are {', '.join(get_args(Matcher))}")
        if cluster is not None:
            if license not in (None, cluster.license):
                raise ValueError("license is not that of the cluster: all nodes need the same one")
            license = cluster.license
        licence = License.new() if license is None else License.parse(license)
        self.license: str = licence.text
        self.secret_key: str = licence.master_key()
        self._address = host, port
        self._port = port
        self._ssl_context = ssl_context
        self._coalesce = coalesce
        self._shared = Shared(Cluster(), Crowd()) if cluster is None else cluster.shared
        self._cluster, self._crowd = self._shared
        self._exchange: Exchange = Exchange(licence, matcher, self._cluster, patience)
        self._faults = Faults()
        self._clients: dict[Client, None] = {}
        self._current_run: tuple[CancelScope, Event] | None = None
        self._service = Service(type(self).__name__, self._start, self._end)

    async def __aenter__(self) -> Self:
        await self._service.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._service.__aexit__(exc_type, exc, traceback)

    async def run(self, *, task_status: TaskStatus[Any] = TASK_STATUS_IGNORED) -> None:
        """
        Run in a task, until it is cancelled: ``await task_group.start(broker.run)``.

        :param task_status: gets this object as soon as it listens
        """
        await self._service.run(partial(task_status.started, self))

    async def _start(self, tasks: Tasks) -> None:
        await self._listen(tasks, self._address[1])

    async def _end(self, tasks: Tasks) -> None:
        self._halt()
        tasks.stop()
        await tasks.stopped()

    async def _listen(self, tasks: Tasks, port: int) -> None:
        """Listen, and serve clients until :meth:`_halt`."""
        listener = await create_tcp_listener(local_host=self.host, local_port=port)
        self._port = listener.extra(SocketAttribute.local_port)
        self._cluster.start(self._exchange)
        scope, ended = self._current_run = CancelScope(), Event()
        tasks.start_soon(self._serve_all, listener, scope, ended)

    async def _serve_all(
        self, listener: MultiListener[SocketStream], scope: CancelScope, ended: Event
    ) -> None:
        try:
            with scope:
                async with listener, create_task_group() as task_group:
                    for each in listener.listeners:
                        serve = partial(each.serve, self._serve, task_group)
                        task_group.start_soon(keep_accepting, serve)
        finally:
            ended.set()

    def _halt(self) -> Event | None:
        """End the run, if there is one, and give what is set when its port is free."""
        if self._current_run is None:
            return None
        (scope, ended), self._current_run = self._current_run, None
        self._cluster.stop(self._exchange)
        for client in self._clients:
            self._exchange.abandon(client.peer)
        self._faults.resume()
        scope.cancel()
        return ended

    @property
    def host(self) -> str:
        """The address that it listens on."""
        return self._address[0]

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    @property
    def url(self) -> str:
        """The URL to connect to by TCP, without a key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtt' if self._ssl_context is None else 'mqtts'}://{host}:{self.port}"

    @property
    def shared(self) -> Shared:
        """What it shares with the other nodes of its cluster, for ``Broker(cluster=...)``."""
        return self._shared

    @property
    def clients(self) -> list[Client]:
        """
        The clients that are connected, from their CONNECT on, in the order of their coming.

        Each has ``id``, ``client_id``, ``username``, ``subscriptions`` and ``wait_closed()``.
        """
        return [client for client in self._clients if client.connected]

    def keygen(self, channel: str, permissions: str = "rw", ttl: int = 0) -> str:
        """
        Make a channel key without asking over the wire.

        :param channel: the target, as for ``emitter/keygen/``: ``a/b/``, or ``a/#/``
        :param permissions: letters out of ``rwslpex``
        :param ttl: for how many seconds it is good; 0 is for ever
        :raises ValueError: if the channel cannot be a target
        """
        try:
            return self._exchange.keygen(channel, permissions, ttl)
        except RefusedError as refusal:
            raise ValueError(refusal.message) from None

    async def publish(self, channel: str, payload: bytes | str, *, ttl: int = 0) -> None:
        """
        Publish as the broker itself, which needs no key.

        Returns when the message is queued for all whom it reaches.

        :param channel: a channel without wildcards, and a slash at its end
        :param payload: the message; text is encoded as UTF-8
        :param ttl: for how many seconds it is also stored
        :raises ValueError: if there cannot be such a channel
        """
        topic = self._topic(channel)
        self._exchange.spread(topic, payload.encode() if isinstance(payload, str) else payload, ttl)
        await self._crowd.relieve()

    async def drop(self, client: Client | str | None = None) -> None:
        """
        Cut links, as a failing network does: nothing more is sent, and wills are published.

        Returns when they are closed.

        :param client: one client, or its id, or the client id of some; all links unless given
        :raises LookupError: if no such client is connected
        """
        chosen = list(self._clients)
        if client is not None:
            chosen = [each for each in chosen if client in (each, each.id, each.client_id)]
            if not chosen:
                raise LookupError("no such client is connected")
        for each in chosen:
            each.cut()
        for each in chosen:
            await each.wait_closed()

    def advance(self, seconds: float) -> None:
        """
        Put the broker's clock forward: what has a ttl ages without any waiting.

        The links do not notice: how long one may be silent is measured by the real clock.

        :param seconds: how far
        :raises ValueError: if this is negative
        """
        if seconds < 0:
            raise ValueError("a broker's clock goes forward only")
        self._cluster.advance(seconds)

    async def stop(self) -> None:
        """
        Stop this node as SIGKILL does, and keep its stored messages.

        Its clients are cut, and their wills are lost. The other nodes notice that: they no longer
        ask it, nor wait for it, and each tells those who watch presence there that subscribers have
        left. As in Emitter, the ids are not theirs, and may be those of clients of the other node.
        Returns when the port is free.
        Stopping it again has no effect.
        """
        if ended := self._halt():
            await ended.wait()

    async def restart(self, *, forget: bool = False) -> None:
        """
        Stop this node if it runs, and start it again, on the same port.

        The ids of messages that it stores from now on name another node. The nodes that knew it
        before ask it for stored messages, but do not answer when it asks, and it waits for them;
        restarting them ends that. Real nodes do so in most restarts.

        :param forget: lose what was stored, as a node does that stores in memory only
        :raises RuntimeError: outside of the ``async with`` block
        """
        tasks = self._service.tasks
        if tasks is None:
            raise RuntimeError("cannot restart the broker: it is not entered; use `async with`")
        await self.stop()
        self._exchange.restart(forget)
        await self._listen(tasks, self._port)

    def pause(self) -> None:
        """
        Stop this node's process where it is, as SIGSTOP does, until :meth:`resume`.

        Links stay open, but nothing is taken from clients; what other nodes send to it waits. They
        get no answers from it, and wait for them.
        """
        self._require_run("pause")
        self._cluster.pause(self._exchange)
        self._faults.pause()

    def resume(self) -> None:
        """Let a paused node handle everything that has arrived since, and go on."""
        self._require_run("resume")
        self._cluster.resume(self._exchange)
        self._faults.resume()

    def cut(self) -> None:
        """
        Cut this node off from the other ones, until :meth:`heal`; its clients do not notice.

        What nodes would send to each other is lost: messages, and changes of presence. Each side
        waits for the answers of the other, and gets none.
        """
        self._require_run("cut")
        self._cluster.cut(self._exchange, True)

    def heal(self) -> None:
        """Connect a node again that was cut off. What was lost stays lost, but bans spread now."""
        self._require_run("heal")
        self._cluster.cut(self._exchange, False)

    @contextmanager
    def hold(self, *kinds: Kind) -> Iterator[None]:
        """
        Keep back what the broker would send to anybody, and send it when the block ends.

        Everything else goes on, so that what is held is overtaken.

        :param kinds: ``"connack"``, ``"puback"``, ``"suback"``, ``"unsuback"``, ``"pingresp"``,
            ``"answer"`` (to a request), ``"error"`` (on ``emitter/error/``) or ``"message"`` (what
            is delivered, changes of presence included); PUBACK, SUBACK and UNSUBACK unless given
        """
        held = Diversion(kinds or _ACKNOWLEDGEMENTS)
        try:
            with self._faults.divert(held):
                yield
        finally:
            held.release()

    @contextmanager
    def lose(self, *kinds: Kind) -> Iterator[None]:
        """
        Throw away what the broker would send to anybody, until the block ends.

        An ``"answer"`` lost while its PUBACK is not is what the real broker does with one that is
        larger than 64 KiB.

        :param kinds: as for :meth:`hold`
        """
        with self._faults.divert(Diversion(kinds or _ACKNOWLEDGEMENTS)):
            yield

    @contextmanager
    def refuse(self, code: int = 5) -> Iterator[None]:
        """
        Answer each CONNECT with a refusal, until the block ends.

        :param code: CONNACK's: 1 protocol version, 2 client id, 3 server unavailable, 4 bad user
            name or password, 5 not authorized
        """
        with self._faults.refuse(code):
            yield

    def _require_run(self, action: str) -> None:
        if self._current_run is None:
            raise RuntimeError(f"cannot {action} the broker: it does not run")

    def _topic(self, channel: str) -> Topic:
        try:
            topic = parse(f"broker/{channel}")
        except RefusedError:
            topic = None
        if topic is None or topic.wild or topic.options:
            raise ValueError(f"cannot publish to {channel!r}: a channel is like 'a/b/'")
        return topic

    async def _serve(self, stream: ByteStream) -> None:
        client = Client(
            self._exchange,
            self._faults,
            self._crowd,
            stream,
            ssl_context=self._ssl_context,
            coalesce=self._coalesce,
        )
        self._clients[client] = None
        try:
            await client.serve()
        except Exception:  # whatever a client does, the others go on
            logger.exception("the link of client %s failed", client.id)
        finally:
            del self._clients[client]
