"""The last will of a connection."""

from __future__ import annotations

from dataclasses import dataclass

from .channels import Key, check_channel, check_key_source
from .checks import check_flag
from .messages import Payload, plain_payload


@dataclass(frozen=True, slots=True, repr=False)
class Will:
    """
    The message that the broker publishes when the connection ends.

    Emitter also publishes it after an orderly DISCONNECT (its ``pubsub/lastwill.go``).

    :ivar key: a key with the permission to write, or a function as in :meth:`Emitter.publish`
    :ivar channel: the channel to publish to
    :ivar message: the message, as in :meth:`Emitter.publish`
    :ivar retain: whether the broker stores it, which requires the permission to store
    :raises InvalidChannelError: if the broker would not accept the channel
    :raises TypeError: if a value has the wrong type
    :raises ValueError: if the key is empty or contains an invalid character
    """

    key: Key
    channel: str
    message: Payload
    retain: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("key", check_key_source(self.key)),
            ("channel", check_channel(self.channel)),
            # A buffer is copied, because its contents might change before it is sent.
            ("message", plain_payload(self.message)),
            ("retain", check_flag("retain", self.retain)),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Will(key=…, channel={self.channel!r}, retain={self.retain})"
