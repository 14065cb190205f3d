"""``Watermark``: the resume position of a subscription, from the ids of stored messages."""

from __future__ import annotations

from datetime import UTC, datetime

from emitter_anyio import StoredMessage
from emitter_anyio._features.watermark import Watermark


def stored(second: int, count: int = 0, node: bytes = b"node") -> StoredMessage:
    id = bytes(4) + (2**32 - 1 - second).to_bytes(4, "big") + (2**32 - 1 - count).to_bytes(4, "big")
    return StoredMessage(id + node + bytes(8), datetime.fromtimestamp(second, UTC), "a/", b"")


def test_new_watermark_has_no_position() -> None:
    watermark = Watermark()
    assert watermark.since is None
    assert watermark.might_be_undelivered(stored(1))
    assert not watermark.is_at(stored(1))


def test_later_messages_are_after_the_watermark() -> None:
    watermark = Watermark()
    watermark.begin(stored(50, 3))
    assert watermark.since == 47
    assert watermark.is_at(stored(50, 3))
    assert not watermark.is_at(stored(50, 4))
    places = [(49, 2), (50, 2), (50, 3), (50, 4), (51, 5), (51, 0)]
    undelivered = [watermark.might_be_undelivered(stored(*place)) for place in places]
    assert undelivered == [False, False, False, True, True, True]


def test_messages_of_a_node_whose_clock_is_behind_are_after_the_watermark() -> None:
    watermark = Watermark()
    watermark.begin(stored(50, 3))
    seconds = (46, 47, 49, 50)
    undelivered = [watermark.might_be_undelivered(stored(each, 1, b"else")) for each in seconds]
    assert undelivered == [False, True, True, True]


def test_messages_after_the_clock_of_a_node_was_set_back_are_after_the_watermark() -> None:
    watermark = Watermark()
    watermark.begin(stored(50, 3))
    assert watermark.might_be_undelivered(stored(48, 4))


async def test_renewal_takes_effect_the_second_time(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(11))
    watermark.renew(stored(15))
    assert watermark.since == 8
    assert watermark.stale.is_set()
    watermark.renew(stored(15))
    assert watermark.since == 12
    assert not watermark.stale.is_set()


async def test_unconfirmed_renewal_is_discarded_by_a_gap(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(11))
    watermark.renew(stored(15))
    watermark.note_gap()
    watermark.renew(stored(19))
    assert watermark.since == 8


async def test_renewal_without_a_message_keeps_the_position(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(11))
    for _ in range(2):
        watermark.renew(None)
        assert watermark.since == 8
    assert not watermark.stale.is_set()
