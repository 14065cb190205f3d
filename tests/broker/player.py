"""A raw MQTT client, and the player of conversations that were recorded from a real Emitter.

Nothing here waits by the clock. A PINGREQ is the barrier: the broker works off a link in order, so
what is not there before the PINGRESP will not come. A ``wait`` puts the broker's clock forward.
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


class Link:
    """A client's end of a link, spoken to in packets."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.closed = False
        self._reader = PacketReader()

    @classmethod
    async def open(cls, broker: Broker) -> Link:
        return cls(await anyio.connect_tcp(broker.host, broker.port))

    @classmethod
    async def connect(cls, broker: Broker, client_id: str = "") -> Link:
        link = await cls.open(broker)
        assert await link.ask(Connect(client_id)) == [ConnAck()]
        return link

    async def send(self, *packets: Packet) -> None:
        """Send packets; that the broker has closed the link is seen by reading."""
        with suppress(anyio.BrokenResourceError):
            await self.stream.send(b"".join(packet.encode() for packet in packets))

    async def receive(self) -> Packet | None:
        """Give the next packet, or ``None`` when the broker has closed the link."""
        while (packet := self._reader.next_packet()) is None:
            try:
                self._reader.feed(await self.stream.receive())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                self.closed = True
                return None
        return packet

    async def read_to_end(self) -> list[Packet]:
        """Give all packets up to the end of the link."""
        packets = []
        while (packet := await self.receive()) is not None:
            packets.append(packet)
        return packets

    async def ask(self, *packets: Packet) -> list[Packet]:
        """Send packets, and give all that comes before the answer to a ping behind them."""
        await self.send(*packets, PingReq())
        answers: list[Packet] = []
        while (packet := await self.receive()) is not None and not isinstance(packet, PingResp):
            answers.append(packet)
        return answers

    async def request(self, topic: str, **fields: Any) -> dict[str, Any]:
        """Ask for something under ``emitter/``, and give the answer's JSON."""
        payload = json.dumps(fields).encode()
        answer, ack = await self.ask(Publish(f"emitter/{topic}/", payload, 1, 9))
        assert ack == PubAck(9)
        assert isinstance(answer, Publish)
        said: dict[str, Any] = json.loads(answer.payload)
        return said


class Player:
    """
    Plays one conversation, and compares every packet.

    How one is written, ``conversations/README.md`` says.

    :param dial: makes each link to the broker
    """

    def __init__(self, broker: Broker, dial: Callable[[Broker], Awaitable[Link]]) -> None:
        self._broker = broker
        self._dial = dial
        self._ahead = 0.0
        self._known = {"secret": broker.secret_key, "run": secrets.token_hex(4)}
        self._links: dict[str, Link] = {}
        self._served: dict[str, Client] = {}  # the broker's ends of these links

    async def play(self, script: dict[str, Any]) -> None:
        try:
            for number, step in enumerate(script["steps"], 1):
                got = await self._do(step)
                for name in got.keys() | step.get("receives", {}).keys():
                    wanted, came = step.get("receives", {}).get(name, []), got.get(name, [])
                    same = self._same_in_any_order if step.get("unordered") else self._same
                    assert same(wanted, came), f"step {number}: {name} wants {wanted}, got {came}"
                closed = {name for name, link in self._links.items() if link.closed}
                assert closed == set(step.get("closes", [])), f"step {number}: closed {closed}"
                for name in closed:
                    await self._links.pop(name).stream.aclose()
        finally:
            for link in self._links.values():
                await anyio.aclose_forcefully(link.stream)

    async def _do(self, step: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        who, do = step.get("client", ""), step["do"]
        got: dict[str, list[Packet]] = {}
        if do == "wait":
            self._broker.advance(step["seconds"])
            self._ahead += step["seconds"]
        elif do == "drop":
            await self._links.pop(who).stream.aclose()
            await self._served[who].wait_closed()  # only the broker knows when it has noticed
        else:
            if who not in self._links:
                self._links[who] = await self._dial(self._broker)
            link = self._links[who]
            if do == "open":
                got[who] = []
            elif do == "disconnect":
                await link.send(Disconnect())
                got[who] = await link.read_to_end()
            elif do == "ping":  # a barrier by itself
                got[who] = [*await link.ask(), PingResp()]
            else:
                got[who] = await link.ask(encode(self._filled(step)))
            if do == "connect":
                self._served[who] = self._broker.clients[-1]
        for name, link in self._links.items():
            if not link.closed and do != "open":
                got.setdefault(name, []).extend(await link.ask())
        return {name: [decode(packet) for packet in packets] for name, packets in got.items()}

    def _filled(self, value: Any) -> Any:
        """Put what was captured into what is about to be sent."""
        if isinstance(value, str):
            return re.sub(r"\$\{(\w+)\}", lambda match: self._known[match[1]], value)
        if isinstance(value, list):
            return [self._filled(each) for each in value]
        if isinstance(value, dict):
            return {name: self._filled(each) for name, each in value.items()}
        return value

    def _same(self, wanted: Any, got: Any) -> bool:
        """Compare what was recorded with what came."""
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
    """Make the packet that a step sends."""
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
    """Write a packet as the recordings do."""
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
            said: dict[str, Any] = {"type": "publish", "topic": topic}
            if flags := dup << 3 | qos << 1 | retain:
                said["flags"] = flags
            if qos:
                said["id"] = packet_id
            try:
                if topic.startswith("emitter/"):
                    return {**said, "json": json.loads(payload)}
                return {**said, "text": payload.decode()}
            except ValueError:
                return {**said, "base64": base64.b64encode(payload).decode()}
    raise ValueError(f"a broker does not send {packet}")


class MemoryStream(ByteStream):
    """One end of a link in memory, which holds a few pieces at a time."""

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

    def take_no_more(self) -> None:
        """Fail whoever sends to this end; what this end sends goes on."""
        self._receive.close()

    async def aclose(self) -> None:
        self._send.close()
        self._receive.close()
        await checkpoint()
