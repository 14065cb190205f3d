"""MessageBatch that came in one go, and which of them are for whom."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeAlias, TypeVar, final

from .messages import EmitterMessage

T = TypeVar("T", bound=Hashable)

ReceiverBatch: TypeAlias = tuple[list[EmitterMessage], int | None]
"""
MessageBatch in the order in which they came, and how many bytes each of them weighs in a buffer;
``None`` where it is not known that all weigh as many. Nobody changes the list, which may be
others', too.
"""


@final
class MessageBatch:
    """
    What came in one go, sorted by channel while it is known anyway which channel each has: to ask
    each message would cost as much as to put it into a buffer.

    :param in_order: all of them
    :param by_channel: the same
    :param each: how many bytes each message of a channel weighs, or ``None``
    """

    __slots__ = ("by_channel", "each", "in_order")

    def __init__(
        self,
        in_order: list[EmitterMessage],
        by_channel: dict[str, list[EmitterMessage]],
        each: dict[str, int | None],
    ) -> None:
        self.in_order = in_order
        self.by_channel = by_channel
        self.each = each

    def append(self, message: EmitterMessage) -> None:
        """Add a message, which may weigh more or less than others of its channel."""
        self.in_order.append(message)
        self.by_channel.setdefault(message.channel, []).append(message)
        self.each[message.channel] = None

    def by_receiver(self, receivers: Mapping[str, Iterable[T]]) -> dict[T, ReceiverBatch]:
        """
        Give what is for each receiver.

        :param receivers: those whom each channel reaches
        """
        found: dict[T, ReceiverBatch] = {}
        several: dict[T, list[str]] = {}
        for channel, messages in self.by_channel.items():
            batch = messages, self.each[channel]
            for receiver in receivers[channel]:
                if receiver in found:
                    several[receiver] = []
                found[receiver] = batch
        if several:
            for channel in self.by_channel:
                for receiver in receivers[channel]:
                    if receiver in several:
                        several[receiver].append(channel)
            found |= self._merge(several)
        return found

    def _merge(self, several: Mapping[T, list[str]]) -> dict[T, ReceiverBatch]:
        merged: dict[T, ReceiverBatch] = {}
        ways: dict[str, list[list[EmitterMessage]]] = {}
        for receiver, channels in several.items():
            if len(channels) == len(self.by_channel):
                merged[receiver] = self.in_order, None
                continue
            messages: list[EmitterMessage] = []
            merged[receiver] = messages, None
            for channel in channels:
                ways.setdefault(channel, []).append(messages)
        if ways:
            for message in self.in_order:
                for messages in ways.get(message.channel, ()):
                    messages.append(message)
        return merged


def make_batch(messages: Iterable[EmitterMessage]) -> MessageBatch:
    """Sort messages by channel that are not sorted yet."""
    found = MessageBatch([], {}, {})
    for message in messages:
        found.append(message)
    return found
