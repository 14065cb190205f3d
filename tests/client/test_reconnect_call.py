"""reconnect(): pending calls finish, and the client continues on another connection."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from emitter_anyio import ClosedError, Emitter, EmitterMessage, Gap, connect
from tests.client.test_request_reply import serving, upper_case
from tests.client.tools import Calls, checkpoints
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


async def test_the_client_continues_on_a_new_connection(emitter: Emitter) -> None:
    before = await emitter.me()
    await emitter.reconnect()
    assert emitter.state == "connected"
    assert emitter.connection is not None
    assert str(emitter.connection.last_error) == "reconnect() was called"
    assert (await emitter.me()).id != before.id
    assert emitter.statistics().connections == 2


async def test_the_next_server_is_used(server: Server) -> None:
    async with connect(servers=[server.url, server.other_url]) as emitter:
        for url in (server.other_url, server.url):
            await emitter.reconnect()
            assert emitter.connection is not None
            assert emitter.connection.server == url


async def test_subscriptions_and_services_are_restored(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("disconnect", calls)
    emitter.on("connect", calls)
    async with (
        emitter.subscribe(key, f"{unique}a/", last=0, mark_gaps=True) as messages,
        serving(emitter, key, f"{unique}b/", upper_case),
    ):
        await emitter.reconnect()
        await calls.get(2)
        await other.publish(key, f"{unique}a/", "x", qos=1)
        assert isinstance(await messages.receive(), Gap)
        message = await messages.receive()
        assert isinstance(message, EmitterMessage)
        assert message.as_string() == "x"
        assert (await other.request(key, f"{unique}b/", "y")).as_string() == "Y"


@pytest.mark.one_node("a message that another node has not received yet would be a missing one")
async def test_nothing_that_was_queued_is_lost(
    server: Server, other: Emitter, key: str, unique: str
) -> None:
    count = 200
    async with (
        connect(server.url) as emitter,
        other.subscribe(key, unique, last=0, buffer=3 * count) as messages,
        anyio.create_task_group() as tasks,
    ):

        async def publish() -> None:
            for number in range(count):
                await emitter.publish(key, unique, f"a{number}")
                await emitter.publish(key, unique, f"b{number}", qos=1)

        tasks.start_soon(publish)
        for _ in range(3):
            await emitter.reconnect()
        found = [(await messages.receive()).as_string() for _ in range(2 * count)]
        for name in "ab":
            assert [text for text in found if text[0] == name] == [
                f"{name}{number}" for number in range(count)
            ]
        assert emitter.statistics().uncertain == 0


async def test_pending_calls_finish(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    """One of them is a request, whose handler replies only during reconnect()."""
    replying = anyio.Event()
    found: dict[str, object] = {}

    async def handler(request: EmitterMessage) -> str:
        await replying.wait()
        return "replied"

    async def request() -> None:
        found["request"] = (await emitter.request(key, unique, "")).as_string()

    async def gather() -> None:
        async with emitter.request_many(key, unique, "", count=1, timeout=None) as replies:
            found["gather"] = [reply.as_string() async for reply in replies]

    async def publish(number: int) -> None:
        await emitter.publish(key, f"{unique}x/", "x", qos=1)
        found[f"publish {number}"] = True

    async def presence() -> None:
        found["presence"] = (await emitter.presence(key, f"{unique}x/")).who

    async with serving(other, key, unique, handler), anyio.create_task_group() as tasks:
        tasks.start_soon(request)
        tasks.start_soon(gather)
        await anyio.wait_all_tasks_blocked()
        await emitter.flush()
        for number in range(50):
            tasks.start_soon(publish, number)
        tasks.start_soon(presence)
        tasks.start_soon(emitter.reconnect)
        while emitter.state != "connecting":
            await anyio.lowlevel.checkpoint()
        assert emitter.connection is None
        replying.set()
    assert (found.pop("request"), found.pop("gather")) == ("replied", ["replied"])
    assert len(found) == 51
    assert emitter.statistics().connections == 2


async def test_a_request_to_a_client_finishes(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    handling, replying = anyio.Event(), anyio.Event()
    found: list[str] = []

    async def handler(request: EmitterMessage) -> str:
        handling.set()
        await replying.wait()
        return "replied"

    async def request() -> None:
        found.append((await emitter.request(key, unique, "")).as_string())

    async with serving(other, key, unique, handler), anyio.create_task_group() as tasks:
        tasks.start_soon(request)
        await handling.wait()
        await emitter.flush()
        tasks.start_soon(emitter.reconnect)
        for _ in range(3):
            await other.flush()
        assert emitter.connection is None
        assert emitter.statistics().connections == 1
        replying.set()
    assert found == ["replied"]
    assert emitter.statistics().connections == 2


async def test_several_callers_share_one_reconnection(emitter: Emitter) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(emitter.reconnect)
    assert emitter.statistics().connections == 2


async def test_a_client_with_one_connection_cannot_reconnect(server: Server) -> None:
    async with connect(server.url, reconnect=None) as emitter:
        before = await emitter.me()
        with pytest.raises(RuntimeError, match="reconnect=None"):
            await emitter.reconnect()
        assert await emitter.me() == before


async def test_a_closed_client_cannot_reconnect(server: Server) -> None:
    emitter = connect(server.url)
    with pytest.raises(ClosedError):
        await emitter.reconnect()
    async with emitter:
        await emitter.disconnect()
        with pytest.raises(ClosedError):
            await emitter.reconnect()
    with pytest.raises(ClosedError):
        await emitter.reconnect()


async def test_cancelling_it_does_not_stop_the_client_from_reconnecting(emitter: Emitter) -> None:
    async with emitter.stream("connect") as connects:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await emitter.reconnect()
        await connects.receive()
    assert emitter.statistics().connections == 2


async def test_disconnecting_ends_it(emitter: Emitter) -> None:
    caught: list[Exception] = []

    async def reconnect() -> None:
        try:
            await emitter.reconnect()
        except ClosedError as exc:
            caught.append(exc)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reconnect)
        await checkpoints()
        assert emitter.statistics().connections == 1
        await emitter.disconnect()
    assert len(caught) == 1


async def test_the_block_can_be_left_during_it(server: Server) -> None:
    async with connect(server.url) as emitter:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await emitter.reconnect()
        assert emitter.connection is None
    assert emitter.state == "closed"


async def test_a_handler_can_await_it(emitter: Emitter, key: str, unique: str) -> None:
    done = anyio.Event()

    @emitter.on("message")
    async def move(message: EmitterMessage) -> None:
        await emitter.reconnect()
        done.set()

    await emitter.subscribe(key, unique, last=0)
    await emitter.publish(key, unique, "move")
    await done.wait()
    assert emitter.statistics().connections == 2
