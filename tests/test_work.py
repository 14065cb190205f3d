"""The cost per message, counted instead of timed, so that no clock decides whether a test fails."""

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
"""Messages per step, which fit into the socket's and the stream's buffers."""
LARGE: Final = 256 * 1024
IN_FLIGHT: Final = 20


TOLERANCE: Final = 1.05
"""The allowed ratio to the measured figure, for other versions of Python and AnyIO."""
SYSTEM_CALLS_TOLERANCE: Final = 1.2
"""Like :data:`TOLERANCE`; the size of batches depends on Trio's random order of tasks."""

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
    ("publishing_large", "asyncio"): Work(52.6, 141.9, 3.02),
    ("publishing_large", "trio"): Work(54.7, 236.4, 5.25),
    ("decoding", "asyncio"): Work(4.02, 6.02, 0),
}
"""The measured cost of a message."""
MEASURED_CALLS: Final = {
    ("opening and closing a connection", "asyncio"): 538,
    ("opening and closing a connection", "trio"): 539,
    ("a ping", "asyncio"): 141.1,
    ("a ping", "trio"): 147,
}
"""Calls of the library from entering a client to leaving it, and for PINGREQ and PINGRESP."""
COPIES: Final = {"receiving_large": 2.2, "publishing_large": 1.2}
"""Copies of a large message that may exist at the same time, without the caller's."""
MAX_BLOCKS_KEPT: Final = 400
"""Memory blocks that may remain after thousands of messages: the event loops keep some."""

ADVICE: Final = "run the benchmarks and see 'Speed' in CONTRIBUTING.md before you raise the bound"


class RemoteEnd:
    """The other end of a socket, which acts only when called and whose work is not counted."""

    def __init__(self, subscriptions: int) -> None:
        self._subscriptions = subscriptions
        self._leaving = anyio.Event()
        self._sock: Any = None
        self._buffer = bytearray(65536)

    async def play(self, peer: Peer) -> None:
        assert isinstance(peer.stream, SocketStream)
        self._sock = peer.stream.sock
        await peer.accept()
        for _ in range(self._subscriptions):
            await peer.answer(await peer.until(SUBSCRIBE))
        await self._leaving.wait()
        await peer.answer_all()

    def leave(self) -> None:
        self._leaving.set()

    async def send(self, data: bytes) -> None:
        """Send all data, and let the client run while the socket is full."""
        view = memoryview(data)
        while True:
            with uncounted(), suppress(BlockingIOError):
                view = view[self._sock.send(view) :]
            if not view:
                return
            await checkpoint()

    async def take(self, size: int) -> None:
        """Read ``size`` bytes."""
        while size > 0:
            with uncounted(), suppress(BlockingIOError):
                while size > 0:
                    size -= self._sock.recv_into(self._buffer)
            if size > 0:
                await checkpoint()

    async def acknowledge(self, messages: int, size: int) -> None:
        """Read QoS 1 PUBLISH packets of one size, and acknowledge them."""
        while messages:
            with uncounted(), suppress(BlockingIOError):
                data = self._sock.recv(65536)
                starts = range(size - len(BODY) - 2, len(data), size)
                self._sock.send(b"".join(b"\x40\x02" + data[at : at + 2] for at in starts))
                messages -= len(starts)
            await checkpoint()


@asynccontextmanager
async def client_and_remote(
    channels: tuple[str, ...] = (), on_message: Callable[[EmitterMessage], None] | None = None
) -> AsyncGenerator[tuple[Emitter, RemoteEnd]]:
    """A client with awaited subscriptions, and the remote end."""
    remote = RemoteEnd(len(channels))
    async with serving("unix", remote.play) as options:
        emitter = connect_once(max_message_size=LARGE + 1024, **options)
        if on_message is not None:
            emitter.on("message", on_message)
        async with emitter:
            for channel in channels:
                await emitter.subscribe("k", channel)
            try:
                yield emitter, remote
            finally:
                remote.leave()


# The paths: each yields a step that is repeated, and its number of messages.


@asynccontextmanager
async def receiving() -> AsyncGenerator[tuple[Step, int]]:
    data = packets.publish("a/", BODY) * MESSAGES
    remote = RemoteEnd(1)
    async with serving("unix", remote.play) as options:
        async with connect_once(**options) as emitter, emitter.subscribe("k", "a/") as messages:

            async def step() -> None:
                await remote.send(data)
                left = MESSAGES
                async for _ in messages:
                    left -= 1
                    if not left:
                        break

            try:
                yield step, MESSAGES
            finally:
                remote.leave()


@asynccontextmanager
async def receiving_alone() -> AsyncGenerator[tuple[Step, int]]:
    """Send one message at a time to a waiting consumer."""
    data = packets.publish("a/", BODY)
    remote = RemoteEnd(1)
    taken = 0

    async def take(messages: EventStream[EmitterMessage]) -> None:
        nonlocal taken
        async for _ in messages:
            taken += 1

    async with serving("unix", remote.play) as options, connect_once(**options) as emitter:
        async with emitter.subscribe("k", "a/") as messages, anyio.create_task_group() as tasks:
            tasks.start_soon(take, messages)

            async def step() -> None:
                wanted = taken + 1
                await remote.send(data)
                while taken < wanted:
                    await checkpoint()

            try:
                yield step, 1
            finally:
                tasks.cancel_scope.cancel()
                remote.leave()


@asynccontextmanager
async def handled(body: bytes, messages: int) -> AsyncGenerator[tuple[Step, int]]:
    data = packets.publish("a/", body) * messages
    taken = 0

    def take(message: EmitterMessage) -> None:
        nonlocal taken
        taken += 1

    async with client_and_remote(("a/",), take) as (_, remote):

        async def step() -> None:
            nonlocal taken
            taken = 0
            await remote.send(data)
            while taken < messages:
                await checkpoint()

        yield step, messages


def handling() -> AbstractAsyncContextManager[tuple[Step, int]]:
    return handled(BODY, MESSAGES)


@asynccontextmanager
async def publishing() -> AsyncGenerator[tuple[Step, int]]:
    size = MESSAGES * len(packets.publish("k/a/", BODY))
    async with client_and_remote() as (emitter, remote):

        async def step() -> None:
            for _ in range(MESSAGES):
                await emitter.publish("k", "a/", BODY)
            await remote.take(size)

        yield step, MESSAGES


@asynccontextmanager
async def confirming() -> AsyncGenerator[tuple[Step, int]]:
    size = len(packets.publish("k/a/", BODY, 1))
    async with client_and_remote() as (emitter, remote):

        async def work() -> None:
            for _ in range(MESSAGES // IN_FLIGHT):
                await emitter.publish("k", "a/", BODY, qos=1)

        async def step() -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(IN_FLIGHT):
                    tasks.start_soon(work)
                await remote.acknowledge(MESSAGES, size)

        yield step, MESSAGES


def receiving_large() -> AbstractAsyncContextManager[tuple[Step, int]]:
    return handled(bytes(LARGE), 1)


@asynccontextmanager
async def publishing_large() -> AsyncGenerator[tuple[Step, int]]:
    body = bytes(LARGE)
    size = len(packets.publish("k/a/", body))
    async with client_and_remote() as (emitter, remote):

        async def step() -> None:
            await emitter.publish("k", "a/", body)
            await remote.take(size)

        yield step, 1


SMALL = (receiving, receiving_alone, handling, publishing, confirming)
LARGER = (receiving_large, publishing_large)


Record: TypeAlias = Callable[[str, object], None]


def check(record: Record, case: str, figures: dict[str, tuple[float, float]]) -> None:
    """
    Record figures for the summary of the test run, and check that none exceeds its bound.

    :param figures: by what is counted: the figure, and the measured one to compare it with
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
    check(
        record,
        f"{case}, {backend}",
        {"calls": (calls, MEASURED_CALLS[case, backend])},
    )


@pytest.mark.parametrize("path", [*SMALL, *LARGER])
async def test_work_per_message(
    path: Path, anyio_backend: tuple[str, object], record_property: Record
) -> None:
    # Trio's random order of tasks changes the number of system calls of a single message.
    steps = 64 if path in (*LARGER, receiving_alone) else 8
    async with path() as (step, messages):
        work = await measure_work(step, messages, steps)
    check_work(record_property, path.__name__, anyio_backend[0], work)


async def test_calls_of_opening_and_closing_a_connection(
    anyio_backend: tuple[str, object], record_property: Record
) -> None:
    async def script(peer: Peer) -> None:
        await peer.serve()

    async with serving("unix", script) as options:

        async def step() -> None:
            async with connect_once(**options):
                # As in nearly all programs, the client has started to read.
                await anyio.wait_all_tasks_blocked()

        work = await measure_work(step, 1, steps=20)
    check_calls(record_property, "opening and closing a connection", anyio_backend[0], work.calls)


@pytest.mark.virtual_time
async def test_calls_of_a_ping(anyio_backend: tuple[str, object], record_property: Record) -> None:
    async def script(peer: Peer) -> None:
        await peer.serve()

    async with memory_peer(script) as connectable:
        async with connect_once(connectable=connectable, keepalive=1):
            work = await measure_work(partial(anyio.sleep, 100), 100)
    check_calls(record_property, "a ping", anyio_backend[0], work.calls)


@pytest.mark.parametrize("path", SMALL)
async def test_messages_leave_no_memory_behind(path: Path, anyio_backend: object) -> None:
    async with path() as (step, messages):
        kept = await leaked_blocks(step, 20)
    assert kept <= MAX_BLOCKS_KEPT, (
        f"{20 * messages} messages leave {kept} blocks behind, more than {MAX_BLOCKS_KEPT}"
    )


@pytest.mark.parametrize("path", LARGER)
async def test_copies_of_a_large_message(path: Path, anyio_backend: object) -> None:
    async with path() as (step, _):
        copies = await peak_memory_bytes(step) / LARGE
    bound = COPIES[path.__name__]
    assert copies <= bound, f"{copies:.2f} copies, more than {bound}: {ADVICE}"


SMALL_PACKET: Final = packets.publish("a/", BODY)
CHUNK: Final = SMALL_PACKET * (65536 // len(SMALL_PACKET))


def connected() -> Codec:
    codec = Codec(Connect())
    codec.connect()
    codec.decode(packets.connack())
    return codec


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_calls_of_decoding_a_chunk(anyio_backend: str, record_property: Record) -> None:
    codec = connected()

    async def step() -> None:
        codec.decode(CHUNK)

    work = await measure_work(step, len(CHUNK) // len(SMALL_PACKET))
    check_work(record_property, "decoding", anyio_backend, work)


def test_decoding_copies_each_byte_once() -> None:
    chunk = CopiedBytes(CHUNK)
    assert len(unbatch(connected().decode(chunk))) == len(CHUNK) // len(SMALL_PACKET)
    # Except the first topic, which the codec remembers as text and with its packet header.
    once = len(CHUNK) + len(SMALL_PACKET)
    assert chunk.copied < once, f"{chunk.copied} bytes of {len(CHUNK)}: {ADVICE}"


def test_pieces_of_a_large_packet_are_joined_once() -> None:
    codec = connected()
    data = packets.publish("a/", bytes(60000))
    pieces = [CopiedBytes(data[at : at + 1000]) for at in range(0, len(data), 1000)]
    events = [event for piece in pieces for event in codec.decode(piece)]
    assert len(events) == 1
    assert sum(piece.copied for piece in pieces) == 0, ADVICE
