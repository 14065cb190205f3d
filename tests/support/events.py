"""Decoded events with their batches of messages split up."""

from __future__ import annotations

from collections.abc import Iterable

from emitter_anyio._protocol.packets import Answer, Event
from emitter_anyio._streams import weight_of
from emitter_anyio._values.batches import MessageBatch


def unbatch(events: Iterable[Event]) -> list[Answer]:
    """Replace each batch by its messages, and check its other views of the same messages."""
    found: list[Answer] = []
    for event in events:
        if not isinstance(event, MessageBatch):
            found.append(event)
            continue
        assert event.in_order
        for channel, messages in event.by_channel.items():
            assert messages == [it for it in event.in_order if it.channel == channel]
            weights = set(map(weight_of, messages))
            assert event.weights[channel] in {None, *(weights if len(weights) == 1 else ())}
        assert sum(map(len, event.by_channel.values())) == len(event.in_order)
        found += event.in_order
    return found
