"""Leaving sends queued packets and waits for replies, within ``disconnect_timeout``."""

from __future__ import annotations

from typing import Literal

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import Emitter
from tests.support.connections import connect_reconnecting
from tests.support.peer import DISCONNECT, PUBLISH, Peer, memory_peer

KEY = "k" * 32

pytestmark = pytest.mark.virtual_time


class SlowPeer:
    """A peer that starts to read after some seconds and records what it receives."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.peers: list[Peer] = []

    async def play(self, peer: Peer) -> None:
        self.peers.append(peer)
        await peer.accept()
        await anyio.sleep(self.seconds)
        await peer.answer_all()


def exactly(seconds: float) -> object:
    # asyncio's virtual clock overshoots each deadline a little.
    return pytest.approx(seconds, abs=1e-3)


async def test_queued_packets_are_sent_before_disconnect(anyio_backend: object) -> None:
    slow = SlowPeer(3)
    async with memory_peer(slow.play, capacity=100) as connectable:
        async with connect_reconnecting(connectable=connectable) as emitter:
            for number in range(50):
                await emitter.publish(KEY, "a/", str(number))
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(3)
    (peer,) = slow.peers
    assert [packet.payload for packet in peer.received if packet.kind == PUBLISH] == [
        str(number).encode() for number in range(50)
    ]
    assert peer.received[-1].kind == DISCONNECT
    assert emitter.statistics().unsent == 0


async def test_replies_are_awaited_before_disconnect(anyio_backend: object) -> None:
    slow = SlowPeer(3)
    done: list[str] = []

    async def call(emitter: Emitter) -> None:
        await emitter.publish(KEY, "a/", "x", qos=1)
        done.append("published")

    async with memory_peer(slow.play) as connectable:
        async with (
            anyio.create_task_group() as tasks,
            connect_reconnecting(connectable=connectable) as emitter,
        ):
            tasks.start_soon(call, emitter)
            await checkpoint()
            while not emitter.statistics().pending:
                await checkpoint()
        assert done == ["published"]
    assert slow.peers[0].received[-1].kind == DISCONNECT


async def test_unresponsive_peer_delays_leaving_for_disconnect_timeout_only(
    anyio_backend: object,
) -> None:
    slow = SlowPeer(100)
    async with memory_peer(slow.play, capacity=100) as connectable:
        async with connect_reconnecting(connectable=connectable, disconnect_timeout=4) as emitter:
            for _ in range(50):
                await emitter.publish(KEY, "a/", "x")
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(4)
        assert connectable.attempts == 1
        assert emitter.state == "closed"


async def test_cancelled_leaving_does_not_wait(anyio_backend: object) -> None:
    slow = SlowPeer(100)
    async with memory_peer(slow.play, capacity=100) as connectable:
        with anyio.CancelScope() as scope:
            async with connect_reconnecting(connectable=connectable) as emitter:
                for _ in range(50):
                    await emitter.publish(KEY, "a/", "x")
                start = anyio.current_time()
                scope.cancel()
        assert anyio.current_time() - start == exactly(0)
        assert emitter.state == "closed"


@pytest.mark.parametrize("timeout", [0, 0.5])
async def test_leaving_does_not_wait_for_the_backoff(anyio_backend: object, timeout: float) -> None:
    async def refuse(attempt: int) -> None:
        if attempt > 1:
            raise OSError("refused")

    cut = anyio.Event()

    async def play(peer: Peer) -> None:
        await peer.accept()
        await cut.wait()

    async with memory_peer(play, before=refuse) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=timeout)
        async with emitter, emitter.stream("disconnect") as disconnected:
            cut.set()
            await disconnected.receive()
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(0)


async def serve(peer: Peer) -> None:
    await peer.serve()


@pytest.mark.parametrize("event", ["connect", "error"])
async def test_handler_awaiting_wait_closed_does_not_delay_leaving(
    event: Literal["connect", "error"], anyio_backend: object
) -> None:
    steps: list[str] = []

    async def wait(*values: object) -> None:
        steps.append("waiting")
        await emitter.wait_closed()
        steps.append(emitter.state)

    async with memory_peer(serve) as connectable:
        emitter = connect_reconnecting(connectable=connectable)
        emitter.on(event, wait)
        if event == "error":
            emitter.on("connect", lambda: 1 / 0)
        async with emitter:
            await anyio.wait_all_tasks_blocked()
            assert steps == ["waiting"]
            start = anyio.current_time()
    assert anyio.current_time() - start == exactly(0)
    assert steps == ["waiting", "closed"]


async def test_handler_that_stopped_awaiting_wait_closed_is_awaited(
    anyio_backend: object,
) -> None:
    steps: list[str] = []

    async def wait() -> None:
        with anyio.move_on_after(1):
            await emitter.wait_closed()
        await anyio.sleep(3)
        steps.append(emitter.state)

    async with memory_peer(serve) as connectable:
        emitter = connect_reconnecting(connectable=connectable)
        emitter.on("connect", wait)
        start = anyio.current_time()
        async with emitter:
            await anyio.sleep(2)
        assert anyio.current_time() - start == exactly(4)
    assert steps == ["closing"]
