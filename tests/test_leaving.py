"""Leaving: what is queued is sent, what is asked is answered, in a bounded time."""

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


class Slow:
    """A peer that begins to read after some seconds, and then notes all that comes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.peers: list[Peer] = []

    async def play(self, peer: Peer) -> None:
        self.peers.append(peer)
        await peer.accept()
        await anyio.sleep(self.seconds)
        await peer.answer_all()


def exactly(seconds: float) -> object:
    # asyncio's virtual clock goes a hair beyond each deadline.
    return pytest.approx(seconds, abs=1e-3)


async def test_all_that_is_queued_is_sent_before_the_goodbye(anyio_backend: object) -> None:
    slow = Slow(3)
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


async def test_answers_are_waited_for_before_the_goodbye(anyio_backend: object) -> None:
    slow = Slow(3)
    done: list[str] = []

    async def call(emitter: Emitter) -> None:
        await emitter.publish(KEY, "a/", "x", qos=1)
        done.append("published")

    async with memory_peer(slow.play) as connectable:
        async with (
            anyio.create_task_group() as tasks,
            connect_reconnecting(connectable=connectable) as one,
        ):
            tasks.start_soon(call, one)
            await checkpoint()
            while not one.statistics().pending:
                await checkpoint()
        assert done == ["published"]
    assert slow.peers[0].received[-1].kind == DISCONNECT


async def test_a_peer_that_does_nothing_is_waited_for_no_longer(anyio_backend: object) -> None:
    slow = Slow(100)
    async with memory_peer(slow.play, capacity=100) as connectable:
        async with connect_reconnecting(connectable=connectable, disconnect_timeout=4) as emitter:
            for _ in range(50):
                await emitter.publish(KEY, "a/", "x")
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(4)
        assert connectable.attempts == 1
        assert emitter.state == "closed"


async def test_under_cancellation_nothing_is_waited_for(anyio_backend: object) -> None:
    slow = Slow(100)
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
async def test_a_backoff_is_not_waited_for(anyio_backend: object, timeout: float) -> None:
    async def refuse(attempt: int) -> None:
        if attempt > 1:
            raise OSError("nobody is there")

    cut = anyio.Event()

    async def play(peer: Peer) -> None:
        await peer.accept()
        await cut.wait()

    async with memory_peer(play, before=refuse) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=timeout)
        async with emitter, emitter.stream("disconnect") as gone:
            cut.set()
            await gone.receive()
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(0)


async def serve(peer: Peer) -> None:
    await peer.serve()


@pytest.mark.parametrize("event", ["connect", "error"])
async def test_a_handler_that_waits_for_the_end_does_not_delay_it(
    event: Literal["connect", "error"], anyio_backend: object
) -> None:
    steps: list[str] = []

    async def wait(*values: object) -> None:
        steps.append("waits")
        await emitter.wait_closed()
        steps.append(emitter.state)

    async with memory_peer(serve) as connectable:
        emitter = connect_reconnecting(connectable=connectable)
        emitter.on(event, wait)
        if event == "error":
            emitter.on("connect", lambda: 1 / 0)
        async with emitter:
            await anyio.wait_all_tasks_blocked()
            assert steps == ["waits"]
            start = anyio.current_time()
    assert anyio.current_time() - start == exactly(0)
    assert steps == ["waits", "closed"]


async def test_a_handler_that_no_longer_waits_for_the_end_is_waited_for(
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
