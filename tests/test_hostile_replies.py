"""Each request ends with a value or a documented error, even after hostile replies."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from emitter_anyio import (
    ChannelKey,
    Emitter,
    EmitterError,
    EmitterMessage,
    Link,
    Me,
    PresenceStatus,
    RemoteProtocolError,
    RequestError,
)
from tests.support import packets
from tests.support.connections import connect_once
from tests.support.peer import DISCONNECT, PINGREQ, PUBLISH, Packet, Peer, tcp_peer

KEY = "k" * 32

Method = Callable[[Emitter], Awaitable[Any]]


async def read_history(emitter: Emitter) -> list[str]:
    return [message.as_string() async for message in emitter.history(KEY, "a/", 1)]


# The call, the fields of a valid reply besides req and status, and the expected result.
REQUESTS: dict[str, tuple[Method, dict[str, object], object]] = {
    "keygen": (
        lambda emitter: emitter.keygen(KEY, "a/"),
        {"key": "x" * 32, "channel": "a/"},
        ChannelKey("x" * 32, "a/"),
    ),
    "keyban": (lambda emitter: emitter.keyban(KEY, KEY), {"banned": True}, True),
    "link": (
        lambda emitter: emitter.link(KEY, "a/", "l"),
        {"name": "l", "channel": "a/"},
        Link("l", "a/"),
    ),
    "me": (lambda emitter: emitter.me(), {"id": "ME"}, Me("ME")),
    "presence": (
        lambda emitter: emitter.presence(KEY, "a/"),
        {"time": 1600000000, "event": "status", "channel": "a/", "who": []},
        (),
    ),
    "history": (
        read_history,
        {"messages": [{"id": "A" * 24 + "AAAAAAAA", "channel": "a/", "payload": "aGk="}]},
        ["hi"],
    ),
}


def unrelated_replies(
    operation: str, req: int, fields: dict[str, object]
) -> Iterator[tuple[str, bytes]]:
    """Iterate over topics and payloads of replies that do not answer the request."""
    topic = f"emitter/{operation}/"
    reply = {"req": req, "status": 200, **fields}
    for wrong in (req + 1, 0, -1, 65536, 10**30, str(req), [req], {"req": req}, True, req + 0.5):
        yield topic, json.dumps({**reply, "req": wrong}).encode()
    yield topic, json.dumps({**fields, "status": 200}).encode()
    other_operation = "me" if operation == "keygen" else "keygen"
    yield f"emitter/{other_operation}/", json.dumps(reply).encode()
    yield f"emitter/{operation}/deeper/", json.dumps(reply).encode()
    yield "emitter/", json.dumps(reply).encode()
    yield "emitter/error/", json.dumps({"status": 401, "message": "no"}).encode()
    for payload in (b"", b"\xff\xfe", b"null", b"7", b'"x"', b"[1,2]", b"{", b"[" * 60000):
        yield topic, payload
    yield topic, b'{"a":' * 12000 + b"1" + b"}" * 12000


def malformed_replies(req: int, fields: dict[str, object]) -> Iterator[bytes]:
    """Iterate over replies to the request that have values of a wrong type."""
    values: list[object] = [None, 7, [7], {"x": 1}, [[]], "\x00", 1.5, [{"id": 7}], -(10**20)]
    for name in fields:
        for value in values:
            if type(value) is not type(fields[name]):
                yield json.dumps({"req": req, "status": 200, **fields, name: value}).encode()
    statuses: list[object] = ["200", None, [200], 200.5, True, {}]
    for status in statuses:
        yield json.dumps({"req": req, **fields, "status": status}).encode()
    yield json.dumps({"req": req, "status": 401, "message": 7}).encode()


def comparable(operation: str, value: Any) -> object:
    if operation == "presence":
        assert isinstance(value, PresenceStatus)
        return value.who

    return value


async def send_reply(peer: Peer, request: Packet, fields: dict[str, object]) -> None:
    """Send a reply, a duplicate of it, the acknowledgement, and another duplicate."""
    payload = json.dumps({"req": request.packet_id, "status": 200, **fields}).encode()
    for _ in range(2):
        await peer.send(packets.publish(request.topic, payload))
    await peer.send(packets.puback(request.packet_id))
    await peer.send(packets.publish(request.topic, payload))


async def answer_further_requests(peer: Peer, operation: str) -> None:
    """Answer the second page request of ``history()``: there are no more messages."""
    if operation == "history":
        request = await peer.until(PUBLISH)
        await send_reply(peer, request, {"messages": []})


async def acknowledge_requests(peer: Peer) -> None:
    """Answer pings, and acknowledge publishes without a reply."""
    while (packet := await peer.packet()) and packet.kind != DISCONNECT:
        if packet.kind == PINGREQ:
            await peer.send(packets.packet(0xD0, b""))
        elif packet.kind == PUBLISH:
            await peer.send(packets.puback(packet.packet_id))


@pytest.mark.parametrize("operation", REQUESTS)
async def test_unrelated_replies_are_dropped(anyio_backend: object, operation: str) -> None:
    method, fields, outcome = REQUESTS[operation]
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.accept()
        request = await peer.until(PUBLISH)
        for topic, payload in unrelated_replies(operation, request.packet_id, fields):
            await peer.send(packets.publish(topic, payload))
            sent += 1
        await peer.send(packets.publish(b"emitter/\xff/", b"x"))
        await send_reply(peer, request, fields)
        await answer_further_requests(peer, operation)
        await acknowledge_requests(peer)

    async with tcp_peer(script) as port:
        emitter = connect_once(host="127.0.0.1", port=port, secure=False, max_message_size=200000)
        errors: list[Exception] = []
        emitter.on("error", errors.append)
        async with emitter:
            assert comparable(operation, await method(emitter)) == outcome
            await emitter.flush()
            # Plus the undecodable topic and the reply after each acknowledgement.
            assert emitter.statistics().nonsense == sent + 2 + (operation == "history")
            assert emitter.statistics().unhandled == 0
        # The client reports unexpected messages once per connection.
        assert [type(error) for error in errors] == [RemoteProtocolError]


@pytest.mark.parametrize("operation", REQUESTS)
async def test_malformed_reply_is_not_returned(anyio_backend: object, operation: str) -> None:
    method, fields, outcome = REQUESTS[operation]

    async def script(peer: Peer) -> None:
        await peer.accept()
        request = await peer.until(PUBLISH)
        replies = list(malformed_replies(request.packet_id, fields))
        assert len(replies) > 10
        for payload in replies:
            await peer.send(packets.publish(request.topic, payload))
        await send_reply(peer, request, fields)
        await answer_further_requests(peer, operation)
        request = await peer.until(PUBLISH)
        await peer.send(
            packets.publish(request.topic, next(malformed_replies(request.packet_id, fields)))
        )
        await peer.send(packets.puback(request.packet_id))
        request = await peer.until(PUBLISH)
        await peer.send(packets.puback(request.packet_id))
        await acknowledge_requests(peer)

    async with tcp_peer(script) as port:
        async with connect_once(host="127.0.0.1", port=port, secure=False) as emitter:
            assert comparable(operation, await method(emitter)) == outcome
            with pytest.raises(RemoteProtocolError, match=operation) as caught:
                await method(emitter)
            assert isinstance(caught.value, EmitterError)
            with pytest.raises(RequestError, match="too large"):
                await method(emitter)


async def test_long_message_of_refusal_is_shortened(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        request = await peer.until(PUBLISH)
        refusal = {"req": request.packet_id, "status": 400, "message": "no\n\x1b[2J" * 5000}
        await peer.send(packets.publish("emitter/error/", json.dumps(refusal).encode()))
        await peer.answer(request)
        await acknowledge_requests(peer)

    async with tcp_peer(script) as port, connect_once(f"mqtt://127.0.0.1:{port}") as emitter:
        with pytest.raises(RequestError) as caught:
            await emitter.publish("k", "a/", b"", qos=1)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert len(caught.value.message) <= 201


def test_long_channel_in_decode_error_is_shortened() -> None:
    message = EmitterMessage("a" * 60000 + "/", b"\xff")
    for read in (message.as_string, message.as_object):
        with pytest.raises(ValueError, match="the message of 1 bytes from") as caught:
            read()
        assert len(str(caught.value)) < 400
