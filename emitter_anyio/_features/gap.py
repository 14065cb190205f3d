"""Reading the stored messages of a gap, over several connections if necessary."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final, NamedTuple

from emitter_anyio._runtime.requester import Requester
from emitter_anyio._streams import MAX_BYTES, weight_of
from emitter_anyio._values.errors import ConnectionLostError, EmitterError
from emitter_anyio._values.messages import StoredMessage

from .history import History, Reader, Send
from .position import OVERLAP_SECONDS, identify
from .stored import Unreadable, second_of
from .watermark import Watermark

_MAX_READ_MESSAGES: Final = 2**20
"""The maximum number of stored messages to read, in case a broker repeats its pages forever."""

_EXPIRED: Final = "the last known message has expired, and later ones might have too"


class _Found(NamedTuple):
    """Found messages sort by time, those of a node from oldest to newest."""

    number: int
    id: bytes
    message: StoredMessage


class NewestMessages:
    """
    The newest messages of those that have been read, within the limits of a resumption.

    :param limit: the maximum number of messages
    :param buffered: the number of messages from earlier gaps, which count as well
    :param buffered_bytes: their weight
    :ivar exceeded: the limit that was exceeded, in words
    """

    def __init__(self, limit: int, buffered: int, buffered_bytes: int) -> None:
        self.exceeded: str | None = None
        self._limit = limit
        self._buffered = buffered
        self._heap: list[_Found] = []
        """The oldest message is at the top."""
        self._ids: set[bytes] = set()
        self._bytes = buffered_bytes
        self._removed = 0, b""
        """The number and the id of the newest message that was removed."""

    def __contains__(self, message: StoredMessage) -> bool:
        return message.id in self._ids

    def add(self, message: StoredMessage) -> bool:
        """Add a message; return ``False`` if it is not newer than one that was removed."""
        found = _Found(identify(message).number, message.id, message)
        if found[:2] <= self._removed:
            return False
        heappush(self._heap, found)
        self._ids.add(message.id)
        self._bytes += weight_of(message)
        while self._heap and (exceeded := self._find_exceeded()):
            self.exceeded = exceeded
            oldest = heappop(self._heap)
            self._removed = oldest.number, oldest.id
            self._ids.remove(oldest.id)
            self._bytes -= weight_of(oldest.message)
        return True

    def in_order(self) -> list[StoredMessage]:
        """Return the messages, oldest first."""
        return [found.message for found in sorted(self._heap)]

    def _find_exceeded(self) -> str | None:
        if self._buffered + len(self._heap) > self._limit:
            return f"more than resume_limit={self._limit} messages were stored"
        if self._bytes > MAX_BYTES:
            return "more than 8 MiB of messages were stored"
        return None


class _Pass:
    """
    One pass over a gap, newest message first, which can take several connections.

    :param reader: reads the messages
    :param previous: the newest message of the passes before it, if any

    :ivar reaches_known: whether it has read a message that was known before it, so that none
        between has expired
    :ivar finds_missed: whether it has read a message that an earlier connection should have found
    """

    def __init__(self, reader: Reader, previous: StoredMessage | None) -> None:
        self.reader = reader
        self.previous = previous
        self.reaches_known = False
        self.finds_missed = False
        # The messages of earlier seconds were stored long enough before to have been read.
        self._settled = 0 if previous is None else second_of(previous) - OVERLAP_SECONDS
        self._is_continued = False

    def continue_through(self, send: Send) -> None:
        """Continue on a new connection."""
        self.reader.send_through(send)
        self._is_continued = True

    def note_known(self) -> None:
        """Note a message that was known before the pass."""
        self.reaches_known = True

    def note_new(self, message: StoredMessage, *, is_first: bool) -> None:
        """
        Note a message that was read for the first time.

        :param is_first: whether it is the first message of its node
        """
        # A node that only a later connection finds might have newer messages as well.
        if second_of(message) < self._settled or (is_first and self._is_continued):
            self.finds_missed = True


class GapReader:
    """
    The reader of the stored messages of a gap.

    If the connection is lost, the next connection finishes the pass that has begun, and then makes
    a pass over what was stored in the meantime. So no connection needs to last for the whole
    gap. If a node was missing on an earlier connection, everything is read again.

    :param history: makes the readers
    :param channel: the channel
    :param watermark: the last message that was certainly delivered
    :param messages: takes the messages
    """

    def __init__(
        self, history: History, channel: str, watermark: Watermark, messages: NewestMessages
    ) -> None:
        self._history = history
        self._channel = channel
        self._watermark = watermark
        self._messages = messages
        self._begun: _Pass | None = None
        """The pass that has read messages, but not all."""
        self._newest: StoredMessage | None = None
        """The newest message that has been read."""
        self._nodes: set[int] = set()
        """The nodes whose messages have been read."""
        self._reason: str | None = None
        """Why messages are missing, if some might be."""

    async def read(self, requester: Requester, key: str) -> tuple[list[StoredMessage], str | None]:
        """
        Read the stored messages that might not have been delivered.

        :param requester: sends the requests on the current connection
        :return: the messages, oldest first, and the reason if some might be missing
        :raises ConnectionLostError: if the connection was lost; a further call continues
        """
        finds_missed = False
        if (begun := self._begun) is not None:
            begun.continue_through(self._history.sender(requester, key, self._channel))
            finds_missed = await self._finish(begun)
        if not finds_missed:
            finds_missed = await self._finish(self._make_pass(requester, key))
        if finds_missed:
            self._newest = self._reason = None
            await self._finish(self._make_pass(requester, key))
        found = self._messages.in_order()
        self._watermark.resumed(found)
        return found, self._messages.exceeded or self._reason

    def _make_pass(self, requester: Requester, key: str) -> _Pass:
        since, previous = self._watermark.since, self._newest
        if previous is not None:
            # Twice the usual overlap shows whether a node was missing before.
            since = second_of(previous) - 2 * OVERLAP_SECONDS
        reader = self._history.reader(requester, key, self._channel, _MAX_READ_MESSAGES, since)
        return _Pass(reader, previous)

    async def _finish(self, current: _Pass) -> bool:
        """Read a pass to its end; return whether it found messages that were missed before."""
        try:
            await self._read(current)
        except ConnectionLostError:
            raise
        except EmitterError as exc:
            self._reason = self._reason or str(exc)
        self._begun = None
        return current.finds_missed

    async def _read(self, current: _Pass) -> None:
        while (read := await current.reader.next()) is not None:
            if isinstance(read, Unreadable):
                self._reason = self._reason or read.reason
                continue
            self._begun = current
            if self._is_known(read, current.previous):
                current.note_known()
            identified = identify(read)
            is_first = identified.node not in self._nodes
            self._nodes.add(identified.node)
            if self._newest is None or identified > identify(self._newest):
                self._newest = read
            if self._watermark.might_be_undelivered(read) and read not in self._messages:
                if not self._messages.add(read):
                    return
                current.note_new(read, is_first=is_first)
        nothing_before = current.previous is None and self._watermark.since is None
        if not (current.reaches_known or nothing_before):
            self._reason = self._reason or _EXPIRED

    def _is_known(self, message: StoredMessage, previous: StoredMessage | None) -> bool:
        """Return whether a message was known before a pass that follows another message."""
        if previous is None:
            return self._watermark.is_at(message)
        return message.id == previous.id or message in self._messages
