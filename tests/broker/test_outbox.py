"""The writes to one client, in virtual time."""

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
    A stream that records writes.

    :ivar writes: the time in seconds since the creation, and the bytes of each write
    :ivar busy: the duration of a write in seconds
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
    """Run the writer during a block, and close the outbox at its end."""
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(outbox.write, stream)
        yield
        outbox.close()


def packets(count: int, start: int = 0) -> list[bytes]:
    return [b"%04d" % number for number in range(start, start + count)]


def put(outbox: Outbox, items: list[bytes]) -> None:
    for item in items:
        outbox.put(item)


class TestImmediateWrites:
    async def test_queued_packets_are_joined(self) -> None:
        stream, outbox = Recorder(), Outbox()
        async with writing(stream, outbox):
            put(outbox, packets(300))
            assert outbox.queued == 1200
            await anyio.sleep(1)
        assert stream.writes == [(0, b"".join(packets(300)))]
        assert (outbox.queued, outbox.written) == (0, 1200)

    async def test_writes_are_limited_to_64_kib(self) -> None:
        stream, outbox = Recorder(), Outbox()
        async with writing(stream, outbox):
            outbox.put(bytes(150000))
        assert [len(data) for _, data in stream.writes] == [65536, 65536, 18928]

    async def test_packets_queued_during_a_write_are_joined(self) -> None:
        stream, outbox = Recorder(), Outbox()
        stream.busy = 5
        async with writing(stream, outbox):
            outbox.put(b"a")
            await anyio.sleep(1)
            outbox.put(b"b")
            outbox.put(b"c")
        assert stream.writes == [(0, b"a"), (pytest.approx(5), b"bc")]

    async def test_broken_stream_ends_the_writer(self) -> None:
        stream, outbox = Recorder(), Outbox()
        stream.broken = True
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(outbox.write, stream)
            outbox.put(b"a")
        assert stream.writes == []
        assert outbox.queued == 1


class TestCoalescing:
    async def test_sixty_packets_are_written_and_the_rest_after_a_second(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            put(outbox, packets(300))
            await anyio.sleep(2)
        first, second = stream.writes
        assert first == (0, b"".join(packets(60)))
        assert second[0] == pytest.approx(1)
        assert second[1] == b"".join(packets(240, 60))

    async def test_flushes_count_from_the_start_of_the_connection(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            for _ in range(2):
                await anyio.sleep(2.75)
                put(outbox, packets(61))
        assert [time for time, _ in stream.writes] == pytest.approx([2.75, 3, 5.5])
        assert [len(data) // 4 for _, data in stream.writes] == [60, 1, 60]

    async def test_next_packet_with_a_token_takes_waiting_packets_along(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            put(outbox, packets(100))
            await anyio.sleep(0.5)
            # Thirty tokens have been refilled.
            put(outbox, packets(31, 100))
            await anyio.sleep(0.1)
            time, data = stream.writes[1]
            assert time == pytest.approx(0.5)
            assert data == b"".join(packets(70, 60))
            await anyio.sleep(1)
        assert [data for _, data in stream.writes[2:]] == packets(1, 130)

    async def test_sixty_packets_per_second_do_not_wait(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            for packet in packets(600):
                outbox.put(packet)
                await anyio.sleep(1 / 59)
        assert [data for _, data in stream.writes] == packets(600)

    async def test_waiting_packets_are_written_after_a_slow_write(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        stream.busy = 10
        async with writing(stream, outbox):
            put(outbox, packets(61))
            await anyio.sleep(15)
        assert stream.writes == [
            (0, b"".join(packets(60))),
            (pytest.approx(10), packets(1, 60)[0]),
        ]

    async def test_packets_above_the_limit_do_not_wait(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True, limit=1000)
        async with writing(stream, outbox):
            put(outbox, packets(70))
            outbox.put(bytes(1000))
            await anyio.sleep(0.1)
            assert sum(len(data) for _, data in stream.writes) == 1280
            assert stream.now < 1

    async def test_waiting_packets_are_lost_on_close(self) -> None:
        stream, outbox = Recorder(), Outbox(coalesce=True)
        async with writing(stream, outbox):
            put(outbox, packets(61))
        assert stream.writes == [(0, b"".join(packets(60)))]
        assert stream.now == 0
