"""The deadlines of replies: each is counted from when the bytes of its packet have left."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from emitter_anyio import RequestTimeoutError
from emitter_anyio._net.timer import ReplyDeadline, Timer
from emitter_anyio._net.transport import Transport
from emitter_anyio._net.writer import Writer
from tests.support.clock import run_on_virtual_time, stand_still
from tests.support.links import one_link
from tests.support.peer import PUBLISH, Peer, memory_peer

SECONDS: Final = (5, 2, 3)
SETTLING_TURNS: Final = 40
"""The turns of the loop in which everything that is due has happened."""


class Taking(Transport):
    """A transport that takes as many bytes as it may."""

    may_send_part = False

    def __init__(self) -> None:
        self.may_take = 0

    async def receive(self, size: int = 0) -> bytes:
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
        taken = min(len(data), self.may_take)
        self.may_take -= taken
        return taken


class Call:
    """A call that awaits a reply, and what becomes of it."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world = world
        self.seconds = seconds
        self.deadline: ReplyDeadline
        self.mark = 0
        self.left: float | None = None
        self.expired: list[float] = []
        self.expired_after_turns: int | None = None

    def expire(self) -> None:
        self.expired.append(anyio.current_time())
        self.expired_after_turns = self.world.turns


Step: TypeAlias = tuple[str, object]
Check: TypeAlias = Callable[[Call], None]

_call = st.tuples(st.just("call"), st.tuples(st.sampled_from(SECONDS), st.integers(1, 40)))
_take = st.tuples(st.just("take"), st.integers(1, 100))
_reply = st.tuples(st.just("reply"), st.integers(0, 20))
_wait = st.tuples(st.just("wait"), st.integers(1, 4))
_stand_still = st.tuples(st.just("stand still"), st.integers(1, 4))


def _steps(*kinds: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.one_of(*kinds), min_size=20, max_size=60)


class World:
    """Calls, the timer and the writer of their connection, and the virtual time."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.turns: int | None = None
        """The turns of the loop since it stood still."""
        self._transport = Taking()
        self._timer = Timer(anyio.current_time)
        self._writer = Writer(self._transport, anyio.current_time)

    async def play(self, steps: list[Step], check: Check) -> None:
        """Do one step after another, and check every call after each."""
        self._writer.begin(lambda: None)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._timer.run, fail_with, lambda: 0)
            for step in steps:
                await self._do(step)
                for call in self.calls:
                    if call.left is None and call.mark <= self._writer.sent:
                        call.left = anyio.current_time()
                    check(call)
            self._timer.end()

    async def _do(self, step: Step) -> None:
        match step:
            case ("call", (int(seconds), int(size))):
                call = Call(self, seconds)
                self._writer.write(bytes(size))
                call.mark = self._writer.queued
                call.deadline = ReplyDeadline(call.expire, seconds, self._timer, self._writer)
                self.calls.append(call)
            case ("take", int(size)):
                self._transport.may_take += size
                self._writer.send_nowait()
            case ("reply", int(which)) if which < len(self.calls):
                self.calls[which].deadline.cancel()
            case ("wait", int(seconds)):
                await anyio.sleep(seconds)
                for _ in range(SETTLING_TURNS):
                    await checkpoint()
            case ("stand still", int(seconds)):
                stand_still(seconds)
                for self.turns in range(SETTLING_TURNS):
                    await checkpoint()
                self.turns = None


def fail_with(error: Exception) -> None:
    raise error


def play(backend: str, steps: list[Step], check: Check) -> World:
    world: list[World] = []

    async def main() -> None:
        world.append(World())
        await world[0].play(steps, check)

    run_on_virtual_time(backend, main)
    return world[0]


on_both_backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@on_both_backends
@settings(max_examples=50)
@given(steps=_steps(_call, _take, _reply, _wait))
def test_each_call_expires_at_its_own_time(backend: str, steps: list[Step]) -> None:
    def check(call: Call) -> None:
        if call.left is None or call.left + call.seconds > anyio.current_time():
            assert not call.expired
        elif not call.deadline.done:
            assert call.expired == [pytest.approx(call.left + call.seconds, abs=1e-6)]

    play(backend, steps, check)


@on_both_backends
@settings(max_examples=50)
@given(steps=_steps(_call, _take, _reply, _wait, _stand_still))
def test_no_call_expires_before_the_reader_has_had_its_turns(
    backend: str, steps: list[Step]
) -> None:
    def check(call: Call) -> None:
        assert call.expired_after_turns is None or call.expired_after_turns >= 10

    world = play(backend, [*steps, ("take", 10_000), ("wait", 100)], check)
    assert all(call.deadline.done or len(call.expired) == 1 for call in world.calls)


async def test_one_that_waits_long_does_not_keep_the_others(anyio_backend: object) -> None:
    transport = Taking()
    transport.may_take = sys.maxsize
    timer, writer = Timer(anyio.current_time), Writer(transport)
    writer.begin(lambda: None)
    long = [ReplyDeadline(pytest.fail, 3600, timer, writer) for _ in range(3)]
    for _ in range(10_000):
        writer.write(b"x")
        ReplyDeadline(pytest.fail, 10, timer, writer).cancel()
    kept = [due for _, _, due in timer._heap]
    assert len(kept) < 100
    assert {due for due in kept if not due.done} == {*long}


async def test_what_a_lost_connection_leaves_waits_for_no_garbage_collector(
    anyio_backend: object,
) -> None:
    timer, writer = Timer(anyio.current_time), Writer(Taking())
    writer.begin(lambda: None)
    gc.disable()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(timer.run, fail_with, lambda: 0)
            for left in (True, False):
                writer.write(b"x")
                if left:
                    writer._transport.may_take = 1  # type: ignore[attr-defined]
                    writer.send_nowait()
                ReplyDeadline(pytest.fail, 5, timer, writer)
            await checkpoint()
            timer.end()
            writer.stop()
        gone: list[weakref.ref[Any]] = [weakref.ref(timer), weakref.ref(writer)]
        del timer, writer
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


class Reluctant:
    """A peer that answers one of the publishes, after a while."""

    def __init__(self, answered: int, after: float) -> None:
        self._answered = answered
        self._after = after

    async def play(self, peer: Peer) -> None:
        await peer.accept()
        for number in range(4):
            packet = await peer.until(PUBLISH)
            if number == self._answered:
                await anyio.sleep(self._after)
                await peer.answer(packet)
        await peer.answer_all()


@pytest.mark.virtual_time
async def test_an_answer_for_one_changes_nothing_for_the_others(anyio_backend: object) -> None:
    ends: dict[str, float] = {}
    errors: dict[str, str] = {}
    async with memory_peer(Reluctant(1, 1).play) as connectable:
        async with one_link(connectable=connectable, request_timeout=10) as emitter:
            start = anyio.current_time()

            async def ask(name: str, timeout: float | None) -> None:
                options = {} if timeout is None else {"timeout": timeout}
                try:
                    await emitter.publish("k", f"{name}/", "x", qos=1, **options)  # type: ignore[arg-type]
                except RequestTimeoutError as exc:
                    errors[name] = str(exc)
                ends[name] = round(anyio.current_time() - start, 3)

            async with anyio.create_task_group() as tasks:
                for name, timeout in (("a", None), ("b", None), ("c", 2.5), ("d", None)):
                    tasks.start_soon(partial(ask, name, timeout))
                    await anyio.sleep(3)
    assert ends == {"a": 10, "b": 4, "c": 8.5, "d": 19}
    assert errors.keys() == {"a", "c", "d"}
    for name, limit in (("a", "10 s"), ("c", "2.5 s"), ("d", "10 s")):
        assert f"'{name}/'" in errors[name]
        assert limit in errors[name]
        assert "unknown" in errors[name]
