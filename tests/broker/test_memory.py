"""Connections in memory, and a throttled broker."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream

from emitter_anyio import ConnectError, WrongLoopError, connect
from emitter_anyio.testing import Broker
from emitter_anyio.testing._memory import CAPACITY_BYTES, MemoryListener, memory_stream_pair
from emitter_anyio.testing._packets import ConnAck, Connect, Disconnect
from tests.broker.player import PacketConnection
from tests.support import tls
from tests.support.connections import connect_reconnecting


class TestConnectable:
    async def test_clients_exchange_messages_without_sockets(self, broker: Broker) -> None:
        key = broker.keygen("a/", "rw")
        connectable = broker.connectable()
        async with (
            connect(connectable=connectable) as one,
            connect(connectable=connectable) as two,
            one.subscribe(key, "a/") as messages,
        ):
            await two.publish(key, "a/", b"x" * 60_000)
            assert (await messages.receive()).binary == b"x" * 60_000
            assert len(broker.clients) == 2
        assert broker.clients == []

    async def test_clients_in_memory_and_on_sockets_exchange_messages(self, broker: Broker) -> None:
        key = broker.keygen("a/", "rw")
        async with (
            connect(connectable=broker.connectable()) as one,
            connect(broker.url) as two,
            one.subscribe(key, "a/") as messages,
        ):
            await two.publish(key, "a/", "x")
            assert (await messages.receive()).binary == b"x"

    @pytest.mark.parametrize("url", ["mqtts://localhost", "wss://localhost"])
    async def test_tls_and_websocket_run_over_it(self, anyio_backend: object, url: str) -> None:
        async with Broker(ssl_context=tls.server_context()) as broker:
            options: Any = {"ssl_context": tls.client_context()}
            async with connect(url, connectable=broker.connectable(), **options) as emitter:
                await emitter.flush()

    async def test_connecting_to_a_stopped_broker_is_refused(self, broker: Broker) -> None:
        connectable = broker.connectable()
        await broker.stop()
        with pytest.raises(ConnectError, match="refused") as caught:
            async with connect(connectable=connectable):
                pass
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
        assert "8080" not in str(caught.value)

    async def test_it_remains_valid_after_a_restart(self, broker: Broker) -> None:
        connectable = broker.connectable()
        async with connect_reconnecting(connectable=connectable) as emitter:
            async with emitter.stream("connect") as connected:
                await broker.restart()
                await connected.receive()

    async def test_it_is_valid_for_each_entering_of_the_broker(self, anyio_backend: object) -> None:
        broker = Broker()
        connectable = broker.connectable()
        with pytest.raises(ConnectionRefusedError):
            await connectable.connect()
        for _ in range(2):
            async with broker, connect(connectable=connectable) as emitter:
                await emitter.flush()

    async def test_stopping_closes_connections_that_were_not_accepted(self, broker: Broker) -> None:
        connectable = broker.connectable()
        async with await connectable.connect() as stream:
            await broker.stop()
            with pytest.raises(EndOfStream):
                await stream.receive()

    async def test_connecting_from_another_event_loop_raises(
        self, broker: Broker, anyio_backend_name: str
    ) -> None:
        connectable = broker.connectable()

        async def enter() -> None:
            async with connect(connectable=connectable):
                pass

        def run() -> None:
            anyio.run(enter, backend=anyio_backend_name)

        with pytest.raises(WrongLoopError, match="connect to its url"):
            await anyio.to_thread.run_sync(run)


class TestStreams:
    async def test_send_waits_until_there_is_space(self, anyio_backend: object) -> None:
        here, there = memory_stream_pair()
        sent = []

        async def send() -> None:
            await here.send(b"x" * (CAPACITY_BYTES + 10))
            sent.append(True)

        async with here, there, anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            assert not sent
            assert len(await there.receive(CAPACITY_BYTES)) == CAPACITY_BYTES
            assert await there.receive() == b"x" * 10
        assert sent

    async def test_empty_send_returns(self, anyio_backend: object) -> None:
        here, there = memory_stream_pair()
        async with here, there:
            await here.send(b"")

    async def test_ends(self, anyio_backend: object) -> None:
        here, there = memory_stream_pair()
        await here.send(b"x")
        await here.send_eof()
        assert await there.receive() == b"x"
        with pytest.raises(EndOfStream):
            await there.receive()
        with pytest.raises(BrokenResourceError):
            await here.send(b"y")
        await there.send(b"back")
        await there.aclose()
        assert there.closed
        assert await here.receive() == b"back"
        with pytest.raises(EndOfStream):
            await here.receive()
        with pytest.raises(ClosedResourceError):
            await there.send(b"z")
        with pytest.raises(ClosedResourceError):
            await there.receive()
        await here.aclose()

    async def test_closing_wakes_tasks_that_wait(self, anyio_backend: object) -> None:
        here, there = memory_stream_pair()
        raised: list[type[Exception]] = []

        async def note(function: Any, *arguments: object) -> None:
            try:
                await function(*arguments)
            except Exception as exc:
                raised.append(type(exc))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(note, here.receive)
            tasks.start_soon(note, here.send, bytes(2 * CAPACITY_BYTES))
            await anyio.wait_all_tasks_blocked()
            await here.aclose()
        assert raised == [ClosedResourceError] * 2
        await there.aclose()

    async def test_listener_that_closes_ends_waiting_connections(
        self, anyio_backend: object
    ) -> None:
        listener = MemoryListener()
        streams = [listener.connect() for _ in range(3)]
        listener.close()
        for stream in streams:
            with pytest.raises(EndOfStream):
                await stream.receive()
            await stream.aclose()


@pytest.mark.virtual_time
class TestThrottle:
    async def test_requests_of_all_clients_share_the_rate(self, broker: Broker) -> None:
        key = broker.keygen("a/", "rw")
        async with (
            connect(connectable=broker.connectable()) as one,
            connect(connectable=broker.connectable()) as two,
        ):
            with broker.throttle(2):
                start = anyio.current_time()
                async with anyio.create_task_group() as tasks:
                    for emitter in (one, two):
                        for _ in range(5):
                            await emitter.publish(key, "a/", "x")
                        tasks.start_soon(emitter.flush)
                # Ten requests, of which the first does not wait.
                assert anyio.current_time() - start == pytest.approx(4.5)
            await one.publish(key, "a/", "x", qos=1)
            assert anyio.current_time() - start == pytest.approx(4.5)

    async def test_pings_do_not_wait(self, broker: Broker) -> None:
        async with connect(connectable=broker.connectable()) as emitter:
            with broker.throttle(0.001):
                start = anyio.current_time()
                for _ in range(10):
                    await emitter.flush()
                assert anyio.current_time() == start

    async def test_request_of_a_disconnected_client_keeps_its_turn(self, broker: Broker) -> None:
        with broker.throttle(0.1):
            for _ in range(3):
                gone = PacketConnection(await broker.connectable().connect())
                await gone.send(Connect(), Disconnect())
                await anyio.wait_all_tasks_blocked()
                await gone.stream.aclose()
            late = PacketConnection(await broker.connectable().connect())
            start = anyio.current_time()
            assert await late.ask(Connect()) == [ConnAck()]
            assert anyio.current_time() - start == pytest.approx(30, abs=1)
            await late.stream.aclose()

    async def test_client_that_waits_for_its_turn_is_not_idle(self, broker: Broker) -> None:
        first = PacketConnection(await broker.connectable().connect())
        second = PacketConnection(await broker.connectable().connect())
        with broker.throttle(0.001):
            assert await first.ask(Connect()) == [ConnAck()]
            assert await second.ask(Connect()) == [ConnAck()]
        for connection in (first, second):
            await connection.stream.aclose()

    async def test_inner_block_applies(self, broker: Broker) -> None:
        async with connect(connectable=broker.connectable()) as emitter:
            key = broker.keygen("a/", "w")
            with broker.throttle(0.001), broker.throttle(1000):
                start = anyio.current_time()
                await emitter.publish(key, "a/", "x", qos=1)
                await emitter.publish(key, "a/", "x", qos=1)
                assert anyio.current_time() - start < 1

    @pytest.mark.parametrize("rate", [0, -1, float("nan")])
    async def test_rate_must_be_positive(self, rate: float) -> None:
        with pytest.raises(ValueError, match="more than 0"):
            with Broker().throttle(rate):
                pass
