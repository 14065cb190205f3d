"""Reading the stored messages of a gap, over several connections if necessary."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final, NamedTuple

from emitter_anyio._runtime.requester import Requester
from emitter_anyio._streams import MAX_BYTES, weight_of
from emitter_anyio._values.errors import ConnectionLostError, EmitterError
from emitter_anyio._values.messages import StoredMessage

from .history import History, Reader
from .position import OVERLAP_SECONDS, identify
from .stored import Unreadable, second_of
from .watermark import Watermark

_MAX_READ_MESSAGES: Final = 2**20
"""The maximum number of stored messages to read, in case a broker repeats its pages forever."""

_EXPIRED: Final = (
    "the last message that was certainly delivered has expired, and later ones might have too"
)


class _Found(NamedTuple):
    """A message that has been read. Newer messages of a node are larger."""

    number: int
    id: bytes
    message: StoredMessage


class _NewestMessages:
    """
    The newest messages of those that have been read, within the limits of a resumption.

    :param limit: the maximum number of messages
    :ivar exceeded: the limit that was exceeded, in words
    """

    def __init__(self, limit: int) -> None:
        self.exceeded: str | None = None
        self._limit = limit
        self._heap: list[_Found] = []
        """The oldest message is at the top."""
        self._ids: set[bytes] = set()
        """The messages that have been read, those that were removed included."""
        self._bytes = 0
        self._removed: _Found | None = None
        """The newest message that was removed."""
        self._others = self._other_bytes = 0

    def __contains__(self, message: StoredMessage) -> bool:
        return message.id in self._ids

    def count_others(self, count: int, size: int) -> None:
        """Set the number and weight of other messages that count towards the limits."""
        self._others, self._other_bytes = count, size

    def add(self, message: StoredMessage) -> bool:
        """Add a message, unless newer ones have reached a limit; return whether it was added."""
        found = _Found(identify(message).number, message.id, message)
        if self._removed is not None and found < self._removed:
            return False
        heappush(self._heap, found)
        self._ids.add(message.id)
        self._bytes += weight_of(message)
        while self._heap and (exceeded := self._find_exceeded()):
            self.exceeded = exceeded
            self._removed = heappop(self._heap)
            self._bytes -= weight_of(self._removed.message)
        return True

    def in_order(self) -> list[StoredMessage]:
        """Return the messages, oldest first."""
        return [found.message for found in sorted(self._heap)]

    def _find_exceeded(self) -> str | None:
        if self._others + len(self._heap) > self._limit:
            return f"more than resume_limit={self._limit} messages were stored"
        if self._other_bytes + self._bytes > MAX_BYTES:
            return "more than 8 MiB of messages were stored"
        return None


@dataclass
class _Part:
    """
    A part of a gap, which one connection has begun to read.

    :ivar reader: reads the messages, newest first
    :ivar before: the newest second that had been read before it, if any
    :ivar begun: whether a message has been read
    :ivar finds_late: whether it has messages that should have been read before
    """

    reader: Reader
    before: int | None
    begun: bool = False
    finds_late: bool = False

    def note_read(self) -> None:
        """Note that a message has been read."""
        self.begun = True

    def note_added(self, second: int) -> None:
        """Note that a message of a second was read for the first time."""
        if self.before is not None and second < self.before - OVERLAP_SECONDS:
            self.finds_late = True


class GapReader:
    """
    The reader of the stored messages of a gap.

    If the connection is lost, the next connection finishes what earlier ones have begun, and then
    reads what was stored in the meantime. So reading completes even if no connection lasts for all
    of it.

    :param history: makes the readers
    :param channel: the channel
    :param watermark: the last message that was certainly delivered
    :param limit: the maximum number of messages, of which the newest are kept
    """

    def __init__(self, history: History, channel: str, watermark: Watermark, limit: int) -> None:
        self._history = history
        self._channel = channel
        self._watermark = watermark
        self._messages = _NewestMessages(limit)
        self._parts: list[_Part] = []
        """The parts that have not been read to their end. Only the first can have been begun."""
        self._newest: int | None = None
        """The newest second that has been read."""
        self._reason: str | None = None
        """Why messages are missing, if some might be."""
        self._reaches_watermark = watermark.since is None

    async def read(
        self, requester: Requester, key: str, buffered: int, buffered_bytes: int
    ) -> tuple[list[StoredMessage], str | None]:
        """
        Read the stored messages that might not have been delivered.

        :param requester: sends the requests on the current connection
        :param buffered: the number of messages from earlier gaps, which count as well
        :param buffered_bytes: their weight
        :return: the messages, oldest first, and the reason if some might be missing
        :raises ConnectionLostError: if the connection was lost; a further call continues
        """
        self._messages.count_others(buffered, buffered_bytes)
        self._begin(requester, key)
        try:
            while self._parts:
                part = self._parts[0]
                await self._read_part(part)
                del self._parts[0]
                if part.finds_late:
                    # A node was missing when an earlier part was read, so begin again.
                    self._newest = None
                    self._parts = [self._make_part(requester, key)]
        except ConnectionLostError:
            raise
        except EmitterError as exc:
            self._reason = self._reason or str(exc)
        found = self._messages.in_order()
        self._watermark.resumed(found)
        reason = self._messages.exceeded or self._reason
        return found, reason or (None if self._reaches_watermark else _EXPIRED)

    def _begin(self, requester: Requester, key: str) -> None:
        """Continue the part that has been begun, and add one for what was stored since then."""
        self._parts = [part for part in self._parts if part.begun]
        for part in self._parts:
            part.reader.send_through(self._history.sender(requester, key, self._channel))
        self._parts.append(self._make_part(requester, key))

    def _make_part(self, requester: Requester, key: str) -> _Part:
        before, since = self._newest, self._watermark.since
        if before is not None:
            # Twice the usual overlap shows whether a node was missing before.
            since = before - 2 * OVERLAP_SECONDS
        reader = self._history.reader(requester, key, self._channel, _MAX_READ_MESSAGES, since)
        return _Part(reader, before)

    async def _read_part(self, part: _Part) -> None:
        """Read a part to its end, or until no older messages are wanted."""
        while (read := await part.reader.next()) is not None:
            if isinstance(read, Unreadable):
                self._reason = self._reason or read.reason
                continue
            part.note_read()
            second = second_of(read)
            self._newest = second if self._newest is None else max(self._newest, second)
            if not self._watermark.might_be_undelivered(read):
                self._reaches_watermark |= self._watermark.is_at(read)
            elif read not in self._messages:
                if not self._messages.add(read):
                    return
                part.note_added(second)
