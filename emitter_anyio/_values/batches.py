"""Batches of messages that were received together, and their distribution to receivers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeAlias, TypeVar, final

from .messages import EmitterMessage

T = TypeVar("T", bound=Hashable)

ReceiverBatch: TypeAlias = tuple[list[EmitterMessage], int | None]
"""
Messages in the order of their arrival, and the weight of each in a buffer, in bytes; ``None`` if
the weights might differ. The list might be shared, so do not change it.
"""


@final
class MessageBatch:
    """
    Messages that were received together, in order and by channel.

    The decoder groups them by channel, because it looks up each channel anyway. Grouping them
    later would cost as much per message as putting it into a buffer.

    :param in_order: all messages
    :param by_channel: the same messages by channel
    :param weights: the weight of each message of a channel, in bytes; ``None`` if they might differ
    """

    __slots__ = ("by_channel", "in_order", "weights")

    def __init__(
        self,
        in_order: list[EmitterMessage],
        by_channel: dict[str, list[EmitterMessage]],
        weights: dict[str, int | None],
    ) -> None:
        self.in_order = in_order
        self.by_channel = by_channel
        self.weights = weights

    def append(self, message: EmitterMessage) -> None:
        """Add a message of any weight."""
        self.in_order.append(message)
        self.by_channel.setdefault(message.channel, []).append(message)
        self.weights[message.channel] = None

    def by_receiver(self, receivers: Mapping[str, Iterable[T]]) -> dict[T, ReceiverBatch]:
        """
        Return the messages for each receiver.

        :param receivers: the receivers of each channel
        """
        found: dict[T, ReceiverBatch] = {}
        several: dict[T, list[str]] = {}
        for channel, messages in self.by_channel.items():
            batch = messages, self.weights[channel]
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
        """Return the messages for receivers of more than one channel, in order."""
        merged: dict[T, ReceiverBatch] = {}
        targets: dict[str, list[list[EmitterMessage]]] = {}
        for receiver, channels in several.items():
            if len(channels) == len(self.by_channel):
                merged[receiver] = self.in_order, None
                continue
            messages: list[EmitterMessage] = []
            merged[receiver] = messages, None
            for channel in channels:
                targets.setdefault(channel, []).append(messages)
        if targets:
            for message in self.in_order:
                for messages in targets.get(message.channel, ()):
                    messages.append(message)
        return merged


def make_batch(messages: Iterable[EmitterMessage]) -> MessageBatch:
    """Group messages into a batch."""
    batch = MessageBatch([], {}, {})
    for message in messages:
        batch.append(message)
    return batch
