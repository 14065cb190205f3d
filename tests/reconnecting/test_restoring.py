"""Restoring a connection: refusals, and subscriptions that start or end at the same time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import (
    Backoff,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    UnauthorizedError,
    connect,
)
from emitter_anyio.testing import Broker
from tests.client.tools import Calls, texts
from tests.support.connections import (
    connect_reconnecting,
    force_reconnect,
    subscribed_channels,
    while_disconnected,
    while_disconnected_nowait,
)


@pytest.fixture
async def other(broker: Broker) -> AsyncIterator[Emitter]:
    """Another client, which acts while the first one is disconnected."""
    async with connect(broker.url, reconnect=Backoff(0, 0)) as other:
        yield other


async def ban(broker: Broker, *keys: str) -> None:
    async with connect(broker.url) as banning_client:
        for key in keys:
            assert await banning_client.keyban(broker.secret_key, key)


async def until_subscribed(broker: Broker) -> None:
    """Wait until the broker has a subscription."""
    while not subscribed_channels(broker):
        await checkpoint()


# Refusals


async def test_banned_key_raises_only_in_its_own_stream(
    broker: Broker, emitter: Emitter, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = broker.keygen("a/"), broker.keygen("b/")
    errors = Calls()
    emitter.on("error", errors)
    async with emitter.subscribe(good, "a/") as one, emitter.subscribe(bad, "b/") as two:
        await broker.publish("b/", "before")
        await emitter.flush()
        await ban(broker, bad)
        await force_reconnect(emitter, broker)
        await broker.publish("a/", "after")
        assert (await one.receive()).binary == b"after"
        assert (await two.receive()).binary == b"before"
        for _ in range(2):
            with pytest.raises(UnauthorizedError, match="subscribe 'b/'"):
                await two.receive()
        assert subscribed_channels(broker) == ["a/"]
        assert not errors.values
    await emitter.flush()
    assert subscribed_channels(broker) == []
    assert not errors.values
    refused = [text for text in caplog.messages if "401 the" in text]
    assert len(refused) == 1
    assert bad not in caplog.text


async def test_stream_with_a_valid_key_continues_beside_one_with_a_banned_key(
    broker: Broker, emitter: Emitter
) -> None:
    good, bad = broker.keygen("a/"), broker.keygen("a/#/")
    async with emitter.subscribe(bad, "a/") as two:
        async with emitter.subscribe(good, "a/") as one:
            await ban(broker, bad)
            await force_reconnect(emitter, broker)
            with pytest.raises(UnauthorizedError):
                await two.receive()
            await broker.publish("a/", "after")
            assert (await one.receive()).binary == b"after"
        await emitter.flush()
        assert subscribed_channels(broker) == []


async def test_refused_awaited_subscription_emits_error_once(
    broker: Broker, emitter: Emitter, caplog: pytest.LogCaptureFixture
) -> None:
    key = broker.keygen("a/")
    errors = Calls()
    emitter.on("error", errors)
    await emitter.subscribe(key, "a/")
    await ban(broker, key)
    await force_reconnect(emitter, broker)
    (error,) = await errors.get(1)
    assert isinstance(error, UnauthorizedError)
    with pytest.raises(UnauthorizedError):
        await emitter.subscribe(key, "a/")
    await force_reconnect(emitter, broker)
    assert len(errors.values) == 1


async def test_refusal_without_an_error_handler_is_logged_once(
    broker: Broker, emitter: Emitter, caplog: pytest.LogCaptureFixture
) -> None:
    key = broker.keygen("#/", "rp")
    await emitter.subscribe(key, "a/")
    await emitter.presence(key, "p/", changes=True)
    await ban(broker, key)
    await force_reconnect(emitter, broker)
    lines = [text for text in caplog.messages if "401" in text]
    assert len(lines) == 2
    assert any("presence 'p/': 401" in text for text in lines)
    assert any("subscribe 'a/': 401" in text for text in lines)


async def test_refused_presence_feed_raises_in_its_own_stream(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    bad = broker.keygen("b/", "p")
    async with emitter.watch_presence(key, "a/") as one, emitter.watch_presence(bad, "b/") as two:
        assert (await one.receive()).event == "status"
        assert (await two.receive()).event == "status"
        await ban(broker, bad)
        await force_reconnect(emitter, broker)
        for _ in range(2):
            with pytest.raises(UnauthorizedError):
                await two.receive()
        await emitter.subscribe(key, "a/b/")
        assert (await one.receive()).event == "subscribe"


async def test_refused_changes_emit_error(broker: Broker, emitter: Emitter) -> None:
    bad = broker.keygen("b/", "p")
    errors = Calls()
    emitter.on("error", errors)
    await emitter.presence(bad, "b/", changes=True)
    await ban(broker, bad)
    await force_reconnect(emitter, broker)
    (error,) = await errors.get(1)
    assert isinstance(error, UnauthorizedError)
    await force_reconnect(emitter, broker)
    assert len(errors.values) == 1


async def test_link_that_cannot_be_restored_emits_error(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    calls = 0

    async def provide() -> str:
        nonlocal calls
        calls += 1
        return key

    errors = Calls()
    emitter.on("error", errors)
    await emitter.link(provide, "a/", "x")
    with broker.lose("reply"):
        await force_reconnect(emitter, broker)
    (error,) = await errors.get(1)
    assert "acknowledged" in str(error)
    await force_reconnect(emitter, broker)
    assert len(errors.values) == 1
    assert calls == 1


async def test_request_subscribes_to_its_replies_again_after_a_refusal(
    broker: Broker, emitter: Emitter
) -> None:
    key = broker.keygen("double/#/")
    async with connect_reconnecting(broker.url) as server, anyio.create_task_group() as tasks:
        await tasks.start(server.serve, broker.keygen("double/#/"), "double/", lambda _: "yes")
        assert (await emitter.request(key, "double/", "?")).binary == b"yes"
        await ban(broker, key)
        async with server.stream("connect") as connected:
            await force_reconnect(emitter, broker)
            await connected.receive()
        with pytest.raises(UnauthorizedError):
            await emitter.request(key, "double/", "?")
        await emitter.keyban(broker.secret_key, key, False)
        assert (await emitter.request(key, "double/", "?")).binary == b"yes"
        tasks.cancel_scope.cancel()


async def test_serve_raises_when_its_restore_is_refused(broker: Broker, emitter: Emitter) -> None:
    key = broker.keygen("double/#/")
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            await tasks.start(emitter.serve, key, "double/", lambda _: "yes")
            await ban(broker, key)
            await force_reconnect(emitter, broker)
            await anyio.sleep_forever()
    assert [type(exc) for exc in caught.value.exceptions] == [UnauthorizedError]


async def test_broker_with_another_licence_refuses_everything(anyio_backend: object) -> None:
    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        async with Broker() as old:
            emitter: Emitter = await tasks.start(connect_reconnecting(old.url).run)
            enter = stack.enter_async_context
            one = await enter(emitter.subscribe(old.keygen("a/"), "a/"))
            two = await enter(emitter.subscribe(old.keygen("b/"), "b/"))
            feed = await enter(emitter.watch_presence(old.keygen("w/", "p"), "w/"))
            assert (await feed.receive()).event == "status"
            connected = await enter(emitter.stream("connect"))
        async with Broker(port=old.port) as new:
            await connected.receive()
            for receive in (one.receive, two.receive, feed.receive):
                with pytest.raises(UnauthorizedError):
                    await receive()
            # The client itself still works.
            async with emitter.subscribe(new.keygen("a/"), "a/") as fresh:
                await new.publish("a/", "x")
                assert (await fresh.receive()).binary == b"x"
            await emitter.disconnect()


# Subscriptions that start or end during the outage


async def test_subscription_entered_while_down_subscribes_once(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    received = []

    async def subscribe() -> None:
        async with emitter.subscribe(key, "a/") as messages:
            assert messages.statistics().gaps == 0
            received.append((await messages.receive()).binary)

    async with anyio.create_task_group() as tasks:
        async with while_disconnected(emitter, broker):
            tasks.start_soon(subscribe)
            for _ in range(10):
                await checkpoint()
        await until_subscribed(broker)
        await broker.publish("a/", "x")
    assert received == [b"x"]
    await emitter.flush()
    assert subscribed_channels(broker) == []


async def test_subscription_left_while_down_is_not_restored(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    await emitter.subscribe(key, "b/")
    async with AsyncExitStack() as stack:
        async with emitter.subscribe(key, "a/"), emitter.watch_presence(key, "w/"):
            await stack.enter_async_context(while_disconnected(emitter, broker))
    assert subscribed_channels(broker) == ["b/"]
    assert not any(client.peer.watched for client in broker.clients)


async def test_subscriptions_left_while_restoring_are_unsubscribed(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    leave = anyio.Event()

    async def subscribe(channel: str) -> None:
        async with emitter.subscribe(key, channel), emitter.watch_presence(key, channel):
            entered.append(channel)
            await leave.wait()

    entered: list[str] = []
    async with anyio.create_task_group() as tasks, emitter.stream("connect") as connected:
        tasks.start_soon(subscribe, "a/")
        tasks.start_soon(subscribe, "b/")
        while len(entered) < 2:
            await checkpoint()
        with broker.hold("suback", "puback", "reply"):
            await broker.drop()
            await until_subscribed(broker)
            leave.set()
            await anyio.wait_all_tasks_blocked()
        await connected.receive()
        await emitter.flush()
        assert subscribed_channels(broker) == []
        assert not any(client.peer.watched for client in broker.clients)


async def test_subscription_interrupted_while_entering_is_not_restored(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async def enter() -> None:
        with pytest.raises(ConnectionLostError):
            async with emitter.subscribe(key, "a/"):
                raise AssertionError("entered")

    async def watch() -> None:
        with pytest.raises(ConnectionLostError):
            async with emitter.watch_presence(key, "w/"):
                raise AssertionError("entered")

    async with anyio.create_task_group() as tasks:
        with broker.hold("suback", "puback", "reply"):
            tasks.start_soon(enter)
            tasks.start_soon(watch)
            await until_subscribed(broker)
            await broker.drop()
    await emitter.flush()
    assert subscribed_channels(broker) == []
    assert not any(client.peer.watched for client in broker.clients)


async def test_unsubscribe_waits_for_the_next_connection(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, "a/")
    async with anyio.create_task_group() as tasks:
        async with while_disconnected_nowait(emitter, broker):
            tasks.start_soon(emitter.unsubscribe, key, "a/")
            for _ in range(10):
                await checkpoint()
    assert subscribed_channels(broker) == []
    await emitter.subscribe(key, "a/")
    await broker.publish("a/", "x")
    assert texts(await calls.get(1)) == ["x"]


async def test_short_subscriptions_across_losses_leave_nothing_behind(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    """The connection is cut at many different moments."""

    async def subscribe_repeatedly(channel: str) -> None:
        for _ in range(10):
            try:
                async with emitter.subscribe(key, channel), emitter.subscribe(key, "c/"):
                    await checkpoint()
            except ConnectionLostError:
                pass

    async with anyio.create_task_group() as tasks:
        for channel in ("a/", "b/", "c/"):
            tasks.start_soon(subscribe_repeatedly, channel)
        for _ in range(8):
            await force_reconnect(emitter, broker)
    await emitter.flush()
    assert subscribed_channels(broker) == []
    assert emitter.statistics().pending == 0


async def test_replay_to_a_handler_continues_after_the_connection_is_lost(broker: Broker) -> None:
    key = broker.keygen("a/#/", "rwl")
    started, gate, done = anyio.Event(), anyio.Event(), anyio.Event()
    handled: list[bytes] = []
    for number in range(4):
        await broker.publish("a/b/", str(number), ttl=1000)
    async with connect_reconnecting(broker.url) as emitter:

        async def handle(message: EmitterMessage) -> None:
            started.set()
            await gate.wait()
            handled.append(message.binary)
            if len(handled) == 4:
                done.set()

        async def subscribe() -> None:
            await emitter.subscribe(key, "a/b/", last=4)

        emitter.on("message", handle, buffer=1, overflow="block")
        await emitter.subscribe(key, "a/", last=0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(subscribe)
            await started.wait()
            await anyio.wait_all_tasks_blocked()
            assert handled == []
            await force_reconnect(emitter, broker)
            gate.set()
        await done.wait()
    assert handled == [b"0", b"1", b"2", b"3"]
