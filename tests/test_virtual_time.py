"""Virtual time: event loops whose clock jumps, and a broker that follows them."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from typing import Any, Literal

import anyio
import pytest
import sniffio
import trio
import trio.testing

from emitter_anyio import UnauthorizedError, connect
from emitter_anyio.testing import Broker, VirtualTimeLoop, run_virtual, virtual_backend
from tests.support.clock import simulate_blocking

YEAR = 365 * 24 * 3600.0

on_both_backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.mark.virtual_time
class TestClock:
    async def test_clock_jumps_to_each_deadline_in_turn(self) -> None:
        woken = []

        async def sleeper(seconds: float) -> None:
            await anyio.sleep(seconds)
            woken.append((seconds, anyio.current_time() - start))

        start = anyio.current_time()
        async with anyio.create_task_group() as group:
            for seconds in (YEAR, 3.0, 60.0):
                group.start_soon(sleeper, seconds)

        assert [seconds for seconds, _ in woken] == [3.0, 60.0, YEAR]
        assert [slept for _, slept in woken] == pytest.approx([3.0, 60.0, YEAR])

    async def test_deadline_cancels(self) -> None:
        start = anyio.current_time()
        with pytest.raises(TimeoutError):
            with anyio.fail_after(3600):
                await anyio.sleep_forever()

        assert anyio.current_time() - start == pytest.approx(3600)

    async def test_clock_does_not_advance_while_a_task_can_run(self) -> None:
        # A hundred turns without waiting come before any deadline, however near.
        send, receive = anyio.create_memory_object_stream[int](0)
        start = anyio.current_time()
        with anyio.fail_after(0.001):
            async with anyio.create_task_group() as group, send, receive:

                async def feed() -> None:
                    for number in range(100):
                        await send.send(number)

                group.start_soon(feed)
                for number in range(100):
                    assert await receive.receive() == number

        assert anyio.current_time() == start

    async def test_jump_advances_the_clock_as_blocking_does(self) -> None:
        start = anyio.current_time()
        simulate_blocking(60)
        assert anyio.current_time() - start == pytest.approx(60)

    async def test_addresses_are_looked_up_without_a_thread(self) -> None:
        start, threads = anyio.current_time(), threading.active_count()
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, YEAR)
            assert await anyio.getaddrinfo("127.0.0.1", 80)
            assert anyio.current_time() == start
            assert threading.active_count() == threads
            group.cancel_scope.cancel()


async def test_time_is_real_without_the_marker(anyio_backend: object) -> None:
    if sniffio.current_async_library() == "trio":
        assert not isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
    else:
        assert not isinstance(asyncio.get_running_loop(), VirtualTimeLoop)


class TestRunning:
    @on_both_backends
    def test_result_is_returned_and_arguments_are_passed(
        self, backend: Literal["asyncio", "trio"]
    ) -> None:
        async def sleep(seconds: float, name: str) -> tuple[str, str, float]:
            await anyio.sleep(seconds)
            return name, sniffio.current_async_library(), anyio.current_time()

        name, library, slept = run_virtual(sleep, YEAR, "a", backend=backend)
        assert (name, library) == ("a", backend)
        assert slept == pytest.approx(YEAR)

    @on_both_backends
    def test_exceptions_are_raised(self, backend: Literal["asyncio", "trio"]) -> None:
        async def fail() -> None:
            await anyio.sleep(1)
            raise LookupError("here")

        with pytest.raises(LookupError, match="here"):
            run_virtual(fail, backend=backend)

    def test_asyncio_is_the_default(self) -> None:
        async def library() -> str:
            return sniffio.current_async_library()

        assert run_virtual(library) == "asyncio"

    async def test_running_in_a_running_loop_raises(self, anyio_backend_name: Any) -> None:
        with pytest.raises(RuntimeError):
            run_virtual(anyio.sleep, 1, backend=anyio_backend_name)

    def test_loop_factory_works_with_asyncio_alone(self) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            loop = runner.get_loop()
            start = loop.time()
            assert start == 0
            runner.run(asyncio.sleep(YEAR))
            assert loop.time() == pytest.approx(YEAR)

    def test_loop_without_a_deadline_waits_for_a_thread(self) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(asyncio.to_thread(time.sleep, 0.01))
            assert runner.get_loop().time() == 0

    @pytest.mark.parametrize("seconds", [-1, float("-inf")])
    def test_negative_jump_raises(self, seconds: float) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, VirtualTimeLoop)
            with pytest.raises(ValueError, match="at least 0"):
                loop.jump(seconds)
            assert loop.time() == 0

    @pytest.mark.parametrize("name", ["curio", "", None, 1])
    def test_unknown_backend_raises(self, name: Any) -> None:
        with pytest.raises(ValueError, match="expected one of asyncio, trio"):
            virtual_backend(name)
        with pytest.raises(ValueError, match="expected one of asyncio, trio"):
            run_virtual(anyio.sleep, 1, backend=name)

    @on_both_backends
    def test_each_backend_has_a_clock_of_its_own(self, backend: Literal["asyncio", "trio"]) -> None:
        async def time_after_an_hour() -> float:
            await anyio.sleep(3600)
            return anyio.current_time()

        times = [run_virtual(time_after_an_hour, backend=backend) for _ in range(2)]
        assert times == pytest.approx([3600, 3600])


class TestBroker:
    @pytest.mark.virtual_time
    async def test_keys_and_stored_messages_expire_in_virtual_time(self) -> None:
        async with Broker() as broker, connect(connectable=broker.connectable()) as emitter:
            key = broker.keygen("a/", "rwsl", ttl=7200)
            await emitter.publish(key, "a/", "x", ttl=3600, qos=1)
            await anyio.sleep(3500)
            assert [message.binary async for message in emitter.history(key, "a/")] == [b"x"]
            await anyio.sleep(200)
            assert [message.binary async for message in emitter.history(key, "a/")] == []
            await anyio.sleep(3600)
            with pytest.raises(UnauthorizedError):
                await emitter.publish(key, "a/", "x", qos=1)

    @on_both_backends
    def test_time_does_not_go_back_in_another_event_loop(
        self, backend: Literal["asyncio", "trio"]
    ) -> None:
        broker = Broker()

        async def seconds_of_new_message(wait: float) -> float:
            async with broker, connect(connectable=broker.connectable()) as emitter:
                await anyio.sleep(wait)
                key = broker.keygen("a/", "rwsl")
                await emitter.publish(key, "a/", "x", ttl=10**6, qos=1)
                found = [message async for message in emitter.history(key, "a/", last=1)]
                return found[-1].time.timestamp()

        first = run_virtual(seconds_of_new_message, 3600, backend=backend)
        second = run_virtual(seconds_of_new_message, 60, backend=backend)
        assert 60 <= second - first <= 120
        third = anyio.run(seconds_of_new_message, 0, backend=backend)
        assert 0 <= third - second <= 60

    async def test_clock_is_real_if_no_virtual_one_was_imported(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "trio.testing")
        broker = Broker()
        before = broker._cluster.now()
        async with broker:
            assert 0 <= broker._cluster.now() - before < 60

    @on_both_backends
    def test_broker_restarts_in_virtual_time_without_a_jump(
        self, backend: Literal["asyncio", "trio"]
    ) -> None:
        async def main() -> None:
            async with Broker() as broker, anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, YEAR)
                start = anyio.current_time()
                await broker.restart()
                assert anyio.current_time() == start
                group.cancel_scope.cancel()

        run_virtual(main, backend=backend)
