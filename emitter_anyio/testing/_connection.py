"""The connection of a client: its packets are handled in order, and replies are queued."""

from __future__ import annotations

import logging
import math
import ssl
from typing import TYPE_CHECKING

from anyio import (
    CancelScope,
    Event,
    aclose_forcefully,
    create_task_group,
    current_time,
    move_on_after,
)
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from ._outbox import STREAM_ERRORS, Outbox
from ._packets import (
    ConnAck,
    Connect,
    Disconnect,
    MalformedPacketError,
    Packet,
    PacketReader,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
)
from ._peer import Kind, Peer, deliver, to_json
from ._refusals import RefusedError
from ._requests import handle_publish
from ._wire import Wire

if TYPE_CHECKING:
    from ._exchange import Exchange
    from ._faults import Faults
    from ._stats import Stats

IDLE_TIMEOUT_SECONDS = 120.0
"""The time without a packet after which Emitter closes a connection (``broker/conn.go``)."""
HIGH_WATER_BYTES = 1024 * 1024
"""The size of a client's queue above which publishers wait for the client."""
STALL_TIMEOUT_SECONDS = 1.0
"""The time that publishers wait for a client that reads nothing, before it is disconnected."""
LINGER_SECONDS = 1.0
"""The time to write the queue of a client that has disconnected."""
_CHUNK_BYTES = 65536
_REQUESTS = (Connect, Publish, Subscribe, Unsubscribe)
"""The packets that wait for their turn while a broker is throttled."""

_METRICS: dict[type[Packet], str] = {
    Connect: "rcv.connect",
    ConnAck: "rcv.connack",
    Publish: "rcv.pub",
    PubAck: "rcv.puback",
    PubRec: "rcv.pubrec",
    PubRel: "rcv.pubrel",
    PubComp: "rcv.pubcomp",
    Subscribe: "rcv.sub",
    SubAck: "rcv.suback",
    Unsubscribe: "rcv.unsub",
    UnsubAck: "rcv.unsuback",
    PingReq: "rcv.pingreq",
    PingResp: "rcv.pingresp",
    Disconnect: "rcv.disconnect",
}
"""Emitter's metrics of received packets."""

logger = logging.getLogger("emitter_anyio.testing")


class SlowClients:
    """
    The clients of a cluster whose queues are too large. Publishers wait for them.

    :ivar clients: the clients that no publisher waits for yet
    """

    def __init__(self) -> None:
        self.clients: set[Client] = set()

    def add(self, client: Client) -> None:
        """Add a client whose queue has become too large."""
        self.clients.add(client)

    async def wait(self, publisher: Client | None = None) -> None:
        """Wait until the queues of these clients have shrunk."""
        while self.clients:
            await self.clients.pop().wait_for_space(publisher)


class Client:
    """
    A client that is connected to a :class:`Broker`.

    :ivar client_id: the client id of its CONNECT
    """

    def __init__(
        self,
        exchange: Exchange,
        faults: Faults,
        slow_clients: SlowClients,
        stats: Stats,
        stream: ByteStream,
        *,
        ssl_context: ssl.SSLContext | None = None,
        coalesce: bool = False,
    ) -> None:
        self.peer: Peer = exchange.new_peer(self._send)
        self.client_id: str = ""
        self.connected: bool = False
        self._exchange = exchange
        self._faults = faults
        self._slow_clients = slow_clients
        self._stats = stats
        self._stream = stream
        self._ssl_context = ssl_context
        self._wire = Wire()
        self._outbox = Outbox(coalesce, HIGH_WATER_BYTES)
        self._scope = CancelScope()
        self._closed = Event()

    @property
    def id(self) -> str:
        """The id of the connection, as in ``me()`` and presence."""
        return self.peer.id

    @property
    def username(self) -> str:
        """The user name shown in presence, or ``""``."""
        return self.peer.username

    @property
    def subscriptions(self) -> list[str]:
        """The channels of its subscriptions, oldest first; a group has ``$share/NAME/``."""
        return self.peer.channels

    async def wait_closed(self) -> None:
        """Wait until the connection is closed and its subscriptions have ended."""
        await self._closed.wait()

    def cut(self) -> None:
        """Close the connection immediately, and discard its queue."""
        self._scope.cancel()

    async def serve(self) -> None:
        """Serve the connection until one side closes it."""
        try:
            with self._scope:
                self._scope.deadline = current_time() + IDLE_TIMEOUT_SECONDS
                await self._faults.wait_resumed()
                if not await self._start_tls():
                    return
                async with create_task_group() as task_group:
                    task_group.start_soon(self._outbox.write, self._stream)
                    await self._read()
                    await self._faults.wait_resumed()
                    self._leave()
                    self._scope.deadline = current_time() + LINGER_SECONDS
                    self._outbox.close()
        finally:
            try:
                self._leave()
            finally:
                with CancelScope(shield=True):
                    await aclose_forcefully(self._stream)
                self._outbox.discard()
                self._closed.set()

    async def _start_tls(self) -> bool:
        if self._ssl_context is None:
            return True
        try:
            self._stream = await TLSStream.wrap(
                self._stream,
                server_side=True,
                ssl_context=self._ssl_context,
                standard_compatible=False,
            )
        except STREAM_ERRORS as exc:
            logger.info("TLS handshake failed: %s", exc)
            return False
        return True

    def _leave(self) -> None:
        self.connected = False
        self._exchange.leave(self.peer)

    async def _read(self) -> None:
        reader = PacketReader()
        while not self._wire.closed:
            try:
                data = await self._stream.receive(_CHUNK_BYTES)
                await self._faults.wait_resumed()
                reader.feed(self._wire.receive(data))
                if answer := self._wire.answer():
                    self._queue(answer)
                    await self._slow_clients.wait(self)
                complete = False  # an incomplete packet does not extend the idle timeout
                while (packet := reader.next_packet()) is not None:
                    if self._faults.throttled and isinstance(packet, _REQUESTS):
                        self._scope.deadline = math.inf  # a client that waits is not idle
                        await self._faults.wait_turn()
                    if not await self._handle(packet):
                        return
                    complete = True
                    await self._faults.wait_resumed()
                    if self._slow_clients.clients:
                        await self._slow_clients.wait(self)
                if complete:
                    self._scope.deadline = current_time() + IDLE_TIMEOUT_SECONDS
            except (MalformedPacketError, *STREAM_ERRORS):
                return

    def _send(self, kind: Kind, data: bytes) -> None:
        if kind == "message":
            self._stats.count("send.pub")
        if not (self._faults.withheld and self._faults.take(self._send, kind, data)):
            self._queue(self._wire.wrap(data))

    def _queue(self, data: bytes) -> None:
        self._outbox.put(data)
        if self._outbox.queued > HIGH_WATER_BYTES:
            self._slow_clients.add(self)

    async def wait_for_space(self, publisher: Client | None) -> None:
        """
        Wait until the queue of this client has shrunk.

        Like Emitter, publishers wait for a slow client as long as it reads anything. A client that
        reads nothing for a second is disconnected, unless it is the publisher itself: it then has
        until the idle timeout.
        """
        idle = 0
        outbox = self._outbox
        while outbox.queued > HIGH_WATER_BYTES and not self._closed.is_set():
            written = outbox.written
            # Require ten idle periods in a row, because a busy event loop delays the writes, too.
            with move_on_after(STALL_TIMEOUT_SECONDS / 10):
                await outbox.wait_progress()
            idle = 0 if outbox.written > written or self is publisher else idle + 1
            if idle == 10:
                logger.warning("disconnected client %s: it stopped reading", self.id)
                self.cut()
                await self._closed.wait()

    async def _handle(self, packet: Packet) -> bool:
        """Handle a packet, and return whether the connection stays open."""
        self._stats.count(_METRICS[type(packet)])
        match packet:
            case Connect():
                return self._connect(packet)
            case _ if not self.connected:
                return False
            case Publish():
                try:
                    await handle_publish(self._exchange, self.peer, packet)
                except RefusedError as refusal:
                    self._refuse(refusal, packet.packet_id)
                if packet.qos:
                    self._send("puback", PubAck(packet.packet_id).encode())
            case Subscribe():
                codes = []
                for topic, qos in packet.filters:
                    codes.append(await self._subscribe(packet.packet_id, topic, qos))
                    # Bound the queue: wait for the replay of this filter before the next one.
                    await self._slow_clients.wait(self)
                self._send("suback", SubAck(packet.packet_id, tuple(codes)).encode())
            case Unsubscribe():
                for topic in packet.filters:
                    try:
                        self._exchange.unsubscribe(self.peer, topic)
                    except RefusedError as refusal:
                        self._refuse(refusal, packet.packet_id)
                self._send("unsuback", UnsubAck(packet.packet_id).encode())
            case PingReq():
                self._send("pingresp", PingResp().encode())
            case PubAck() | PubRec() | PubRel() | PubComp():
                pass
            case _:  # DISCONNECT, or a packet that only a broker may send
                return False
        return True

    def _connect(self, packet: Connect) -> bool:
        # Like Emitter, accept a second CONNECT.
        refusal = self._faults.refusal
        self.client_id = packet.client_id
        self.peer.set_identity(packet.username or "", None if refusal else packet.will)
        self.connected = not refusal
        self._send("connack", ConnAck(refusal).encode())
        return self.connected

    async def _subscribe(self, packet_id: int, topic: str, qos: int) -> int:
        try:
            await self._exchange.subscribe(self.peer, topic)
        except RefusedError as refusal:
            self._refuse(refusal, packet_id)
            return 128
        return qos

    def _refuse(self, refusal: RefusedError, packet_id: int) -> None:
        reply = {"status": refusal.status, "message": refusal.message}
        if packet_id:
            reply = {"req": packet_id, **reply}
        deliver((self.peer,), "error", "emitter/error/", to_json(reply))
