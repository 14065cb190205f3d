"""A development broker in a thread, and its synchronous methods."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import get_type_hints

import anyio
import pytest
from anyio.abc import AsyncResource
from blockbuster import blockbuster_ctx

from emitter_anyio import ConnectRefusedError, Emitter, RequestTimeoutError, connect
from emitter_anyio.testing import BlockingBroker, Broker, ClientSnapshot
from tests.support.command import run

pytestmark = pytest.mark.anyio

THREAD = "emitter_anyio broker"
NOT_MIRRORED = {"connectable", "run", "shared"}
"""Members that are for the event loop of the broker, or for the package."""
METHODS = [
    name
    for name, member in vars(Broker).items()
    if not name.startswith("_") and callable(member) and name not in {*NOT_MIRRORED, "drop"}
]
"""The methods of a broker, without ``drop``, whose parameter differs."""


@pytest.fixture
def blocking() -> Iterator[BlockingBroker]:
    with BlockingBroker() as broker:
        yield broker


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


async def lose_connection(emitter: Emitter, broker: BlockingBroker) -> None:
    """Drop the client, and wait until it has reconnected."""
    async with emitter.stream("connect") as connects:
        broker.drop()
        await connects.receive()


class TestSignatures:
    def test_blocking_broker_has_every_member_of_broker(self) -> None:
        names = {name for name in vars(Broker) if not name.startswith("_")}
        mirrored = {name for name in vars(BlockingBroker) if not name.startswith("_")}
        assert mirrored == names - NOT_MIRRORED | {"license", "secret_key"}

    @pytest.mark.parametrize("name", METHODS)
    def test_parameters_and_types_match_broker(self, name: str) -> None:
        method, mirror = getattr(Broker, name), getattr(BlockingBroker, name)
        signature, hints = inspect.signature(mirror), get_type_hints(mirror)
        assert signature.parameters == inspect.signature(method).parameters
        expected = get_type_hints(method)
        if name in ("hold", "lose", "refuse", "throttle"):
            expected["return"] = AbstractContextManager[None]
        assert hints == expected
        assert signature.return_annotation == hints["return"]
        assert mirror.__qualname__ == f"BlockingBroker.{name}"
        assert f":meth:`Broker.{name}`" in mirror.__doc__

    def test_attributes_match_broker(self) -> None:
        with BlockingBroker(broker := Broker(matcher="mqtt")) as blocking:
            for name in ("host", "port", "url", "license", "secret_key"):
                assert getattr(blocking, name) == getattr(broker, name)


class TestWithAClient:
    """The client runs in the thread that calls the broker."""

    async def test_message_is_delivered(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        key = blocking.keygen("a/", "rwl")
        async with connect(blocking.url) as emitter:
            async with emitter.subscribe(key, "a/") as messages:
                blocking.publish("a/", "live")
                assert (await messages.receive()).as_string() == "live"
            blocking.publish("a/", "stored", ttl=60)
            assert [stored.as_string() async for stored in emitter.history(key, "a/")] == ["stored"]
            blocking.advance(61)
            assert [stored async for stored in emitter.history(key, "a/")] == []

    async def test_publish_does_not_wait_for_a_subscriber_that_cannot_read(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        key = blocking.keygen("a/", "r")
        async with connect(blocking.url, reconnect=None) as emitter:
            async with emitter.subscribe(key, "a/", buffer=10_000) as messages:
                for _ in range(100):  # more than the broker queues before publishers wait
                    blocking.publish("a/", b"x" * 60_000)
                for _ in range(100):
                    await messages.receive()

    async def test_clients_are_snapshots(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        async with connect(blocking.url, username="ann", client_id="c") as emitter:
            (before,) = blocking.clients
            id = (await emitter.me()).id
            assert before == ClientSnapshot(id, "c", "ann", [])
            await emitter.subscribe(blocking.keygen("a/", "r"), "a/")
            (after,) = blocking.clients
            assert (before.subscriptions, after.subscriptions) == ([], ["a/"])

    async def test_dropped_client_reconnects(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        async with connect(blocking.url) as emitter, emitter.stream("connect") as connects:
            for choose in (lambda client: None, lambda client: client, lambda client: client.id):
                (client,) = blocking.clients
                blocking.drop(choose(client))
                await connects.receive()
            with pytest.raises(LookupError):
                blocking.drop("unknown")
            await emitter.me()

    async def test_restarted_broker_accepts_the_client(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        async with connect(blocking.url) as emitter, emitter.stream("connect") as connects:
            blocking.stop()
            blocking.restart()
            await connects.receive()
            await emitter.me()

    async def test_paused_broker_does_not_reply(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        async with connect(blocking.url) as emitter:
            blocking.pause()
            with pytest.raises(RequestTimeoutError):
                await emitter.me(timeout=0.01)
            blocking.resume()
            await emitter.me()

    async def test_faults_end_with_their_blocks(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        async with connect(blocking.url) as emitter:
            for fault in (blocking.hold, blocking.lose):
                with fault("reply", "puback"):
                    with pytest.raises(RequestTimeoutError):
                        await emitter.me(timeout=0.01)
                await emitter.me()
        with pytest.raises(ZeroDivisionError), blocking.refuse(4):
            with pytest.raises(ConnectRefusedError):
                async with connect(blocking.url):
                    pass  # pragma: no cover - never reached
            raise ZeroDivisionError
        async with connect(blocking.url):
            pass

    async def test_blockbuster_does_not_report_calls(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        with blockbuster_ctx():  # in every module
            async with connect(blocking.url) as emitter:
                key = blocking.keygen("a/", "rw")
                for _ in range(100):
                    blocking.publish("a/", "x")
                await emitter.publish(key, "a/", "x", qos=1)
                with blocking.hold():
                    await lose_connection(emitter, blocking)

    async def test_several_threads_can_call_concurrently(
        self, anyio_backend: object, blocking: BlockingBroker
    ) -> None:
        async def publish() -> None:
            await anyio.to_thread.run_sync(blocking.publish, "a/", "x")

        key = blocking.keygen("a/", "r")
        async with connect(blocking.url) as emitter, emitter.subscribe(key, "a/") as messages:
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(publish)
                for _ in range(10):
                    await messages.receive()


class TestCluster:
    async def test_nodes_share_an_event_loop(self, anyio_backend: object) -> None:
        first = Broker(patience=0)
        second = Broker(cluster=first, patience=0)
        with BlockingBroker(first) as one, BlockingBroker(second) as two:
            key = one.keygen("#/", "r")
            async with connect(two.url) as emitter, emitter.subscribe(key, "a/") as messages:
                one.publish("a/", "of one node")
                assert (await messages.receive()).as_string() == "of one node"
                one.cut()
                one.publish("a/", "lost")
                one.heal()
                async with emitter.subscribe(key, "b/") as later:
                    one.publish("b/", "received")
                    assert (await later.receive()).as_string() == "received"
                one.stop()
                two.publish("a/", "of the other node")
                assert (await messages.receive()).as_string() == "of the other node"
        assert threads() == []


class TestEntering:
    def test_leaving_ends_the_threads(self) -> None:
        before = threading.active_count()
        with BlockingBroker():
            assert threads() == [THREAD]
        assert threading.active_count() == before

    def test_broker_can_be_entered_again(self) -> None:
        blocking = BlockingBroker()
        for _ in range(2):
            with blocking:
                assert blocking.clients == []

    def test_port_in_use_raises_on_entering(self, blocking: BlockingBroker) -> None:
        second = BlockingBroker(Broker(port=blocking.port))
        with pytest.raises(OSError, match="in use"):
            second.__enter__()
        assert threads() == [THREAD]

    def test_entering_twice_raises(self, blocking: BlockingBroker) -> None:
        with pytest.raises(RuntimeError, match="already entered; leave it first"):
            blocking.__enter__()
        assert blocking.clients == []

    def test_leaving_without_entering_raises(self) -> None:
        with pytest.raises(RuntimeError, match="not entered"):
            BlockingBroker().__exit__(None, None, None)

    def test_call_outside_the_block_raises(self) -> None:
        with pytest.raises(RuntimeError, match="not running; use 'with'"):
            BlockingBroker().keygen("a/")

    def test_failure_of_the_broker_is_raised_on_leaving(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(_: object, listener: AsyncResource, *__: object) -> None:
            await listener.aclose()
            raise ZeroDivisionError

        monkeypatch.setattr(Broker, "_serve_all", fail)
        blocking = BlockingBroker()
        blocking.__enter__()
        assert blocking.keygen("a/")  # calls still end
        with pytest.raises(ZeroDivisionError) as caught:
            blocking.__exit__(None, None, None)
        assert caught.type is ZeroDivisionError
        assert threads() == []

    def test_call_raises_exception_of_broker(self, blocking: BlockingBroker) -> None:
        with pytest.raises(ValueError, match="invalid channel"):
            blocking.publish("a/+/", "x")
        with pytest.raises(ValueError, match="invalid seconds"):
            blocking.advance(-1)
        with pytest.raises(TypeError):
            blocking.publish("a/")  # type: ignore[call-arg]  # what this test is about

    def test_program_can_exit_without_leaving_broker(self) -> None:
        program = """
from emitter_anyio.testing import BlockingBroker
broker = BlockingBroker().__enter__()
print(len(broker.clients))
"""
        done = run("-c", program)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
