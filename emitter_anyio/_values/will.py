"""The message that the broker publishes when a connection ends."""

from __future__ import annotations

from dataclasses import dataclass

from .channels import Key, check_channel, check_key_source
from .checks import check_flag
from .messages import Payload, plain_payload


@dataclass(frozen=True, slots=True, repr=False)
class Will:
    """
    The message that the broker publishes when this link ends.

    Emitter publishes it after a clean goodbye too (its ``pubsub/lastwill.go``).

    :ivar key: a key with the permission to write, or a function as in :meth:`Emitter.publish`
    :ivar channel: the channel to publish to
    :ivar message: the payload, as in ``publish()``
    :ivar retain: whether to store it, for which the key needs the permission to store
    :raises InvalidChannelError: if the broker would not take the channel
    :raises TypeError: if a value has the wrong type
    :raises ValueError: if the key has a character that no key has
    """

    key: Key
    channel: str
    message: Payload
    retain: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("key", check_key_source(self.key)),
            ("channel", check_channel(self.channel)),
            # A buffer is copied, because what is in it may change before the broker gets it.
            ("message", plain_payload(self.message)),
            ("retain", check_flag("retain", self.retain)),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Will(key=…, channel={self.channel!r}, retain={self.retain})"
