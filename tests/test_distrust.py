"""Wrong and hostile answers, to every request: each ends with its value or a documented error."""

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
from tests.support.links import one_link
from tests.support.peer import DISCONNECT, PINGREQ, PUBLISH, Packet, Peer, tcp_peer

KEY = "k" * 32

Verb = Callable[[Emitter], Awaitable[Any]]


async def read_history(emitter: Emitter) -> list[str]:
    return [message.as_string() async for message in emitter.history(KEY, "a/", 1)]


# What is asked; what a good answer to it has beside req and status; what comes of that.
REQUESTS: dict[str, tuple[Verb, dict[str, object], object]] = {
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


def hostile(operation: str, req: int, good: dict[str, object]) -> Iterator[tuple[str, bytes]]:
    """Answers that answer nothing: topics and payloads."""
    topic = f"emitter/{operation}/"
    whole = {"req": req, "status": 200, **good}
    for wrong in (req + 1, 0, -1, 65536, 10**30, str(req), [req], {"req": req}, True, req + 0.5):
        yield topic, json.dumps({**whole, "req": wrong}).encode()
    yield topic, json.dumps({**good, "status": 200}).encode()
    other = "me" if operation == "keygen" else "keygen"
    yield f"emitter/{other}/", json.dumps(whole).encode()
    yield f"emitter/{operation}/deeper/", json.dumps(whole).encode()
    yield "emitter/", json.dumps(whole).encode()
    yield "emitter/error/", json.dumps({"status": 401, "message": "no"}).encode()
    for nonsense in (b"", b"\xff\xfe", b"null", b"7", b'"x"', b"[1,2]", b"{", b"[" * 60000):
        yield topic, nonsense
    yield topic, b'{"a":' * 12000 + b"1" + b"}" * 12000


def wrong_shapes(req: int, good: dict[str, object]) -> Iterator[bytes]:
    """Answers to just this request, with values of another kind."""
    values: list[object] = [None, 7, [7], {"x": 1}, [[]], "\x00", 1.5, [{"id": 7}], -(10**20)]
    for name in good:
        for value in values:
            if type(value) is not type(good[name]):
                yield json.dumps({"req": req, "status": 200, **good, name: value}).encode()
    statuses: list[object] = ["200", None, [200], 200.5, True, {}]
    for status in statuses:
        yield json.dumps({"req": req, **good, "status": status}).encode()
    yield json.dumps({"req": req, "status": 401, "message": 7}).encode()


def value_of(operation: str, value: Any) -> object:
    if operation == "presence":
        assert isinstance(value, PresenceStatus)
        return value.who

    return value


async def answer_last(peer: Peer, asked: Packet, good: dict[str, object]) -> None:
    answer = json.dumps({"req": asked.packet_id, "status": 200, **good}).encode()
    # A duplicate, and one behind the acknowledgement, are too late.
    for payload in (answer, answer):
        await peer.send(packets.publish(asked.topic, payload))
    await peer.send(packets.puback(asked.packet_id))
    await peer.send(packets.publish(asked.topic, answer))


async def answer_more(peer: Peer, operation: str) -> None:
    """Answer the second look that history takes for one message: there are no others."""
    if operation == "history":
        asked = await peer.until(PUBLISH)
        await answer_last(peer, asked, {"messages": []})


async def answer_pings(peer: Peer) -> None:
    """Answer these, and only acknowledge everything else."""
    while (packet := await peer.packet()) and packet.kind != DISCONNECT:
        if packet.kind == PINGREQ:
            await peer.send(packets.packet(0xD0, b""))
        elif packet.kind == PUBLISH:
            await peer.send(packets.puback(packet.packet_id))


@pytest.mark.parametrize("operation", REQUESTS)
async def test_what_answers_nothing_is_dropped(anyio_backend: object, operation: str) -> None:
    verb, good, outcome = REQUESTS[operation]
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.accept()
        asked = await peer.until(PUBLISH)
        for topic, payload in hostile(operation, asked.packet_id, good):
            await peer.send(packets.publish(topic, payload))
            sent += 1
        await peer.send(packets.publish(b"emitter/\xff/", b"x"))
        await answer_last(peer, asked, good)
        await answer_more(peer, operation)
        await answer_pings(peer)

    async with tcp_peer(script) as port:
        emitter = one_link(host="127.0.0.1", port=port, secure=False, max_message_size=200000)
        errors: list[Exception] = []
        emitter.on("error", errors.append)
        async with emitter:
            assert value_of(operation, await verb(emitter)) == outcome
            await emitter.flush()
            # The undecodable topic, and each answer behind its acknowledgement, make more.
            assert emitter.statistics().nonsense == sent + 2 + (operation == "history")
            assert emitter.statistics().unhandled == 0
        # Nonsense is reported once.
        assert [type(error) for error in errors] == [RemoteProtocolError]


@pytest.mark.parametrize("operation", REQUESTS)
async def test_an_answer_of_the_wrong_shape_is_no_value(
    anyio_backend: object, operation: str
) -> None:
    verb, good, outcome = REQUESTS[operation]

    async def script(peer: Peer) -> None:
        await peer.accept()
        asked = await peer.until(PUBLISH)
        shapes = list(wrong_shapes(asked.packet_id, good))
        assert len(shapes) > 10
        for payload in shapes:
            await peer.send(packets.publish(asked.topic, payload))
        await answer_last(peer, asked, good)
        await answer_more(peer, operation)
        asked = await peer.until(PUBLISH)
        await peer.send(packets.publish(asked.topic, next(wrong_shapes(asked.packet_id, good))))
        await peer.send(packets.puback(asked.packet_id))
        asked = await peer.until(PUBLISH)
        await peer.send(packets.puback(asked.packet_id))
        await answer_pings(peer)

    async with tcp_peer(script) as port:
        async with one_link(host="127.0.0.1", port=port, secure=False) as emitter:
            assert value_of(operation, await verb(emitter)) == outcome
            with pytest.raises(RemoteProtocolError, match=operation) as caught:
                await verb(emitter)
            assert isinstance(caught.value, EmitterError)
            with pytest.raises(RequestError, match="too large"):
                await verb(emitter)


async def test_long_words_of_a_refusal_are_cut(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        asked = await peer.until(PUBLISH)
        said = {"req": asked.packet_id, "status": 400, "message": "no\n\x1b[2J" * 5000}
        await peer.send(packets.publish("emitter/error/", json.dumps(said).encode()))
        await peer.answer(asked)
        await answer_pings(peer)

    async with tcp_peer(script) as port, one_link(f"mqtt://127.0.0.1:{port}") as emitter:
        with pytest.raises(RequestError) as caught:
            await emitter.publish("k", "a/", b"", qos=1)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert len(caught.value.message) <= 201


def test_a_long_channel_in_an_error_is_cut() -> None:
    message = EmitterMessage("a" * 60000 + "/", b"\xff")
    for read in (message.as_string, message.as_object):
        with pytest.raises(ValueError, match="the message of 1 bytes from") as caught:
            read()
        assert len(str(caught.value)) < 400
