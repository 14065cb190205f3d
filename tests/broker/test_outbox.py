"""How packets are written to one client, by a clock that jumps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio import BrokenResourceError, EndOfStream
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint

from emitter_anyio.testing._outbox import Outbox

pytestmark = pytest.mark.virtual_time


class Recorder(ByteStream):
    """
    A stream into memory, which notes when something was sent.

    :ivar writes: seconds since it was made, and what was sent then
    :ivar busy: how long a send takes
    """

    def __init__(self) -> None:
        self.writes: list[tuple[float, bytes]] = []
        self.busy = 0.0
        self.broken = False
        self._start = anyio.current_time()

    @property
    def now(self) -> float:
        return anyio.current_time() - self._start

    async def send(self, item: bytes) -> None:
        if self.broken:
            raise BrokenResourceError
        self.writes.append((self.now, item))
        await anyio.sleep(self.busy)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        raise EndOfStream

    async def send_eof(self) -> None:
        await checkpoint()

    async def aclose(self) -> None:
        await checkpoint()


@asynccontextmanager
async def writing(stream: Recorder, outbox: Outbox) -> AsyncIterator[None]:
    """Write what a block puts; at its end the outbox is closed, and the writer must end."""
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(outbox.write, stream)
        yield
        outbox.close()


def packets(count: int, start: int = 0) -> list[bytes]:
    return [b"%04d" % number for number in range(start, start + count)]


def put(outbox: Outbox, items: list[bytes]) -> None:
    for item in items:
        outbox.put(item)


class TestAtOnce:
    async def test_what_is_there_is_joined(self) -> None:
        stream, outbox = Recorder(), Outbox()
        async with writing(stream, outbox):
            put(outbox, packets(300))
            assert outbox.queued == 1200
            await anyio.sleep(1)
        assert stream.writes == [(0, b"".join(packets(300)))]
        assert (outbox.queued, outbox.written) == (0, 1200)

    async def test_much_goes_in_pieces_of_64_kib(self) -> None:
        stream, outbox = Recorder(), Outbox()
        async with writing(stream, outbox):
            outbox.put(bytes(150000))
        assert [len(data) for _, data in stream.writes] == [65536, 65536, 18928]

    async def test_what_comes_while_one_is_under_way_is_the_next(self) -> None:
        stream, outbox = Recorder(), Outbox()
        stream.busy = 5
        async with writing(stream, outbox):
            outbox.put(b"a")
            await anyio.sleep(1)
            outbox.put(b"b")
            outbox.put(b"c")
        assert stream.writes == [(0, b"a"), (pytest.approx(5), b"bc")]

    async def test_a_broken_stream_ends_it(self) -> None:
        stream, outbox = Recorder(), Outbox()
        stream.broken = True
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(outbox.write, stream)
            outbox.put(b"a")
        assert stream.writes == []
        assert outbox.queued == 1


class TestCoalescing:
    async def test_sixty_at_once_and_the_others_after_a_second(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            put(outbox, packets(300))
            await anyio.sleep(2)
        first, second = stream.writes
        assert first == (0, b"".join(packets(60)))
        assert second[0] == pytest.approx(1)
        assert second[1] == b"".join(packets(240, 60))

    async def test_the_seconds_count_from_the_beginning_of_the_link(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            for _ in range(2):
                await anyio.sleep(2.75)
                put(outbox, packets(61))
        assert [time for time, _ in stream.writes] == pytest.approx([2.75, 3, 5.5])
        assert [len(data) // 4 for _, data in stream.writes] == [60, 1, 60]

    async def test_the_next_that_may_be_written_takes_the_others_along(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            put(outbox, packets(100))
            await anyio.sleep(0.5)
            # thirty more by now
            put(outbox, packets(31, 100))
            await anyio.sleep(0.1)
            time, data = stream.writes[1]
            assert time == pytest.approx(0.5)
            assert data == b"".join(packets(70, 60))
            await anyio.sleep(1)
        assert [data for _, data in stream.writes[2:]] == packets(1, 130)

    async def test_those_who_send_sixty_a_second_never_wait(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            for packet in packets(600):
                outbox.put(packet)
                await anyio.sleep(1 / 59)
        assert [data for _, data in stream.writes] == packets(600)

    async def test_one_that_is_slow_to_take_the_first_gets_the_others_behind_it(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        stream.busy = 10
        async with writing(stream, outbox):
            put(outbox, packets(61))
            await anyio.sleep(15)
        assert stream.writes == [
            (0, b"".join(packets(60))),
            (pytest.approx(10), packets(1, 60)[0]),
        ]

    async def test_nothing_waits_when_there_is_much(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True, limit=1000)
        async with writing(stream, outbox):
            put(outbox, packets(70))
            outbox.put(bytes(1000))
            await anyio.sleep(0.1)
            assert sum(len(data) for _, data in stream.writes) == 1280
            assert stream.now < 1

    async def test_what_waits_when_it_is_closed_is_lost(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            put(outbox, packets(61))
        assert stream.writes == [(0, b"".join(packets(60)))]
        assert stream.now == 0
