"""The order in which stored messages are sent."""

from __future__ import annotations

import math
from collections import Counter, deque
from itertools import islice
from typing import Final, NamedTuple

from ._values import Stored

_LOW_WATER: Final = 256
"""More messages are read from disk when fewer than these are in memory."""
_LANES_PER_FETCH: Final = 64


class Fetch(NamedTuple):
    """
    What to read from disk.

    :ivar generation: the schedule that this is for; see :meth:`Schedule.restart`
    :ivar after: the id after which to read messages of all channels but ``without``; ``None`` to
        read none
    :ivar without: channels to leave out
    :ivar until: the last id to read of ``lanes``, if no further messages of all channels are read
    :ivar lanes: channels whose oldest messages to read
    """

    generation: int
    after: int | None
    without: frozenset[str]
    until: int
    lanes: tuple[str, ...]


class Lane(NamedTuple):
    """
    The oldest messages of a channel, as read from disk.

    :ivar complete: whether these are all its messages up to the last id that was read
    """

    channel: str
    messages: list[Stored]
    complete: bool


class Fetched(NamedTuple):
    """
    What was read from disk.

    :ivar messages: messages of all channels except those left out
    :ivar last: the last id that was read or left out
    :ivar end: whether there are no messages after it
    :ivar lanes: the oldest messages of single channels
    """

    messages: list[Stored]
    last: int
    end: bool
    lanes: list[Lane]


class Schedule:
    """
    The order in which stored messages are sent: by id, within each channel.

    The schedule reads messages from disk in parts, oldest first. If a message must be sent again
    later, its channel is left out until then, so it does not delay others. When the channel is due,
    its messages are read from the oldest one. After a lost connection, the schedule restarts with
    the oldest message of all channels.
    """

    def __init__(self) -> None:
        self._queue: deque[Stored] = deque()
        self._in_flight: Counter[str] = Counter()
        self._due: dict[str, float] = {}
        """The channels that wait, and the time from which to send each."""
        self._partial: Counter[str] = Counter()
        """The number of queued messages of channels that were due, and still have more on disk."""
        self._generation = 0
        self._last = 0
        """The id up to which messages have been read or left out."""
        self._end = False

    # Reading

    def wanted(self, now: float) -> Fetch | None:
        """Return what to read from disk now, if anything; :meth:`add` must follow."""
        if len(self._queue) >= _LOW_WATER:
            return None
        channels = (
            channel
            for channel, due in self._due.items()
            if due <= now and channel not in self._partial and channel not in self._in_flight
        )
        lanes = tuple(islice(channels, _LANES_PER_FETCH))
        if self._end and not lanes:
            return None
        after = None if self._end else self._last
        return Fetch(self._generation, after, frozenset(self._due), self._last, lanes)

    def grow(self) -> None:
        """Note that messages were stored, or will be before the next read."""
        self._end = False

    def add(self, fetch: Fetch, fetched: Fetched | None) -> None:
        """
        Add messages that were read from disk.

        :param fetch: what was to be read
        :param fetched: what was read; ``None`` if reading failed
        """
        if fetched is None or fetch.generation != self._generation:
            return
        for lane in fetched.lanes:
            self._queue.extend(lane.messages)
            if lane.complete:
                del self._due[lane.channel]
            else:
                self._partial[lane.channel] = len(lane.messages)
        if fetch.after is not None:
            self._last, self._end = fetched.last, fetched.end
        for message in fetched.messages:
            if message.channel not in self._due:
                self._queue.append(message)

    # Sending

    def next(self) -> Stored | None:
        """Return the next message to send, if there is one in memory; it is in flight then."""
        if not self._queue:
            return None
        message = self._queue.popleft()
        self._in_flight[message.channel] += 1
        if message.channel in self._partial:
            _decrement(self._partial, message.channel)
        return message

    def finish(self, message: Stored) -> None:
        """Note that a message is no longer in flight, and is not to be sent again."""
        _decrement(self._in_flight, message.channel)

    def postpone(self, message: Stored, due: float = math.inf) -> None:
        """
        Note that a message is no longer in flight, and is to be sent again.

        :param due: the time from which to send it and the later messages of its channel
        """
        self.finish(message)
        channel = message.channel
        if channel in self._due and channel not in self._partial:
            self._due[channel] = max(self._due[channel], due)
            return
        self._queue = deque(each for each in self._queue if each.channel != channel)
        self._partial.pop(channel, None)
        self._due[channel] = due

    def resume(self, channel: str, due: float) -> None:
        """Set the time from which to send a channel that waits."""
        if channel in self._due:
            self._due[channel] = due

    def next_due(self, now: float) -> float:
        """Return the time at which the next channel becomes due."""
        return min((due for due in self._due.values() if due > now), default=math.inf)

    def restart(self) -> None:
        """Start with the oldest message again; channels that wait still do."""
        self._generation += 1
        self._queue.clear()
        self._last, self._end = 0, False
        for channel in self._partial:
            del self._due[channel]
        self._partial.clear()


def _decrement(counter: Counter[str], channel: str) -> None:
    """Count one less, and remove a channel that has none left."""
    counter[channel] -= 1
    if not counter[channel]:
        del counter[channel]
