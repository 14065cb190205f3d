"""Keepalive and ping timeouts, over hours of virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest
import sniffio
import trio

from emitter_anyio import ConnectionLostError, Emitter, EmitterMessage
from tests.support import packets
from tests.support.connections import connect_once
from tests.support.peer import DISCONNECT, PINGREQ, PUBLISH, Peer, memory_peer

pytestmark = pytest.mark.virtual_time

HOUR = 3600.0
CHUNK = packets.publish("a/", b"x" * 100)


def approximately(seconds: float) -> Any:
    # asyncio's virtual clock goes slightly past each deadline.
    return pytest.approx(seconds, abs=1e-6)


class RecordingPeer:
    """
    A peer that records when each packet arrived.

    :param falls_silent: the time in seconds after which it does not answer
    """

    def __init__(self, *, falls_silent: float = float("inf")) -> None:
        self.start = anyio.current_time()
        self.falls_silent = falls_silent
        self.times: dict[int, list[float]] = {}
        self.send_in_background: Callable[[Peer], Coroutine[Any, Any, None]] | None = None

    @property
    def now(self) -> float:
        return anyio.current_time() - self.start

    @property
    def pings(self) -> list[float]:
        return self.times.get(PINGREQ, [])

    def longest_silence(self) -> float:
        """Return the longest time in seconds in which the client sent nothing."""
        times = [0.0, *sorted(time for kind in self.times.values() for time in kind)]
        return max(after - before for before, after in pairwise(times))

    async def run(self, peer: Peer) -> None:
        await peer.accept()
        self.start = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            if self.send_in_background is not None:
                tasks.start_soon(self.send_in_background, peer)
            while packet := await peer.packet():
                self.times.setdefault(packet.kind, []).append(self.now)
                if packet.kind == DISCONNECT:
                    break
                if self.now < self.falls_silent:
                    await peer.answer(packet)
            tasks.cancel_scope.cancel()


# A peer that stops answering


@pytest.mark.parametrize("keepalive", [1, 30, 60, 2.5])
async def test_silent_peer_is_lost_after_one_and_a_half_keepalive_periods(
    anyio_backend: object, keepalive: float
) -> None:
    recorder = RecordingPeer(falls_silent=0)
    async with memory_peer(recorder.run) as connectable:
        with pytest.raises(ConnectionLostError, match="ping timeout") as caught:
            async with connect_once(connectable=connectable, keepalive=keepalive):
                await anyio.sleep_forever()
        assert recorder.now == approximately(1.5 * keepalive)
        assert recorder.pings == [approximately(keepalive)]
        assert connectable.streams[0].closed
    assert f"{1.5 * keepalive:g} s" in str(caught.value)
    assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize(
    "times", [(0.1,), (10,), (29.9,), (30,), (30.1,), (44.9,), (20, 40), (29, 58, 80, 120)]
)
@pytest.mark.parametrize("size", [1, len(CHUNK)])
async def test_keepalive_period_starts_with_last_received_byte(
    anyio_backend: object, times: tuple[float, ...], size: int
) -> None:
    # Part of a packet also shows that the peer is alive.
    recorder = RecordingPeer(falls_silent=0)

    async def send(peer: Peer) -> None:
        for number, time in enumerate(times):
            await anyio.sleep(time - recorder.now)
            await peer.send(CHUNK[number : number + 1] if size == 1 else CHUNK)

    recorder.send_in_background = send
    async with memory_peer(recorder.run) as connectable:
        emitter = connect_once(connectable=connectable, keepalive=30)
        emitter.on("message", lambda message: None)
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with emitter:
                await anyio.sleep_forever()
        assert recorder.now == approximately(times[-1] + 45)


async def test_ping_timeout_ends_pending_calls_and_block(anyio_backend: object) -> None:
    recorder = RecordingPeer(falls_silent=0)
    failed_at: list[float] = []

    async def fail_call(call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            await call()
        failed_at.append(recorder.now)

    block_ended_at = []
    async with memory_peer(recorder.run) as connectable:
        emitter = connect_once(connectable=connectable, keepalive=30, request_timeout=None)

        async def enter(emitter: Emitter) -> None:
            async with emitter.subscribe("key", "b/"):
                pass

        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with emitter, anyio.create_task_group() as tasks:
                await anyio.sleep(5)
                for call in (
                    partial(emitter.publish, "key", "a/", "x", qos=1),
                    partial(emitter.subscribe, "key", "a/"),
                    partial(enter, emitter),
                    emitter.me,
                    emitter.flush,
                ):
                    tasks.start_soon(fail_call, call)
                try:
                    await anyio.sleep_forever()
                finally:
                    block_ended_at.append(recorder.now)
    assert failed_at == [approximately(45)] * 5
    assert block_ended_at == [approximately(45)]


async def test_ping_timeout_occurs_although_client_publishes(anyio_backend: object) -> None:
    recorder = RecordingPeer(falls_silent=100)
    async with memory_peer(recorder.run) as connectable:
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with connect_once(connectable=connectable, keepalive=30) as emitter:
                while True:
                    await emitter.publish("k", "a/", "x")
                    await anyio.sleep(1)
        # The last answer was to the PINGREQ at 90 s.
        assert recorder.now == approximately(135)


async def test_peer_that_reads_nothing_is_lost(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(HOUR)

    async with memory_peer(script, capacity=1000) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with connect_once(connectable=connectable, keepalive=30) as emitter:
                while True:
                    await emitter.publish("k", "a/", bytes(10_000))
        # The PINGREQ at 30 s cannot be written within 45 s.
        assert anyio.current_time() - start == approximately(75)


async def test_peer_that_stops_reading_during_close_is_lost(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(HOUR)

    async with memory_peer(script, capacity=100) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with connect_once(
                connectable=connectable, keepalive=2, disconnect_timeout=60
            ) as emitter:
                await emitter.publish("k", "a/", bytes(10_000))
        assert anyio.current_time() - start == approximately(5)


# A peer that answers


async def test_connection_stays_open_while_peer_answers_pings(anyio_backend: object) -> None:
    recorder = RecordingPeer()
    async with memory_peer(recorder.run) as connectable:
        async with connect_once(connectable=connectable, keepalive=30):
            await anyio.sleep(3 * HOUR + 1)
    assert recorder.pings == [approximately(30 * number) for number in range(1, 361)]


async def test_client_that_only_receives_sends_pings(anyio_backend: object) -> None:
    # The broker drops a client from which it receives nothing for 120 s.
    recorder = RecordingPeer()

    async def send(peer: Peer) -> None:
        while True:
            await anyio.sleep(7)
            await peer.send(CHUNK)

    recorder.send_in_background = send
    async with memory_peer(recorder.run) as connectable:
        emitter = connect_once(connectable=connectable, keepalive=30)
        emitter.on("message", lambda message: None)
        async with emitter:
            await anyio.sleep(HOUR + 1)
        assert emitter.statistics().received == 514
    assert recorder.pings == [approximately(30 * number) for number in range(1, 121)]


async def test_client_that_only_publishes_sends_pings(anyio_backend: object) -> None:
    # A publish with QoS 0 gets no answer, so only a PINGREQ can show that the peer is alive.
    recorder = RecordingPeer()
    async with memory_peer(recorder.run) as connectable:
        async with connect_once(connectable=connectable, keepalive=30) as emitter:
            for _ in range(514):
                await emitter.publish("k", "a/", "x")
                await anyio.sleep(7)
    assert len(recorder.times[PUBLISH]) == 514
    assert recorder.pings == [approximately(30 * number) for number in range(1, 120)]


async def test_traffic_in_both_directions_needs_no_ping(anyio_backend: object) -> None:
    recorder = RecordingPeer()
    async with memory_peer(recorder.run) as connectable:
        async with connect_once(connectable=connectable, keepalive=30) as emitter:
            for _ in range(300):
                await emitter.publish("k", "a/", "x", qos=1)
                await anyio.sleep(12)
    assert not recorder.pings
    assert len(recorder.times[DISCONNECT]) == 1


async def test_slow_message_prevents_ping_timeout(anyio_backend: object) -> None:
    # A message that arrives one byte at a time.
    async def send(peer: Peer) -> None:
        for number in range(len(CHUNK)):
            await anyio.sleep(29)
            await peer.send(CHUNK[number : number + 1])

    recorder = RecordingPeer(falls_silent=0)
    recorder.send_in_background = send
    async with memory_peer(recorder.run) as connectable:
        emitter = connect_once(connectable=connectable, keepalive=30)
        async with emitter, emitter.stream("message") as messages:
            assert (await messages.receive()).binary == b"x" * 100
            assert recorder.now == approximately(29 * len(CHUNK))


# Reading paused by the client


async def handle_for_an_hour(message: EmitterMessage) -> None:
    await anyio.sleep(HOUR)


async def test_paused_reading_is_not_a_ping_timeout(anyio_backend: object) -> None:
    recorder = RecordingPeer()
    count = 3

    async def send(peer: Peer) -> None:
        for _ in range(count):
            await peer.send(CHUNK)
        await anyio.sleep(HOUR)
        for _ in range(count):
            await peer.send(CHUNK)

    handled: list[float] = []
    all_handled = anyio.Event()

    async def handle(message: EmitterMessage) -> None:
        await handle_for_an_hour(message)
        handled.append(recorder.now)
        if len(handled) == 2 * count:
            all_handled.set()

    recorder.send_in_background = send
    async with memory_peer(recorder.run) as connectable:
        emitter = connect_once(connectable=connectable, keepalive=30)
        emitter.on("message", handle, buffer=1, overflow="block")
        async with emitter:
            await all_handled.wait()
            # The client sends pings during the pause, so that the broker does not drop it.
            assert recorder.longest_silence() <= 30.001
    assert handled == [approximately(HOUR * number) for number in range(1, 2 * count + 1)]


async def test_peer_that_falls_silent_is_lost_after_pause(anyio_backend: object) -> None:
    recorder = RecordingPeer(falls_silent=0)

    async def send(peer: Peer) -> None:
        await peer.send(CHUNK * 3)

    recorder.send_in_background = send
    async with memory_peer(recorder.run) as connectable:
        emitter = connect_once(connectable=connectable, keepalive=30)
        emitter.on("message", handle_for_an_hour, buffer=1, overflow="block")
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with emitter:
                await anyio.sleep_forever()
        # One message is being handled and one is buffered, so reading resumes after an hour. The
        # handler needs two more hours, but the block waits only disconnect_timeout for it.
        assert recorder.now == approximately(HOUR + 45 + 5)


async def test_messages_received_with_connack_do_not_disable_ping_timeout(
    anyio_backend: object,
) -> None:
    closed_after = []

    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(packets.CONNACK + CHUNK * 5)
        start = anyio.current_time()
        while await peer.packet():
            pass
        closed_after.append(anyio.current_time() - start)

    async with memory_peer(script) as connectable:
        emitter = connect_once(connectable=connectable, keepalive=30)
        emitter.on("message", lambda message: None, buffer=1, overflow="block")
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with emitter:
                await anyio.sleep_forever()
    assert closed_after == [approximately(45)]


# No polling


class TurnCounter:
    """Counts the wake-ups of the event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        if sniffio.current_async_library() == "trio":
            trio.lowlevel.add_instrument(_CountingInstrument(self))
            return
        selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]  # private
        select = selector.select

        def counting_select(timeout: float | None = None) -> Any:
            self.count += 1
            return select(timeout)

        monkeypatch.setattr(selector, "select", counting_select)


class _CountingInstrument(trio.abc.Instrument):
    def __init__(self, turns: TurnCounter) -> None:
        self._turns = turns

    def before_io_wait(self, timeout: float) -> None:
        self._turns.count += 1


async def test_idle_connection_does_not_poll(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = RecordingPeer()
    async with memory_peer(recorder.run) as connectable:
        async with connect_once(connectable=connectable, keepalive=60):
            await anyio.sleep(1)
            turns = TurnCounter(monkeypatch)
            await anyio.sleep(HOUR)
            count = turns.count
    assert len(recorder.pings) == 60
    # A few wake-ups per PINGREQ and answer; polling every second would cause 3600.
    assert count < 60 * 20
