"""What the session keeps of what was asked: pending packets, grants, feeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from ._channels import Key, unshare
from ._requests import Request

T = TypeVar("T")


class Replay(NamedTuple):
    """Which stored messages a subscriber asks for; all ``None`` leaves it to the broker."""

    last: int | None = None
    since: int | None = None
    until: int | None = None

    @property
    def nothing(self) -> bool:
        return self.last == 0

    @property
    def insists(self) -> bool:
        """Whether somebody has asked for stored messages in so many words."""
        return self != Replay() and not self.nothing

    @property
    def options(self) -> tuple[tuple[str, int | None], ...]:
        return (("last", self.last), ("from", self.since), ("until", self.until))


class Pending(Generic[T]):
    """
    Something asked of the broker that it has not settled yet.

    It outlives the caller that waits for it: its packet id stays reserved until the broker has
    acknowledged it, so that a late answer confirms nothing else.
    """

    __slots__ = (
        *("operation", "key", "channel", "request", "settles", "awaited", "waiters", "quiet"),
        *("done", "refusal", "nonsense", "grant", "_value", "_error", "_wakers"),
    )

    def __init__(
        self,
        operation: str,
        key: str | None = None,
        channel: str | None = None,
        *,
        request: Request[Any] | None = None,
        settles: int = 0,
        awaited: bool = True,
    ) -> None:
        self.operation = operation
        self.key = key
        self.channel = channel
        self.request = request
        self.settles = settles
        """How many publishes of QoS 0 had been sent before it."""
        self.awaited = awaited
        """Whether somebody still wants to know."""
        self.waiters = 0
        self.quiet = False
        """Whether a refusal is no news."""
        self.done = False
        self.refusal: tuple[int | None, str] | None = None
        self.nonsense: str | None = None
        self.grant: Grant | None = None
        self._value: T | None = None
        self._error: Callable[[], Exception] | None = None
        self._wakers: list[Callable[[], None]] = []

    def call_when_done(self, waker: Callable[[], None]) -> None:
        """Have a function called once there is an outcome, which may be now."""
        if self.done:
            waker()
        else:
            self._wakers.append(waker)

    def succeed(self, value: T) -> None:
        """Settle it with a value, if nothing has settled it yet."""
        if not self.done:
            self._value = value
            self._finish()

    def fail(self, error: Callable[[], Exception]) -> None:
        """Settle it with an error, made anew for each one who waits, if nothing has settled it."""
        if not self.done:
            self._error = error
            self._finish()

    def result(self) -> T:
        """Return the value or raise the error."""
        if self._error is not None:
            raise self._error()
        return self._value  # type: ignore[return-value]  # succeed() has put a T there

    def _finish(self) -> None:
        self.done = True
        for waker in self._wakers:
            waker()


class Grant:
    """
    One key's right to one subscription, and how many use it.

    :param source: the key as the user gave it
    :param key: the key as the broker is told it
    """

    def __init__(self, source: Key, key: str, filter: str) -> None:
        self.source = source
        self.key = key
        self.filter = filter
        """The channel, with its group in front if it is shared."""
        self.channel = unshare(filter)[1]
        self.asked: Pending[None]
        """The SUBSCRIBE that asked for it on this link, or on the last one."""
        self.granted = False
        """Whether the broker has said yes to it, on this link or an earlier one."""
        self.refused = False
        """Whether the broker has said no to it when it was last asked."""
        self.users = 0
        self.replay_left = 65536


class Emission(NamedTuple):
    """An event for ``on()`` and ``stream()``."""

    event: str
    value: Any
