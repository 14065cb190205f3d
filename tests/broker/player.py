"""A client of MQTT packets, and a player of conversations recorded from an Emitter broker.

Nothing waits for time. PINGREQ is a barrier: the broker handles packets in order, so everything
that it sends because of earlier packets arrives before PINGRESP. ``wait`` advances the broker's
clock.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from emitter_anyio.testing._packets import (
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PacketReader,
    PingReq,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
    Will,
)

if TYPE_CHECKING:
    from emitter_anyio.testing import Broker
    from emitter_anyio.testing._connection import Client


class PacketConnection:
    """The client's end of a connection, which sends and receives packets."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.closed = False
        self._reader = PacketReader()

    @classmethod
    async def open(cls, broker: Broker) -> PacketConnection:
        return cls(await anyio.connect_tcp(broker.host, broker.port))

    @classmethod
    async def connect(cls, broker: Broker, client_id: str = "") -> PacketConnection:
        connection = await cls.open(broker)
        assert await connection.ask(Connect(client_id)) == [ConnAck()]
        return connection

    async def send(self, *packets: Packet) -> None:
        """Send packets. If the broker has closed the connection, only reading shows it."""
        with suppress(anyio.BrokenResourceError):
            await self.stream.send(b"".join(packet.encode() for packet in packets))

    async def receive(self) -> Packet | None:
        """Return the next packet, or ``None`` if the broker has closed the connection."""
        while (packet := self._reader.next_packet()) is None:
            try:
                self._reader.feed(await self.stream.receive())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                self.closed = True
                return None
        return packet

    async def read_to_end(self) -> list[Packet]:
        """Return all packets until the connection ends."""
        packets = []
        while (packet := await self.receive()) is not None:
            packets.append(packet)
        return packets

    async def ask(self, *packets: Packet) -> list[Packet]:
        """Send packets and a ping, and return the packets before the reply to the ping."""
        await self.send(*packets, PingReq())
        answers: list[Packet] = []
        while (packet := await self.receive()) is not None and not isinstance(packet, PingResp):
            answers.append(packet)
        return answers

    async def request(self, topic: str, **fields: Any) -> dict[str, Any]:
        """Send a request to a topic under ``emitter/``, and return the JSON of the reply."""
        payload = json.dumps(fields).encode()
        answer, ack = await self.ask(Publish(f"emitter/{topic}/", payload, 1, 9))
        assert ack == PubAck(9)
        assert isinstance(answer, Publish)
        reply: dict[str, Any] = json.loads(answer.payload)
        return reply


class Player:
    """
    Plays a conversation and compares every packet.

    ``conversations/README.md`` describes the format.

    :param open_connection: a function that opens a connection to the broker
    """

    def __init__(
        self, broker: Broker, open_connection: Callable[[Broker], Awaitable[PacketConnection]]
    ) -> None:
        self._broker = broker
        self._open = open_connection
        self._ahead = 0.0
        self._known = {"secret": broker.secret_key, "run": secrets.token_hex(4)}
        self._connections: dict[str, PacketConnection] = {}
        self._clients: dict[str, Client] = {}  # the broker's ends of these connections

    async def play(self, script: dict[str, Any]) -> None:
        try:
            for number, step in enumerate(script["steps"], 1):
                got = await self._do(step)
                for name in got.keys() | step.get("receives", {}).keys():
                    wanted, came = step.get("receives", {}).get(name, []), got.get(name, [])
                    same = self._same_in_any_order if step.get("unordered") else self._same
                    assert same(wanted, came), f"step {number}: {name} wants {wanted}, got {came}"
                closed = {
                    name for name, connection in self._connections.items() if connection.closed
                }
                assert closed == set(step.get("closes", [])), f"step {number}: closed {closed}"
                for name in closed:
                    await self._connections.pop(name).stream.aclose()
        finally:
            for connection in self._connections.values():
                await anyio.aclose_forcefully(connection.stream)

    async def _do(self, step: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        who, do = step.get("client", ""), step["do"]
        got: dict[str, list[Packet]] = {}
        if do == "wait":
            self._broker.advance(step["seconds"])
            self._ahead += step["seconds"]
        elif do == "drop":
            await self._connections.pop(who).stream.aclose()
            await self._clients[
                who
            ].wait_closed()  # the other clients receive the effects after this
        else:
            if who not in self._connections:
                self._connections[who] = await self._open(self._broker)
            connection = self._connections[who]
            if do == "open":
                got[who] = []
            elif do == "disconnect":
                await connection.send(Disconnect())
                got[who] = await connection.read_to_end()
            elif do == "ping":  # a barrier by itself
                got[who] = [*await connection.ask(), PingResp()]
            else:
                got[who] = await connection.ask(encode(self._filled(step)))
            if do == "connect":
                self._clients[who] = self._broker.clients[-1]
        for name, connection in self._connections.items():
            if not connection.closed and do != "open":
                got.setdefault(name, []).extend(await connection.ask())
        return {name: [decode(packet) for packet in packets] for name, packets in got.items()}

    def _filled(self, value: Any) -> Any:
        """Replace names by captured values."""
        if isinstance(value, str):
            return re.sub(r"\$\{(\w+)\}", lambda match: self._known[match[1]], value)
        if isinstance(value, list):
            return [self._filled(each) for each in value]
        if isinstance(value, dict):
            return {name: self._filled(each) for name, each in value.items()}
        return value

    def _same(self, wanted: Any, got: Any) -> bool:
        """Return whether a value matches the recorded one, and capture values."""
        match wanted:
            case {"$capture": name}:
                self._known[name] = got
                return isinstance(got, str) and got != ""
            case {"$ref": name}:
                return bool(self._known.get(name) == got)
            case {"$time": _}:
                return isinstance(got, int) and abs(got - time.time() - self._ahead) < 10
            case {"$any": _}:
                return got is not None
            case dict():
                return (
                    isinstance(got, dict)
                    and wanted.keys() == got.keys()
                    and all(self._same(wanted[name], got[name]) for name in wanted)
                )
            case list():
                return (
                    isinstance(got, list)
                    and len(wanted) == len(got)
                    and all(map(self._same, wanted, got))
                )
            case str():
                return bool(self._filled(wanted) == got)
        return bool(wanted == got)

    def _same_in_any_order(self, wanted: list[Any], got: list[Any]) -> bool:
        left = list(got)
        for packet in wanted:
            known = self._known.copy()
            for candidate in left:
                if self._same(packet, candidate):
                    left.remove(candidate)
                    break
                self._known = known.copy()
            else:
                return False
        return not left


def encode(step: dict[str, Any]) -> Packet:
    """Return the packet that a step sends."""
    match step["do"]:
        case "connect":
            will = step.get("will")
            password = step.get("password")
            return Connect(
                step.get("client_id", ""),
                step.get("username"),
                None if password is None else password.encode(),
                will
                and Will(will["topic"], will["payload"].encode(), 0, will.get("retain", False)),
            )
        case "publish":
            payload = step.get("text", "").encode() * step.get("times", 1)
            if "json" in step:
                payload = json.dumps(step["json"]).encode()
            elif "base64" in step:
                payload = base64.b64decode(step["base64"])
            qos, retain = step.get("qos", 0), step.get("retain", False)
            return Publish(step["topic"], payload, qos, step.get("id", 0), retain)
        case "subscribe":
            qos = step.get("qos", 0)
            return Subscribe(step["id"], tuple((topic, qos) for topic in step["topics"]))
        case "unsubscribe":
            return Unsubscribe(step["id"], tuple(step["topics"]))
    raise ValueError(step["do"])


def decode(packet: Packet) -> dict[str, Any]:
    """Return a packet in the format of the recordings."""
    match packet:
        case ConnAck(code):
            return {"type": "connack", "code": code}
        case PubAck(packet_id):
            return {"type": "puback", "id": packet_id}
        case SubAck(packet_id, codes):
            return {"type": "suback", "id": packet_id, "codes": list(codes)}
        case UnsubAck(packet_id):
            return {"type": "unsuback", "id": packet_id}
        case PingResp():
            return {"type": "pingresp"}
        case Publish(topic, payload, qos, packet_id, retain, dup):
            fields: dict[str, Any] = {"type": "publish", "topic": topic}
            if flags := dup << 3 | qos << 1 | retain:
                fields["flags"] = flags
            if qos:
                fields["id"] = packet_id
            try:
                if topic.startswith("emitter/"):
                    return {**fields, "json": json.loads(payload)}
                return {**fields, "text": payload.decode()}
            except ValueError:
                return {**fields, "base64": base64.b64encode(payload).decode()}
    raise ValueError(f"a broker does not send {packet}")


class MemoryStream(ByteStream):
    """One end of a connection in memory, which buffers four chunks in each direction."""

    def __init__(
        self, send: MemoryObjectSendStream[bytes], receive: MemoryObjectReceiveStream[bytes]
    ) -> None:
        self._send = send
        self._receive = receive

    @classmethod
    def pair(cls) -> tuple[MemoryStream, MemoryStream]:
        there, back = (anyio.create_memory_object_stream[bytes](4) for _ in range(2))
        return cls(there[0], back[1]), cls(back[0], there[1])

    async def send(self, item: bytes) -> None:
        await self._send.send(item)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self._receive.receive()

    async def send_eof(self) -> None:
        self._send.close()
        await checkpoint()

    def break_receiving(self) -> None:
        """Make sends to this end fail, but keep the other direction."""
        self._receive.close()

    async def aclose(self) -> None:
        self._send.close()
        self._receive.close()
        await checkpoint()
