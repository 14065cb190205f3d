"""The queue of outgoing packets, and the task that sends them."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from .transport import Transport

MAX_QUEUED_BYTES: Final = 262144
"""The queue size in bytes from which callers wait for space."""

MAX_SEND_BYTES: Final = 131072
"""The approximate maximum number of bytes per system call."""

LARGE_PACKET_BYTES: Final = 65536
"""The size in bytes from which a packet is sent immediately instead of being batched."""

BUSY_PACKETS: Final = 32
"""The number of new packets per turn from which the writer task waits for more to send together."""

MAX_COLLECT_YIELDS: Final = 8
"""The maximum number of turns that the writer task waits for more packets."""


def _never() -> bool:
    return False


class Writer:
    """
    A queue that sends packets in the order of the calls.

    If no send is in progress, the first packet of each turn and each large packet are sent
    immediately. The writer task sends the others together. No caller ever waits in a send.

    :param transport: sends the bytes
    :param clock: returns the time of the event loop
    :param pause: gives other tasks a turn; see :class:`Backend`
    """

    def __init__(
        self,
        transport: Transport,
        clock: Callable[[], float] = anyio.current_time,
        pause: Callable[[], Awaitable[None]] = checkpoint,
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._pause = pause
        self._packets: deque[bytes | memoryview] = deque()
        self.size = 0
        """The bytes in the queue."""
        self.limit = MAX_QUEUED_BYTES
        """
        The queue size in bytes from which callers wait; 0 while a caller waits, and after the last
        packet. It and ``size`` are plain attributes, because every publish compares them.
        """
        self.idle = False
        """Whether no send is in progress, and the writer task, if started, waits for packets."""
        self._start: Callable[[], object] | None = None
        self._wake: anyio.Event | None = None
        self._waiting: deque[anyio.Event] = deque()
        self._sent_callbacks: deque[tuple[int, Callable[[], object]]] = deque()
        self._awaiting_stop: list[anyio.Event] = []
        self._in_send_bytes = 0
        self._partly_sent = False
        self.broken = False
        """Whether the connection has ended, so that nothing more is sent."""
        self._batching = False
        """Whether a packet was sent immediately in this turn, so that further ones are batched."""
        self.ended = False
        """Whether the last packet has been queued."""
        self.sent = 0
        """The number of bytes sent on this connection."""
        self.last_sent = clock()

    @property
    def queued(self) -> int:
        """The number of bytes ever queued on this connection."""
        return self.sent + self.size

    @property
    def unsent_packets(self) -> list[bytes | memoryview]:
        """The packets that have not been sent, not even in part."""
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
        """The number of queued bytes that are not part of a send in progress."""
        return self.size - self._in_send_bytes

    @property
    def has_space(self) -> bool:
        """Whether the queue has space for a packet, and no caller waits for space."""
        return self.size < self.limit

    async def wait_for_space(self) -> None:
        """Wait until the queue has space for a packet, in the order of the calls."""
        if self.has_space:
            return
        turn = anyio.Event()
        self._waiting.append(turn)
        self.limit = 0
        self._admit()
        try:
            await turn.wait()
        finally:
            # A cancelled caller admits the next one. Otherwise, its write() does.
            self._waiting.remove(turn)
            if not (self._waiting or self.ended):
                self.limit = MAX_QUEUED_BYTES
            self._admit()

    def begin(self, start: Callable[[], object]) -> None:
        """
        Start sending.

        :param start: starts a task that calls :meth:`run`; called when that is first needed
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

        :param several: whether several packets are likely; they are then all sent by the writer
            task, together
        """
        self._batching = several

    def call_when_sent(self, waker: Callable[[], object]) -> None:
        """
        Call a function when all bytes queued so far have been sent, or the connection has ended.

        This might be immediately.
        """
        if self.size and not self.broken:
            self._sent_callbacks.append((self.sent + self.size, waker))
        else:
            waker()

    async def wait_sent(self) -> None:
        """Wait until all bytes queued so far have been sent, or the connection has ended."""
        event = anyio.Event()
        self.call_when_sent(event.set)
        await event.wait()

    async def wait_stopped(self) -> None:
        """Wait until the connection has ended."""
        if not self.broken:
            event = anyio.Event()
            self._awaiting_stop.append(event)
            await event.wait()

    async def run(self, abandoned: Callable[[], bool] = _never) -> None:
        """
        Send queued packets until cancelled.

        :param abandoned: returns whether the task has to end in this turn; see
            :meth:`Tasks.abandoned`
        :raises OSError: if the connection breaks
        """
        while not abandoned():
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
                # Under load, more packets are about to be queued. Sending them together is cheaper.
                await self._pause()

    def send_nowait(self) -> None:
        """Send what is possible without waiting, because the connection is about to be closed."""
        with suppress(OSError):
            while self._packets and not self._in_send_bytes:
                if not (sent := self._transport.try_send(self._next_bytes())):
                    return
                self._note_sent(sent)

    def forbid_task(self) -> None:
        """Never start the writer task from now on."""
        self._start = None

    def stop(self) -> None:
        """Wake all waiting tasks, because the connection has ended."""
        self.broken = True
        for turn in self._waiting:
            turn.set()
        for event in self._awaiting_stop:
            event.set()
        callbacks, self._sent_callbacks = self._sent_callbacks, deque()
        for _, waker in callbacks:
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
            # The writer task will get the same error, and handles it.
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
        """Let busy callers queue more, because a system call costs as much as many packets."""
        before = 0
        for _ in range(MAX_COLLECT_YIELDS):
            count = len(self._packets)
            if count - before < BUSY_PACKETS or self.size >= MAX_SEND_BYTES:
                break
            before = count
            # Trio runs the tasks of a batch in random order. After two turns, each has run.
            await self._pause()
            await self._pause()

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
        while self._sent_callbacks and self._sent_callbacks[0][0] <= self.sent:
            self._sent_callbacks.popleft()[1]()
        self._admit()

    def _admit(self) -> None:
        if self._waiting and (self.size < MAX_QUEUED_BYTES or self.broken):
            self._waiting[0].set()
