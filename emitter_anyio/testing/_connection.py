"""One client's link: what it sends is worked off in order, what it gets goes to its outbox."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
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
from ._wire import Wire

if TYPE_CHECKING:
    from ._exchange import Exchange

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


class Diversion:
    """Packets that a test keeps from being sent."""

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self.kinds = kinds
        self.kept: list[tuple[Client, Kind, bytes]] = []

    def release(self) -> None:
        """Send them after all."""
        for client, kind, data in self.kept:
            client.send(kind, data)


class Traffic:
    """
    What the links of a broker share: who cannot keep up, and the faults that a test wants.

    :param crowded: who cannot keep up, for the nodes of a cluster together
    """

    def __init__(self, crowded: set[Client] | None = None) -> None:
        self.crowded: set[Client] = set() if crowded is None else crowded
        self.refusal = 0
        self.diversions: list[Diversion] = []
        self._going_on: Event | None = None  # while the broker is paused

    def pause(self) -> None:
        """Take nothing more of what clients send."""
        if self._going_on is None:
            self._going_on = Event()

    def resume(self) -> None:
        """Go on."""
        if self._going_on is not None:
            self._going_on.set()
            self._going_on = None

    async def go_on(self) -> None:
        """Wait while the broker is paused."""
        while self._going_on is not None:
            await self._going_on.wait()

    @contextmanager
    def divert(self, diversion: Diversion) -> Iterator[None]:
        """Put aside what would be sent; of two diversions the later gets it."""
        self.diversions.insert(0, diversion)
        try:
            yield
        finally:
            self.diversions.remove(diversion)

    async def relieve(self, publisher: Client | None = None) -> None:
        """Wait until those who were just sent too much can take more."""
        while self.crowded:
            await self.crowded.pop().wait_for_room(publisher)


class Client(Peer):
    """
    A client that is connected to a :class:`Broker`.

    :ivar id: the connection's id, as ``me`` and presence tell it
    :ivar client_id: what the client calls itself
    :ivar username: what presence shows of it, or ``""``
    """

    def __init__(
        self,
        exchange: Exchange,
        traffic: Traffic,
        stream: ByteStream,
        *,
        ssl_context: ssl.SSLContext | None = None,
        coalesce: bool = False,
    ) -> None:
        super().__init__(exchange.name, next(exchange.numbers))
        self.client_id: str = ""
        self.connected: bool = False
        self._exchange = exchange
        self._traffic = traffic
        self._stream = stream
        self._ssl_context = ssl_context
        self._wire = Wire()
        self._outbox = Outbox(coalesce, HIGH_WATER)
        self._scope = CancelScope()
        self._closed = Event()

    @property
    def subscriptions(self) -> list[str]:
        """The channels it is subscribed to, a group's with ``$share/…/``, oldest first."""
        return list(self.subscribed.values())

    async def wait_closed(self) -> None:
        """Wait until the link is closed, and all that it had is given back."""
        await self._closed.wait()

    def cut(self) -> None:
        """Close the link now, whatever is still queued."""
        self._scope.cancel()

    def send(self, kind: Kind, data: bytes) -> None:
        for diversion in self._traffic.diversions:
            if kind in diversion.kinds:
                diversion.kept.append((self, kind, data))
                return
        self._put(self._wire.wrap(data))

    async def serve(self) -> None:
        """Serve the link until one side closes it."""
        try:
            with self._scope:
                self._scope.deadline = current_time() + SILENCE
                await self._traffic.go_on()
                if not await self._begin():
                    return
                async with create_task_group() as task_group:
                    task_group.start_soon(self._outbox.write, self._stream)
                    await self._read()
                    await self._traffic.go_on()
                    self._leave()
                    self._scope.deadline = current_time() + LINGER
                    self._outbox.close()
        finally:
            try:
                self._leave()
            finally:
                with CancelScope(shield=True):
                    await aclose_forcefully(self._stream)
                self._outbox.progress.set()
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
        self._exchange.leave(self)

    async def _read(self) -> None:
        reader = PacketReader()
        while not self._wire.closed:
            try:
                data = await self._stream.receive(_CHUNK)
                await self._traffic.go_on()
                reader.feed(self._wire.receive(data))
                if answer := self._wire.answer():
                    self._put(answer)
                    await self._traffic.relieve(self)
                whole = False  # half a packet does not break the silence
                while (packet := reader.next_packet()) is not None:
                    if not await self._take(packet):
                        return
                    whole = True
                    await self._traffic.go_on()
                    if self._traffic.crowded:
                        await self._traffic.relieve(self)
                if whole:
                    self._scope.deadline = current_time() + SILENCE
            except (MalformedPacketError, *ENDED):
                return

    def _put(self, data: bytes) -> None:
        self._outbox.put(data)
        if self._outbox.queued > HIGH_WATER:
            self._traffic.crowded.add(self)

    async def wait_for_room(self, publisher: Client | None) -> None:
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
                await outbox.progress.wait()
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
                    await self._exchange.publish(self, packet)
                except RefusedError as refusal:
                    self._refuse(refusal, packet.packet_id)
                if packet.qos:
                    self.send("puback", PubAck(packet.packet_id).encode())
            case Subscribe():
                codes = []
                for topic, qos in packet.filters:
                    codes.append(await self._subscribe(packet.packet_id, topic, qos))
                    # What one filter replays must be on its way before the next one is.
                    await self._traffic.relieve(self)
                self.send("suback", SubAck(packet.packet_id, tuple(codes)).encode())
            case Unsubscribe():
                for topic in packet.filters:
                    try:
                        self._exchange.unsubscribe(self, topic)
                    except RefusedError as refusal:
                        self._refuse(refusal, packet.packet_id)
                self.send("unsuback", UnsubAck(packet.packet_id).encode())
            case PingReq():
                self.send("pingresp", PingResp().encode())
            case PubAck() | PubRec() | PubRel() | PubComp():
                pass
            case _:  # DISCONNECT, or what only a broker may send
                return False
        return True

    def _connect(self, packet: Connect) -> bool:
        # a second CONNECT is taken like the first
        refusal = self._traffic.refusal
        self.client_id = packet.client_id
        self.introduce(packet.username or "", None if refusal else packet.will)
        self.connected = not refusal
        self.send("connack", ConnAck(refusal).encode())
        return self.connected

    async def _subscribe(self, packet_id: int, topic: str, qos: int) -> int:
        try:
            await self._exchange.subscribe(self, topic)
        except RefusedError as refusal:
            self._refuse(refusal, packet_id)
            return 128
        return qos

    def _refuse(self, refusal: RefusedError, packet_id: int) -> None:
        said = {"status": refusal.status, "message": refusal.message}
        if packet_id:
            said = {"req": packet_id, **said}
        deliver((self,), "error", "emitter/error/", to_json(said))
