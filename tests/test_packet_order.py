"""Packets are sent in the order of the calls, for all methods."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, Literal, NamedTuple

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from emitter_anyio import Emitter, RequestError
from tests.support.connections import connect_once
from tests.support.packets import puback
from tests.support.peer import (
    DISCONNECT,
    PINGREQ,
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Packet,
    Peer,
    memory_peer,
)

Method = Literal[
    "publish",
    "publish, qos=1",
    "publish_with_link",
    "publish_with_link, qos=1",
    "subscribe",
    "subscribe, entered",
    "unsubscribe",
    "presence",
    "keygen",
    "keyban",
    "link",
    "me",
    "history",
    "flush",
]
METHODS: Final[tuple[Method, ...]] = Method.__args__  # type: ignore[attr-defined]  # typing's own

TURNS: Final = 4
"""The turns after which a started task has made its call, in any order of the tasks of a turn."""


class Call(NamedTuple):
    method: Method
    size: int
    pauses: bool
    """Whether other tasks get some turns after the call, so that queued packets can be sent."""


class Sent(NamedTuple):
    """The properties that identify a packet: kind, QoS and the number of its call."""

    kind: int
    qos: int
    number: str


def expected(number: int, method: Method) -> Sent:
    text = f"n{number:03d}"
    if method in ("publish", "publish_with_link"):
        return Sent(PUBLISH, 0, text)
    if method in ("subscribe", "subscribe, entered"):
        return Sent(SUBSCRIBE, 1, text)
    if method == "unsubscribe":
        return Sent(UNSUBSCRIBE, 1, text)
    if method == "flush":
        return Sent(PINGREQ, 0, "")
    # Requests are PUBLISH packets; only that of me() contains no number.
    return Sent(PUBLISH, 1, "" if method == "me" else text)


async def call(emitter: Emitter, number: int, method: Method, size: int) -> None:
    mark = f"n{number:03d}"
    channel, body = f"{mark}/", mark.encode() + bytes(size)

    async def enter() -> None:
        async with emitter.subscribe("k", channel, last=0):
            await anyio.sleep_forever()

    async def read() -> None:
        async for _ in emitter.history("k", channel, last=1):
            pass

    calls: dict[Method, Callable[[], Awaitable[Any]]] = {
        "publish": lambda: emitter.publish("k", "a/", body),
        "publish, qos=1": lambda: emitter.publish("k", "a/", body, qos=1),
        "publish_with_link": lambda: emitter.publish_with_link("li", body),
        "publish_with_link, qos=1": lambda: emitter.publish_with_link("li", body, qos=1),
        "subscribe": lambda: emitter.subscribe("k", channel),
        "subscribe, entered": enter,
        "unsubscribe": lambda: emitter.unsubscribe("k", channel),
        "presence": lambda: emitter.presence("k", channel),
        "keygen": lambda: emitter.keygen("k", channel),
        "keyban": lambda: emitter.keyban("k", mark),
        "link": lambda: emitter.link("k", channel, "li"),
        "me": emitter.me,
        "history": read,
        "flush": emitter.flush,
    }
    # The peer acknowledges requests without replying.
    with suppress(RequestError):
        await calls[method]()


def identify(packet: Packet) -> Sent:
    found = re.search(rb"n\d{3}", packet.body)
    qos = packet.flags >> 1 & 3
    return Sent(packet.kind, qos, found[0].decode() if found else "")


async def make_calls(calls: list[Call], capacity: int, pace: int) -> list[Sent]:
    """Make the calls, each in a separate task, and return the packets that were sent."""
    sent: list[Packet] = []
    all_sent = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        while (packet := await peer.packet()) and packet.kind != DISCONNECT:
            for _ in range(pace):
                await checkpoint()
            # Without a reply, history requests a smaller page, which is not another call.
            is_retry = b"emitter/history/" in packet.body and identify(packet) in map(
                identify, sent
            )
            if not all_sent.is_set() and not is_retry:
                sent.append(packet)
            if len(sent) == len(calls):
                all_sent.set()
            if packet.kind == PUBLISH and packet.flags & 6:
                await peer.send(puback(packet.packet_id))
            else:
                await peer.answer(packet)

    async with memory_peer(script, capacity=capacity) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            async with anyio.create_task_group() as tasks:
                for number, (method, size, pauses) in enumerate(calls):
                    if method == "publish" and not pauses:
                        await call(emitter, number, method, size)
                        continue
                    tasks.start_soon(call, emitter, number, method, size)
                    for _ in range(TURNS):
                        await checkpoint()
                await all_sent.wait()
                tasks.cancel_scope.cancel()
    return list(map(identify, sent))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=30)
@given(
    calls=st.lists(
        st.builds(
            Call,
            st.sampled_from(METHODS),
            st.sampled_from([0, 100, 5000, 30_000]),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    ),
    capacity=st.sampled_from([50, 5000, 65536]),
    pace=st.integers(0, 5),
)
def test_packets_are_sent_in_the_order_of_the_calls(
    backend: str, calls: list[Call], capacity: int, pace: int
) -> None:
    sent = anyio.run(make_calls, calls, capacity, pace, backend=backend)
    assert sent == [expected(number, one.method) for number, one in enumerate(calls)]
