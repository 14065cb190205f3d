"""Reconnecting restores everything before ``connect`` is emitted."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from emitter_anyio import (
    Backoff,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    PresenceFeed,
    RequestTimeoutError,
    connect,
)
from emitter_anyio.testing import Broker, FaultProxy
from tests.client.tools import Calls, texts
from tests.support.connections import (
    QUICK_BACKOFF,
    connect_reconnecting,
    force_reconnect,
    subscribed_channels,
    while_disconnected,
)
from tests.support.peer import DISCONNECT, Peer, memory_peer

# Restored state


async def test_streams_continue_on_the_next_connection(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/") as one, emitter.subscribe(key, "b/") as two:
        for round in "123":
            await broker.publish("a/", f"a{round}")
            await broker.publish("b/", f"b{round}")
            assert (await one.receive()).as_string() == f"a{round}"
            assert (await two.receive()).as_string() == f"b{round}"
            await force_reconnect(emitter, broker)
        assert subscribed_channels(broker) == ["a/", "b/"]
        assert one.statistics().gaps == 3
    assert emitter.statistics().connections == 4


async def test_stored_messages_are_not_replayed_again(broker: Broker, key: str) -> None:
    async with connect_reconnecting(broker.url) as emitter:
        await emitter.publish(key, "a/", "old", 60, qos=1)
        async with emitter.subscribe(key, "a/", last=5) as messages:
            assert (await messages.receive()).as_string() == "old"
            await force_reconnect(emitter, broker)
            await emitter.publish(key, "a/", "new", qos=1)
            assert (await messages.receive()).as_string() == "new"


async def test_awaited_subscriptions_are_restored(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, "a/")
    await force_reconnect(emitter, broker)
    await emitter.subscribe(key, "a/")
    await broker.publish("a/", "x")
    assert texts(await calls.get(1)) == ["x"]
    await emitter.unsubscribe(key, "a/")
    assert subscribed_channels(broker) == []
    await force_reconnect(emitter, broker)
    assert subscribed_channels(broker) == []


async def test_every_key_of_a_channel_is_restored(broker: Broker, emitter: Emitter) -> None:
    keys = [broker.keygen("a/"), broker.keygen("a/#/")]
    async with emitter.subscribe(keys[0], "a/") as one, emitter.subscribe(keys[1], "a/") as two:
        await force_reconnect(emitter, broker)
        await broker.publish("a/", "x")
        assert (await one.receive()).binary == (await two.receive()).binary == b"x"
    await emitter.flush()
    assert subscribed_channels(broker) == []


async def test_groups_are_restored_as_groups(broker: Broker, emitter: Emitter) -> None:
    key = broker.keygen("$share/g/a/", "r")
    async with emitter.subscribe(key, "a/", group="g") as messages:
        await force_reconnect(emitter, broker)
        assert subscribed_channels(broker) == ["$share/g/a/"]
        await broker.publish("a/", "x")
        assert (await messages.receive()).binary == b"x"


def confirmed_names(feed: PresenceFeed) -> list[str | None]:
    return [member.username for member in feed.members.values() if member.confirmed]


async def test_presence_feed_is_updated_after_the_outage(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with connect(broker.url, username="old") as old:
        await old.subscribe(key, "a/")
        async with emitter.watch_presence(key, "a/", refresh=None) as feed:
            assert [member.username for member in feed.members.values()] == ["old"]
            async with connect(broker.url, username="new", reconnect=QUICK_BACKOFF) as new:
                await new.subscribe(key, "a/")
                await old.disconnect()
                async with new.stream("connect") as connected:
                    await force_reconnect(emitter, broker)
                    await connected.receive()
                # Members known from earlier connections stay, but unconfirmed.
                while confirmed_names(feed) != ["new"]:
                    await anyio.lowlevel.checkpoint()
                assert feed.statistics().gaps == 1


async def test_presence_feed_does_not_confirm_a_subchannel_member_that_left_during_the_outage(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.watch_presence(key, "a/", refresh=None) as feed:
        assert (await feed.receive()).event == "status"
        async with connect(broker.url, username="guest") as guest:
            await guest.subscribe(key, "a/b/")
            assert (await feed.receive()).event == "subscribe"
            async with while_disconnected(emitter, broker):
                await guest.disconnect()
        # A status does not list subchannels, so only an event could remove the guest.
        while confirmed_names(feed):
            await anyio.lowlevel.checkpoint()
        assert [member.username for member in feed.members.values()] == ["guest"]


async def test_presence_feed_continues_after_a_loss_during_its_refresh(broker: Broker) -> None:
    key = broker.keygen("a/", "rp")
    async with connect_reconnecting(broker.url) as emitter, emitter.stream("error") as errors:
        async with emitter.watch_presence(key, "a/", refresh=0.01) as feed:
            with broker.hold("reply", "puback"):
                while not emitter.statistics().pending:
                    await anyio.lowlevel.checkpoint()
                async with emitter.stream("disconnect") as disconnected:
                    await broker.drop()
                    await disconnected.receive()
            await emitter.wait_connected()
            async with emitter.subscribe(key, "a/"):
                async for event in feed:
                    if event.who:
                        break
            assert errors.statistics().current_buffer_used == 0


async def test_changes_are_restored(broker: Broker, emitter: Emitter, key: str) -> None:
    calls = Calls()
    emitter.on("presence", calls)
    await emitter.presence(key, "a/", changes=True)
    await calls.get(1)
    await force_reconnect(emitter, broker)
    count = len(calls.values)
    async with connect(broker.url, username="guest") as guest:
        await guest.subscribe(key, "a/b/")
        last = (await calls.get(count + 1))[-1]
        assert [member.username for member in last.who] == ["guest"]
    await emitter.presence(key, "a/", changes=False)
    await force_reconnect(emitter, broker)
    assert not any(client.peer.watched for client in broker.clients)


async def test_changes_are_restored_with_the_last_key(broker: Broker, emitter: Emitter) -> None:
    old, new = broker.keygen("a/", "p"), broker.keygen("a/#/", "rp")
    await emitter.presence(old, "a/", changes=True)
    await emitter.presence(new, "a/", changes=True)
    await emitter.keyban(broker.secret_key, old)
    await force_reconnect(emitter, broker)
    async with emitter.stream("presence") as changes, connect(broker.url) as other:
        await other.subscribe(new, "a/")
        assert (await changes.receive()).event == "subscribe"


async def test_links_are_restored(broker: Broker, emitter: Emitter, key: str) -> None:
    await emitter.link(key, "a/", "x", subscribe=True, ttl=60)
    calls = Calls()
    emitter.on("message", calls)
    await force_reconnect(emitter, broker)
    await emitter.publish_with_link("x", "through", qos=1)
    assert texts(await calls.get(1)) == ["through"]
    stored = [message.as_string() async for message in emitter.history(key, "a/")]
    assert stored == ["through"]


async def test_request_and_serve_continue(broker: Broker, emitter: Emitter, key: str) -> None:
    async def double(message: EmitterMessage) -> int:
        return 2 * int(message.as_object())

    async with connect_reconnecting(broker.url) as server, anyio.create_task_group() as tasks:
        await tasks.start(server.serve, key, "double/", double)
        for number in range(3):
            reply = await emitter.request(key, "double/", number)
            assert reply.as_object() == 2 * number
            async with server.stream("connect") as connected:
                await force_reconnect(emitter, broker)
                await connected.receive()
        tasks.cancel_scope.cancel()


async def test_everything_is_restored_before_connect_is_emitted(broker: Broker, key: str) -> None:
    found: list[list[str]] = []
    emitter = connect_reconnecting(broker.url)
    emitter.on("connect", lambda: found.append(subscribed_channels(broker)))
    async with emitter:
        await emitter.link(key, "l/", "x")
        await emitter.presence(key, "p/", changes=True)
        async with (
            emitter.subscribe(key, "a/"),
            emitter.subscribe(key, "b/"),
            emitter.watch_presence(key, "w/"),
        ):
            with broker.hold("suback"):
                async with emitter.stream("connect") as connected:
                    await broker.drop()
                    while not subscribed_channels(broker):
                        await anyio.lowlevel.checkpoint()
                    await anyio.wait_all_tasks_blocked()
                    assert emitter.state == "connecting"
                    assert emitter.connection is None
                    with pytest.raises(anyio.WouldBlock):
                        connected.receive_nowait()
            await emitter.wait_connected()
            (client,) = broker.clients
            assert list(client.peer.links) == ["x"]
            assert len(client.peer.watched) == 2
    assert found == [[], ["a/", "b/"]]


async def test_connection_is_replaced(broker: Broker, emitter: Emitter) -> None:
    first = await emitter.me()
    before = emitter.connection
    assert before is not None
    assert before.id == first.id
    assert before.last_error is None
    await force_reconnect(emitter, broker)
    after = emitter.connection
    assert after is not None
    assert after.server == before.server
    assert after.since >= before.since
    assert after.id is None
    assert isinstance(after.last_error, EOFError | OSError)
    assert (await emitter.me()).id != first.id


async def test_each_event_is_logged(
    broker: Broker, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "emitter_anyio")
    async with connect_reconnecting(broker.url) as emitter:
        async with emitter.subscribe(key, "a/"), emitter.watch_presence(key, "b/"):
            await force_reconnect(emitter, broker)
        assert emitter.connection is not None
        cause = emitter.connection.last_error
    lines = [text for text in caplog.messages if not text.startswith("try ")]
    assert len(lines) == 4
    assert all(broker.url in line for line in lines)
    assert str(cause) in lines[1]
    assert "2" in lines[2].replace(broker.url, "")


# Brokers that answer late or never


@pytest.mark.virtual_time
async def test_broker_that_acknowledges_nothing_is_left_after_request_timeout(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        Broker() as broker,
        connect_reconnecting(connectable=broker.connectable(), request_timeout=5) as emitter,
    ):
        async with emitter.subscribe(broker.keygen("a/", "r"), "a/") as messages:
            with broker.lose("suback"):
                await broker.drop()
                # The next connection is open by then, and waits for the rest of the 5 s.
                await anyio.sleep(1)
                assert emitter.connection is None
                assert subscribed_channels(broker) == ["a/"]
                (silent,) = broker.clients
                await silent.wait_closed()
                assert emitter.state == "connecting"
            await emitter.wait_connected()
            await broker.publish("a/", "x")
            assert (await messages.receive()).binary == b"x"
            assert emitter.connection is not None
            assert isinstance(emitter.connection.last_error, RequestTimeoutError)
            assert messages.statistics().gaps == 1
    assert " 5 s" in caplog.text


async def test_connection_lost_while_restoring_emits_no_events(broker: Broker, key: str) -> None:
    async with connect_reconnecting(broker.url) as emitter, emitter.stream("connect") as connected:
        async with (
            emitter.stream("disconnect") as disconnected,
            emitter.subscribe(key, "a/") as messages,
        ):
            for _ in range(3):
                with broker.hold("suback"):
                    await broker.drop()
                    while not subscribed_channels(broker):
                        await anyio.lowlevel.checkpoint()
            await connected.receive()
            await broker.publish("a/", "x")
            assert (await messages.receive()).binary == b"x"
            assert messages.statistics().gaps == 1
            assert disconnected.statistics().current_buffer_used == 1
            assert emitter.statistics().connections == 2


class SlowPeer:
    """A peer that answers late, or never, on every connection except the first."""

    def __init__(self, seconds: float | None) -> None:
        self.connections = 0
        self.lost = anyio.Event()
        self._seconds = seconds

    async def play(self, peer: Peer) -> None:
        self.connections += 1
        await peer.accept()
        if self.connections == 1:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(peer.answer_all)
                await self.lost.wait()
                tasks.cancel_scope.cancel()
            return
        while (packet := await peer.packet()) and packet.kind != DISCONNECT:
            if self._seconds is not None:
                await anyio.sleep(self._seconds)
                await peer.answer(packet)


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("seconds", "subscriptions"),
    [
        (3, 6),
        # The first reply may take twice the timeout.
        (7, 2),
    ],
)
async def test_restoring_continues_while_the_broker_keeps_answering(
    anyio_backend: object, seconds: float, subscriptions: int
) -> None:
    slow = SlowPeer(seconds)
    async with memory_peer(slow.play) as connectable:
        async with (
            connect_reconnecting(connectable=connectable, request_timeout=5) as emitter,
            emitter.stream("connect") as connected,
        ):
            for number in range(subscriptions):
                await emitter.subscribe("k", f"c/{number}/", 0)
            slow.lost.set()
            start = anyio.current_time()
            await connected.receive()
            assert anyio.current_time() - start == pytest.approx(subscriptions * seconds, abs=0.1)
    assert slow.connections == 2


@pytest.mark.virtual_time
async def test_connections_that_cannot_be_restored_use_up_the_tries(
    anyio_backend: object,
) -> None:
    slow = SlowPeer(None)
    backoff = Backoff(initial=1, maximum=2, tries=3)
    async with memory_peer(slow.play) as connectable:
        with pytest.raises(ConnectionLostError, match="3 tries"):
            async with connect(
                connectable=connectable, request_timeout=5, reconnect=backoff
            ) as emitter:
                await emitter.subscribe("k", "c/", 0)
                slow.lost.set()
                await anyio.sleep_forever()
    assert slow.connections == 4


@pytest.mark.virtual_time
async def test_broker_that_never_answers_connect_is_left_after_connect_timeout(
    anyio_backend: object,
) -> None:
    scripts = [Peer.accept, Peer.packet, Peer.serve]

    async def play(peer: Peer) -> None:
        script = scripts.pop(0)
        await script(peer)
        if script is Peer.packet:
            await peer.rest()

    async with memory_peer(play) as connectable:
        async with connect_reconnecting(connectable=connectable, connect_timeout=7) as emitter:
            await anyio.sleep(1)
            start = anyio.current_time()
            await emitter.flush()
            assert anyio.current_time() - start == pytest.approx(6, abs=0.1)
            assert emitter.connection is not None
            assert "no answer within 7 s" in str(emitter.connection.last_error)


async def test_reconnecting_works_when_data_arrives_in_single_bytes(
    broker: Broker, key: str
) -> None:
    async with (
        FaultProxy(broker.host, broker.port) as proxy,
        connect_reconnecting(proxy.url) as emitter,
        emitter.stream("connect") as connected,
        emitter.subscribe(key, "a/") as messages,
    ):
        proxy.split(1)
        await proxy.cut()
        await connected.receive()
        await emitter.publish(key, "a/", "x", qos=1)
        assert (await messages.receive()).binary == b"x"
