"""What a message costs, counted and not timed, so that a slow change turns red without a clock."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Final, TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import Emitter, EmitterMessage, EventStream
from emitter_anyio._protocol.codec import Codec
from emitter_anyio._protocol.packets import Connect
from tests.support import packets
from tests.support.connections import connect_once
from tests.support.events import unbatch
from tests.support.peer import SUBSCRIBE, Peer, SocketStream, memory_peer, serving
from tests.support.work import (
    CopiedBytes,
    Work,
    leaked_blocks,
    measure_work,
    peak_memory_bytes,
    uncounted,
)

pytestmark = [pytest.mark.without_debug, pytest.mark.fast_path]

Step: TypeAlias = Callable[[], Awaitable[None]]
Path: TypeAlias = Callable[[], AbstractAsyncContextManager[tuple[Step, int]]]

BODY: Final = bytes(64)
MESSAGES: Final = 400
"""In one step: what the socket holds, and the buffer of a stream."""
LARGE: Final = 256 * 1024
IN_FLIGHT: Final = 20


TOLERANCE: Final = 1.05
"""A figure may exceed the measured one by this factor, for other versions of Python and AnyIO."""
SYSTEM_CALLS_TOLERANCE: Final = 1.2
"""As :data:`TOLERANCE`: how many packets leave together depends on Trio's random order of tasks."""

# The largest figures measured with Python 3.11 to 3.13, and with the oldest dependencies.
MEASURED: Final = {
    ("receiving", "asyncio"): Work(6.27, 8.98, 0.0257),
    ("receiving", "trio"): Work(6.27, 9.81, 0.0463),
    ("receiving_alone", "asyncio"): Work(89, 273.1, 5),
    ("receiving_alone", "trio"): Work(87, 362, 7.2),
    ("handling", "asyncio"): Work(8.31, 10.62, 0.0282),
    ("handling", "trio"): Work(8.31, 11.57, 0.0500),
    ("publishing", "asyncio"): Work(15.5, 17.65, 0.0276),
    ("publishing", "trio"): Work(15.63, 18.52, 0.0557),
    ("confirming", "asyncio"): Work(63.62, 96.78, 0.3588),
    ("confirming", "trio"): Work(66.5, 118.8, 0.6028),
    ("receiving_large", "asyncio"): Work(202.3, 554.6, 10.02),
    ("receiving_large", "trio"): Work(190.3, 755.0, 16.28),
    ("publishing_large", "asyncio"): Work(49.23, 138.4, 3.02),
    ("publishing_large", "trio"): Work(49.23, 235.3, 5.25),
    ("decoding", "asyncio"): Work(4.02, 6.02, 0),
}
"""What one message costs."""
MEASURED_CALLS: Final = {
    ("opening and closing a link", "asyncio"): 571,
    ("opening and closing a link", "trio"): 571,
    ("a ping", "asyncio"): 141.1,
    ("a ping", "trio"): 147,
}
"""Calls of the library for a link from entering to leaving, and for a PINGREQ and its answer."""
COPIES: Final = {"receiving_large": 2.2, "publishing_large": 1.2}
"""How often a large message may be in memory at the same time, beside what the caller has."""
KEPT: Final = 400
"""Blocks of memory that thousands of messages may leave: the event loops keep some."""

ADVICE: Final = "run the benchmarks and see 'Speed' in CONTRIBUTING.md before you raise the bound"


class Far:
    """The other end of a socket, which does nothing on its own, and whose work is not counted."""

    def __init__(self, subscriptions: int) -> None:
        self._subscriptions = subscriptions
        self._over = anyio.Event()
        self._sock: Any = None
        self._buffer = bytearray(65536)

    async def play(self, peer: Peer) -> None:
        assert isinstance(peer.stream, SocketStream)
        self._sock = peer.stream.sock
        await peer.accept()
        for _ in range(self._subscriptions):
            await peer.answer(await peer.until(SUBSCRIBE))
        await self._over.wait()
        await peer.answer_all()

    def leave(self) -> None:
        self._over.set()

    async def send(self, data: bytes) -> None:
        """Send all of it, in turns with the client where it is too much at once."""
        view = memoryview(data)
        while True:
            with uncounted(), suppress(BlockingIOError):
                view = view[self._sock.send(view) :]
            if not view:
                return
            await checkpoint()

    async def take(self, size: int) -> None:
        """Take so many bytes."""
        while size > 0:
            with uncounted(), suppress(BlockingIOError):
                while size > 0:
                    size -= self._sock.recv_into(self._buffer)
            if size > 0:
                await checkpoint()

    async def confirm(self, messages: int, size: int) -> None:
        """Take PUBLISH packets of one size and of QoS 1, and acknowledge them."""
        while messages:
            with uncounted(), suppress(BlockingIOError):
                data = self._sock.recv(65536)
                starts = range(size - len(BODY) - 2, len(data), size)
                self._sock.send(b"".join(b"\x40\x02" + data[at : at + 2] for at in starts))
                messages -= len(starts)
            await checkpoint()


@asynccontextmanager
async def case(
    channels: tuple[str, ...] = (), on_message: Callable[[EmitterMessage], None] | None = None
) -> AsyncGenerator[tuple[Emitter, Far]]:
    """A client, awaited subscriptions of it, and the far end."""
    far = Far(len(channels))
    async with serving("unix", far.play) as options:
        emitter = connect_once(max_message_size=LARGE + 1024, **options)
        if on_message is not None:
            emitter.on("message", on_message)
        async with emitter:
            for channel in channels:
                await emitter.subscribe("k", channel)
            try:
                yield emitter, far
            finally:
                far.leave()


# The paths. Each is a step that is repeated, and how many messages it has.


@asynccontextmanager
async def receiving() -> AsyncGenerator[tuple[Step, int]]:
    data = packets.publish("a/", BODY) * MESSAGES
    far = Far(1)
    async with serving("unix", far.play) as options:
        async with connect_once(**options) as emitter, emitter.subscribe("k", "a/") as messages:

            async def step() -> None:
                await far.send(data)
                left = MESSAGES
                async for _ in messages:
                    left -= 1
                    if not left:
                        break

            try:
                yield step, MESSAGES
            finally:
                far.leave()


@asynccontextmanager
async def receiving_alone() -> AsyncGenerator[tuple[Step, int]]:
    """One message at a time, which the consumer waits for."""
    data = packets.publish("a/", BODY)
    far = Far(1)
    taken = 0

    async def take(messages: EventStream[EmitterMessage]) -> None:
        nonlocal taken
        async for _ in messages:
            taken += 1

    async with serving("unix", far.play) as options, connect_once(**options) as emitter:
        async with emitter.subscribe("k", "a/") as messages, anyio.create_task_group() as tasks:
            tasks.start_soon(take, messages)

            async def step() -> None:
                wanted = taken + 1
                await far.send(data)
                while taken < wanted:
                    await checkpoint()

            try:
                yield step, 1
            finally:
                tasks.cancel_scope.cancel()
                far.leave()


@asynccontextmanager
async def handled(body: bytes, messages: int) -> AsyncGenerator[tuple[Step, int]]:
    data = packets.publish("a/", body) * messages
    taken = 0

    def take(message: EmitterMessage) -> None:
        nonlocal taken
        taken += 1

    async with case(("a/",), take) as (_, far):

        async def step() -> None:
            nonlocal taken
            taken = 0
            await far.send(data)
            while taken < messages:
                await checkpoint()

        yield step, messages


def handling() -> AbstractAsyncContextManager[tuple[Step, int]]:
    return handled(BODY, MESSAGES)


@asynccontextmanager
async def publishing() -> AsyncGenerator[tuple[Step, int]]:
    size = MESSAGES * len(packets.publish("k/a/", BODY))
    async with case() as (emitter, far):

        async def step() -> None:
            for _ in range(MESSAGES):
                await emitter.publish("k", "a/", BODY)
            await far.take(size)

        yield step, MESSAGES


@asynccontextmanager
async def confirming() -> AsyncGenerator[tuple[Step, int]]:
    size = len(packets.publish("k/a/", BODY, 1))
    async with case() as (emitter, far):

        async def work() -> None:
            for _ in range(MESSAGES // IN_FLIGHT):
                await emitter.publish("k", "a/", BODY, qos=1)

        async def step() -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(IN_FLIGHT):
                    tasks.start_soon(work)
                await far.confirm(MESSAGES, size)

        yield step, MESSAGES


def receiving_large() -> AbstractAsyncContextManager[tuple[Step, int]]:
    return handled(bytes(LARGE), 1)


@asynccontextmanager
async def publishing_large() -> AsyncGenerator[tuple[Step, int]]:
    body = bytes(LARGE)
    size = len(packets.publish("k/a/", body))
    async with case() as (emitter, far):

        async def step() -> None:
            await emitter.publish("k", "a/", body)
            await far.take(size)

        yield step, 1


SMALL = (receiving, receiving_alone, handling, publishing, confirming)
LARGER = (receiving_large, publishing_large)


Record: TypeAlias = Callable[[str, object], None]


def check(record: Record, case: str, figures: dict[str, tuple[float, float]]) -> None:
    """
    Record figures, which the summary of the run prints, and check that none exceeds its bound.

    :param figures: by what is counted: the figure and what was measured before
    """
    bounds = {
        what: measured * (SYSTEM_CALLS_TOLERANCE if what == "system calls" else TOLERANCE)
        for what, (_, measured) in figures.items()
    }
    texts = [
        f"{figure:.4g} {what} (at most {bounds[what]:.4g})" for what, (figure, _) in figures.items()
    ]
    record(case, ", ".join(texts))
    for text, (what, (figure, _)) in zip(texts, figures.items(), strict=True):
        assert figure <= bounds[what], f"{case}: {text}; {ADVICE}"


def check_work(record: Record, path: str, backend: str, work: Work) -> None:
    was = asdict(MEASURED[path, backend])
    figures = {what.replace("_", " "): (n, was[what]) for what, n in asdict(work).items()}
    check(record, f"{path} a message, {backend}", figures)


def check_calls(record: Record, case: str, backend: str, calls: float) -> None:
    check(record, f"{case}, {backend}", {"calls": (calls, MEASURED_CALLS[case, backend])})


@pytest.mark.parametrize("path", [*SMALL, *LARGER])
async def test_what_a_message_calls(
    path: Path, anyio_backend: tuple[str, object], record_property: Record
) -> None:
    # With Trio's random order of tasks, one message takes a few system calls more or less.
    steps = 64 if path in (*LARGER, receiving_alone) else 8
    async with path() as (step, messages):
        work = await measure_work(step, messages, steps)
    check_work(record_property, path.__name__, anyio_backend[0], work)


async def test_what_opening_and_closing_a_link_calls(
    anyio_backend: tuple[str, object], record_property: Record
) -> None:
    async def script(peer: Peer) -> None:
        await peer.serve()

    async with serving("unix", script) as options:

        async def step() -> None:
            async with connect_once(**options):
                # As in nearly all programs, it has begun to read.
                await anyio.wait_all_tasks_blocked()

        work = await measure_work(step, 1, steps=20)
    check_calls(record_property, "opening and closing a link", anyio_backend[0], work.calls)


@pytest.mark.virtual_time
async def test_what_a_ping_calls(
    anyio_backend: tuple[str, object], record_property: Record
) -> None:
    async def script(peer: Peer) -> None:
        await peer.serve()

    async with memory_peer(script) as connectable:
        async with connect_once(connectable=connectable, keepalive=1):
            work = await measure_work(partial(anyio.sleep, 100), 100)
    check_calls(record_property, "a ping", anyio_backend[0], work.calls)


@pytest.mark.parametrize("path", SMALL)
async def test_what_messages_leave_in_memory(path: Path, anyio_backend: object) -> None:
    async with path() as (step, messages):
        kept = await leaked_blocks(step, 20)
    assert kept <= KEPT, f"{20 * messages} messages leave {kept} blocks, at most {KEPT}"


@pytest.mark.parametrize("path", LARGER)
async def test_how_often_a_large_message_is_in_memory(path: Path, anyio_backend: object) -> None:
    async with path() as (step, _):
        copies = await peak_memory_bytes(step) / LARGE
    bound = COPIES[path.__name__]
    assert copies <= bound, f"{copies:.2f} times at once, at most {bound}: {ADVICE}"


SMALL_PACKET: Final = packets.publish("a/", BODY)
CHUNK: Final = SMALL_PACKET * (65536 // len(SMALL_PACKET))


def connected() -> Codec:
    codec = Codec(Connect())
    codec.connect()
    codec.decode(packets.connack())
    return codec


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_decoding_a_chunk_calls(anyio_backend: str, record_property: Record) -> None:
    codec = connected()

    async def step() -> None:
        codec.decode(CHUNK)

    work = await measure_work(step, len(CHUNK) // len(SMALL_PACKET))
    check_work(record_property, "decoding", anyio_backend, work)


def test_decoding_copies_no_byte_twice() -> None:
    chunk = CopiedBytes(CHUNK)
    assert len(unbatch(connected().decode(chunk))) == len(CHUNK) // len(SMALL_PACKET)
    # But the first topic, which is remembered as text and with its head.
    once = len(CHUNK) + len(SMALL_PACKET)
    assert chunk.copied < once, f"{chunk.copied} bytes of {len(CHUNK)}: {ADVICE}"


def test_the_pieces_of_a_large_packet_are_joined_once() -> None:
    codec = connected()
    data = packets.publish("a/", bytes(60000))
    pieces = [CopiedBytes(data[at : at + 1000]) for at in range(0, len(data), 1000)]
    events = [event for piece in pieces for event in codec.decode(piece)]
    assert len(events) == 1
    assert sum(piece.copied for piece in pieces) == 0, ADVICE
