"""How long to wait before a link is opened again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ._channels import is_number, is_whole


@dataclass(frozen=True, slots=True)
class Backoff:
    """
    Exponential waiting with full jitter: clients that lost one broker do not come back as a crowd.

    Before the n-th try in a row it waits a random time between nothing and ``initial`` doubled
    n - 1 times, ``maximum`` at most. A link that was good for longer than that ends the row.

    :ivar initial: the longest that the first try is waited for, in seconds
    :ivar maximum: the longest that any is waited for, in seconds
    :ivar tries: give up after so many in a row; ``None`` never
    :raises TypeError: if a value is of the wrong kind
    :raises ValueError: if one is out of its range
    """

    initial: float = 0.1
    maximum: float = 30
    tries: int | None = None

    def __post_init__(self) -> None:
        for name in ("initial", "maximum"):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is at least 0 seconds and finite, not {value}")
        if self.maximum < self.initial:
            raise ValueError(f"maximum is at least initial, {self.initial}, not {self.maximum}")
        if self.tries is not None:
            if not is_whole(self.tries):
                raise TypeError(f"tries is a whole number or None, not {type(self.tries).__name__}")
            if self.tries < 1:
                raise ValueError(f"tries is at least 1, not {self.tries}: reconnect=None is none")

    def longest(self, attempt: int) -> float:
        """Tell the longest that a try is waited for, in seconds; the first in a row is 0."""
        # Some doublings more make it no longer, but a float too large.
        return min(self.maximum, self.initial * 2.0 ** min(attempt, 64))

    def delay(self, attempt: int) -> float:
        """Draw how long to wait before a try, in seconds; the first in a row is 0."""
        return random.uniform(0, self.longest(attempt))
