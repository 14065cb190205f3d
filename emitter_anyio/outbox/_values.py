"""The values and the errors of an outbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from emitter_anyio._values.errors import EmitterError
from emitter_anyio._values.messages import ITEM_OVERHEAD_BYTES, Readable


class Record(NamedTuple):
    """
    A message to store.

    :ivar ttl: the seconds for which it is valid, from when it is stored
    """

    channel: str
    payload: bytes
    ttl: int | None
    retain: bool
    echo: bool

    @property
    def weight(self) -> int:
        """The number of bytes that it counts towards the size of the outbox."""
        return weigh(self.channel, self.payload)


class Stored(NamedTuple):
    """
    A message on disk that waits to be published.

    :ivar id: its position; later messages have higher ids
    :ivar published: the time at which it was stored, by the clock of the outbox
    """

    id: int
    channel: str
    payload: bytes
    ttl: int | None
    retain: bool
    echo: bool
    published: float

    @property
    def weight(self) -> int:
        """The number of bytes that it counts towards the size of the outbox."""
        return weigh(self.channel, self.payload)


def weigh(channel: str, payload: bytes) -> int:
    """Return the number of bytes that a message counts towards the size of an outbox."""
    return len(channel) + len(payload) + WEIGHT_OVERHEAD_BYTES


WEIGHT_OVERHEAD_BYTES: Final = ITEM_OVERHEAD_BYTES
"""The weight of a message in addition to its payload and channel, as in the buffer of a stream."""


@dataclass(frozen=True, slots=True, repr=False)
class ParkedMessage(Readable):
    """
    A message that the broker has refused, and that is kept until it is retried or dropped.

    :ivar id: its number in the outbox
    :ivar channel: the channel
    :ivar binary: the payload
    :ivar age: the seconds since it was published to the outbox
    :ivar reason: the text of the refusal
    :ivar status: Emitter's status of the refusal, such as 401; ``None`` if the client rejected the
        message because it is too large with the key of its channel
    """

    id: int
    channel: str
    binary: bytes
    age: float
    reason: str
    status: int | None

    def __repr__(self) -> str:
        return (
            f"<ParkedMessage id={self.id} channel={self.channel!r} bytes={len(self.binary)} "
            f"status={self.status}>"
        )


@dataclass(frozen=True, slots=True)
class OutboxStatistics:
    """
    The figures of an outbox.

    :ivar waiting: the number of messages that the broker has not accepted yet
    :ivar oldest: the age of the oldest waiting message in seconds, or ``None``
    :ivar parked: the number of messages that the broker has refused
    :ivar given_up: the number of messages that were given up since the file was created, because
        they were too old, their ``ttl`` had passed, or newer ones needed their space
    :ivar size: the bytes of all waiting and parked messages. Each message counts as its payload,
        its channel and 128 bytes
    """

    waiting: int
    oldest: float | None
    parked: int
    given_up: int
    size: int


class OutboxError(EmitterError):
    """A failure to open, read or write the file of an outbox, or to get a key for a channel."""


class OutboxInUseError(OutboxError):
    """A file that is in use by another outbox, in this or another process."""


class OutboxFullError(OutboxError):
    """A full outbox; the message was not stored."""


class MessageParkedError(OutboxError):
    """
    A message that the broker has refused; ``__cause__`` is the refusal.

    :ivar message: the message, which is parked
    """

    def __init__(self, text: str, *, message: ParkedMessage) -> None:
        super().__init__(text)
        self.message = message


class MessagesGivenUpError(OutboxError):
    """
    Messages that an outbox has given up.

    :ivar count: the number of messages
    """

    def __init__(self, text: str, *, count: int) -> None:
        super().__init__(text)
        self.count = count
