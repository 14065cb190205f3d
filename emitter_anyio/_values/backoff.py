"""The time to wait before reconnecting."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

from .checks import is_int, is_number


@dataclass(frozen=True, slots=True)
class Backoff:
    """
    Exponential back-off with full jitter, which keeps clients from reconnecting together.

    The delay before the n-th consecutive try is random, between 0 seconds and ``initial`` doubled
    n - 1 times, up to ``maximum``. The count restarts after a connection has been good for
    10 seconds.

    Set ``spread`` for large numbers of clients. With ``initial=0.1``, clients that lose the same
    broker make most of their tries within the first second, even if the broker is not back yet.
    ``spread`` adds a random delay before the first try.

    :ivar initial: the longest delay before the first try, in seconds
    :ivar maximum: the longest delay before any try, in seconds
    :ivar spread: the longest additional delay before the first try after each loss, in seconds
    :ivar tries: the number of consecutive failed tries after which the client gives up; ``None``
        for no limit
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
                raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
            if not 0 <= value <= sys.float_info.max:
                raise ValueError(
                    f"{name} must be a finite number of at least 0 seconds, not {value}"
                )
        if self.maximum < self.initial:
            raise ValueError(
                f"maximum must be at least initial, {self.initial} seconds, not {self.maximum}"
            )
        if self.tries is not None:
            if not is_int(self.tries):
                raise TypeError(f"tries must be an int or None, not {type(self.tries).__name__}")
            if self.tries < 1:
                raise ValueError(
                    f"tries must be at least 1, not {self.tries}; "
                    "to disable reconnecting, use reconnect=None"
                )

    def longest(self, attempt: int) -> float:
        """Return the longest delay before a try, in seconds; the first consecutive try is 0."""
        # More than 1000 doublings would overflow a float, and 64 exceed any sensible maximum.
        return min(self.maximum, self.initial * 2.0 ** min(attempt, 64))

    def delay(self, attempt: int) -> float:
        """Return a random delay before a try, in seconds; the first consecutive try is 0."""
        return random.uniform(0, self.longest(attempt))

    def spread_delay(self) -> float:
        """Return a random additional delay before the first try after a loss, in seconds."""
        return random.uniform(0, self.spread)
