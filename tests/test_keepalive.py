"""Who is silent for how long, and what comes of it: hours pass here, in no time."""

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
from tests.support.links import one_link
from tests.support.peer import DISCONNECT, PINGREQ, PUBLISH, Peer, memory_peer

pytestmark = pytest.mark.virtual_time

HOUR = 3600.0
CHUNK = packets.publish("a/", b"x" * 100)


def exactly(seconds: float) -> Any:
    # asyncio's virtual clock goes a hair beyond each deadline.
    return pytest.approx(seconds, abs=1e-6)


class Watched:
    """A peer that answers for as long as it is told to, and notes when each packet came."""

    def __init__(self, *, falls_silent: float = float("inf")) -> None:
        self.start = anyio.current_time()
        self.falls_silent = falls_silent
        self.times: dict[int, list[float]] = {}
        self.says: Callable[[Peer], Coroutine[Any, Any, None]] | None = None

    @property
    def now(self) -> float:
        return anyio.current_time() - self.start

    @property
    def pings(self) -> list[float]:
        return self.times.get(PINGREQ, [])

    def longest_silence(self) -> float:
        """How long the client has said nothing at most."""
        times = [0.0, *sorted(time for kind in self.times.values() for time in kind)]
        return max(after - before for before, after in pairwise(times))

    async def play(self, peer: Peer) -> None:
        await peer.accept()
        self.start = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            if self.says is not None:
                tasks.start_soon(self.says, peer)
            while packet := await peer.packet():
                self.times.setdefault(packet.kind, []).append(self.now)
                if packet.kind == DISCONNECT:
                    break
                if self.now < self.falls_silent:
                    await peer.answer(packet)
            tasks.cancel_scope.cancel()


# A peer that falls silent


@pytest.mark.parametrize("keepalive", [1, 30, 60, 2.5])
async def test_a_silent_peer_is_lost_after_one_and_a_half_periods(
    anyio_backend: object, keepalive: float
) -> None:
    watched = Watched(falls_silent=0)
    async with memory_peer(watched.play) as connectable:
        with pytest.raises(ConnectionLostError, match="ping timeout") as caught:
            async with one_link(connectable=connectable, keepalive=keepalive):
                await anyio.sleep_forever()
        assert watched.now == exactly(1.5 * keepalive)
        assert watched.pings == [exactly(keepalive)]
        assert connectable.streams[0].closed
    assert f"{1.5 * keepalive:g} s" in str(caught.value)
    assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize(
    "times", [(0.1,), (10,), (29.9,), (30,), (30.1,), (44.9,), (20, 40), (29, 58, 80, 120)]
)
@pytest.mark.parametrize("size", [1, len(CHUNK)])
async def test_the_period_begins_with_the_last_byte(
    anyio_backend: object, times: tuple[float, ...], size: int
) -> None:
    # A part of a packet is a sign of life, too.
    watched = Watched(falls_silent=0)

    async def say(peer: Peer) -> None:
        for number, time in enumerate(times):
            await anyio.sleep(time - watched.now)
            await peer.send(CHUNK[number : number + 1] if size == 1 else CHUNK)

    watched.says = say
    async with memory_peer(watched.play) as connectable:
        emitter = one_link(connectable=connectable, keepalive=30)
        emitter.on("message", lambda message: None)
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with emitter:
                await anyio.sleep_forever()
        assert watched.now == exactly(times[-1] + 45)


async def test_pending_calls_and_the_body_learn_of_it(anyio_backend: object) -> None:
    watched = Watched(falls_silent=0)
    lost: list[float] = []

    async def lose(call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            await call()
        lost.append(watched.now)

    body_ended = []
    async with memory_peer(watched.play) as connectable:
        emitter = one_link(connectable=connectable, keepalive=30, request_timeout=None)

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
                    tasks.start_soon(lose, call)
                try:
                    await anyio.sleep_forever()
                finally:
                    body_ended.append(watched.now)
    assert lost == [exactly(45)] * 5
    assert body_ended == [exactly(45)]


async def test_a_busy_publisher_notices_all_the_same(anyio_backend: object) -> None:
    watched = Watched(falls_silent=100)
    async with memory_peer(watched.play) as connectable:
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with one_link(connectable=connectable, keepalive=30) as emitter:
                while True:
                    await emitter.publish("k", "a/", "x")
                    await anyio.sleep(1)
        # The last answer was to the PINGREQ of 90 s.
        assert watched.now == exactly(135)


async def test_a_peer_that_takes_nothing_is_lost_too(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(HOUR)

    async with memory_peer(script, capacity=1000) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with one_link(connectable=connectable, keepalive=30) as emitter:
                while True:
                    await emitter.publish("k", "a/", bytes(10_000))
        # The PINGREQ of 30 s waits for 45 s in vain.
        assert anyio.current_time() - start == exactly(75)


async def test_a_peer_that_falls_silent_during_the_goodbye_is_lost(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await anyio.sleep(HOUR)

    async with memory_peer(script, capacity=100) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with one_link(
                connectable=connectable, keepalive=2, disconnect_timeout=60
            ) as emitter:
                await emitter.publish("k", "a/", bytes(10_000))
        assert anyio.current_time() - start == exactly(5)


# A peer that lives


async def test_a_peer_that_answers_pings_keeps_the_link_for_hours(anyio_backend: object) -> None:
    watched = Watched()
    async with memory_peer(watched.play) as connectable:
        async with one_link(connectable=connectable, keepalive=30):
            await anyio.sleep(3 * HOUR + 1)
    assert watched.pings == [exactly(30 * number) for number in range(1, 361)]


async def test_a_client_that_only_receives_still_speaks(anyio_backend: object) -> None:
    # The broker drops a client that is silent for 120 s, however much it sends itself.
    watched = Watched()

    async def say(peer: Peer) -> None:
        while True:
            await anyio.sleep(7)
            await peer.send(CHUNK)

    watched.says = say
    async with memory_peer(watched.play) as connectable:
        emitter = one_link(connectable=connectable, keepalive=30)
        emitter.on("message", lambda message: None)
        async with emitter:
            await anyio.sleep(HOUR + 1)
        assert emitter.statistics().received == 514
    assert watched.pings == [exactly(30 * number) for number in range(1, 121)]


async def test_a_client_that_only_publishes_still_asks(anyio_backend: object) -> None:
    # Nothing answers a publish of QoS 0: without a PINGREQ a dead peer would look alive.
    watched = Watched()
    async with memory_peer(watched.play) as connectable:
        async with one_link(connectable=connectable, keepalive=30) as emitter:
            for _ in range(514):
                await emitter.publish("k", "a/", "x")
                await anyio.sleep(7)
    assert len(watched.times[PUBLISH]) == 514
    assert watched.pings == [exactly(30 * number) for number in range(1, 120)]


async def test_traffic_both_ways_needs_no_ping(anyio_backend: object) -> None:
    watched = Watched()
    async with memory_peer(watched.play) as connectable:
        async with one_link(connectable=connectable, keepalive=30) as emitter:
            for _ in range(300):
                await emitter.publish("k", "a/", "x", qos=1)
                await anyio.sleep(12)
    assert not watched.pings
    assert len(watched.times[DISCONNECT]) == 1


async def test_a_slow_link_is_no_silent_peer(anyio_backend: object) -> None:
    # A large message that comes a byte at a time.
    async def say(peer: Peer) -> None:
        for number in range(len(CHUNK)):
            await anyio.sleep(29)
            await peer.send(CHUNK[number : number + 1])

    watched = Watched(falls_silent=0)
    watched.says = say
    async with memory_peer(watched.play) as connectable:
        emitter = one_link(connectable=connectable, keepalive=30)
        async with emitter, emitter.stream("message") as messages:
            assert (await messages.receive()).binary == b"x" * 100
            assert watched.now == exactly(29 * len(CHUNK))


# A pause that the client has asked for


async def pause(message: EmitterMessage) -> None:
    await anyio.sleep(HOUR)


async def test_a_pause_under_block_is_no_silence(anyio_backend: object) -> None:
    watched = Watched()
    count = 3

    async def say(peer: Peer) -> None:
        for _ in range(count):
            await peer.send(CHUNK)
        await anyio.sleep(HOUR)
        for _ in range(count):
            await peer.send(CHUNK)

    handled: list[float] = []
    all_handled = anyio.Event()

    async def handle(message: EmitterMessage) -> None:
        await pause(message)
        handled.append(watched.now)
        if len(handled) == 2 * count:
            all_handled.set()

    watched.says = say
    async with memory_peer(watched.play) as connectable:
        emitter = one_link(connectable=connectable, keepalive=30)
        emitter.on("message", handle, buffer=1, overflow="block")
        async with emitter:
            await all_handled.wait()
            # It is asked all the while, so that the broker does not count us as silent.
            assert watched.longest_silence() <= 30.001
    assert handled == [exactly(HOUR * number) for number in range(1, 2 * count + 1)]


async def test_a_peer_that_falls_silent_behind_a_pause_is_lost(anyio_backend: object) -> None:
    watched = Watched(falls_silent=0)

    async def say(peer: Peer) -> None:
        await peer.send(CHUNK * 3)

    watched.says = say
    async with memory_peer(watched.play) as connectable:
        emitter = one_link(connectable=connectable, keepalive=30)
        emitter.on("message", pause, buffer=1, overflow="block")
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with emitter:
                await anyio.sleep_forever()
        # One is being handled and one waits: the third is taken in after an hour. Then the handler
        # goes on for two hours more, which the block waits for no longer than for its goodbye.
        assert watched.now == exactly(HOUR + 45 + 5)


async def test_what_came_with_connack_is_no_pause_for_ever(anyio_backend: object) -> None:
    lost = []

    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(packets.CONNACK + CHUNK * 5)
        start = anyio.current_time()
        while await peer.packet():
            pass
        lost.append(anyio.current_time() - start)

    async with memory_peer(script) as connectable:
        emitter = one_link(connectable=connectable, keepalive=30)
        emitter.on("message", lambda message: None, buffer=1, overflow="block")
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with emitter:
                await anyio.sleep_forever()
    assert lost == [exactly(45)]


# No polling


class Turns:
    """Counts how often the event loop wakes up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        if sniffio.current_async_library() == "trio":
            trio.lowlevel.add_instrument(_CountingInstrument(self))
            return
        selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]  # its own
        select = selector.select

        def counting_select(timeout: float | None = None) -> Any:
            self.count += 1
            return select(timeout)

        monkeypatch.setattr(selector, "select", counting_select)


class _CountingInstrument(trio.abc.Instrument):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def before_io_wait(self, timeout: float) -> None:
        self._turns.count += 1


async def test_nothing_is_polled(anyio_backend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    async with memory_peer(watched.play) as connectable:
        async with one_link(connectable=connectable, keepalive=60):
            await anyio.sleep(1)
            turns = Turns(monkeypatch)
            await anyio.sleep(HOUR)
            count = turns.count
    assert len(watched.pings) == 60
    # A few for each PINGREQ and its answer; a look every second alone would make 3600.
    assert count < 60 * 20
