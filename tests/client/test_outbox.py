"""The outbox: publishing without a connection, in order and at least once."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import Emitter, UnauthorizedError, connect
from emitter_anyio.outbox import MessageParkedError, Outbox
from tests.client.tools import Calls
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


async def sent(box: Outbox) -> None:
    """Wait until no message waits."""
    while box.statistics().waiting:  # noqa: ASYNC110 - the figures have no event
        await anyio.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a file that does not exist yet."""
    return tmp_path / "out.db"


async def test_messages_arrive_in_order_when_the_client_is_entered(
    emitter: Emitter, server: Server, key: str, unique: str, path: Path
) -> None:
    client = connect(server.url)
    async with emitter.subscribe(key, unique, last=0) as messages:
        async with Outbox(path, client, key) as box:
            async with anyio.create_task_group() as tasks:
                for number in range(500):
                    tasks.start_soon(box.publish, f"{unique}{number % 2}/", number)
                    await checkpoint()
            async with client:
                received = [(await messages.receive()).as_object() for _ in range(500)]
                await sent(box)
    for remainder in (0, 1):
        assert [number for number in received if number % 2 == remainder] == list(
            range(remainder, 500, 2)
        )


async def test_connection_that_is_replaced_loses_nothing(
    emitter: Emitter, server: Server, key: str, unique: str, path: Path
) -> None:
    async with (
        emitter.subscribe(key, unique, last=0) as messages,
        connect(server.url) as client,
        Outbox(path, client, key) as box,
    ):
        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(box.publish, unique, number)
                await checkpoint()
                if number % 50 == 49:
                    await client.reconnect()
        await sent(box)
        await client.publish(key, unique, -1, qos=1)
        received = []
        while (number := (await messages.receive()).as_object()) >= 0:
            received.append(number)
    assert list(dict.fromkeys(received)) == list(range(200))


async def test_message_is_stored_for_its_remaining_ttl(
    emitter: Emitter, key: str, unique: str, path: Path
) -> None:
    async with Outbox(path, emitter, key) as box:
        await box.publish(unique, "stored", ttl=60)
        await box.publish(unique, "retained", retain=True)
        await box.publish(unique, "not stored")
        await sent(box)
    stored = [message.as_string() async for message in emitter.history(key, unique)]
    assert sorted(stored) == ["retained", "stored"]


async def test_refused_message_is_parked_and_can_be_retried(
    emitter: Emitter, key: str, unique: str, path: Path
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    async with Outbox(path, emitter, NO_KEY) as box:
        await box.publish(unique, "refused")
        (error,) = await errors.get(1)
        assert isinstance(error, MessageParkedError)
        assert isinstance(error.__cause__, UnauthorizedError)
        assert box.statistics().parked == 1
    async with (
        emitter.subscribe(key, unique, last=0) as messages,
        Outbox(path, emitter, key) as box,
    ):
        (parked,) = await box.parked()
        assert await box.retry([parked]) == 1
        assert (await messages.receive()).as_string() == "refused"
        await sent(box)


async def test_key_function_gets_the_key_of_each_channel(
    emitter: Emitter, server: Server, key: str, unique: str, path: Path
) -> None:
    keys = {f"{unique}0/": [NO_KEY], f"{unique}1/": []}

    async def key_of(channel: str) -> str:
        if keys[channel]:
            return keys[channel].pop()
        return (await emitter.keygen(server.secret, channel, "w")).key

    async with (
        emitter.subscribe(key, unique, last=0) as messages,
        Outbox(path, emitter, key_of) as box,
    ):
        for number in range(10):
            await box.publish(f"{unique}{number % 2}/", number)
        received = [(await messages.receive()).as_object() for _ in range(10)]
    assert [number for number in received if number % 2] == [1, 3, 5, 7, 9]
    assert [number for number in received if not number % 2] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("inner", ["client", "outbox"])
async def test_leaving_sends_what_waits(
    emitter: Emitter, server: Server, key: str, unique: str, path: Path, inner: str
) -> None:
    client = connect(server.url)
    async with emitter.subscribe(key, unique, last=0) as messages:
        if inner == "client":
            async with Outbox(path, client, key) as box, client:
                await box.publish(unique, 1)
        else:
            async with client, Outbox(path, client, key) as box:
                await box.publish(unique, 1)
        assert (await messages.receive()).as_object() == 1
