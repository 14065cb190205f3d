"""Messages and payloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Generic, TypeAlias, TypeVar

from .text import make_printable

T = TypeVar("T")

Payload: TypeAlias = bytes | bytearray | memoryview | str | object
"""What can be published: bytes-like objects, ``str`` (as UTF-8), or other objects (as JSON)."""

ITEM_OVERHEAD_BYTES: Final = 128
"""
The weight of a buffered item in bytes, in addition to its payload and channel: the memory that its
Python objects take.
"""

JSONEncoder: TypeAlias = Callable[[object], object]
"""A function that returns something that JSON can represent for an object that it cannot."""

_SHOWN_BYTES = 64

_JSON_TYPES: Final = (dict, list, tuple, int, float, type(None))
"""Types that are not buffers. Trying ``memoryview()`` would add a third to their encoding time."""


class Readable:
    """The methods of a message that read its payload."""

    __slots__ = ()

    channel: str
    binary: bytes

    def as_binary(self) -> bytes:
        """Return the payload as bytes."""
        return self.binary

    def as_string(self) -> str:
        """
        Return the payload as text.

        :raises ValueError: if it is not UTF-8
        """
        try:
            return self.binary.decode()
        except UnicodeDecodeError as exc:
            raise ValueError(
                f"cannot decode {describe(self)} as UTF-8: {exc.reason} at byte {exc.start}"
            ) from exc

    def as_object(self) -> Any:
        """
        Return the payload decoded from JSON.

        :raises ValueError: if it is not JSON
        """
        try:
            return json.loads(self.binary)
        except (ValueError, RecursionError) as exc:
            raise ValueError(f"cannot decode {describe(self)} as JSON: {exc}") from exc

    def as_type(self, decode: Callable[[bytes], T]) -> T:
        """
        Return the payload decoded by a function, such as ``Reading.model_validate_json``.

        :param decode: a function that takes the payload
        :return: what ``decode`` returns
        :raises Exception: what ``decode`` raises
        """
        return decode(self.binary)

    asBinary = as_binary  # noqa: N815 - the original SDK's name
    asString = as_string  # noqa: N815 - the original SDK's name
    asObject = as_object  # noqa: N815 - the original SDK's name


def describe(message: Readable) -> str:
    """Return words for a message, without its payload."""
    return f"the message of {len(message.binary)} bytes from {make_printable(message.channel)!r}"


def may_contain_key(message: Readable) -> bool:
    """Return whether a message is a reply to keygen(), which a subscription to "+/" might get."""
    return message.channel.startswith("emitter/keygen/")


def _show_payload(message: Readable) -> str:
    if may_contain_key(message):
        return f"<{len(message.binary)} bytes>"
    return repr(message.binary[:_SHOWN_BYTES]) + ("…" if len(message.binary) > _SHOWN_BYTES else "")


class EmitterMessage(Readable):
    """
    A message from a channel.

    All streams and handlers that receive a message share one object, so treat it as read-only.

    :ivar channel: the channel that it was published to, with a trailing slash and without a key
    :ivar binary: the payload
    """

    # An instance is created for every message, so rarely used attributes are in a subclass.
    __slots__ = ("binary", "channel")

    channel: str
    binary: bytes

    def __init__(self, channel: str, binary: bytes) -> None:
        self.channel = channel
        self.binary = binary

    def __repr__(self) -> str:
        replayed = ", replayed" if self.replayed else ""
        return f"<EmitterMessage channel={self.channel!r} binary={_show_payload(self)}{replayed}>"

    @property
    def replayed(self) -> bool:
        """Whether it was read back from the broker's storage, so that it might arrive twice."""
        return False

    @property
    def id(self) -> bytes | None:
        """The broker's id of a replayed message; ``None`` for other messages."""
        return None


class ReplayedMessage(EmitterMessage):
    """A message that a subscription has read back from the broker's storage."""

    __slots__ = ("_id",)

    def __init__(self, channel: str, binary: bytes, id: bytes) -> None:
        super().__init__(channel, binary)
        self._id = id

    @property
    def replayed(self) -> bool:
        return True

    @property
    def id(self) -> bytes | None:
        return self._id


class DecodedMessage(EmitterMessage, Generic[T]):
    """
    A message from a stream with ``decode=``.

    It has everything that an :class:`EmitterMessage` has.

    :ivar value: the decoded payload
    :ivar channel: the channel that it was published to, with a trailing slash and without a key
    :ivar binary: the payload
    """

    __slots__ = ("_id", "value")

    value: T

    def __init__(self, message: EmitterMessage, value: T) -> None:
        super().__init__(message.channel, message.binary)
        self.value = value
        self._id = message.id

    def __repr__(self) -> str:
        return super().__repr__().replace("EmitterMessage", "DecodedMessage", 1)

    @property
    def replayed(self) -> bool:
        return self._id is not None

    @property
    def id(self) -> bytes | None:
        return self._id


@dataclass(frozen=True, slots=True)
class Gap:
    """
    A position in a stream at which messages might be missing because the connection was lost.

    :ivar channel: the channel of the subscription
    :ivar resumed: the number of stored messages from this period that follow
    :ivar complete: whether these are all messages that were stored during the period
    :ivar reason: why they might be incomplete, or ``None``
    """

    channel: str
    resumed: int = 0
    complete: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class StoredMessage(Readable):
    """
    A message from the broker's storage.

    :ivar id: the broker's id of the message; newer messages have smaller ids
    :ivar time: the time at which the broker stored it, to the second, read from the id
    :ivar channel: the channel that it was published to, with a trailing slash and without a key
    :ivar binary: the payload
    """

    id: bytes
    time: datetime
    channel: str
    binary: bytes

    def __repr__(self) -> str:
        return (
            f"<StoredMessage time={self.time:%Y-%m-%dT%H:%M:%SZ} channel={self.channel!r} "
            f"binary={_show_payload(self)}>"
        )


def encode_payload(message: Payload, default: JSONEncoder | None = None) -> bytes:
    """
    Encode a message to publish.

    :param default: called for objects that JSON cannot represent, as in :func:`json.dumps`
    :raises TypeError: if it is neither bytes-like, nor ``str``, nor JSON-serializable
    :raises ValueError: if it cannot be encoded as UTF-8 or JSON
    """
    plain = plain_payload(message)
    if isinstance(plain, bytes):
        return plain
    if isinstance(plain, str):
        return _encode_text(plain)
    try:
        text = json.dumps(
            plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=default
        )
    except TypeError as exc:
        raise TypeError(
            f"cannot encode a message of type {type(message).__name__} as JSON: {exc}; "
            "a message must be bytes-like, str or JSON-serializable"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"cannot encode the message as JSON: {exc}") from exc
    return _encode_text(text)


def plain_payload(message: Payload) -> Payload:
    """
    Return a buffer as ``bytes``, text as a plain ``str``, and other objects unchanged.

    :raises TypeError: if it is a buffer of Python objects
    """
    if isinstance(message, str):
        return str.__str__(message)
    if type(message) is bytes or isinstance(message, _JSON_TYPES):
        return message
    try:
        view = memoryview(message)  # type: ignore[arg-type]  # raises TypeError if not a buffer
    except TypeError:
        return message
    with view:
        if "O" in view.format:
            raise TypeError(
                "cannot encode the message: its buffer contains Python objects instead of bytes"
            )
        return view.tobytes()


def _encode_text(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"cannot encode the message as UTF-8: {exc.reason} at character {exc.start}"
        ) from exc
