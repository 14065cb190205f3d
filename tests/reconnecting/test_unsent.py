"""QoS 0 publishes around a lost connection: sent later, uncertain or unsent, and counted."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import Backoff, ConnectionLostError, Emitter, connect
from emitter_anyio.testing import Broker, FaultProxy
from tests.client.tools import Calls
from tests.support.connections import (
    QUICK_BACKOFF,
    connect_once,
    connect_reconnecting,
    force_reconnect,
    while_disconnected,
)
from tests.support.leaks import running_tasks
from tests.support.memory import MemoryStream
from tests.support.peer import DISCONNECT, PUBLISH, SUBSCRIBE, Peer, memory_peer, serving

KEY = "k" * 32

# Sent on the next connection


class StalledPeers:
    """Peers: the first reads CONNECT and nothing more, the later ones behave as brokers."""

    def __init__(self) -> None:
        self.cut = anyio.Event()
        self.peers: list[Peer] = []
        self.open = True

    async def before(self, attempt: int) -> None:
        if attempt > 1 and not self.open:
            raise OSError("refused")

    async def play(self, peer: Peer) -> None:
        self.peers.append(peer)
        if len(self.peers) > 1:
            await peer.serve()
            return
        await peer.accept()
        await self.cut.wait()

    def payloads(self) -> list[str]:
        """Return what was published on the last connection."""
        return [
            packet.payload.decode() for packet in self.peers[-1].received if packet.kind == PUBLISH
        ]

    async def fill(self, emitter: Emitter, *texts: str) -> None:
        """Publish a message that is sent in part, then ``texts``, which stay in the queue."""
        await emitter.publish(KEY, "a/", "stuck" * 100)
        await anyio.wait_all_tasks_blocked()
        for text in texts:
            await emitter.publish(KEY, "a/", text)


async def test_unsent_publishes_go_out_first_on_the_next_connection(anyio_backend: object) -> None:
    stalled = StalledPeers()
    async with memory_peer(stalled.play, capacity=200, before=stalled.before) as connectable:
        async with connect_reconnecting(connectable=connectable) as emitter:
            await stalled.fill(emitter, *"123")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(emitter.publish, KEY, "a/", "4")
                async with emitter.stream("connect") as connected:
                    stalled.cut.set()
                    await connected.receive()
            await emitter.publish(KEY, "a/", "5")
            await emitter.flush()
            assert stalled.payloads() == [*"12345"]
            assert emitter.statistics().uncertain == 1
    assert emitter.statistics().unsent == 0


async def test_sending_task_ends_with_its_connection(anyio_backend: object) -> None:
    class StallingStream(MemoryStream):
        """A stream whose ``send()`` never returns for some data, even after closing."""

        async def send(self, item: bytes) -> None:
            if b"stuck" in item:
                await anyio.sleep_forever()
            await super().send(item)

    cuts: list[anyio.Event] = []

    async def script(peer: Peer) -> None:
        cuts.append(anyio.Event())
        await peer.accept()
        await cuts[-1].wait()

    async with (
        memory_peer(script, kind=StallingStream) as connectable,
        connect_reconnecting(connectable=connectable, disconnect_timeout=0) as emitter,
        emitter.stream("connect") as connected,
    ):
        await anyio.wait_all_tasks_blocked()
        idle_count = len(running_tasks())
        for number in range(20):
            await emitter.publish(KEY, "a/", "stuck")
            if not number:
                await anyio.wait_all_tasks_blocked()
                assert len(running_tasks()) == idle_count + 1
            # Trio runs ready tasks in random order, so the task might not have started yet.
            cuts[-1].set()
            await connected.receive()
        await anyio.wait_all_tasks_blocked()
        assert len(running_tasks()) <= idle_count + 1
        cuts[-1].set()


async def test_publishes_with_qos_1_are_never_resent(anyio_backend: object) -> None:
    stalled = StalledPeers()

    async def publish() -> None:
        with pytest.raises(ConnectionLostError):
            await emitter.publish(KEY, "a/", "confirmed", qos=1)

    async with memory_peer(stalled.play, capacity=200) as connectable:
        async with connect_reconnecting(connectable=connectable) as emitter:
            await stalled.fill(emitter, "1")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(publish)
                await anyio.wait_all_tasks_blocked()
                await emitter.publish(KEY, "a/", "2")
                stalled.cut.set()
            await emitter.flush()
            assert stalled.payloads() == [*"12"]


async def test_unsent_publishes_wait_for_a_restored_connection(anyio_backend: object) -> None:
    stalled = StalledPeers()
    lost = 0

    async def play(peer: Peer) -> None:
        nonlocal lost
        if len(stalled.peers) in (1, 2):
            stalled.peers.append(peer)
            await peer.accept()
            await peer.until(SUBSCRIBE)
            lost += 1
        elif stalled.peers:
            await stalled.play(peer)
        else:
            # The first connection takes a subscription before it stalls.
            stalled.peers.append(peer)
            await peer.accept()
            await peer.answer(await peer.until(SUBSCRIBE))
            await stalled.cut.wait()

    async with memory_peer(play, capacity=200) as connectable:
        async with connect_reconnecting(connectable=connectable) as emitter:
            await emitter.subscribe(KEY, "s/", 0)
            await stalled.fill(emitter, *"123")
            async with emitter.stream("connect") as connected:
                stalled.cut.set()
                await connected.receive()
            await emitter.publish(KEY, "a/", "4")
            await emitter.flush()
            assert lost == 2
            assert stalled.payloads() == [*"1234"]
            assert emitter.statistics().uncertain == 1


async def overfill(emitter: Emitter, key: str) -> int:
    """Publish numbers until a full socket makes many wait, and return their count."""
    count = 0
    while emitter.statistics().queued_bytes < 50000:
        await emitter.publish(key, "a/", str(count).ljust(8000))
        count += 1
        for _ in range(5):
            await checkpoint()
    return count


async def test_unsent_publishes_over_sockets_arrive_once_and_in_order(
    anyio_backend: object,
) -> None:
    async with Broker() as broker, FaultProxy(broker.host, broker.port) as proxy:
        key = broker.keygen("a/")
        async with (
            connect(broker.url) as subscriber,
            subscriber.subscribe(key, "a/", buffer=10000) as messages,
            connect_reconnecting(proxy.url) as emitter,
            emitter.stream("connect") as connected,
        ):
            proxy.stall("to_broker")
            count = await overfill(emitter, key)
            await proxy.cut()
            proxy.resume("to_broker")
            await connected.receive()
            await emitter.publish(key, "a/", "end", qos=1)
            received = []
            while (message := await messages.receive()).binary != b"end":
                received.append(int(message.as_string()))
            uncertain = emitter.statistics().uncertain
            assert 0 < uncertain < count
            assert received == list(range(uncertain, count))


async def test_publishes_waiting_for_a_full_socket_are_unsent_when_the_peer_closes(
    anyio_backend: object,
) -> None:
    peers: list[Peer] = []
    full = anyio.Event()

    async def script(peer: Peer) -> None:
        peers.append(peer)
        if len(peers) > 1:
            await peer.serve()
            return
        await peer.accept()
        await full.wait()
        await peer.stream.send_eof()
        while await peer.packet():
            pass

    def numbers(peer: Peer) -> list[int]:
        return [int(packet.payload) for packet in peer.received if packet.kind == PUBLISH]

    async with serving("unix", script) as options:
        async with (
            connect_reconnecting(**options) as emitter,
            emitter.stream("connect") as connected,
        ):
            count = await overfill(emitter, KEY)
            full.set()
            await connected.receive()
            await emitter.flush()
            uncertain = emitter.statistics().uncertain
    assert 0 < uncertain < count
    # The peer might hold an incomplete packet at the end.
    assert numbers(peers[0]) == list(range(uncertain - bool(peers[0].unparsed)))
    assert numbers(peers[1]) == list(range(uncertain, count))


# Uncertain


async def test_only_unacknowledged_publishes_are_uncertain(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    key = broker.keygen("a/")
    async with connect_reconnecting(broker.url) as emitter:
        for _ in range(3):
            await emitter.publish(key, "a/", "x")
        await emitter.flush()
        for _ in range(2):
            await emitter.publish(key, "a/", "x")
        await force_reconnect(emitter, broker)
        assert emitter.statistics().uncertain == 2
        await force_reconnect(emitter, broker)
        assert emitter.statistics().uncertain == 2
    assert len([text for text in caplog.messages if "2 publishes" in text]) == 1


async def test_publishes_made_while_down_are_not_uncertain(broker: Broker) -> None:
    key = broker.keygen("a/")
    async with (
        connect_reconnecting(broker.url) as emitter,
        connect(broker.url, reconnect=QUICK_BACKOFF) as other,
    ):
        async with other.subscribe(key, "a/") as messages, anyio.create_task_group() as tasks:
            async with other.stream("connect") as connected:
                async with while_disconnected(emitter, broker):
                    tasks.start_soon(emitter.publish, key, "a/", "x")
                    await checkpoint()
                    with pytest.raises(TimeoutError), anyio.fail_after(0.001):
                        await emitter.publish(key, "a/", "given up")
                await connected.receive()
            await emitter.flush()
            await other.flush()
            assert messages.statistics().current_buffer_used <= 1
        assert emitter.statistics().uncertain == 0


# Never sent


@pytest.mark.parametrize("backoff", [None, Backoff(0.001, 0.001, tries=3)])
async def test_unsent_publishes_are_reported_without_a_next_connection(
    anyio_backend: object, backoff: Backoff | None, caplog: pytest.LogCaptureFixture
) -> None:
    stalled, errors = StalledPeers(), Calls()
    async with memory_peer(stalled.play, capacity=200, before=stalled.before) as connectable:
        emitter = connect(connectable=connectable, reconnect=backoff)
        emitter.on("error", errors)
        with pytest.raises(ConnectionLostError, match="lost"):
            async with emitter:
                await stalled.fill(emitter, *"123")
                stalled.open = False
                stalled.cut.set()
                await anyio.sleep_forever()
    assert emitter.statistics().unsent == 3
    assert emitter.statistics().uncertain == 1
    (error,) = errors.values
    assert isinstance(error, ConnectionLostError)
    assert "3 publishes" in str(error)
    assert caplog.messages.count(str(error)) == 1


def exactly(seconds: float) -> object:
    # asyncio's virtual clock overshoots each deadline a little.
    return pytest.approx(seconds, abs=1e-3)


@pytest.mark.virtual_time
async def test_leaving_while_down_keeps_trying_until_disconnect_timeout(
    anyio_backend: object,
) -> None:
    stalled = StalledPeers()
    async with memory_peer(stalled.play, capacity=200, before=stalled.before) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=7)
        async with emitter, emitter.stream("disconnect") as disconnected:
            await stalled.fill(emitter, *"123")
            stalled.open = False
            stalled.cut.set()
            await disconnected.receive()
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(7)
        assert connectable.attempts > 10
    assert emitter.statistics().unsent == 3
    assert emitter.state == "closed"


@pytest.mark.virtual_time
async def test_leaving_while_down_stops_when_the_tries_are_used_up(anyio_backend: object) -> None:
    stalled = StalledPeers()
    async with memory_peer(stalled.play, capacity=200, before=stalled.before) as connectable:
        emitter = connect(connectable=connectable, reconnect=Backoff(0.5, 0.5, tries=2))
        async with emitter, emitter.stream("disconnect") as disconnected:
            await stalled.fill(emitter, *"123")
            stalled.open = False
            stalled.cut.set()
            await disconnected.receive()
            start = anyio.current_time()
        assert anyio.current_time() - start <= 1.1
        assert connectable.attempts == 3
    assert emitter.statistics().unsent == 3
    assert emitter.state == "closed"


@pytest.mark.virtual_time
@pytest.mark.parametrize("leave", ["block", "disconnect"])
async def test_leaving_while_down_sends_unsent_publishes_if_it_reconnects_in_time(
    anyio_backend: object, leave: str
) -> None:
    stalled = StalledPeers()

    async def open_later() -> None:
        await anyio.sleep(5)
        stalled.open = True

    async with memory_peer(stalled.play, capacity=200, before=stalled.before) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=7)
        async with anyio.create_task_group() as tasks:
            async with emitter, emitter.stream("disconnect") as disconnected:
                await stalled.fill(emitter, *"123")
                stalled.open = False
                stalled.cut.set()
                await disconnected.receive()
                tasks.start_soon(open_later)
                start = anyio.current_time()
                if leave == "disconnect":
                    await emitter.disconnect()
                    assert emitter.state == "closed"
            assert anyio.current_time() - start == pytest.approx(5, abs=0.1)
    assert stalled.payloads() == [*"123"]
    assert stalled.peers[-1].received[-1].kind == DISCONNECT
    assert emitter.statistics().unsent == 0


@pytest.mark.virtual_time
async def test_connection_lost_while_leaving_is_replaced_to_send_the_rest(
    anyio_backend: object,
) -> None:
    stalled = StalledPeers()

    async def cut_later() -> None:
        await anyio.sleep(1)
        stalled.cut.set()

    async with memory_peer(stalled.play, capacity=200) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=7)
        async with anyio.create_task_group() as tasks, emitter:
            await stalled.fill(emitter, *"123")
            tasks.start_soon(cut_later)
    assert stalled.payloads() == [*"123"]
    assert emitter.statistics().unsent == 0
    assert emitter.statistics().uncertain == 1


@pytest.mark.virtual_time
async def test_stalled_connection_delays_leaving_for_disconnect_timeout_only(
    anyio_backend: object,
) -> None:
    stalled = StalledPeers()
    async with memory_peer(stalled.play, capacity=200) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=7)
        async with emitter:
            await stalled.fill(emitter, *"123")
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(7)
        stalled.cut.set()
    assert emitter.statistics().unsent == 3
    assert emitter.statistics().connections == 1


@pytest.mark.parametrize("down", [False, True])
async def test_cancelling_counts_unsent_publishes_immediately(
    anyio_backend: object, down: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stalled = StalledPeers()
    async with memory_peer(stalled.play, capacity=200, before=stalled.before) as connectable:
        emitter = connect_reconnecting(connectable=connectable)
        with anyio.CancelScope() as scope:
            async with emitter, emitter.stream("disconnect") as disconnected:
                await stalled.fill(emitter, *"123")
                stalled.open = False
                if down:
                    stalled.cut.set()
                    await disconnected.receive()
                scope.cancel()
                await checkpoint()
        assert scope.cancelled_caught
        stalled.cut.set()
    assert emitter.statistics().unsent == 3
    assert "3 publishes" in caplog.text


async def test_publish_waiting_for_queue_space_is_not_counted_as_unsent(
    anyio_backend: object,
) -> None:
    stalled = StalledPeers()
    accepted = 0
    raised: list[type[BaseException]] = []

    async def publish() -> None:
        nonlocal accepted
        try:
            while True:
                await emitter.publish(KEY, "a/", "x" * 50_000)
                accepted += 1
        except ConnectionLostError as exc:
            raised.append(type(exc))

    async with memory_peer(stalled.play, capacity=200) as connectable:
        emitter = connect_once(connectable=connectable)
        with pytest.raises(ConnectionLostError):
            async with emitter, anyio.create_task_group() as tasks:
                await stalled.fill(emitter)
                tasks.start_soon(publish)
                await anyio.wait_all_tasks_blocked()
                assert accepted > 1
                stalled.cut.set()
                await anyio.sleep_forever()
    assert raised == [ConnectionLostError]
    assert emitter.statistics().unsent == accepted
