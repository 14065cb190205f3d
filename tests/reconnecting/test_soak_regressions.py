"""Bugs that the soak test found, each in its smallest form."""

from __future__ import annotations

import json

import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import EmitterMessage, Gap, connect
from emitter_anyio.testing import Broker, FaultProxy
from tests.support import packets, peer
from tests.support.connections import connect_reconnecting
from tests.support.peer import Peer, memory_peer

KEY = "k" * 32


def text_of(item: EmitterMessage | Gap) -> str:
    return "gap" if isinstance(item, Gap) else item.as_string()


async def test_connection_lost_before_restoring_leaves_a_gap_after_its_messages() -> None:
    connections = 0

    async def script(broker: Peer) -> None:
        nonlocal connections
        connections += 1
        await broker.accept()
        first = await broker.until(peer.SUBSCRIBE)
        await broker.send(packets.suback(first.packet_id, 0))
        if connections == 2:
            # Lose the connection before the second subscription is restored.
            await broker.send(packets.publish("a/", b"between"))
            return
        second = await broker.until(peer.SUBSCRIBE)
        await broker.send(packets.suback(second.packet_id, 0))
        if connections == 3:
            await broker.send(packets.publish("a/", b"at last"))
            await broker.answer_all()

    async with memory_peer(script) as connectable, connect(connectable=connectable) as emitter:
        async with (
            emitter.subscribe(KEY, "a/", 0, mark_gaps=True) as messages,
            emitter.subscribe(KEY, "b/", 0),
        ):
            assert [text_of(await messages.receive()) for _ in range(4)] == [
                *("gap", "between"),
                *("gap", "at last"),
            ]
            assert messages.statistics().gaps == 2


async def test_connection_lost_while_resuming_leaves_a_gap_after_its_messages() -> None:
    async with Broker() as broker, connect(broker.url) as emitter:
        key = broker.keygen("a/", "rl")
        async with (
            emitter.subscribe(key, "a/", 0, resume=True, mark_gaps=True) as messages,
            emitter.stream("message") as received,
            emitter.stream("connect") as connected,
        ):
            with broker.hold("reply"):
                await broker.drop()
                await connected.receive()
                await broker.publish("a/", "between")
                await received.receive()
                await broker.drop()
            await connected.receive()
            await broker.publish("a/", "at last")
            items = [await messages.receive() for _ in range(4)]
            assert list(map(text_of, items)) == ["gap", "between", "gap", "at last"]
            # The messages stored during both gaps were read back in place of the first.
            assert [item.complete for item in items if isinstance(item, Gap)] == [True, True]


async def test_connection_lost_with_the_suback_leaves_no_resumption(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "emitter_anyio")
    connections = 0

    async def script(broker: Peer) -> None:
        nonlocal connections
        connections += 1
        await broker.accept()
        if 1 < connections < 10:
            # The script closes the connection before the client can read the SUBACK.
            await broker.answer(await broker.until(peer.SUBSCRIBE))
            return
        while (packet := await broker.packet()) and packet.kind != peer.DISCONNECT:
            if packet.kind == peer.PUBLISH:
                reply = json.dumps({"req": packet.packet_id, "messages": []})
                await broker.send(packets.publish("emitter/history/", reply.encode()))
            await broker.answer(packet)
            if connections == 1 and packet.kind == peer.SUBSCRIBE:
                return

    async with (
        peer.tcp_peer(script) as port,
        connect_reconnecting(f"mqtt://127.0.0.1:{port}") as emitter,
        emitter.subscribe(KEY, "a/", 0, resume=True),
    ):
        while not any("resumed 'a/'" in text for text in caplog.messages):
            await checkpoint()
        await emitter.flush()
        for _ in range(100):
            await checkpoint()
    assert sum("resumed 'a/'" in text for text in caplog.messages) == 1


async def test_publish_before_an_unanswered_disconnect_is_uncertain() -> None:
    async with Broker() as broker, FaultProxy(broker.host, broker.port) as proxy:
        key = broker.keygen("a/", "w")
        async with connect(proxy.url, disconnect_timeout=0.1) as emitter:
            await emitter.publish(key, "a/", "before")
            await emitter.flush()
            proxy.stall("to_broker")
            await emitter.publish(key, "a/", "too late")
        assert emitter.statistics().uncertain == 1


async def test_publish_before_an_answered_disconnect_is_not_uncertain() -> None:
    async with Broker() as broker:
        async with connect(broker.url) as emitter:
            await emitter.publish(broker.keygen("a/", "w"), "a/", "in time")
        assert emitter.statistics().uncertain == 0
