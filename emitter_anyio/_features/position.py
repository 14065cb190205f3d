"""A position among the stored messages of a channel, and its form as a cursor. No I/O."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice, pairwise
from typing import Final, NamedTuple

from emitter_anyio._values.checks import check_text
from emitter_anyio._values.messages import StoredMessage

from .stored import ID_EPOCH

OVERLAP_SECONDS: Final = 3
"""
The time before the newest message in which further messages might appear.

The clocks of nodes may differ by 2 s, and a node stores messages of several connections together.
"""

RETENTION_SECONDS: Final = 4096
"""The time for which a position keeps a node from which no newer messages were read."""
_MAX_QUIET_NODES: Final = 8
"""The maximum number of such nodes."""

_MAX_UINT64: Final = 0xFFFFFFFFFFFFFFFF
_MIN_ID_BYTES: Final = 16

_MAX_RECENT_MESSAGES: Final = 512
"""The maximum number of messages of each node that a position lists one by one."""

_VERSION: Final = "1."
_CHECKSUM_BYTES: Final = 4


class NodeMessage(NamedTuple):
    """
    A stored message, identified by the node that stored it and by its number on that node.

    :ivar number: the second since 2018 and the node's counter; newer messages have larger numbers
    :ivar node: the node's name, which is new after each start of the node
    """

    number: int
    node: int

    @property
    def second(self) -> int:
        """The Unix second in which it was stored."""
        return (self.number >> 32) + ID_EPOCH


def _first_number(second: int) -> int:
    """Return the smallest number of a message that was stored in a Unix second."""
    return (second - ID_EPOCH) << 32


def identify(message: StoredMessage) -> NodeMessage:
    """Return the node and the number of a message."""
    node_number = int.from_bytes(message.id[4:12], "big") ^ _MAX_UINT64
    return NodeMessage(node_number, int.from_bytes(message.id[12:16], "big"))


class _NodePosition:
    """
    What has been read of the messages of a node.

    :ivar floor: the number up to which all messages have been read
    :ivar recent: the numbers above it that have been read
    :ivar newest: the largest number that has been read
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.floor, *recent = numbers
        self.recent = dict.fromkeys(recent)
        self.newest = max((self.floor, *recent))

    def covers(self, number: int) -> bool:
        return number <= self.floor or number in self.recent

    def add(self, number: int) -> None:
        self.newest = max(self.newest, number)
        self.recent[number] = None
        if len(self.recent) > _MAX_RECENT_MESSAGES:
            self.raise_floor(sorted(self.recent)[_MAX_RECENT_MESSAGES // 2])

    def raise_floor(self, number: int) -> None:
        self.newest = max(self.newest, number)
        self.floor = max(self.floor, number)
        if self.recent:
            self.recent = {each: None for each in self.recent if each > self.floor}

    def settle_before(self, number: int) -> None:
        """Note that everything has been read before a number, up to the last one that was read."""
        self.raise_floor(max((each for each in self.recent if each < number), default=self.floor))

    def numbers(self) -> list[int]:
        return [self.floor, *sorted(self.recent)]


class Position:
    """
    A position among the stored messages of a channel: which messages have been read.

    Within the last seconds, messages can appear that sort before messages that have been read. So a
    position lists the messages of these seconds one by one. Before that, the newest message of each
    node is enough. Only message ids count, not the local clock. Nodes are kept for
    ``RETENTION_SECONDS``, so that late messages can be recognized.

    :param begin: the Unix second before which all messages have been read; ``None`` if none have
    :param read: the numbers of messages that have been read, by node, the smallest first. It stands
        for all messages of its node up to it
    """

    def __init__(
        self, begin: int | None = None, read: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self.begin = begin
        self._start = begin
        """The second before which the messages of unknown nodes have been read."""
        self._nodes = {node: _NodePosition(numbers) for node, numbers in (read or {}).items()}

    @classmethod
    def after(cls, message: StoredMessage) -> Position:
        """Return the position after a message."""
        identified = identify(message)
        return cls(identified.second, {identified.node: [identified.number]})

    @classmethod
    def parse(cls, cursor: str) -> Position:
        """
        Return the position of a cursor.

        :raises ValueError: if it is not a cursor
        """
        if cursor[:1].isdigit() and not cursor.startswith(_VERSION):
            raise ValueError("invalid cursor: it was made by a newer version of emitter_anyio")
        try:
            data = base64.urlsafe_b64decode(cursor.removeprefix(_VERSION) + "==")
            packed, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
            if not cursor.startswith(_VERSION) or checksum != _checksum(packed):
                raise ValueError
            return cls._parse(_unpack(packed))
        except (ValueError, StopIteration, binascii.Error):
            raise ValueError(
                "invalid cursor: it is malformed or truncated; pass a cursor that consume() "
                "returned, unchanged"
            ) from None

    @classmethod
    def _parse(cls, numbers: Iterator[int]) -> Position:
        begin, count = next(numbers), next(numbers)
        read = {}
        for _ in range(count):
            node, floor, recent = next(numbers), next(numbers), next(numbers)
            read[node] = list(accumulate(islice(numbers, recent), initial=floor))
        return cls(begin or None, read)

    @property
    def cursor(self) -> str:
        """The position as text."""
        numbers = [self.begin or 0, len(self._nodes)]
        for node, read in self._nodes.items():
            floor, *recent = listed = read.numbers()
            numbers += [node, floor, len(recent)]
            numbers += [later - earlier for earlier, later in pairwise(listed)]
        packed = _pack(numbers)
        return _VERSION + base64.urlsafe_b64encode(packed + _checksum(packed)).decode().rstrip("=")

    @property
    def newest(self) -> NodeMessage | None:
        """The newest message that has been read, if any."""
        newest = (NodeMessage(read.newest, node) for node, read in self._nodes.items())
        return max(newest, default=None)

    @property
    def has_several_nodes(self) -> bool:
        """Whether messages of more than one node have been read in the last hour."""
        return len(self._nodes) > 1

    def covers(self, message: NodeMessage) -> bool:
        """Return whether a message has been read."""
        read = self._nodes.get(message.node)
        if read is None:
            return self._start is not None and message.second < self._start
        return read.covers(message.number)

    def rewind(self, late: Iterable[NodeMessage], newest: int) -> None:
        """
        Move back, so that late messages are read, and those that their nodes stored before them.

        :param late: the messages, at least one
        :param newest: the second of the newest message that is known
        """
        begin = newest
        for each in late:
            read = self._nodes.get(each.node)
            last = self._start or 0 if read is None else NodeMessage(read.newest, 0).second
            begin = min(begin, each.second, last)
        self.begin = max(begin, newest - RETENTION_SECONDS)

    def add(self, message: NodeMessage, newest: int) -> None:
        """
        Note that a message has been read, and all messages of earlier seconds before it.

        :param newest: the second of the newest message that is known
        """
        read = self._nodes.get(message.node)
        if read is None:
            floor = 0 if self._start is None else _first_number(self._start) - 1
            read = self._nodes[message.node] = _NodePosition((max(0, floor),))
        settled = newest - OVERLAP_SECONDS
        if message.second < settled:
            read.raise_floor(message.number)
        else:
            read.add(message.number)
        begin = min(message.second, settled)
        if self.begin is None or self.begin < begin:
            self.begin = begin
            self._forget_before(_first_number(begin))

    def _forget_before(self, number: int) -> None:
        quiet = {node: read for node, read in self._nodes.items() if read.newest < number}
        kept = sorted(quiet, key=lambda node: quiet[node].newest)[-_MAX_QUIET_NODES:]
        for node, read in quiet.items():
            if node not in kept or read.newest < number - (RETENTION_SECONDS << 32):
                del self._nodes[node]
                forgotten = NodeMessage(read.newest, node).second
                self._start = max(self._start or 0, forgotten + 1)
        for read in self._nodes.values():
            read.settle_before(number)


def check_after(after: object, *, live: bool) -> Position | None:
    """
    Check an ``after`` argument.

    :param live: whether ``"now"`` is accepted
    :return: the position; ``None`` for ``"now"``
    :raises TypeError: if it is neither ``None``, a cursor nor a message
    :raises ValueError: if it is malformed
    """
    if after is None:
        return Position()
    if isinstance(after, StoredMessage):
        if len(after.id) < _MIN_ID_BYTES:
            raise ValueError(f"invalid after: the id of the message has {len(after.id)} bytes")
        return Position.after(after)
    cursor = check_text("after", after, ", a StoredMessage or None")
    if cursor != "now":
        return Position.parse(cursor)
    if not live:
        raise ValueError("after='now' is for consume(); history() reads what is already stored")
    return None


def _checksum(packed: bytes) -> bytes:
    return zlib.crc32(packed).to_bytes(_CHECKSUM_BYTES, "big")


def _pack(numbers: Iterable[int]) -> bytes:
    """Encode numbers in groups of 7 bits, the lowest first."""
    packed = bytearray()
    for number in numbers:
        while number > 0x7F:
            packed.append(number & 0x7F | 0x80)
            number >>= 7
        packed.append(number)
    return bytes(packed)


def _unpack(packed: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in packed:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
