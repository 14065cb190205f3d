"""Initial inputs for the fuzzer, most of them recorded from real brokers."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emitter_anyio._values import snappy
from tests.support import packets
from tests.support.stats import RECORDED as SNAPSHOT

RECORDED = Path(__file__).parent.parent / "broker" / "conversations"

_OPERATIONS = ("keygen", "keyban", "link", "me", "presence", "history", "error")


def recorded() -> Iterator[list[dict[str, Any]]]:
    """Yield the broker's packets on each connection of each recorded conversation."""
    for path in sorted(RECORDED.glob("*.json")):
        by_client: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for step in json.loads(path.read_text())["steps"]:
            for client, received in step.get("receives", {}).items():
                by_client[client] += received
        yield from by_client.values()


def conversations() -> Iterator[bytes]:
    """Yield recorded conversations as inputs of ``codec``, whole and in pieces of 5 bytes."""
    for connection in recorded():
        wire = b"".join(map(_encode, connection))
        yield b"\0" + wire
        yield b"\x14" + wire


def answers() -> Iterator[bytes]:
    """Yield recorded answers to outstanding requests, with their numbers and with absurd ones."""
    recorded_answers = {
        (packet["topic"].split("/")[1], _payload(packet))
        for connection in recorded()
        for packet in connection
        if packet["type"] == "publish" and packet["topic"].startswith("emitter/")
    }
    for operation, payload in sorted(recorded_answers):
        number = _OPERATIONS.index(operation) if operation in _OPERATIONS else len(_OPERATIONS)
        answer = json.loads(payload)
        absurd = {name: 10**30 for name in answer if isinstance(answer[name], int)}
        replaced = {name: answer[name] for name in ("req", "status") if name in answer}
        if "req" in answer:
            # The seven requests have ids 1 to 7; a refusal is for the publish after them.
            replaced["req"] = 8 if operation == "error" else number + 1
        for changed in ({}, absurd):
            line = json.dumps({**answer, **changed, **replaced}, separators=(",", ":"))
            yield bytes((number,)) + line.encode()


def frames() -> Iterator[bytes]:
    """Yield frames of every kind, in one piece and in small pieces."""
    whole = [frame(2, b"MQTT"), frame(9, b"ping"), frame(10, b""), frame(8, b"\x03\xe8bye")]
    parts = [frame(2, b"MQ", final=False), frame(9, b"?"), frame(0, b"TT")]
    bad = [frame(1, b"text"), frame(2, bytes(2000)), frame(3, b""), frame(9, bytes(126))]
    for wire in (*whole, *bad, b"".join(parts), b"".join([*parts, *whole])):
        yield b"\0" + wire
        yield b"\3" + wire


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """Build a frame as a server sends it."""
    size = len(payload)
    head = bytes((opcode | (0x80 if final else 0), min(126, size)))
    return head + (b"" if size < 126 else size.to_bytes(2, "big")) + payload


def handshakes() -> Iterator[bytes]:
    """Yield servers' answers to a handshake; none can match its random key."""
    upgraded = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    yield upgraded + b"Sec-WebSocket-Accept: AAAA\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n\x82\0"
    yield b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot here\n"
    yield b"HTTP/1.1 302 Found\r\nLocation: wss://elsewhere/?secret\r\n\r\n"
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    yield b"\x15\x03\x03\0\2\2\x46"
    yield b"\x20\2\0\0"


def urls() -> Iterator[bytes]:
    """Yield URLs of every scheme, with a newline where a password is inserted."""
    yield from (
        *(b"mqtt://h", b"mqtts://h:8443/", b"mqtt://[::1]:8080", b"unix:///tmp/a%20b"),
        *(b"mqtt://ann\nh:8080", b"mqtts://ann%40x\n[::1]", b"mqtt://ann\nh:x", b"http://ann\nh"),
        *(b"mqtt://ann\nh/chat/", b"mqtt://ann\n[::1", b"unix://ann\nh/x", b"mqtt://\n"),
    )


def _encode(packet: dict[str, Any]) -> bytes:
    match packet["type"]:
        case "connack":
            return packets.connack(packet["code"])
        case "puback":
            return packets.puback(packet["id"])
        case "suback":
            return packets.suback(packet["id"], *packet["codes"])
        case "unsuback":
            return packets.unsuback(packet["id"])
        case "pingresp":
            return packets.PINGRESP
        case "publish":
            # The broker delivers at QoS 0 only.
            return packets.publish(packet["topic"], _payload(packet), flags=packet.get("flags", 0))
    raise ValueError(packet["type"])


def _payload(packet: dict[str, Any]) -> bytes:
    if "json" in packet:
        return json.dumps(_plain(packet["json"]), separators=(",", ":")).encode()
    if "base64" in packet:
        return base64.b64decode(packet["base64"])
    return str(packet["text"]).encode()


def _plain(value: Any) -> Any:
    """Replace the placeholders for values that differ between conversations."""
    match value:
        case {"$time": _}:
            return 1600000000
        case {"$capture": str(name)} | {"$ref": str(name)} | {"$any": str(name)}:
            # 32 characters serve both as a key and as the id of a stored message.
            return (name * 32)[:32]
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case list():
            return [_plain(each) for each in value]
    return value


def snapshots() -> Iterator[bytes]:
    """Yield a recorded snapshot of a node's figures, compressed and decompressed."""
    yield SNAPSHOT
    yield snappy.decode(SNAPSHOT)
