"""A client belongs to one thread and event loop; calls from elsewhere raise and change nothing."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeAlias

import anyio
import pytest
import trio
from anyio import from_thread, to_thread

from emitter_anyio import Emitter, EmitterMessage, EventStream, PresenceFeed, WrongLoopError
from emitter_anyio.testing import Broker
from tests.support.connections import connect_once

ADVICE = r"anyio\.from_thread.*portal"


class Client:
    """A client with a stream that has buffered messages, and the arguments of calls."""

    def __init__(self, broker: Broker, emitter: Emitter) -> None:
        self.emitter = emitter
        self.secret = broker.secret_key
        self.key = broker.keygen("a/#/", "rwslp")
        self.messages: EventStream[EmitterMessage]
        self.feed: PresenceFeed

    async def key_function(self) -> str:
        raise AssertionError("a key function was called in another event loop")


Use: TypeAlias = Callable[[Client], Awaitable[object]]


async def enter(client: Client, name: str, *arguments: object) -> None:
    async with getattr(client.emitter, name)(*arguments):
        pass  # pragma: no cover - never reached


async def read_history(client: Client, key: object) -> None:
    async for _ in client.emitter.history(key, "a/"):  # type: ignore[arg-type]
        pass  # pragma: no cover - never reached


async def call(function: Callable[[], object]) -> None:
    function()


async def enter_again(client: Client) -> None:
    await client.emitter.__aenter__()


USES: dict[str, Use] = {
    "publish": lambda c: c.emitter.publish(c.key, "a/", "x"),
    "publish, qos=1": lambda c: c.emitter.publish(c.key, "a/", "x", qos=1),
    "publish, key function": lambda c: c.emitter.publish(c.key_function, "a/", "x"),
    "publish_with_link": lambda c: c.emitter.publish_with_link("ab", "x"),
    "flush": lambda c: c.emitter.flush(),
    "keygen": lambda c: c.emitter.keygen(c.secret, "b/"),
    "keyban": lambda c: c.emitter.keyban(c.secret, c.key),
    "link": lambda c: c.emitter.link(c.key, "a/", "ab"),
    "me": lambda c: c.emitter.me(),
    "presence": lambda c: c.emitter.presence(c.key, "a/", changes=True),
    "subscribe, awaited": lambda c: c.emitter.subscribe(c.key, "a/b/"),
    "subscribe, entered": lambda c: enter(c, "subscribe", c.key, "a/b/"),
    "unsubscribe": lambda c: c.emitter.unsubscribe(c.key, "a/"),
    "watch_presence": lambda c: enter(c, "watch_presence", c.key, "a/b/"),
    "history": lambda c: read_history(c, c.key),
    "history, key function": lambda c: read_history(c, c.key_function),
    "request": lambda c: c.emitter.request(c.key, "a/", "x"),
    "request_many": lambda c: enter(c, "request_many", c.key, "a/", "x"),
    "serve": lambda c: c.emitter.serve(c.key, "a/", lambda message: b""),
    "stream": lambda c: enter(c, "stream", "message"),
    "on": lambda c: call(lambda: c.emitter.on("connect", print)),
    "off": lambda c: call(lambda: c.emitter.off("disconnect", print)),
    "disconnect": lambda c: c.emitter.disconnect(),
    "reconnect": lambda c: c.emitter.reconnect(),
    "wait_connected": lambda c: c.emitter.wait_connected(),
    "wait_closed": lambda c: c.emitter.wait_closed(),
    "entering": enter_again,
    "leaving": lambda c: c.emitter.__aexit__(None, None, None),
    "run": lambda c: c.emitter.run(),
    "receive": lambda c: c.messages.receive(),
    "async for": lambda c: call(c.messages.__aiter__),
    "anext": lambda c: anext(c.feed),
    "receive_nowait": lambda c: call(c.messages.receive_nowait),
    "aclose": lambda c: c.messages.aclose(),
    "close": lambda c: call(c.messages.close),
    "a feed": lambda c: c.feed.receive(),
}
"""Every use that must be refused outside the client's event loop."""


@asynccontextmanager
async def client_of(broker: Broker) -> AsyncGenerator[Client]:
    """Yield a client, and check at the end that it works as before."""
    emitter = connect_once(broker.url)
    emitter.on("disconnect", print)
    client = Client(broker, emitter)
    async with (
        emitter,
        emitter.subscribe(client.key, "a/") as client.messages,
        emitter.watch_presence(client.key, "a/") as client.feed,
    ):
        assert (await client.feed.receive()).event == "status"
        for text in "123":
            await emitter.publish(client.key, "a/", text, qos=1)
        assert (await client.messages.receive()).binary == b"1"
        yield client
        assert (await client.messages.receive()).binary == b"2"
        assert client.messages.statistics().current_buffer_used == 1
        await emitter.flush()
        (one,) = broker.clients
        assert one.id == (await emitter.me()).id
        assert one.subscriptions == ["a/"]
        figures = emitter.statistics()
        assert (figures.received, figures.pending, figures.nonsense) == (3, 0, 0)
        with pytest.raises(RuntimeError, match="already entered"):
            await emitter.__aenter__()


async def expect_refusal(client: Client, use: Use) -> None:
    with pytest.raises(WrongLoopError, match=ADVICE):
        await use(client)


async def run_elsewhere(other: str, client: Client, use: Use) -> None:
    await to_thread.run_sync(lambda: anyio.run(expect_refusal, client, use, backend=other))


@pytest.mark.parametrize("other", ["asyncio", "trio"])
@pytest.mark.parametrize("name", USES)
async def test_call_in_another_thread_raises_wrong_loop_error(
    broker: Broker, name: str, other: str
) -> None:
    async with client_of(broker) as client:
        await run_elsewhere(other, client, USES[name])


async def test_pending_call_gets_its_reply_despite_calls_in_other_threads(broker: Broker) -> None:
    async with client_of(broker) as client, anyio.create_task_group() as tasks:
        with broker.hold("reply", "puback"):
            tasks.start_soon(client.emitter.me)
            await anyio.wait_all_tasks_blocked()
            for other in ("asyncio", "trio"):
                await run_elsewhere(other, client, USES["me"])


async def test_leaving_a_stream_in_another_thread_raises_wrong_loop_error(broker: Broker) -> None:
    async with client_of(broker) as client:
        entering = client.emitter.subscribe(client.key, "a/b/")
        await entering.__aenter__()

        async def leave(client: Client) -> None:
            await entering.__aexit__(None, None, None)

        await run_elsewhere("asyncio", client, leave)
        await client.emitter.flush()
        assert broker.clients[0].subscriptions == ["a/", "a/b/"]
        await entering.__aexit__(None, None, None)


async def test_other_threads_can_call_through_the_event_loop(broker: Broker) -> None:
    async with client_of(broker) as client:
        me = await to_thread.run_sync(lambda: from_thread.run(client.emitter.me))
        assert me == await client.emitter.me()


@contextmanager
def frequent_thread_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


async def test_statistics_work_in_any_thread(broker: Broker) -> None:
    key = broker.keygen("a/", "rw")
    started, over = anyio.Event(), threading.Event()

    def read_statistics(emitter: Emitter, messages: EventStream[EmitterMessage]) -> None:
        while not over.is_set():
            emitter.statistics()
            assert emitter.state in ("connecting", "connected")
            messages.statistics()
            if not started.is_set():
                from_thread.run_sync(started.set)

    async with connect_once(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
        with frequent_thread_switches():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(to_thread.run_sync, read_statistics, emitter, messages)
                await started.wait()
                try:
                    for _ in range(100):
                        async with emitter.stream("message") as others:
                            await emitter.publish(key, "a/", "x")
                            await others.receive()
                finally:
                    over.set()
        figures = messages.statistics()
        assert figures.current_buffer_used == 100
        for _ in range(100):
            await messages.receive()
        assert messages.statistics().current_buffer_used == 0


async def test_on_and_off_work_in_any_thread_before_entering(broker: Broker) -> None:
    events: list[str] = []
    emitter = connect_once(broker.url)
    handler = emitter.on("connect", lambda: events.append("connect"))

    def change() -> None:
        emitter.on("disconnect", lambda: events.append("disconnect"))
        emitter.off("connect", handler)

    await to_thread.run_sync(change)
    async with emitter:
        pass
    assert events == ["disconnect"]


async def test_client_awaited_in_an_event_loop_must_be_entered_there(broker: Broker) -> None:
    emitter = connect_once(broker.url)

    async def enter() -> None:
        async with emitter:
            pass  # pragma: no cover - never reached

    async def elsewhere() -> None:
        for call_elsewhere in (emitter.wait_connected, enter, emitter.stream("connect").__aenter__):
            with pytest.raises(WrongLoopError):
                await call_elsewhere()

    async with emitter.stream("connect") as connected:
        await to_thread.run_sync(anyio.run, elsewhere)
        async with emitter:
            await connected.receive()
    emitter = connect_once(broker.url)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(emitter.wait_connected)
        await anyio.wait_all_tasks_blocked()
        await to_thread.run_sync(anyio.run, elsewhere)
        async with emitter:
            await anyio.wait_all_tasks_blocked()


async def test_cancelled_wait_connected_does_not_bind_the_client_to_its_loop(
    broker: Broker,
) -> None:
    emitter = connect_once(broker.url)

    async def wait_and_cancel() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.wait_connected)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()

    async def wait_and_enter() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.wait_connected)
            await anyio.wait_all_tasks_blocked()
            async with emitter:
                await emitter.me()

    for function in (wait_and_cancel, wait_and_enter):
        await to_thread.run_sync(anyio.run, function)
    # A client that has ended belongs to no event loop.
    async with emitter:
        await emitter.me()


THREAD_CHECK_ONLY = ("publish", "receive")
"""Calls that check only the thread until they have to wait."""

WAITING = {
    **{name: use for name, use in USES.items() if name not in THREAD_CHECK_ONLY},
    "receive": lambda c: c.feed.receive(),
}


async def expect_all_refused(client: Client) -> None:
    for use in WAITING.values():
        await expect_refusal(client, use)


@asynccontextmanager
async def client_with_broker() -> AsyncGenerator[Client]:
    async with Broker() as broker, client_of(broker) as client:
        yield client


def test_another_event_loop_in_the_same_thread_raises_wrong_loop_error() -> None:
    with asyncio.Runner() as own, asyncio.Runner() as other:
        left = asyncio.Event()
        entered: asyncio.Future[Client] = own.get_loop().create_future()

        async def live() -> None:
            async with client_with_broker() as client:
                entered.set_result(client)
                await left.wait()

        async def leave() -> None:
            left.set()
            await living

        living = own.get_loop().create_task(live())
        client = own.get_loop().run_until_complete(entered)
        other.run(expect_all_refused(client))
        own.run(leave())


def run_trio_as_guest(main: Callable[[], Awaitable[None]]) -> asyncio.Future[None]:
    """Run Trio as a guest in the running asyncio event loop."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(outcome: Any) -> None:
        try:
            done.set_result(outcome.unwrap())
        except BaseException as exc:
            done.set_exception(exc)

    trio.lowlevel.start_guest_run(
        main, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=finish
    )
    return done


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_trio_as_a_guest_is_another_event_loop(
    anyio_backend: object,
) -> None:
    async with client_with_broker() as client:
        await run_trio_as_guest(partial(expect_all_refused, client))

    entered: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
    left = trio.Event()

    async def live() -> None:
        async with client_with_broker() as client:
            entered.set_result(client)
            await left.wait()

    living = run_trio_as_guest(live)
    await expect_all_refused(await entered)
    left.set()
    await living
