"""The queue of packets to one client, and the task that writes them."""

from __future__ import annotations

import math

from anyio import (
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    Event,
    current_time,
)
from anyio.abc import ByteStream

from emitter_anyio._backend.interrupts import uninterrupted

WRITES_PER_SECOND = 60
"""The default of Emitter's ``limit.flushRate``: writes to one client per second."""
STREAM_ERRORS = (BrokenResourceError, ClosedResourceError, EndOfStream, OSError)
"""The errors that a closed or broken stream raises; TLS raises OSError."""
_CHUNK_BYTES = 65536


class Outbox:
    """
    A queue of packets to one client.

    :param coalesce: whether to limit writes like Emitter (``internal/network/listener/conn.go``).
        Each packet takes one of 60 tokens, which are refilled at 60 per second. A packet without a
        token waits for the next packet with a token, or for a flush, once per second since the
        start of the connection. It is lost if the client disconnects before. Without ``coalesce``,
        packets are joined only if they are queued while a write is in progress
    :param limit: the number of queued bytes above which packets do not wait for tokens

    :ivar queued: the number of bytes not yet written
    :ivar written: the number of bytes written
    """

    def __init__(self, coalesce: bool = False, limit: float = math.inf) -> None:
        self.queued = 0
        self.written = 0
        self._progress = Event()
        self._coalesce = coalesce
        self._limit = limit
        self._ready: list[bytes] = []
        self._waiting: list[bytes] = []
        self._wake = Event()
        self._closed = False
        self._started_at = self._refilled_at = self._waiting_since = current_time()
        self._tokens: float = WRITES_PER_SECOND

    def put(self, data: bytes) -> None:
        """Queue a packet."""
        self.queued += len(data)
        if self._take_token() or self.queued > self._limit:
            self._ready += self._waiting
            self._ready.append(data)
            self._waiting.clear()
        else:
            if not self._waiting:
                self._waiting_since = self._refilled_at
            self._waiting.append(data)
        self._wake.set()

    def close(self) -> None:
        """End the writer after it has written the packets that do not wait for a token."""
        self._closed = True
        self._wake.set()

    def discard(self) -> None:
        """Wake the tasks in :meth:`wait_progress`, because nothing more is written."""
        self._progress.set()

    async def wait_progress(self) -> None:
        """Wait until bytes are written, or until :meth:`discard`."""
        await self._progress.wait()

    @uninterrupted
    async def write(self, stream: ByteStream) -> None:
        """Write queued packets until :meth:`close` or until the stream fails."""
        while True:
            while self._ready:
                data = b"".join(self._ready)
                self._ready.clear()
                try:
                    for start in range(0, len(data), _CHUNK_BYTES):
                        piece = data[start : start + _CHUNK_BYTES]
                        await stream.send(piece)
                        self.queued -= len(piece)
                        self.written += len(piece)
                        self._progress.set()
                        self._progress = Event()
                except STREAM_ERRORS:
                    return  # the reading task still handles what the client has sent
            if self._closed:
                return
            self._wake = Event()
            with CancelScope(deadline=self._next_flush()) as scope:
                await self._wake.wait()
            if scope.cancelled_caught:
                self._ready += self._waiting
                self._waiting.clear()

    def _take_token(self) -> bool:
        if not self._coalesce:
            return True
        before, self._refilled_at = self._refilled_at, current_time()
        earned = (self._refilled_at - before) * WRITES_PER_SECOND
        self._tokens = min(WRITES_PER_SECOND, self._tokens + earned)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _next_flush(self) -> float:
        if not self._waiting:
            return math.inf
        return self._started_at + math.floor(self._waiting_since - self._started_at) + 1
