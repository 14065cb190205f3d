"""The state of a session: pending packets and subscriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from emitter_anyio._values.channels import KeySource, unshare
from emitter_anyio._values.requests import Request

T = TypeVar("T")


class Replay(NamedTuple):
    """The stored messages to replay to a subscriber; by default, the broker decides."""

    last: int | None = None
    since: int | None = None
    until: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the subscriber excluded stored messages."""
        return self.last == 0

    @property
    def is_explicit(self) -> bool:
        """Whether the subscriber explicitly requested stored messages."""
        return self != Replay() and not self.is_empty

    @property
    def options(self) -> tuple[tuple[str, int | None], ...]:
        """The options of the topic."""
        return (("last", self.last), ("from", self.since), ("until", self.until))


class Pending(Generic[T]):
    """
    A packet that the broker has not acknowledged yet, and its outcome.

    It outlives the caller that awaits it. Its packet id stays reserved until the broker has
    acknowledged it, so that a late reply cannot be mistaken for the reply to another packet.

    :param operation: the client's method, for errors
    :param request: the control request in the packet, if any
    :param publishes_before: the number of QoS 0 publishes queued before it on its connection
    :param awaited: whether a caller awaits the outcome; otherwise, a refusal is emitted as an event
    :param quiet: whether a refusal is not emitted either
    :param grant: the subscription that the packet requests, if any
    """

    __slots__ = (
        *(
            "operation",
            "key",
            "channel",
            "request",
            "publishes_before",
            "awaited",
            "quiet",
            "grant",
        ),
        *("done", "refusal", "invalid_reply", "_waiters", "_value", "_error", "_wakers"),
    )

    def __init__(
        self,
        operation: str,
        key: str | None = None,
        channel: str | None = None,
        *,
        request: Request[Any] | None = None,
        publishes_before: int = 0,
        awaited: bool = True,
        quiet: bool = False,
        grant: Grant | None = None,
    ) -> None:
        self.operation = operation
        self.key = key
        self.channel = channel
        self.request = request
        self.publishes_before = publishes_before
        self.awaited = awaited
        self.quiet = quiet
        self.grant = grant
        self.done = False
        self.refusal: tuple[int | None, str] | None = None
        self.invalid_reply: str | None = None
        self._waiters = 0
        self._value: T | None = None
        self._error: Callable[[], Exception] | None = None
        self._wakers: list[Callable[[], None]] = []

    def begin_wait(self) -> None:
        """Add a caller that awaits the outcome."""
        self._waiters += 1
        self.awaited = True

    def end_wait(self) -> None:
        """Remove a caller that awaited the outcome."""
        self._waiters -= 1
        self.awaited = self._waiters > 0

    def call_when_done(self, waker: Callable[[], None]) -> None:
        """Call a function when the outcome is known, possibly immediately."""
        if self.done:
            waker()
        else:
            self._wakers.append(waker)

    def note_refusal(self, refusal: tuple[int | None, str] | None) -> None:
        """Keep the first refusal until the acknowledgement arrives."""
        self.refusal = self.refusal or refusal

    def note_invalid_reply(self, reason: str) -> None:
        """Keep the reason why a reply was invalid."""
        self.invalid_reply = reason

    def succeed(self, value: T) -> None:
        """Set the outcome to a value, unless it is already set."""
        if not self.done:
            self._value = value
            self._finish()

    def fail(self, error: Callable[[], Exception]) -> None:
        """
        Set the outcome to an error, unless it is already set.

        :param error: makes a new exception for each caller
        """
        if not self.done:
            self._error = error
            self._finish()

    def result(self) -> T:
        """Return the value, or raise the error."""
        if self._error is not None:
            raise self._error()
        return self._value  # type: ignore[return-value]  # succeed() has put a T there

    def _finish(self) -> None:
        self.done = True
        # The grant refers to this object. Break the reference cycle.
        self.grant = None
        for waker in self._wakers:
            waker()


class Grant:
    """
    A subscription with a certain key and filter, and the number of its users.

    :param source: the key or key function that the user passed
    :param key: the key that is sent to the broker
    :param filter: the channel, preceded by its group if there is one
    """

    def __init__(self, source: KeySource, key: str, filter: str) -> None:
        self.source = source
        self.key = key
        self.filter = filter
        self.channel = unshare(filter)[1]
        self.asked: Pending[None]
        """The last SUBSCRIBE for it, on this connection or the previous one."""
        self.accepted = False
        """Whether the broker has accepted it on any connection."""
        self.refused = False
        """Whether the broker refused the last SUBSCRIBE for it."""
        self.users = 0

    def ask(self, key: str, asked: Pending[None]) -> None:
        """Record a SUBSCRIBE for it."""
        self.key, self.asked, self.refused = key, asked, False

    def answer(self, *, accepted: bool) -> None:
        """Record the reply to the SUBSCRIBE."""
        self.refused = not accepted
        self.accepted = self.accepted or accepted

    def use(self) -> None:
        """Add a user."""
        self.users += 1

    def leave(self) -> None:
        """Remove a user."""
        self.users -= 1


class Emission(NamedTuple):
    """An event for ``on()`` and ``stream()``, or ``"refused"`` for the trace hook."""

    event: str
    value: Any


class Refusal(NamedTuple):
    """A refusal by the broker, as the trace hook gets it."""

    operation: str
    channel: str | None
    status: int | None
