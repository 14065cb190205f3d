"""What a fuzzer begins with: what real brokers have said, and URLs."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import packets

RECORDED = Path(__file__).parent.parent / "broker" / "conversations"

_OPERATIONS = ("keygen", "keyban", "link", "me", "presence", "history", "error")


def recorded() -> Iterator[list[dict[str, Any]]]:
    """What the broker has said on each link of each recorded conversation."""
    for path in sorted(RECORDED.glob("*.json")):
        said: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for step in json.loads(path.read_text())["steps"]:
            for client, received in step.get("receives", {}).items():
                said[client] += received
        yield from said.values()


def conversations() -> Iterator[bytes]:
    """Recorded conversations as the codec is fed them, at once and in pieces of 5 bytes."""
    for said in recorded():
        wire = b"".join(map(_encode, said))
        yield b"\0" + wire
        yield b"\x14" + wire


def answers() -> Iterator[bytes]:
    """What was answered in them, to what is outstanding, and the same with absurd numbers."""
    said = {
        (packet["topic"].split("/")[1], _payload(packet))
        for link in recorded()
        for packet in link
        if packet["type"] == "publish" and packet["topic"].startswith("emitter/")
    }
    for operation, payload in sorted(said):
        number = _OPERATIONS.index(operation) if operation in _OPERATIONS else len(_OPERATIONS)
        answer = json.loads(payload)
        absurd = {name: 10**30 for name in answer if isinstance(answer[name], int)}
        asked = {name: answer[name] for name in ("req", "status") if name in answer}
        if "req" in answer:
            # The requests have the first ids; a refusal is of the publish behind all seven.
            asked["req"] = 8 if operation == "error" else number + 1
        for more in ({}, absurd):
            line = json.dumps({**answer, **more, **asked}, separators=(",", ":"))
            yield bytes((number,)) + line.encode()


def frames() -> Iterator[bytes]:
    """Frames of every kind, in one piece and in small ones."""
    whole = [frame(2, b"MQTT"), frame(9, b"ping"), frame(10, b""), frame(8, b"\x03\xe8bye")]
    parts = [frame(2, b"MQ", final=False), frame(9, b"?"), frame(0, b"TT")]
    bad = [frame(1, b"text"), frame(2, bytes(2000)), frame(3, b""), frame(9, bytes(126))]
    for wire in (*whole, *bad, b"".join(parts), b"".join([*parts, *whole])):
        yield b"\0" + wire
        yield b"\3" + wire


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """A frame as a server sends it."""
    size = len(payload)
    head = bytes((opcode | (0x80 if final else 0), min(126, size)))
    return head + (b"" if size < 126 else size.to_bytes(2, "big")) + payload


def handshakes() -> Iterator[bytes]:
    """Answers of servers to a handshake, none of which can know its key."""
    upgraded = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    yield upgraded + b"Sec-WebSocket-Accept: AAAA\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n\x82\0"
    yield b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot here\n"
    yield b"HTTP/1.1 302 Found\r\nLocation: wss://elsewhere/?secret\r\n\r\n"
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    yield b"\x15\x03\x03\0\2\2\x46"
    yield b"\x20\2\0\0"


def urls() -> Iterator[bytes]:
    """URLs of every scheme, the places for a password marked by the end of a line."""
    yield from (
        *(b"mqtt://h", b"mqtts://h:8443/", b"mqtt://[::1]:8080", b"unix:///tmp/a%20b"),
        *(b"mqtt://ann\nh:8080", b"mqtts://ann%40x\n[::1]", b"mqtt://ann\nh:x", b"http://ann\nh"),
        *(b"mqtt://ann\nh/chat/", b"mqtt://ann\n[::1", b"unix://ann\nh/x", b"mqtt://\n"),
    )


def _encode(said: dict[str, Any]) -> bytes:
    match said["type"]:
        case "connack":
            return packets.connack(said["code"])
        case "puback":
            return packets.puback(said["id"])
        case "suback":
            return packets.suback(said["id"], *said["codes"])
        case "unsuback":
            return packets.unsuback(said["id"])
        case "pingresp":
            return packets.PINGRESP
        case "publish":
            # None was recorded above QoS 0: the broker delivers at no other.
            return packets.publish(said["topic"], _payload(said), flags=said.get("flags", 0))
    raise ValueError(said["type"])


def _payload(said: dict[str, Any]) -> bytes:
    if "json" in said:
        return json.dumps(_plain(said["json"]), separators=(",", ":")).encode()
    if "base64" in said:
        return base64.b64decode(said["base64"])
    return str(said["text"]).encode()


def _plain(value: Any) -> Any:
    """Put something in the place of what was new in each conversation."""
    match value:
        case {"$time": _}:
            return 1600000000
        case {"$capture": str(name)} | {"$ref": str(name)} | {"$any": str(name)}:
            # An id of a stored message has to be base64 of 16 bytes, and does for a key as well.
            return (name * 32)[:32]
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case list():
            return [_plain(each) for each in value]
    return value
