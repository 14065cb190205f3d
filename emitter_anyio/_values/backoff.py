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

    Before each try, the client waits a random time between 0 seconds and a ceiling. The ceiling is
    ``initial`` for the first try and doubles with each consecutive try up to ``maximum``, but it is
    never below ``spread``. It returns to its first value after a connection has been good for
    10 seconds.

    Set ``spread`` if thousands of clients share a broker. With ``initial=0.1``, clients that lose
    the same broker make four tries each within the first second, even if the broker is not back
    yet. With ``spread``, ``n`` clients together make about ``2 * n / spread`` tries per second.

    :ivar initial: the ceiling for the first try, in seconds
    :ivar maximum: the highest ceiling, in seconds, unless ``spread`` is higher
    :ivar spread: the lowest ceiling, in seconds
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
        return max(self.spread, min(self.maximum, self.initial * 2.0 ** min(attempt, 64)))

    def delay(self, attempt: int) -> float:
        """Return a random delay before a try, in seconds; the first consecutive try is 0."""
        return random.uniform(0, self.longest(attempt))
