"""What a client is to be sent: queued by whoever has something for it, written by one task."""

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

WRITES_PER_SECOND = 60
"""How often Emitter writes to one client (``limit.flushRate``)."""
ENDED = (BrokenResourceError, ClosedResourceError, EndOfStream, OSError)
"""What a stream raises when it is of no further use; OSError is that of TLS."""
_CHUNK = 65536


class Outbox:
    """
    Packets on their way to one client.

    :param coalesce: write as Emitter does (``internal/network/listener/conn.go``): there are 60
        writes, one for each packet, and 60 more a second; what comes when there are none left waits
        for the first packet behind it that has one, or for the next of the flushes that come once
        a second from the link's beginning on, or is lost when the client leaves. Without it, only
        what comes while another write is under way is joined
    :param limit: with more bytes than these queued, nothing waits

    :ivar queued: bytes that are not written yet
    :ivar written: bytes that are
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
        self._born = self._looked = self._late_since = current_time()
        self._allowed: float = WRITES_PER_SECOND

    def put(self, data: bytes) -> None:
        """Queue something."""
        self.queued += len(data)
        if self._may_write() or self.queued > self._limit:
            self._ready += self._waiting
            self._ready.append(data)
            self._waiting.clear()
        else:
            if not self._waiting:
                self._late_since = self._looked
            self._waiting.append(data)
        self._wake.set()

    def close(self) -> None:
        """Queue nothing more: the writer ends with what is ready."""
        self._closed = True
        self._wake.set()

    def discard(self) -> None:
        """Wake those that wait for progress, because nothing more is written."""
        self._progress.set()

    async def wait_progress(self) -> None:
        """Wait until some bytes were written, or until :meth:`discard`."""
        await self._progress.wait()

    async def write(self, stream: ByteStream) -> None:
        """Write what is queued, until :meth:`close`, or until the stream takes no more."""
        while True:
            while self._ready:
                data = b"".join(self._ready)
                self._ready.clear()
                try:
                    for start in range(0, len(data), _CHUNK):
                        piece = data[start : start + _CHUNK]
                        await stream.send(piece)
                        self.queued -= len(piece)
                        self.written += len(piece)
                        self._progress.set()
                        self._progress = Event()
                except ENDED:
                    return  # the reader still takes what the client sent before it went
            if self._closed:
                return
            self._wake = Event()
            with CancelScope(deadline=self._next_flush()) as scope:
                await self._wake.wait()
            if scope.cancelled_caught:
                self._ready += self._waiting
                self._waiting.clear()

    def _may_write(self) -> bool:
        if not self._coalesce:
            return True
        before, self._looked = self._looked, current_time()
        earned = (self._looked - before) * WRITES_PER_SECOND
        self._allowed = min(WRITES_PER_SECOND, self._allowed + earned)
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True

    def _next_flush(self) -> float:
        if not self._waiting:
            return math.inf
        return self._born + math.floor(self._late_since - self._born) + 1
