"""What the codec gives, message by message."""

from __future__ import annotations

from collections.abc import Iterable

from emitter_anyio._protocol.packets import Answer, Event
from emitter_anyio._streams import weight_of
from emitter_anyio._values.batches import MessageBatch


def one_by_one(events: Iterable[Event]) -> list[Answer]:
    """Take the messages out of what they came in, which has to hold each of them once more."""
    found: list[Answer] = []
    for event in events:
        if not isinstance(event, MessageBatch):
            found.append(event)
            continue
        assert event.in_order
        for channel, messages in event.by_channel.items():
            assert messages == [one for one in event.in_order if one.channel == channel]
            weights = set(map(weight_of, messages))
            assert event.weights[channel] in {None, *(weights if len(weights) == 1 else ())}
        assert sum(map(len, event.by_channel.values())) == len(event.in_order)
        found += event.in_order
    return found
