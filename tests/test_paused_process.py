"""A process that was paused keeps its connection and the replies that arrived during the pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from threading import Event, Thread
from typing import Any

import anyio
import pytest
from anyio import TCPConnectable
from anyio.lowlevel import checkpoint

from emitter_anyio import ConnectionLostError, Emitter, EmitterMessage, RequestTimeoutError
from tests.support import packets, tls
from tests.support.background import Background, background
from tests.support.clock import simulate_blocking
from tests.support.connections import connect_once, connect_reconnecting
from tests.support.leaks import open_sockets
from tests.support.memory import MemoryStream
from tests.support.peer import PINGREQ, PUBLISH, Packet, Peer, memory_peer

MESSAGE = packets.publish("a/", b"x" * 100)


# With virtual time: the peer pauses as well; data that it sent before waits in the stream


class SlowPeer:
    """A peer that answers each PINGREQ after a delay."""

    def __init__(self, ping_delay: float = 0) -> None:
        self.ping_delay = ping_delay
        self.start = 0.0
        self.pings: list[float] = []
        self.stream: MemoryStream

    @property
    def now(self) -> float:
        return anyio.current_time() - self.start

    async def play(self, peer: Peer) -> None:
        assert isinstance(peer.stream, MemoryStream)
        self.stream = peer.stream
        await peer.accept()
        self.start = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            while packet := await peer.packet():
                if packet.kind == PINGREQ:
                    self.pings.append(self.now)
                if packet.kind != PUBLISH:
                    tasks.start_soon(self._answer, peer, packet)
            tasks.cancel_scope.cancel()

    async def _answer(self, peer: Peer, packet: Packet) -> None:
        if packet.kind == PINGREQ:
            await anyio.sleep(self.ping_delay)
        await peer.answer(packet)


def exactly(seconds: float) -> Any:
    # asyncio's virtual clock overshoots each deadline a little.
    return pytest.approx(seconds, abs=1e-6)


@pytest.mark.virtual_time
@pytest.mark.parametrize("ping_delay", [0, 5, 14.9])
@pytest.mark.parametrize("after", [0, 29.9, 31, 44.5])
@pytest.mark.parametrize("seconds", [0.5, 1.6, 14, 16, 46, 3600])
async def test_answering_peer_is_kept_after_a_pause(
    anyio_backend: object, seconds: float, after: float, ping_delay: float
) -> None:
    slow_peer = SlowPeer(ping_delay)
    async with memory_peer(slow_peer.play) as connectable:
        async with connect_once(connectable=connectable, keepalive=30) as emitter:
            await anyio.sleep(after)
            simulate_blocking(seconds)
            await anyio.sleep(100)
            assert emitter.statistics().connections == 1
    assert slow_peer.now == exactly(after + seconds + 100)
    assert len(slow_peer.pings) >= 3


@pytest.mark.virtual_time
@pytest.mark.parametrize("seconds", [0.02, 0.7, 2.5, 100])
async def test_repeated_pauses_do_not_lose_the_connection(
    anyio_backend: object, seconds: float
) -> None:
    slow_peer = SlowPeer()
    async with memory_peer(slow_peer.play) as connectable:
        async with connect_once(connectable=connectable, keepalive=1):
            for _ in range(100):
                simulate_blocking(seconds)
                # Give the peer time to answer.
                for _ in range(20):
                    await checkpoint()
    assert slow_peer.pings


@pytest.mark.virtual_time
async def test_silent_peer_gets_another_ping_after_a_pause(anyio_backend: object) -> None:
    slow_peer = SlowPeer(ping_delay=3600)
    async with memory_peer(slow_peer.play) as connectable:
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with connect_once(connectable=connectable, keepalive=30):
                await anyio.sleep(31)
                simulate_blocking(100)
                await anyio.sleep_forever()
        assert slow_peer.now == exactly(131 + 15)
    assert slow_peer.pings == [exactly(30), exactly(131)]


@pytest.mark.virtual_time
@pytest.mark.parametrize("seconds", [0.1, 1, 31])
async def test_silent_peer_is_lost_despite_constant_pauses(
    anyio_backend: object, seconds: float
) -> None:
    slow_peer = SlowPeer(ping_delay=3600)
    async with memory_peer(slow_peer.play) as connectable:
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with connect_once(connectable=connectable, keepalive=30):
                while True:
                    simulate_blocking(seconds)
                    await checkpoint()
        assert slow_peer.now < 150 + 20 * seconds


@pytest.mark.virtual_time
async def test_peer_that_reads_nothing_for_a_while_is_kept(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(70)
        await peer.answer_all()

    async with memory_peer(script, capacity=1000) as connectable:
        async with connect_once(connectable=connectable, keepalive=30) as emitter:
            await emitter.publish("k", "a/", bytes(10_000))
            await anyio.sleep(200)
            assert emitter.statistics().connections == 1


@pytest.mark.virtual_time
async def test_peer_that_sends_but_reads_nothing_is_kept(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        for _ in range(20):
            await anyio.sleep(40)
            await peer.send(MESSAGE)
        await peer.answer_all()

    async with memory_peer(script, capacity=1000) as connectable:
        emitter = connect_once(connectable=connectable, keepalive=30)
        emitter.on("message", lambda message: None)
        async with emitter:
            await emitter.publish("k", "a/", bytes(10_000))
            await anyio.sleep(900)
            assert emitter.statistics().received == 20


@pytest.mark.virtual_time
async def test_peer_that_reads_nothing_is_lost_after_a_pause(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(3600)

    async with memory_peer(script, capacity=1000) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with connect_once(connectable=connectable, keepalive=30) as emitter:
                await emitter.publish("k", "a/", bytes(10_000))
                await anyio.sleep(31)
                simulate_blocking(100)
                await anyio.sleep_forever()
        # The timeout runs as if the first ping were due at the end of the pause.
        assert anyio.current_time() - start == exactly(131 + 45)


Call = Callable[[Emitter], Any]

CALLS: dict[str, Call] = {
    "request_timeout": lambda emitter: emitter.publish("k", "a/", "x", qos=1),
    "timeout": lambda emitter: emitter.publish("k", "a/", "x", qos=1, timeout=10),
}


@pytest.mark.virtual_time
@pytest.mark.parametrize("backlog", [0, 5000])
@pytest.mark.parametrize("seconds", [5, 6, 100])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_reply_that_arrived_before_the_pause_is_received(
    anyio_backend: object, call: Call, seconds: float, backlog: int
) -> None:
    slow_peer = SlowPeer()
    async with memory_peer(slow_peer.play) as connectable:
        emitter = connect_once(connectable=connectable, request_timeout=10)
        emitter.on("message", lambda message: None, buffer=backlog + 1)
        async with emitter, anyio.create_task_group() as tasks:
            tasks.start_soon(call, emitter)
            await anyio.sleep(5)
            slow_peer.stream.send_nowait(MESSAGE * backlog + packets.puback(1))
            simulate_blocking(seconds)
        assert emitter.statistics().received == backlog


@pytest.mark.virtual_time
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_missing_reply_times_out_after_a_pause(anyio_backend: object, call: Call) -> None:
    slow_peer = SlowPeer()
    async with memory_peer(slow_peer.play) as connectable:
        async with connect_once(connectable=connectable, request_timeout=10) as emitter:

            async def expect_timeout() -> None:
                with pytest.raises(RequestTimeoutError):
                    await call(emitter)
                assert slow_peer.now == exactly(19)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(expect_timeout)
                await anyio.sleep(5)
                simulate_blocking(14)


# With real sockets, and a broker that continues in a thread


@pytest.fixture(scope="module")
def plain() -> Iterator[Background]:
    with background() as started:
        yield started


@pytest.fixture(scope="module")
def secure() -> Iterator[Background]:
    with background(ssl_context=tls.server_context()) as started:
        yield started


class BrokerInThread:
    """A broker in a thread, and the options to connect to it in one way."""

    def __init__(self, scheme: str, background: Background) -> None:
        self.background = background
        self._sockets = open_sockets()
        self.options: dict[str, Any] = {"keepalive": 1}
        host, port = background.broker.host, background.broker.port
        if scheme == "connectable":
            self.options["connectable"] = TCPConnectable(host, port)
        else:
            self.options["servers"] = [f"{scheme}://{host}:{port}"]
        if scheme in ("mqtts", "wss"):
            self.options["ssl_context"] = tls.client_context()

    def wait_until_closed(self) -> None:
        """Wait at most 10 s until the broker, in its thread, has closed this test's sockets."""
        for _ in range(1000):
            if open_sockets() <= self._sockets:
                return
            time.sleep(0.01)


SCHEMES = ["mqtt", "mqtts", "ws", "wss", "connectable"]


def make_broker_in_thread(scheme: str, plain: Background, secure: Background) -> BrokerInThread:
    return BrokerInThread(scheme, secure if scheme in ("mqtts", "wss") else plain)


@pytest.fixture(params=SCHEMES)
def broker_in_thread(
    request: pytest.FixtureRequest, plain: Background, secure: Background
) -> Iterator[BrokerInThread]:
    started = make_broker_in_thread(request.param, plain, secure)
    yield started
    started.wait_until_closed()


def stand_still_for(seconds: float, action: Callable[[], object]) -> None:
    """Block the event loop while ``action`` runs in a thread, and for some seconds after it."""
    thread = Thread(target=action)
    thread.start()
    thread.join()
    time.sleep(seconds)


async def test_messages_sent_during_a_pause_arrive_on_the_same_connection(
    plain: Background, secure: Background, anyio_backend: object, unique: str
) -> None:
    # Blocking the event loop once pauses the connections of all schemes together.
    started = [make_broker_in_thread(scheme, plain, secure) for scheme in SCHEMES]

    def publish() -> None:
        for each in (plain, secure):
            for number in range(3):
                each.publish(unique, f"{number}")

    async with AsyncExitStack() as stack:
        subscribed = []
        for each in started:
            emitter = await stack.enter_async_context(connect_reconnecting(**each.options))
            key = each.background.key(unique, "rw")
            messages = await stack.enter_async_context(emitter.subscribe(key, unique))
            subscribed.append((emitter, messages))
        stand_still_for(2, action=publish)
        for _, messages in subscribed:
            assert [(await messages.receive()).as_string() for _ in range(3)] == list("012")
        # Wait until the next PINGREQ is answered or has timed out.
        await anyio.sleep(1.6)
        for emitter, _ in subscribed:
            await emitter.flush()
            assert emitter.statistics().connections == 1
    await anyio.to_thread.run_sync(started[0].wait_until_closed)


@pytest.mark.parametrize("options", [{}, {"timeout": 0.2}], ids=["request_timeout", "timeout"])
async def test_replies_sent_during_a_pause_are_received(
    broker_in_thread: BrokerInThread, anyio_backend: object, unique: str, options: dict[str, Any]
) -> None:
    stack = ExitStack()

    async def hold() -> None:
        stack.enter_context(broker_in_thread.background.broker.hold("puback"))

    async def release() -> None:
        stack.close()

    async with connect_reconnecting(**broker_in_thread.options, request_timeout=0.2) as emitter:
        key = broker_in_thread.background.key(unique, "rw")
        await anyio.to_thread.run_sync(broker_in_thread.background.call, hold)
        async with anyio.create_task_group() as tasks:
            publish = partial(emitter.publish, key, unique, "x", qos=1, **options)
            tasks.start_soon(publish)
            await anyio.wait_all_tasks_blocked()
            stand_still_for(0.3, action=partial(broker_in_thread.background.call, release))
        assert emitter.statistics().connections == 1


async def test_reply_of_another_client_sent_during_a_pause_is_received(
    plain: Background, anyio_backend: object, unique: str
) -> None:
    serving, served, answer, done = Event(), Event(), Event(), Event()

    async def serve(message: EmitterMessage) -> str:
        served.set()
        await anyio.to_thread.run_sync(answer.wait)
        return "yes"

    async def serve_until_done() -> None:
        key = plain.key(f"{unique}#/", "rw")
        async with connect_reconnecting(plain.url) as server, anyio.create_task_group() as tasks:
            await tasks.start(server.serve, key, unique, serve)
            serving.set()
            await anyio.to_thread.run_sync(done.wait)
            tasks.cancel_scope.cancel()

    broker_in_thread = BrokerInThread("mqtt", plain)
    await anyio.to_thread.run_sync(plain.start_soon, serve_until_done)
    await anyio.to_thread.run_sync(serving.wait)
    async with connect_reconnecting(**broker_in_thread.options) as emitter:
        key = plain.key(f"{unique}#/", "rw")

        async def ask() -> None:
            assert (await emitter.request(key, unique, "?", timeout=0.3)).as_string() == "yes"

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.to_thread.run_sync(served.wait)
            stand_still_for(0.4, action=answer.set)
    done.set()
    await anyio.to_thread.run_sync(broker_in_thread.wait_until_closed)
