"""How long to wait before a link is opened again."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

from .checks import is_int, is_number


@dataclass(frozen=True, slots=True)
class Backoff:
    """
    Exponential back-off with full jitter, so that clients of one broker do not reconnect together.

    The wait before the n-th try in a row is random, between 0 seconds and ``initial`` doubled
    n - 1 times, at most ``maximum``. A connection that was good for 10 seconds ends the row.

    ``spread`` is for fleets: with ``initial=0.1``, clients that lose one broker together make most
    of their tries in the first second, whether it is back or not. A first random wait spreads them.

    :ivar initial: the longest wait before the first try, in seconds
    :ivar maximum: the longest wait before any try, in seconds
    :ivar spread: the longest additional wait before the first try after each loss, in seconds
    :ivar tries: the number of failed tries in a row after which the client gives up; ``None``:
        never
    :raises TypeError: if a value has the wrong type
    :raises ValueError: if a value is out of range
    """

    initial: float = 0.1
    maximum: float = 30
    spread: float = 0
    tries: int | None = None

    def __post_init__(self) -> None:
        for name in ("initial", "maximum", "spread"):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
            if not 0 <= value <= sys.float_info.max:
                raise ValueError(f"{name} is at least 0 seconds and finite, not {value}")
        if self.maximum < self.initial:
            raise ValueError(f"maximum is at least initial, {self.initial}, not {self.maximum}")
        if self.tries is not None:
            if not is_int(self.tries):
                raise TypeError(f"tries is a whole number or None, not {type(self.tries).__name__}")
            if self.tries < 1:
                raise ValueError(f"tries is at least 1, not {self.tries}: reconnect=None is none")

    def longest(self, attempt: int) -> float:
        """Return the longest wait before a try, in seconds; the first try in a row is 0."""
        # 64 doublings reach any maximum, and some hundreds more overflow a float.
        return min(self.maximum, self.initial * 2.0 ** min(attempt, 64))

    def delay(self, attempt: int) -> float:
        """Draw the wait before a try, in seconds; the first try in a row is 0."""
        return random.uniform(0, self.longest(attempt))

    def spread_delay(self) -> float:
        """Draw the additional wait before the first try after a loss, in seconds."""
        return random.uniform(0, self.spread)
