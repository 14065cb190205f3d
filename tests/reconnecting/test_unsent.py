"""Publishes of QoS 0 around a lost link: sent later, uncertain, or never sent, and always told."""

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

# On the next link


class Stuck:
    """Peers of which the first takes CONNECT and no byte more, and the later ones are brokers."""

    def __init__(self) -> None:
        self.cut = anyio.Event()
        self.peers: list[Peer] = []
        self.open = True

    async def before(self, attempt: int) -> None:
        if attempt > 1 and not self.open:
            raise OSError("nobody is there")

    async def play(self, peer: Peer) -> None:
        self.peers.append(peer)
        if len(self.peers) > 1:
            await peer.serve()
            return
        await peer.accept()
        await self.cut.wait()

    def payloads(self) -> list[str]:
        """What was published on the last link."""
        return [one.payload.decode() for one in self.peers[-1].received if one.kind == PUBLISH]

    async def fill(self, emitter: Emitter, *texts: str) -> None:
        """Publish what gets stuck on the way, and behind it what no link has had a byte of."""
        await emitter.publish(KEY, "a/", "stuck" * 100)
        await anyio.wait_all_tasks_blocked()
        for text in texts:
            await emitter.publish(KEY, "a/", text)


async def test_what_no_link_has_had_goes_out_first_on_the_next(anyio_backend: object) -> None:
    stuck = Stuck()
    async with memory_peer(stuck.play, capacity=200, before=stuck.before) as connectable:
        async with connect_reconnecting(connectable=connectable) as emitter:
            await stuck.fill(emitter, *"123")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(emitter.publish, KEY, "a/", "4")
                async with emitter.stream("connect") as connected:
                    stuck.cut.set()
                    await connected.receive()
            await emitter.publish(KEY, "a/", "5")
            await emitter.flush()
            assert stuck.payloads() == [*"12345"]
            assert emitter.statistics().uncertain == 1
    assert emitter.statistics().unsent == 0


async def test_the_task_that_sends_ends_with_its_link(anyio_backend: object) -> None:
    class Deaf(MemoryStream):
        """Does not tell who sends that it is closed."""

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
        memory_peer(script, kind=Deaf) as connectable,
        connect_reconnecting(connectable=connectable, disconnect_timeout=0) as emitter,
        emitter.stream("connect") as connected,
    ):
        await anyio.wait_all_tasks_blocked()
        at_rest = len(running_tasks())
        for number in range(20):
            await emitter.publish(KEY, "a/", "stuck")
            if not number:
                await anyio.wait_all_tasks_blocked()
                assert len(running_tasks()) == at_rest + 1
            # Trio runs the tasks of a turn in either order: it may not have begun by then.
            cuts[-1].set()
            await connected.receive()
        await anyio.wait_all_tasks_blocked()
        assert len(running_tasks()) <= at_rest + 1
        cuts[-1].set()


async def test_confirmed_publishes_are_never_sent_again(anyio_backend: object) -> None:
    stuck = Stuck()

    async def publish() -> None:
        with pytest.raises(ConnectionLostError):
            await emitter.publish(KEY, "a/", "confirmed", qos=1)

    async with memory_peer(stuck.play, capacity=200) as connectable:
        async with connect_reconnecting(connectable=connectable) as emitter:
            await stuck.fill(emitter, "1")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(publish)
                await anyio.wait_all_tasks_blocked()
                await emitter.publish(KEY, "a/", "2")
                stuck.cut.set()
            await emitter.flush()
            assert stuck.payloads() == [*"12"]


async def test_a_link_that_is_not_restored_is_given_none_of_them(anyio_backend: object) -> None:
    stuck = Stuck()
    lost = 0

    async def play(peer: Peer) -> None:
        nonlocal lost
        if len(stuck.peers) in (1, 2):
            stuck.peers.append(peer)
            await peer.accept()
            await peer.until(SUBSCRIBE)
            lost += 1
        elif stuck.peers:
            await stuck.play(peer)
        else:
            # The first link takes a subscription before it gets stuck.
            stuck.peers.append(peer)
            await peer.accept()
            await peer.answer(await peer.until(SUBSCRIBE))
            await stuck.cut.wait()

    async with memory_peer(play, capacity=200) as connectable:
        async with connect_reconnecting(connectable=connectable) as emitter:
            await emitter.subscribe(KEY, "s/", 0)
            await stuck.fill(emitter, *"123")
            async with emitter.stream("connect") as connected:
                stuck.cut.set()
                await connected.receive()
            await emitter.publish(KEY, "a/", "4")
            await emitter.flush()
            assert lost == 2
            assert stuck.payloads() == [*"1234"]
            assert emitter.statistics().uncertain == 1


async def overfill(emitter: Emitter, key: str) -> int:
    """Publish numbers until many wait for a socket that takes no more; returns how many."""
    count = 0
    while emitter.statistics().queued_bytes < 50000:
        await emitter.publish(key, "a/", str(count).ljust(8000))
        count += 1
        for _ in range(5):
            await checkpoint()
    return count


async def test_over_sockets_what_was_not_handed_over_arrives_once_and_in_order(
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
            arrived = []
            while (message := await messages.receive()).binary != b"end":
                arrived.append(int(message.as_string()))
            uncertain = emitter.statistics().uncertain
            assert 0 < uncertain < count
            assert arrived == list(range(uncertain, count))


async def test_what_waits_for_a_full_socket_when_the_peer_hangs_up_is_untouched(
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
        return [int(one.payload) for one in peer.received if one.kind == PUBLISH]

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
    # Of one the peer may have a part.
    assert numbers(peers[0]) == list(range(uncertain - bool(peers[0].unparsed)))
    assert numbers(peers[1]) == list(range(uncertain, count))


# Uncertain


async def test_only_what_the_broker_has_not_confirmed_is_uncertain(
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


async def test_what_is_published_while_down_is_certain(broker: Broker) -> None:
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
async def test_without_a_next_link_they_are_told(
    anyio_backend: object, backoff: Backoff | None, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, errors = Stuck(), Calls()
    async with memory_peer(stuck.play, capacity=200, before=stuck.before) as connectable:
        emitter = connect(connectable=connectable, reconnect=backoff)
        emitter.on("error", errors)
        with pytest.raises(ConnectionLostError, match="lost"):
            async with emitter:
                await stuck.fill(emitter, *"123")
                stuck.open = False
                stuck.cut.set()
                await anyio.sleep_forever()
    assert emitter.statistics().unsent == 3
    assert emitter.statistics().uncertain == 1
    (error,) = errors.values
    assert isinstance(error, ConnectionLostError)
    assert "3 publishes" in str(error)
    assert caplog.messages.count(str(error)) == 1


def exactly(seconds: float) -> object:
    # asyncio's virtual clock goes a hair beyond each deadline.
    return pytest.approx(seconds, abs=1e-3)


@pytest.mark.virtual_time
async def test_leaving_while_down_tries_on_until_the_time_is_up(anyio_backend: object) -> None:
    stuck = Stuck()
    async with memory_peer(stuck.play, capacity=200, before=stuck.before) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=7)
        async with emitter, emitter.stream("disconnect") as gone:
            await stuck.fill(emitter, *"123")
            stuck.open = False
            stuck.cut.set()
            await gone.receive()
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(7)
        assert connectable.attempts > 10
    assert emitter.statistics().unsent == 3
    assert emitter.state == "closed"


@pytest.mark.virtual_time
async def test_leaving_while_down_takes_no_more_tries_than_there_are(anyio_backend: object) -> None:
    stuck = Stuck()
    async with memory_peer(stuck.play, capacity=200, before=stuck.before) as connectable:
        emitter = connect(connectable=connectable, reconnect=Backoff(0.5, 0.5, tries=2))
        async with emitter, emitter.stream("disconnect") as gone:
            await stuck.fill(emitter, *"123")
            stuck.open = False
            stuck.cut.set()
            await gone.receive()
            start = anyio.current_time()
        assert anyio.current_time() - start <= 1.1
        assert connectable.attempts == 3
    assert emitter.statistics().unsent == 3
    assert emitter.state == "closed"


@pytest.mark.virtual_time
@pytest.mark.parametrize("leave", ["body", "disconnect"])
async def test_leaving_while_down_sends_them_if_a_link_comes_in_time(
    anyio_backend: object, leave: str
) -> None:
    stuck = Stuck()

    async def open_later() -> None:
        await anyio.sleep(5)
        stuck.open = True

    async with memory_peer(stuck.play, capacity=200, before=stuck.before) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=7)
        async with anyio.create_task_group() as tasks:
            async with emitter, emitter.stream("disconnect") as gone:
                await stuck.fill(emitter, *"123")
                stuck.open = False
                stuck.cut.set()
                await gone.receive()
                tasks.start_soon(open_later)
                start = anyio.current_time()
                if leave == "disconnect":
                    await emitter.disconnect()
                    assert emitter.state == "closed"
            assert anyio.current_time() - start == pytest.approx(5, abs=0.1)
    assert stuck.payloads() == [*"123"]
    assert stuck.peers[-1].received[-1].kind == DISCONNECT
    assert emitter.statistics().unsent == 0


@pytest.mark.virtual_time
async def test_a_link_that_is_lost_while_leaving_is_made_up_for(anyio_backend: object) -> None:
    stuck = Stuck()

    async def cut_later() -> None:
        await anyio.sleep(1)
        stuck.cut.set()

    async with memory_peer(stuck.play, capacity=200) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=7)
        async with anyio.create_task_group() as tasks, emitter:
            await stuck.fill(emitter, *"123")
            tasks.start_soon(cut_later)
    assert stuck.payloads() == [*"123"]
    assert emitter.statistics().unsent == 0
    assert emitter.statistics().uncertain == 1


@pytest.mark.virtual_time
async def test_a_link_that_takes_nothing_holds_the_goodbye_for_the_timeout_only(
    anyio_backend: object,
) -> None:
    stuck = Stuck()
    async with memory_peer(stuck.play, capacity=200) as connectable:
        emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=7)
        async with emitter:
            await stuck.fill(emitter, *"123")
            start = anyio.current_time()
        assert anyio.current_time() - start == exactly(7)
        stuck.cut.set()
    assert emitter.statistics().unsent == 3
    assert emitter.statistics().links == 1


@pytest.mark.parametrize("down", [False, True])
async def test_cancelling_counts_them_at_once(
    anyio_backend: object, down: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = Stuck()
    async with memory_peer(stuck.play, capacity=200, before=stuck.before) as connectable:
        emitter = connect_reconnecting(connectable=connectable)
        with anyio.CancelScope() as scope:
            async with emitter, emitter.stream("disconnect") as gone:
                await stuck.fill(emitter, *"123")
                stuck.open = False
                if down:
                    stuck.cut.set()
                    await gone.receive()
                scope.cancel()
                await checkpoint()
        assert scope.cancelled_caught
        stuck.cut.set()
    assert emitter.statistics().unsent == 3
    assert "3 publishes" in caplog.text


async def test_what_waits_for_room_was_not_accepted(anyio_backend: object) -> None:
    stuck = Stuck()
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

    async with memory_peer(stuck.play, capacity=200) as connectable:
        emitter = connect_once(connectable=connectable)
        with pytest.raises(ConnectionLostError):
            async with emitter, anyio.create_task_group() as tasks:
                await stuck.fill(emitter)
                tasks.start_soon(publish)
                await anyio.wait_all_tasks_blocked()
                assert accepted > 1
                stuck.cut.set()
                await anyio.sleep_forever()
    assert raised == [ConnectionLostError]
    assert emitter.statistics().unsent == accepted
