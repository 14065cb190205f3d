"""Messages and payloads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias

from .text import make_printable

Payload: TypeAlias = "bytes | bytearray | memoryview | str | object"
"""What can be published: bytes-like and ``str`` (UTF-8) go as they are, all else as JSON."""

ITEM_OVERHEAD_BYTES: Final = 128
"""What waits in a buffer weighs so many bytes beside its payload and channel: what Python keeps
around them."""

_SHOWN_BYTES = 64

_JSON_TYPES: Final = (dict, list, tuple, int, float, type(None))
"""Not buffers: to try would cost a third of what encoding them does."""


class Readable:
    """What can be done with the payload of a message."""

    __slots__ = ()

    channel: str
    binary: bytes

    def as_binary(self) -> bytes:
        """Return the payload as it is."""
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
                f"{self._describe()} is not UTF-8: {exc.reason} at byte {exc.start}"
            ) from exc

    def as_object(self) -> Any:
        """
        Return what the payload is in JSON.

        :raises ValueError: if it is not JSON
        """
        try:
            return json.loads(self.binary)
        except (ValueError, RecursionError) as exc:
            raise ValueError(f"{self._describe()} is not JSON: {exc}") from exc

    asBinary = as_binary  # noqa: N815 - the original SDK's name
    asString = as_string  # noqa: N815 - the original SDK's name
    asObject = as_object  # noqa: N815 - the original SDK's name

    def _describe(self) -> str:
        return f"the message of {len(self.binary)} bytes from {make_printable(self.channel)!r}"


def _show_payload(message: Readable) -> str:
    if message.channel.startswith("emitter/keygen/"):
        # The broker's reply, which a wide subscription may receive as a message.
        return f"<{len(message.binary)} bytes>"
    return repr(message.binary[:_SHOWN_BYTES]) + ("…" if len(message.binary) > _SHOWN_BYTES else "")


class EmitterMessage(Readable):
    """
    A message from a channel.

    All streams and handlers that a message reaches share one object: treat it as read-only.

    :ivar channel: the channel it was published to, with its trailing slash and without a key
    :ivar binary: the payload
    """

    # Made for every message: what is rare is in a class of its own.
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
        """Whether it was read back from the broker's storage, so that it may come twice."""
        return False

    @property
    def id(self) -> bytes | None:
        """What the broker's storage knows it by, where ``replayed``; else ``None``."""
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


@dataclass(frozen=True, slots=True)
class Gap:
    """
    A place in a stream at which messages may be missing, since the link was away.

    :ivar channel: the channel of the subscription
    :ivar resumed: how many stored messages follow that the gap would have lost
    :ivar complete: whether these are all that were stored meanwhile
    :ivar reason: why not, where they are not
    """

    channel: str
    resumed: int = 0
    complete: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class StoredMessage(Readable):
    """
    A message from the broker's storage.

    :ivar id: what the broker knows it by; the order of the ids is the reverse of that in time
    :ivar time: when the broker took it, to the second, read from the id
    :ivar channel: the channel it was published to, with its trailing slash and without a key
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


def encode_payload(message: Payload) -> bytes:
    """
    Turn what is to be published into bytes.

    :raises TypeError: if it is neither bytes-like nor ``str`` and JSON does not know it
    :raises ValueError: if it is text that has no UTF-8, or an object that has no JSON
    """
    plain = plain_payload(message)
    if isinstance(plain, bytes):
        return plain
    if isinstance(plain, str):
        return _encode_text(plain)
    try:
        text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except TypeError as exc:
        raise TypeError(
            "cannot encode the message: it must be bytes-like, str or what JSON can hold, not "
            f"{type(message).__name__}: {exc}"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"the message has no JSON: {exc}") from exc
    return _encode_text(text)


def plain_payload(message: Payload) -> Payload:
    """Return any buffer as ``bytes``, text as a plain ``str``, and other objects as they are."""
    if isinstance(message, str):
        return str.__str__(message)
    if type(message) is bytes or isinstance(message, _JSON_TYPES):
        return message
    try:
        view = memoryview(message)  # type: ignore[arg-type]  # whether it is one, this tells
    except TypeError:
        return message
    with view:
        if "O" in view.format:
            raise TypeError("cannot encode the message: a buffer of Python objects has no bytes")
        return view.tobytes()


def _encode_text(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"the message has no UTF-8: {exc.reason} at character {exc.start}"
        ) from exc
