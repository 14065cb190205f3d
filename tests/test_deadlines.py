"""The deadlines of replies: each timeout starts when the last byte of the request is written."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from emitter_anyio import RequestTimeoutError
from emitter_anyio._net.timer import ReplyDeadline, Timer
from emitter_anyio._net.transport import Transport
from emitter_anyio._net.writer import Writer
from emitter_anyio.testing import run_virtual
from tests.support.clock import simulate_blocking
from tests.support.connections import connect_once
from tests.support.peer import PUBLISH, Peer, memory_peer

SECONDS: Final = (5, 2, 3)
SETTLING_TURNS: Final = 40
"""The number of event loop turns after which everything that is due has happened."""


class LimitedTransport(Transport):
    """A transport that accepts a limited number of bytes."""

    may_send_part = False

    def __init__(self) -> None:
        self.capacity = 0

    async def receive(self, size: int = 0, into: memoryview | None = None) -> bytes:
        raise NotImplementedError

    async def send(self, data: bytes | memoryview) -> int:
        raise NotImplementedError

    async def send_eof(self) -> None:
        raise NotImplementedError

    def interrupt(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    def try_send(self, data: bytes | memoryview) -> int:
        accepted = min(len(data), self.capacity)
        self.capacity -= accepted
        return accepted


class Call:
    """A call that awaits a reply, and when its deadline expired."""

    def __init__(self, simulation: Simulation, seconds: float) -> None:
        self.simulation = simulation
        self.seconds = seconds
        self.deadline: ReplyDeadline
        self.mark = 0
        self.written_at: float | None = None
        self.expired: list[float] = []
        self.expired_after_turns: int | None = None

    def expire(self) -> None:
        self.expired.append(anyio.current_time())
        self.expired_after_turns = self.simulation.turns


Backend: TypeAlias = Literal["asyncio", "trio"]
Step: TypeAlias = tuple[str, object]
Check: TypeAlias = Callable[[Call], None]

_call = st.tuples(st.just("call"), st.tuples(st.sampled_from(SECONDS), st.integers(1, 40)))
_accept = st.tuples(st.just("accept"), st.integers(1, 100))
_reply = st.tuples(st.just("reply"), st.integers(0, 20))
_wait = st.tuples(st.just("wait"), st.integers(1, 4))
_block = st.tuples(st.just("block"), st.integers(1, 4))


def _steps(*kinds: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.one_of(*kinds), min_size=20, max_size=60)


class Simulation:
    """Calls with the timer and the writer of their connection, on virtual time."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.turns: int | None = None
        """The number of event loop turns since the loop was blocked."""
        self._transport = LimitedTransport()
        self._timer = Timer(anyio.current_time)
        self._writer = Writer(self._transport, anyio.current_time)

    async def run(self, steps: list[Step], check: Check) -> None:
        """Run the steps, and check every call after each step."""
        self._writer.begin(lambda: None)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._timer.run, fail_with, lambda: 0)
            for step in steps:
                await self._run_step(step)
                for call in self.calls:
                    if call.written_at is None and call.mark <= self._writer.sent:
                        call.written_at = anyio.current_time()
                    check(call)
            self._timer.end()

    async def _run_step(self, step: Step) -> None:
        match step:
            case ("call", (int(seconds), int(size))):
                call = Call(self, seconds)
                self._writer.write(bytes(size))
                call.mark = self._writer.queued
                call.deadline = ReplyDeadline(call.expire, seconds, self._timer, self._writer)
                self.calls.append(call)
            case ("accept", int(size)):
                self._transport.capacity += size
                self._writer.send_nowait()
            case ("reply", int(which)) if which < len(self.calls):
                self.calls[which].deadline.cancel()
            case ("wait", int(seconds)):
                await anyio.sleep(seconds)
                for _ in range(SETTLING_TURNS):
                    await checkpoint()
            case ("block", int(seconds)):
                simulate_blocking(seconds)
                for self.turns in range(SETTLING_TURNS):
                    await checkpoint()
                self.turns = None


def fail_with(error: Exception) -> None:
    raise error


def run(backend: Backend, steps: list[Step], check: Check) -> Simulation:
    simulation: list[Simulation] = []

    async def main() -> None:
        simulation.append(Simulation())
        await simulation[0].run(steps, check)

    run_virtual(main, backend=backend)
    return simulation[0]


on_both_backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@on_both_backends
@settings(max_examples=50)
@given(steps=_steps(_call, _accept, _reply, _wait))
def test_call_expires_at_its_own_deadline(backend: Backend, steps: list[Step]) -> None:
    def check(call: Call) -> None:
        if call.written_at is None or call.written_at + call.seconds > anyio.current_time():
            assert not call.expired
        elif not call.deadline.done:
            assert call.expired == [pytest.approx(call.written_at + call.seconds, abs=1e-6)]

    run(backend, steps, check)


@on_both_backends
@settings(max_examples=50)
@given(steps=_steps(_call, _accept, _reply, _wait, _block))
def test_call_does_not_expire_before_reader_had_10_turns(
    backend: Backend, steps: list[Step]
) -> None:
    def check(call: Call) -> None:
        assert call.expired_after_turns is None or call.expired_after_turns >= 10

    simulation = run(backend, [*steps, ("accept", 10_000), ("wait", 100)], check)
    assert all(call.deadline.done or len(call.expired) == 1 for call in simulation.calls)


async def test_long_deadline_does_not_keep_cancelled_ones_in_memory(anyio_backend: object) -> None:
    transport = LimitedTransport()
    transport.capacity = sys.maxsize
    timer, writer = Timer(anyio.current_time), Writer(transport)
    writer.begin(lambda: None)
    long = [ReplyDeadline(pytest.fail, 3600, timer, writer) for _ in range(3)]
    for _ in range(10_000):
        writer.write(b"x")
        ReplyDeadline(pytest.fail, 10, timer, writer).cancel()
    entries = [due for _, _, due in timer._heap]
    assert len(entries) < 100
    assert {due for due in entries if not due.done} == {*long}


async def test_deadlines_of_lost_connection_are_freed_without_garbage_collection(
    anyio_backend: object,
) -> None:
    timer, writer = Timer(anyio.current_time), Writer(LimitedTransport())
    writer.begin(lambda: None)
    gc.disable()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(timer.run, fail_with, lambda: 0)
            for written in (True, False):
                writer.write(b"x")
                if written:
                    writer._transport.capacity = 1  # type: ignore[attr-defined]
                    writer.send_nowait()
                ReplyDeadline(pytest.fail, 5, timer, writer)
            await checkpoint()
            timer.end()
            writer.stop()
        references: list[weakref.ref[Any]] = [weakref.ref(timer), weakref.ref(writer)]
        del timer, writer
        assert [one() for one in references] == [None, None]
    finally:
        gc.enable()


class SlowPeer:
    """A peer that answers one of four publishes, after a delay."""

    def __init__(self, answered: int, delay: float) -> None:
        self._answered = answered
        self._delay = delay

    async def run(self, peer: Peer) -> None:
        await peer.accept()
        for number in range(4):
            packet = await peer.until(PUBLISH)
            if number == self._answered:
                await anyio.sleep(self._delay)
                await peer.answer(packet)
        await peer.answer_all()


@pytest.mark.virtual_time
async def test_reply_to_one_call_does_not_change_deadlines_of_others(anyio_backend: object) -> None:
    ends: dict[str, float] = {}
    errors: dict[str, str] = {}
    async with memory_peer(SlowPeer(1, 1).run) as connectable:
        async with connect_once(connectable=connectable, request_timeout=10) as emitter:
            start = anyio.current_time()

            async def publish(name: str, timeout: float | None) -> None:
                options = {} if timeout is None else {"timeout": timeout}
                try:
                    await emitter.publish("k", f"{name}/", "x", qos=1, **options)  # type: ignore[arg-type]
                except RequestTimeoutError as exc:
                    errors[name] = str(exc)
                ends[name] = round(anyio.current_time() - start, 3)

            async with anyio.create_task_group() as tasks:
                for name, timeout in (("a", None), ("b", None), ("c", 2.5), ("d", None)):
                    tasks.start_soon(partial(publish, name, timeout))
                    await anyio.sleep(3)
    assert ends == {"a": 10, "b": 4, "c": 8.5, "d": 19}
    assert errors.keys() == {"a", "c", "d"}
    for name, limit in (("a", "10 s"), ("c", "2.5 s"), ("d", "10 s")):
        assert f"'{name}/'" in errors[name]
        assert limit in errors[name]
        assert "unknown" in errors[name]
