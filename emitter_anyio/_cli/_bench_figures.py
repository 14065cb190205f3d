"""What ``bench`` measures: latencies, and losses by the numbers in the messages. Without I/O."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from struct import Struct
from typing import Any, Final

HEADER: Final = Struct(">4sIQQ")
"""The beginning of each payload: the run, the publisher, the number of the message, its time."""

_NANOSECONDS_PER_UNIT: Final = 1000

_MAX_DISTINCT_LATENCIES: Final = 20_000

_EXACT_BELOW: Final = 1000
"""The latency in microseconds from which on three digits are kept."""


class Latencies:
    """A distribution of latencies, counted in microseconds."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, nanoseconds: Iterable[int]) -> None:
        """Add latencies. Those below 0, after a step of the clock, count as 0."""
        self._counts.update([each // _NANOSECONDS_PER_UNIT for each in nanoseconds])
        if len(self._counts) > _MAX_DISTINCT_LATENCIES:
            self._counts = self._rounded()

    def merge(self, counts: Mapping[str, int]) -> None:
        """Add the result of :meth:`counts` of another process."""
        self._counts.update({int(value): count for value, count in counts.items()})

    def counts(self) -> dict[str, int]:
        """Return how often each latency was measured, for JSON."""
        return {str(value): count for value, count in self._rounded().items()}

    def summary(self) -> dict[str, float] | None:
        """Return percentiles in milliseconds, or ``None`` without measurements."""
        ordered = sorted(self._rounded().items())
        if not ordered:
            return None
        counts = list(accumulate(count for _, count in ordered))
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        return {
            name: ordered[bisect_left(counts, math.ceil(counts[-1] * share))][0] / 1000
            for name, share in shares.items()
        }

    def _rounded(self) -> Counter[int]:
        rounded: Counter[int] = Counter()
        for value, count in self._counts.items():
            value, step = max(value, 0), 1
            while value // step >= _EXACT_BELOW:
                step *= 10
            rounded[value // step * step] += count
        return rounded


class Numbering:
    """
    The numbers of the messages that one subscriber received from one publisher.

    :param first: the first number to expect

    :ivar received: the number of different messages
    :ivar duplicates: the number of messages that arrived before
    :ivar reordered: the number of messages that arrived after a later one
    """

    def __init__(self, first: int = 0) -> None:
        self.received = 0
        self.duplicates = 0
        self.reordered = 0
        self._next = first
        self._missing: list[range] = []

    def add(self, numbers: Iterable[int]) -> None:
        """Add numbers in the order of arrival."""
        following, received = self._next, 0
        for number in numbers:
            if number == following:
                following += 1
                received += 1
            elif number > following:
                self._missing.append(range(following, number))
                following = number + 1
                received += 1
            else:
                self._add_late(number)
        self._next = following
        self.received += received

    def _add_late(self, number: int) -> None:
        for index, gap in enumerate(self._missing):
            if number in gap:
                parts = range(gap.start, number), range(number + 1, gap.stop)
                self._missing[index : index + 1] = [part for part in parts if part]
                self.reordered += 1
                self.received += 1
                return
        self.duplicates += 1

    def lost(self, published: int | None = None) -> int:
        """
        Return the number of missing messages.

        :param published: the number after the last one published, if it is known
        """
        # len() of a range fails above sys.maxsize, and a payload might contain any number.
        gaps = sum(gap.stop - gap.start for gap in self._missing)
        return gaps + max((published or 0) - self._next, 0)


@dataclass(frozen=True, slots=True)
class Measurement:
    """
    What one process has measured.

    :ivar messages: the number of messages or connections
    :ivar start: the time at which the first began, in nanoseconds; 0 if none did
    :ivar end: the time at which the last ended, in nanoseconds
    :ivar latencies: the result of :meth:`Latencies.counts`
    :ivar failed: the number of publishes without an acknowledgement, or of failed connections
    :ivar published: the number of messages by publisher
    :ivar lost: the number of messages that are missing
    :ivar duplicates: the number of messages that arrived twice
    :ivar reordered: the number of messages that arrived after a later one
    :ivar error: what ended the measurement early, or ``""``
    """

    messages: int = 0
    start: int = 0
    end: int = 0
    latencies: Mapping[str, int] = field(default_factory=dict)
    failed: int = 0
    published: Mapping[str, int] = field(default_factory=dict)
    lost: int = 0
    duplicates: int = 0
    reordered: int = 0
    error: str = ""


def summarize(parts: Iterable[Measurement], size: int | None) -> dict[str, Any]:
    """
    Combine the results of all processes.

    Rates are computed from the sum of the messages and the time in which any process was
    measuring, because the sum of the processes' rates would count the time only once.

    :param size: the bytes of each message, or ``None`` for connections
    """
    results = list(parts)
    latencies = Latencies()
    for part in results:
        latencies.merge(part.latencies)
    total = sum(part.messages for part in results)
    start = min((part.start for part in results if part.start), default=0)
    end = max((part.end for part in results), default=0)
    seconds = (end - start) / 1e9
    rate = total / seconds if seconds else 0.0
    summary: dict[str, Any] = {"seconds": round(seconds, 3)}
    if size is None:
        summary |= {"connects": total, "connects_per_second": round(rate, 1)}
    else:
        summary |= {"messages": total, "messages_per_second": round(rate, 1)}
        summary |= {"bytes_per_second": round(rate * size)}
    return {
        **summary,
        "latency_ms": latencies.summary(),
        **{
            name: sum(getattr(part, name) for part in results)
            for name in ("failed", "lost", "duplicates", "reordered")
        },
    }
