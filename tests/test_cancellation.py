"""Every method, cancelled at each of its checkpoints: the client stays usable and leaks nothing."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import ChannelKey, Emitter, EmitterMessage, connect
from emitter_anyio._features.position import Position
from emitter_anyio.testing import Broker
from tests.support.steps import all_cancel_styles, cancel_at_step, cancel_styles
from tests.support.tables import tables

Method = Callable[[], Awaitable[object]]


def make_methods(emitter: Emitter, broker: Broker) -> dict[str, Method]:
    key = broker.keygen("a/#/", "rwslp")

    async def enter_and_leave() -> None:
        async with emitter.subscribe(key, "a/b/", last=3) as messages:
            await messages.aclose()

    async def watch() -> None:
        async with emitter.watch_presence(key, "a/") as feed:
            await feed.receive()

    async def subscribe_and_unsubscribe() -> None:
        await emitter.subscribe(key, "a/c/")
        await emitter.unsubscribe(key, "a/c/")

    return {
        "publish": partial(emitter.publish, key, "a/", "x", qos=1),
        "publish and store": partial(emitter.publish, key, "a/b/", "x", ttl=60, qos=1),
        "flush": emitter.flush,
        "keygen": partial(emitter.keygen, broker.secret_key, "b/"),
        "me": emitter.me,
        "presence": partial(emitter.presence, key, "a/"),
        "presence changes": partial(emitter.presence, key, "a/", changes=True),
        "subscribe": subscribe_and_unsubscribe,
        "entered subscribe": enter_and_leave,
        "watch_presence": watch,
    }


NAMES = (
    "publish",
    "publish and store",
    "flush",
    "keygen",
    "me",
    "presence",
    "presence changes",
    "subscribe",
    "entered subscribe",
    "watch_presence",
)


async def check_usable_over_socket(emitter: Emitter, broker: Broker) -> None:
    """Check that the connection still works and that nothing is left of the cancelled calls."""
    key = broker.keygen("z/", "rw")
    async with emitter.subscribe(key, "z/") as messages:
        await emitter.publish(key, "z/", "still here", qos=1)
        assert (await messages.receive()).binary == b"still here"
    await emitter.flush()
    (client,) = broker.clients
    assert not client.subscriptions
    assert emitter.statistics().pending == 0
    assert emitter.statistics().nonsense == 0


class CancelAfter:
    """Cancels a scope after a number of turns of the event loop."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.scope = anyio.CancelScope()

    async def cancel_later(self) -> None:
        for _ in range(self.turns):
            await checkpoint()
        self.scope.cancel()


@pytest.mark.parametrize("name", NAMES)
async def test_method_cancelled_by_scope_leaves_client_usable(broker: Broker, name: str) -> None:
    async with connect(broker.url) as emitter:
        method = make_methods(emitter, broker)[name]
        for turns in range(60):
            cancel = CancelAfter(turns)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel.cancel_later)
                with cancel.scope:
                    await method()
                    # The call was faster.
                    tasks.cancel_scope.cancel()
        if name == "presence changes":
            await emitter.presence(broker.keygen("a/#/", "p"), "a/", changes=False)
        if name == "subscribe":
            await emitter.unsubscribe(broker.keygen("a/#/", "r"), "a/c/")
        await check_usable_over_socket(emitter, broker)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("name", NAMES)
async def test_method_cancelled_natively_leaves_client_usable(broker: Broker, name: str) -> None:
    async with connect(broker.url) as emitter:
        method = make_methods(emitter, broker)[name]
        for turns in range(60):
            task = asyncio.ensure_future(method())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
        await emitter.flush()
        if name == "presence changes":
            await emitter.presence(broker.keygen("a/#/", "p"), "a/", changes=False)
        if name == "subscribe":
            for client in broker.clients:
                assert len(client.subscriptions) <= 1
            await emitter.disconnect()
            return
        await check_usable_over_socket(emitter, broker)


async def test_publish_in_cancelled_scope_sends_nothing(broker: Broker) -> None:
    key = broker.keygen("a/", "rw")
    async with connect(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
        sent = 0
        with anyio.CancelScope() as scope:
            scope.cancel()
            for _ in range(64):
                await emitter.publish(key, "a/", "x")
                sent += 1
        await emitter.publish(key, "a/", "last", qos=1)
        while (await messages.receive()).binary != b"last":
            sent -= 1
        assert sent == 0, "a cancelled publish was sent"


async def test_publish_loop_notices_cancellation_within_16_calls(broker: Broker) -> None:
    key = broker.keygen("a/", "w")
    calls = 0
    async with connect(broker.url) as emitter:
        with anyio.CancelScope() as scope:
            scope.cancel()
            while True:
                await emitter.publish(key, "a/", "x")
                calls += 1
    assert calls < 16


async def test_publish_loop_yields_within_64_calls(broker: Broker) -> None:
    key = broker.keygen("a/", "w")
    async with connect(broker.url) as emitter:
        ran = anyio.Event()

        async def run() -> None:
            ran.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            calls = 0
            while not ran.is_set():
                await emitter.publish(key, "a/", "x")
                calls += 1
        # Trio runs the tasks of a turn in any order, so run() might start one turn later.
        assert calls <= 2 * 64 + 1


async def test_receive_loop_yields_within_64_messages(broker: Broker) -> None:
    key = broker.keygen("a/", "rw")
    async with connect(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
        for _ in range(200):
            await emitter.publish(key, "a/", "x")
        await emitter.flush()
        ran = anyio.Event()

        async def run() -> None:
            ran.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            count = 0
            while not ran.is_set():
                await messages.receive()
                count += 1
        assert count <= 2 * 64 + 1


async def test_cancelled_receive_loses_no_message(broker: Broker) -> None:
    key = broker.keygen("a/", "rw")
    received: list[EmitterMessage] = []
    async with connect(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
        for number in range(50):
            cancel = CancelAfter(number % 7)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel.cancel_later)
                await emitter.publish(key, "a/", str(number))
                with cancel.scope:
                    while True:
                        received.append(await messages.receive())
        await emitter.flush()
        while messages.statistics().current_buffer_used:
            received.append(await messages.receive())
    assert [int(message.binary) for message in received] == list(range(50))


async def test_late_reply_is_dropped(broker: Broker) -> None:
    async with connect(broker.url) as emitter:
        keys: list[ChannelKey] = []
        emitter.on("keygen", keys.append)
        with broker.hold("reply", "puback"):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(emitter.keygen, broker.secret_key, "late/")
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()
            assert emitter.statistics().pending == 1
        assert (await emitter.keygen(broker.secret_key, "b/")).channel == "b/"
        assert emitter.statistics().pending == 0
        assert emitter.statistics().nonsense == 0
    assert [key.channel for key in keys] == ["b/"]


# Cancellation at every suspension point, over in-memory connections on virtual time

MORE_NAMES = (
    *NAMES,
    "keyban",
    "link",
    "publish_with_link",
    "history",
    "request and serve",
    "request_many and serve",
    "reconnect",
    "group",
    "resume",
    "key by function",
    "subscribe, key by function",
    "consume",
)


def make_more_methods(emitter: Emitter, broker: Broker) -> dict[str, Method]:
    key = broker.keygen("a/#/", "rwslp")
    group_key = broker.keygen("$share/g/a/g/", "r")
    other_key = broker.keygen("b/", "r")

    async def link() -> None:
        await emitter.link(key, "a/l/", "l1", subscribe=True)
        await emitter.unsubscribe(key, "a/l/")

    async def publish_with_link() -> None:
        await emitter.link(key, "a/l/", "l2")
        await emitter.publish_with_link("l2", "x", qos=1)

    async def history() -> None:
        async for message in emitter.history(key, "a/b/"):
            assert message.channel == "a/b/"

    async def serve_and_request() -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(emitter.serve, key, "a/s/", lambda message: message.binary)
            assert (await emitter.request(key, "a/s/", "x")).binary == b"x"
            tasks.cancel_scope.cancel()

    async def serve_and_request_many() -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(emitter.serve, key, "a/s/", lambda message: message.binary)
            async with emitter.request_many(key, "a/s/", "x", count=1, idle=1) as replies:
                assert [reply.binary async for reply in replies] == [b"x"]
            tasks.cancel_scope.cancel()

    async def group() -> None:
        async with emitter.subscribe(group_key, "a/g/", group="g"):
            pass

    async def resume() -> None:
        async with emitter.subscribe(key, "a/r/", 0, resume=True, mark_gaps=True):
            pass

    def new_function() -> Callable[[], Awaitable[str]]:
        async def by_function() -> str:
            return (await emitter.keygen(broker.secret_key, "a/#/", "rw")).key

        return by_function

    async def publish_by_function() -> None:
        await emitter.publish(new_function(), "a/", "x", qos=1)

    async def subscribe_by_function() -> None:
        async with emitter.subscribe(new_function(), "a/f/", 0):
            pass

    async def consume() -> None:
        # A position near the end needs few requests.
        now = Position(int(time.time())).cursor
        async with emitter.consume(key, "a/k/", after=now) as log:
            await emitter.publish(key, "a/k/", "x", 60, qos=1)
            assert (await anext(log)).binary == b"x"

    return {
        **make_methods(emitter, broker),
        "keyban": partial(emitter.keyban, broker.secret_key, other_key),
        "link": link,
        "publish_with_link": publish_with_link,
        "history": history,
        "request and serve": serve_and_request,
        "request_many and serve": serve_and_request_many,
        "reconnect": emitter.reconnect,
        "group": group,
        "resume": resume,
        "key by function": publish_by_function,
        "subscribe, key by function": subscribe_by_function,
        "consume": consume,
    }


async def undo(emitter: Emitter, broker: Broker) -> None:
    """Undo what a method might have done before it was cancelled."""
    key = broker.keygen("a/#/", "rwslp")
    for channel in ("a/c/", "a/l/"):
        await emitter.unsubscribe(key, channel)
    await emitter.presence(key, "a/", changes=False)


async def check_no_leftovers(emitter: Emitter, broker: Broker) -> None:
    await emitter.flush()
    (client,) = broker.clients
    # The subscription for replies to request() stays as long as the client.
    assert [channel for channel in client.subscriptions if not channel.startswith("a/s/")] == []
    assert not client.peer.watched
    figures = emitter.statistics()
    assert (figures.pending, figures.nonsense, figures.dropped) == (0, 0, 0)
    entries = tables(emitter)
    grants = entries.get("Wants._grants", ())
    assert not [grant for grant in grants if not grant.startswith("a/s/")]
    subscriptions = entries.get("Subscriptions._subscriptions", ())
    assert not [it for it in subscriptions if not it.filter.startswith("a/s/")]
    for name in (
        "Wants._feeds",
        "Subscriptions._awaited",
        "Presence._watches",
        "Presence._for_handlers",
        "KeyRing._asking",
        "Replies.waiting",
    ):
        assert name not in entries, entries


@pytest.mark.virtual_time
@pytest.mark.without_debug
@pytest.mark.parametrize("name", MORE_NAMES)
async def test_method_cancelled_at_each_step_leaves_client_usable(name: str) -> None:
    async with Broker() as broker:
        async with connect(connectable=broker.connectable()) as emitter:
            for style in all_cancel_styles():
                for step in itertools.count():
                    method = make_more_methods(emitter, broker)[name]
                    if not await cancel_at_step(run(method), step, style):
                        break
                    await undo(emitter, broker)
                    await check_no_leftovers(emitter, broker)
            await undo(emitter, broker)
            await check_usable_in_memory(emitter, broker)
            assert emitter.statistics().connections == 1 or name == "reconnect"


@pytest.mark.virtual_time
@pytest.mark.without_debug
@pytest.mark.parametrize("name", MORE_NAMES)
async def test_method_cancelled_at_each_step_while_reconnecting_leaves_client_usable(
    name: str,
) -> None:
    async with Broker() as broker:
        async with connect(connectable=broker.connectable()) as emitter:
            for style in all_cancel_styles():
                for step in itertools.count():
                    await drop_connection(emitter, broker)
                    method = make_more_methods(emitter, broker)[name]
                    if not await cancel_at_step(run(method), step, style):
                        break
                    await emitter.wait_connected()
                    await undo(emitter, broker)
                    await check_no_leftovers(emitter, broker)
            await emitter.wait_connected()
            await undo(emitter, broker)
            await check_usable_in_memory(emitter, broker)


@pytest.mark.virtual_time
@pytest.mark.without_debug
@pytest.mark.parametrize("name", MORE_NAMES)
async def test_method_cancelled_during_restore_leaves_client_usable(name: str) -> None:
    async with Broker() as broker:
        key = broker.keygen("k/", "rw")
        async with (
            connect(connectable=broker.connectable()) as emitter,
            emitter.subscribe(key, "k/", 0) as messages,
        ):
            for style in cancel_styles():
                with broker.hold("suback"):
                    await drop_connection(emitter, broker)
                    await anyio.sleep(1)
                    assert emitter.state == "connecting"
                    (client,) = broker.clients
                    assert client.subscriptions == ["k/"], "subscribed, but without a SUBACK"
                    method = make_more_methods(emitter, broker)[name]
                    assert await cancel_at_step(run(method), 0, style)
                await emitter.wait_connected()
                await undo(emitter, broker)
                await emitter.publish(key, "k/", "restored", qos=1)
                assert (await messages.receive()).binary == b"restored"


async def run(method: Method) -> None:
    await method()


async def drop_connection(emitter: Emitter, broker: Broker) -> None:
    async with emitter.stream("disconnect") as lost:
        await broker.drop()
        await lost.receive()


async def check_usable_in_memory(emitter: Emitter, broker: Broker) -> None:
    key = broker.keygen("z/", "rw")
    async with emitter.subscribe(key, "z/") as messages:
        await emitter.publish(key, "z/", "still here", qos=1)
        assert (await messages.receive()).binary == b"still here"
    await check_no_leftovers(emitter, broker)
