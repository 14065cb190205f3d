"""Packets leave in the order of the calls, whichever verbs they are of."""

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

Verb = Literal[
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
VERBS: Final[tuple[Verb, ...]] = Verb.__args__  # type: ignore[attr-defined]  # typing's own

TURNS: Final = 4
"""So many turns later a task that was started has called, in whatever order the tasks of a turn
run."""


class Call(NamedTuple):
    verb: Verb
    size: int
    rests: bool
    """Whether the others get some turns behind it, so that what has gathered may leave."""


class Sent(NamedTuple):
    """What a packet is told by: its kind, its QoS, and the number of the call that it is of."""

    kind: int
    qos: int
    number: str


def expected(number: int, verb: Verb) -> Sent:
    text = f"n{number:03d}"
    if verb in ("publish", "publish_with_link"):
        return Sent(PUBLISH, 0, text)
    if verb in ("subscribe", "subscribe, entered"):
        return Sent(SUBSCRIBE, 1, text)
    if verb == "unsubscribe":
        return Sent(UNSUBSCRIBE, 1, text)
    if verb == "flush":
        return Sent(PINGREQ, 0, "")
    # A request is a PUBLISH, and of all of them only this one says nothing of its own.
    return Sent(PUBLISH, 1, "" if verb == "me" else text)


async def call(emitter: Emitter, number: int, verb: Verb, size: int) -> None:
    mark = f"n{number:03d}"
    channel, body = f"{mark}/", mark.encode() + bytes(size)

    async def enter() -> None:
        async with emitter.subscribe("k", channel, last=0):
            await anyio.sleep_forever()

    async def read() -> None:
        async for _ in emitter.history("k", channel, last=1):
            pass

    calls: dict[Verb, Callable[[], Awaitable[Any]]] = {
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
    # The peer confirms and says nothing more.
    with suppress(RequestError):
        await calls[verb]()


def told(packet: Packet) -> Sent:
    found = re.search(rb"n\d{3}", packet.body)
    qos = packet.flags >> 1 & 3
    return Sent(packet.kind, qos, found[0].decode() if found else "")


async def leave(calls: list[Call], capacity: int, pace: int) -> list[Sent]:
    """Make the calls, each in a task of its own; what has left then."""
    sent: list[Packet] = []
    all_there = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        while (packet := await peer.packet()) and packet.kind != DISCONNECT:
            for _ in range(pace):
                await checkpoint()
            # Without an answer, history asks again for less: that is no call.
            again = b"emitter/history/" in packet.body and told(packet) in map(told, sent)
            if not all_there.is_set() and not again:
                sent.append(packet)
            if len(sent) == len(calls):
                all_there.set()
            if packet.kind == PUBLISH and packet.flags & 6:
                await peer.send(puback(packet.packet_id))
            else:
                await peer.answer(packet)

    async with memory_peer(script, capacity=capacity) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            async with anyio.create_task_group() as tasks:
                for number, (verb, size, rests) in enumerate(calls):
                    if verb == "publish" and not rests:
                        await call(emitter, number, verb, size)
                        continue
                    tasks.start_soon(call, emitter, number, verb, size)
                    for _ in range(TURNS):
                        await checkpoint()
                await all_there.wait()
                tasks.cancel_scope.cancel()
    return list(map(told, sent))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=30)
@given(
    calls=st.lists(
        st.builds(
            Call,
            st.sampled_from(VERBS),
            st.sampled_from([0, 100, 5000, 30_000]),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    ),
    capacity=st.sampled_from([50, 5000, 65536]),
    pace=st.integers(0, 5),
)
def test_packets_leave_in_the_order_of_the_calls(
    backend: str, calls: list[Call], capacity: int, pace: int
) -> None:
    sent = anyio.run(leave, calls, capacity, pace, backend=backend)
    assert sent == [expected(number, one.verb) for number, one in enumerate(calls)]
