"""One client's link: what it sends is worked off in order, what it gets goes to its outbox."""

from __future__ import annotations

import logging
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

from ._outbox import ENDED, Outbox
from ._packets import (
    ConnAck,
    Connect,
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

SILENCE = 120.0
"""Seconds without a packet after which Emitter closes a link (``internal/broker/conn.go``)."""
HIGH_WATER = 1024 * 1024
"""Bytes queued for one client from which on those who publish to it wait for it."""
PATIENCE = 1.0
"""Seconds that they wait for a client that takes nothing at all; then it is cut."""
LINGER = 1.0
"""Seconds in which a client that left may still take what was queued for it."""
_CHUNK = 65536

logger = logging.getLogger("emitter_anyio.testing")


class Crowd:
    """
    The clients that cannot keep up, of all nodes of a cluster: whoever publishes waits for them.

    :ivar clients: those that nothing waits for yet
    """

    def __init__(self) -> None:
        self.clients: set[Client] = set()

    def add(self, client: Client) -> None:
        """Add a client that was just sent too much."""
        self.clients.add(client)

    async def relieve(self, publisher: Client | None = None) -> None:
        """Wait until those that were just sent too much can take more."""
        while self.clients:
            await self.clients.pop().wait_for_space(publisher)


class Client:
    """
    A client that is connected to a :class:`Broker`.

    :ivar client_id: what the client calls itself
    """

    def __init__(
        self,
        exchange: Exchange,
        faults: Faults,
        crowd: Crowd,
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
        self._crowd = crowd
        self._stream = stream
        self._ssl_context = ssl_context
        self._wire = Wire()
        self._outbox = Outbox(coalesce, HIGH_WATER)
        self._scope = CancelScope()
        self._closed = Event()

    @property
    def id(self) -> str:
        """The connection's id, as ``me`` and presence give it."""
        return self.peer.id

    @property
    def username(self) -> str:
        """What presence shows beside the id, or ``""``."""
        return self.peer.username

    @property
    def subscriptions(self) -> list[str]:
        """The channels it is subscribed to, a group's with ``$share/…/``, oldest first."""
        return self.peer.channels

    async def wait_closed(self) -> None:
        """Wait until the link is closed, and all that it had is given back."""
        await self._closed.wait()

    def cut(self) -> None:
        """Close the link now, whatever is still queued."""
        self._scope.cancel()

    async def serve(self) -> None:
        """Serve the link until one side closes it."""
        try:
            with self._scope:
                self._scope.deadline = current_time() + SILENCE
                await self._faults.wait_resumed()
                if not await self._begin():
                    return
                async with create_task_group() as task_group:
                    task_group.start_soon(self._outbox.write, self._stream)
                    await self._read()
                    await self._faults.wait_resumed()
                    self._leave()
                    self._scope.deadline = current_time() + LINGER
                    self._outbox.close()
        finally:
            try:
                self._leave()
            finally:
                with CancelScope(shield=True):
                    await aclose_forcefully(self._stream)
                self._outbox.discard()
                self._closed.set()

    async def _begin(self) -> bool:
        if self._ssl_context is None:
            return True
        try:
            self._stream = await TLSStream.wrap(
                self._stream,
                server_side=True,
                ssl_context=self._ssl_context,
                standard_compatible=False,
            )
        except ENDED as exc:
            logger.info("no TLS handshake: %s", exc)
            return False
        return True

    def _leave(self) -> None:
        self.connected = False
        self._exchange.leave(self.peer)

    async def _read(self) -> None:
        reader = PacketReader()
        while not self._wire.closed:
            try:
                data = await self._stream.receive(_CHUNK)
                await self._faults.wait_resumed()
                reader.feed(self._wire.receive(data))
                if answer := self._wire.answer():
                    self._put(answer)
                    await self._crowd.relieve(self)
                whole = False  # half a packet does not break the silence
                while (packet := reader.next_packet()) is not None:
                    if not await self._take(packet):
                        return
                    whole = True
                    await self._faults.wait_resumed()
                    if self._crowd.clients:
                        await self._crowd.relieve(self)
                if whole:
                    self._scope.deadline = current_time() + SILENCE
            except (MalformedPacketError, *ENDED):
                return

    def _send(self, kind: Kind, data: bytes) -> None:
        if not (self._faults.diversions and self._faults.keep(self._send, kind, data)):
            self._put(self._wire.wrap(data))

    def _put(self, data: bytes) -> None:
        self._outbox.put(data)
        if self._outbox.queued > HIGH_WATER:
            self._crowd.add(self)

    async def wait_for_space(self, publisher: Client | None) -> None:
        """
        Wait until this client can be sent more.

        Whoever publishes to a client waits for it as long as it takes anything, so that a flood
        goes at the pace of the slowest healthy receiver, as with the real broker. One that takes
        nothing is cut; but a client that waits for itself has its 120 seconds.
        """
        idle = 0
        outbox = self._outbox
        while outbox.queued > HIGH_WATER and not self._closed.is_set():
            written = outbox.written
            # in tenths: a loop that was busy itself must not take that for a client's silence
            with move_on_after(PATIENCE / 10):
                await outbox.wait_progress()
            idle = 0 if outbox.written > written or self is publisher else idle + 1
            if idle == 10:
                logger.warning("client %s takes nothing and is cut", self.id)
                self.cut()
                await self._closed.wait()

    async def _take(self, packet: Packet) -> bool:
        """Work off one packet, and say whether the link goes on."""
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
                    # What one filter replays must be on its way before the next one is.
                    await self._crowd.relieve(self)
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
            case _:  # DISCONNECT, or what only a broker may send
                return False
        return True

    def _connect(self, packet: Connect) -> bool:
        # a second CONNECT is taken like the first
        refusal = self._faults.refusal
        self.client_id = packet.client_id
        self.peer.introduce(packet.username or "", None if refusal else packet.will)
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
        said = {"status": refusal.status, "message": refusal.message}
        if packet_id:
            said = {"req": packet_id, **said}
        deliver((self.peer,), "error", "emitter/error/", to_json(said))
