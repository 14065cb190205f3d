"""What leaves, in the order of the calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from .transport import Transport

MAX_QUEUED_BYTES: Final = 262144
"""So many bytes may wait for the link before those who have more wait themselves."""

MAX_SEND_BYTES: Final = 131072
"""So many bytes are handed over at a time."""

LARGE_PACKET_BYTES: Final = 65536
"""A packet of so many bytes is worth a call of the system of its own."""

BUSY_PACKETS: Final = 32
MAX_COLLECT_YIELDS: Final = 8
"""While at least so many packets come between, those that wait wait for so many pauses more."""


class Writer:
    """
    The packets on their way to the link.

    Bytes leave in one place: the first packet of a turn, and each large one, is sent at once, if
    nothing is under way, and what gathers behind it is sent by the writer task in its own turn. No
    caller ever waits in a send.

    :param transport: the link
    :param clock: tells the time of the loop
    """

    def __init__(
        self, transport: Transport, clock: Callable[[], float] = anyio.current_time
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._packets: deque[bytes | memoryview] = deque()
        self.size = 0
        """The bytes in the queue."""
        self.limit = MAX_QUEUED_BYTES
        """
        At this many bytes in the queue, a caller waits: 0 while another one waits, and after the
        last packet. Plain attributes, because each publish compares them.
        """
        self.idle = False
        """Whether nothing is being sent, and the writer task waits for packets if it has begun."""
        self._start: Callable[[], object] | None = None
        self._wake: anyio.Event | None = None
        self._waiting: deque[anyio.Event] = deque()
        self._marks: deque[tuple[int, Callable[[], object]]] = deque()
        self._awaiting_stop: list[anyio.Event] = []
        self._in_send_bytes = 0
        self._partly_sent = False
        self.broken = False
        """Whether nothing will leave any more."""
        self._batching = False
        """Whether one packet has been sent at once since anything came, so that others gather."""
        self.ended = False
        """Whether the last packet has been queued."""
        self.sent = 0
        """How many bytes have been handed over to this link."""
        self.last_sent = clock()

    @property
    def queued(self) -> int:
        """How many bytes have been queued on this link."""
        return self.sent + self.size

    @property
    def unsent_packets(self) -> list[bytes | memoryview]:
        """The packets of which no byte has been handed over."""
        whole: list[bytes | memoryview] = []
        gone = self._in_send_bytes
        for packet in self._packets:
            if gone > 0:
                gone -= len(packet)
            else:
                whole.append(packet)
        return whole[1:] if self._partly_sent and not self._in_send_bytes else whole

    @property
    def unoffered_bytes(self) -> int:
        """How many bytes the link has not been offered yet."""
        return self.size - self._in_send_bytes

    @property
    def has_space(self) -> bool:
        """Whether the queue has space for a packet, and no caller waits for space."""
        return self.size < self.limit

    async def wait_for_space(self) -> None:
        """Wait until there is room for one more packet; first come, first served."""
        if self.has_space:
            return
        turn = anyio.Event()
        self._waiting.append(turn)
        self.limit = 0
        self._admit()
        try:
            await turn.wait()
        finally:
            # One that gives up lets the next one in; else its write() does.
            self._waiting.remove(turn)
            if not (self._waiting or self.ended):
                self.limit = MAX_QUEUED_BYTES
            self._admit()

    def begin(self, start: Callable[[], object]) -> None:
        """
        Send from now on.

        :param start: has :meth:`run` run in a task, once there is something for it to do
        """
        self._start = start
        self.idle = True
        self._transport.set_waker(self._wake_task)
        if self._packets:
            self._send_now(self._next_bytes())
        if self._packets:
            self._wake_task()

    def write(self, data: bytes) -> None:
        """Queue a packet."""
        self.size += len(data)
        self._packets.append(data)
        if self.idle:
            if not self._batching or len(data) >= LARGE_PACKET_BYTES:
                self._batching = True
                self._send_now(data)
                if not self._packets:
                    return
            self._wake_task()

    def write_last(self, data: bytes) -> None:
        """Queue the last packet, after which the queue has no space."""
        self.ended = True
        self.limit = 0
        self.write(data)

    def begin_turn(self, *, several: bool) -> None:
        """
        Begin a turn.

        :param several: whether several packets are likely, which are then sent together
        """
        self._batching = several

    def call_when_sent(self, waker: Callable[[], object]) -> None:
        """
        Have a function called when everything that is queued now has been sent, or nothing will be
        any more; which may be now.
        """
        if self.size and not self.broken:
            self._marks.append((self.sent + self.size, waker))
        else:
            waker()

    async def wait_sent(self) -> None:
        """Wait until everything that is queued now has been sent, or nothing will be any more."""
        event = anyio.Event()
        self.call_when_sent(event.set)
        await event.wait()

    async def wait_stopped(self) -> None:
        """Wait until the connection is gone."""
        if not self.broken:
            event = anyio.Event()
            self._awaiting_stop.append(event)
            await event.wait()

    async def run(self) -> None:
        """Send what is queued, until cancelled or until the link breaks."""
        while True:
            if not self._packets:
                await self._transport.send_control()
            if not self._packets:
                self.idle, self._batching = True, False
                self._wake = anyio.Event()
                await self._wake.wait()
                continue
            if (count := len(self._packets)) >= BUSY_PACKETS:
                await self._collect()
            data = self._next_bytes()
            if not (sent := self._transport.try_send(data)):
                sent = await self._send(data)
            self._note_sent(sent)
            if count > 1 and not self._packets:
                # Where many leave, more are coming: together they cost less than one by one.
                await checkpoint()

    def send_nowait(self) -> None:
        """Hand over what the link takes at once, since there will be no later."""
        with suppress(OSError):
            while self._packets and not self._in_send_bytes:
                if not (sent := self._transport.try_send(self._next_bytes())):
                    return
                self._note_sent(sent)

    def forbid_task(self) -> None:
        """Start no task any more."""
        self._start = None

    def stop(self) -> None:
        """Let go those who wait: nothing will leave any more."""
        self.broken = True
        for turn in self._waiting:
            turn.set()
        for event in self._awaiting_stop:
            event.set()
        marks, self._marks = self._marks, deque()
        for _, waker in marks:
            waker()

    def _wake_task(self) -> None:
        if self.idle:
            self.idle = False
            if self._wake is not None:
                self._wake.set()
            elif self._start is not None:
                self._start()

    def _send_now(self, data: bytes | memoryview) -> None:
        try:
            sent = self._transport.try_send(data)
        except OSError:
            # The writer task, roused for what is left, meets the same error and knows what to do.
            return
        if sent:
            self._note_sent(sent)

    async def _send(self, data: bytes | memoryview) -> int:
        self._in_send_bytes = len(data)
        try:
            sent = await self._transport.send(data)
        except BaseException:
            if not self._transport.may_send_part:
                self._in_send_bytes = 0
            raise
        self._in_send_bytes = 0
        return sent

    async def _collect(self) -> None:
        """Let more come where many come: a call of the system costs as much as many packets."""
        before = 0
        for _ in range(MAX_COLLECT_YIELDS):
            count = len(self._packets)
            if count - before < BUSY_PACKETS or self.size >= MAX_SEND_BYTES:
                break
            before = count
            # Trio runs the tasks of a turn in either order: in two of them, each has run.
            await checkpoint()
            await checkpoint()

    def _next_bytes(self) -> bytes | memoryview:
        if len(self._packets) == 1:
            return self._packets[0]
        if self.size <= MAX_SEND_BYTES:
            return b"".join(self._packets)
        packets, chosen, size = iter(self._packets), list[bytes | memoryview](), 0
        while size < MAX_SEND_BYTES:
            chosen.append(next(packets))
            size += len(chosen[-1])
        return b"".join(chosen)

    def _note_sent(self, sent: int) -> None:
        self.size -= sent
        self.sent += sent
        self.last_sent = self._clock()
        if not self.size:
            self._packets.clear()
            self._partly_sent = False
            sent = 0
        while sent:
            packet = self._packets.popleft()
            self._partly_sent = len(packet) > sent
            if self._partly_sent:
                self._packets.appendleft(memoryview(packet)[sent:])
                break
            sent -= len(packet)
        while self._marks and self._marks[0][0] <= self.sent:
            self._marks.popleft()[1]()
        self._admit()

    def _admit(self) -> None:
        if self._waiting and (self.size < MAX_QUEUED_BYTES or self.broken):
            self._waiting[0].set()
