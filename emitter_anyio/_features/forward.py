"""Reading stored messages from the oldest to the newest, with bounded memory. No I/O.

The broker returns the newest messages of a period. So the oldest come first only if a period has
been read to its beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from emitter_anyio._values.messages import StoredMessage

from .position import OVERLAP_SECONDS, RETENTION_SECONDS, NodeMessage, Position, identify
from .stored import (
    ID_EPOCH,
    BrokerFacts,
    NodeProbe,
    PageRequest,
    Reading,
    Steps,
    Unreadable,
    advance,
    second_of,
)

_MAX_HELD_BYTES: Final = 12 * 1024 * 1024
"""The maximum weight of the messages that are held. With the pages being read: 16 MiB."""
_MAX_WINDOW_BYTES: Final = 1024 * 1024
"""The weight of messages above which a window of several seconds is made smaller."""
_MESSAGE_OVERHEAD_BYTES: Final = 256
"""The memory of a message in addition to its id, channel and payload."""
_MAX_MESSAGES: Final = 2**31 - 1
_END_OF_TIME: Final = 2**33
"""A second after that of every message."""

_LOOK_BACK_AGES: Final = tuple(OVERLAP_SECONDS + 2**number for number in range(12))
"""The times before the newest message at which to look for messages that were stored late."""
LOOK_BACK_REQUESTS: Final = len(_LOOK_BACK_AGES)
"""The maximum number of requests that look for them."""
_LOOK_BACK_MESSAGES: Final = 64

EXPIRED_SINCE: Final = (
    "the last message that was read before has expired, and messages after it might have too"
)


class _Window:
    """
    The messages of a window, as far as they are held.

    :param limit: their maximum weight in bytes
    :ivar items: messages and unreadable windows, newest first
    :ivar removed: the number of messages that were removed, the newest ones
    """

    def __init__(self, limit: int) -> None:
        self.items: deque[StoredMessage | Unreadable] = deque()
        self.removed = 0
        self._limit = limit
        self._weight = 0

    @property
    def full(self) -> bool:
        return self._weight > self._limit

    @property
    def sparse(self) -> bool:
        """Whether a window of twice the length is likely to fit as well."""
        return self._weight < self._limit // 4

    @property
    def seconds(self) -> tuple[int, int]:
        """The oldest and the newest second of the items, of which there must be one."""
        found = [
            each.since if isinstance(each, Unreadable) else second_of(each) for each in self.items
        ]
        return min(found), max(found)

    def add(self, item: StoredMessage | Unreadable) -> None:
        self.items.append(item)
        self._weight += _weigh(item)

    def remove_newest(self) -> None:
        while self.full and len(self.items) > 1:
            item = self.items.popleft()
            self._weight -= _weigh(item)
            self.removed += isinstance(item, StoredMessage)


class ForwardReading:
    """
    One pass over the stored messages of a channel, from a position to the newest, oldest first.

    It reads window by window. If the messages of a window exceed a limit, it reads less; if they
    are few, the next window is longer. A second that exceeds the limit is read several times.

    :param position: where to begin; moved by each message that is yielded
    :param until: the newest second, in Unix time; ``None`` for no bound
    :param now: the current Unix second of the local clock, where a search starts
    :param broker: the known facts about the broker, to which the reading adds
    :param level: the first level of the channel
    """

    def __init__(
        self, position: Position, until: int | None, now: int, broker: BrokerFacts, level: str
    ) -> None:
        self._position = position
        self._until = until
        self._now = now
        self._broker = broker
        self._level = level
        self._newest = 0
        """The newest second of all messages so far."""
        self._remaining = _MAX_MESSAGES
        self._expected = position.newest
        """The newest message before the position, until it is found."""

    def read_newest(self, last: int) -> Steps[None]:
        """
        Yield the newest messages, the oldest of them first.

        :param last: the maximum number of messages
        """
        window = _Window(_MAX_HELD_BYTES)
        yield from self._gather(window, self._position.begin, self._until, last, whole=True)
        # Older messages are not among the newest, even if they are in the same seconds.
        yield from self._yield_all(window, settled=True)
        if window.removed:
            # Neither are messages that were stored after the first pass.
            self._until = self._newest
            yield from self.read(window.removed)

    def read(
        self, last: int = _MAX_MESSAGES, *, expect_last: bool = False, look_back: int = 0
    ) -> Steps[None]:
        """
        Yield the messages after the position, oldest first.

        :param last: the maximum number of messages
        :param expect_last: whether to report it if the newest message before the position has
            expired
        :param look_back: the number of requests with which to look first for messages before the
            position that have not been read, because the clock of their node is behind
        """
        self._remaining = last
        if not expect_last:
            self._expected = None
        late = yield from self._find_late(_LOOK_BACK_AGES[:look_back])
        yield from self._read_on()
        if self._remaining > 0:
            for each in late:
                # A message that cannot be read has been reported, and is not read again.
                self._position.add(each, self._newest)

    def _find_late(self, ages: Sequence[int]) -> Steps[list[NodeMessage]]:
        """
        Find messages before the position that have not been read, and move back to them.

        :param ages: the times before the newest message at which to look, in seconds
        """
        if (newest := self._position.newest) is None:
            return []
        since = newest.second - RETENTION_SECONDS
        for age in ages:
            reply = yield PageRequest(_LOOK_BACK_MESSAGES, since, newest.second - age)
            found = [identify(message) for message in reply.messages or ()]
            if late := [each for each in found if not self._position.covers(each)]:
                self._position.rewind(late, newest.second)
                return late
            if reply.messages is not None and len(found) < _LOOK_BACK_MESSAGES:
                break
        return []

    def _read_on(self) -> Steps[None]:
        begin, until, width = self._position.begin, self._until, 1
        in_gap = False
        while self._remaining > 0:
            one_second = begin == until and begin is not None
            window = _Window(_MAX_HELD_BYTES if one_second else _MAX_WINDOW_BYTES)
            yield from self._gather(window, begin, until, whole=one_second)
            if window.full and not one_second:
                oldest, newest = window.seconds
                # Half of the time that filled it, because the messages there were the newest.
                width = max(1, (newest - oldest + 1) // 2)
                if begin is None:
                    in_gap, until = True, (yield from self._find_oldest(None, oldest)) - 1
                else:
                    width = min(width, max(1, ((until or newest) - begin + 1) // 2))
                    in_gap, until = False, begin + width - 1
                continue
            yield from self._report_expired(window, until)
            is_empty, is_sparse = not window.items, window.sparse
            yield from self._yield_all(window)
            if window.removed:
                continue
            if until is None or until == self._until:
                return
            begin = until + 1
            if is_empty and not in_gap and begin < self._newest:
                # The bisection proves nothing about messages that hide others, a reading does.
                until = (yield from self._find_oldest(begin, self._newest)) - 1
                in_gap = until >= begin
            else:
                in_gap = False
                width *= 2 if is_sparse and not is_empty else 1
            if not in_gap:
                until = begin + width - 1
            if until >= self._newest or (self._until is not None and until > self._until):
                until = self._until

    def _gather(
        self,
        window: _Window,
        since: int | None,
        until: int | None,
        last: int = _MAX_MESSAGES,
        *,
        whole: bool,
    ) -> Steps[None]:
        """
        Read a window, newest first.

        :param last: the maximum number of messages
        :param whole: whether to read to the beginning of the window and to remove the newest
            messages when it is full, instead of stopping then
        """
        steps = Reading(last, since, until, self._now, self._broker, self._level).steps()
        step = advance(steps)
        while step is not None and (whole or not window.full):
            if isinstance(step, PageRequest | NodeProbe):
                step = advance(steps, (yield step))
                continue
            if isinstance(step, Unreadable) or not self._is_known(step):
                window.add(step)
                if whole:
                    window.remove_newest()
            step = advance(steps)

    def _is_known(self, message: StoredMessage) -> bool:
        identified = identify(message)
        self._newest = max(self._newest, identified.second)
        if identified == self._expected:
            self._expected = None
        return self._position.covers(identified)

    def _yield_all(self, window: _Window, *, settled: bool = False) -> Steps[None]:
        while window.items and self._remaining > 0:
            item = window.items.pop()
            yield item
            # Only now has the item been taken.
            if isinstance(item, StoredMessage):
                self._remaining -= 1
                self._position.add(identify(item), _END_OF_TIME if settled else self._newest)

    def _report_expired(self, window: _Window, until: int | None) -> Steps[None]:
        if self._expected is not None and (until is None or until >= self._expected.second):
            begin = self._expected.second
            self._expected = None
            found = [second_of(each) for each in window.items if isinstance(each, StoredMessage)]
            yield Unreadable(begin, min(found, default=max(begin, self._now)), EXPIRED_SINCE)

    def _find_oldest(self, since: int | None, found: int) -> Steps[int]:
        """
        Find the second of the oldest message of a window by bisection.

        A message of more than 64 KiB hides older ones, so that the result might be too new.

        :param since: the oldest second of the window
        :param found: the second of a message
        """
        first, last = ID_EPOCH if since is None else since, found
        while first < last:
            middle = (first + last) // 2
            messages = (yield PageRequest(1, since, middle)).messages
            if messages is None:
                last = middle
            elif messages:
                last = max(first, min(middle, second_of(messages[0])))
            else:
                first = middle + 1
        return last


def _weigh(item: StoredMessage | Unreadable) -> int:
    if isinstance(item, Unreadable):
        return _MESSAGE_OVERHEAD_BYTES
    sizes = len(item.id) + len(item.channel) + len(item.binary)
    return sizes + _MESSAGE_OVERHEAD_BYTES
