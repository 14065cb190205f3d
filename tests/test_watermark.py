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
    watermark.begin(stored(5, 3))
    assert watermark.since == 5
    assert watermark.is_at(stored(5, 3))
    assert not watermark.is_at(stored(5, 4))
    places = [(4, 9), (5, 2), (5, 3), (5, 4), (6, 0)]
    undelivered = [watermark.might_be_undelivered(stored(*place)) for place in places]
    assert undelivered == [False, False, False, True, True]


def test_messages_of_other_nodes_within_a_second_are_unordered() -> None:
    watermark = Watermark()
    watermark.begin(stored(5, 3))
    assert watermark.might_be_undelivered(stored(5, 1, b"else"))
    assert not watermark.might_be_undelivered(stored(4, 9, b"else"))


async def test_renewal_takes_effect_the_second_time(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(1))
    watermark.renew(stored(5))
    assert watermark.since == 1
    assert watermark.stale.is_set()
    watermark.renew(stored(5))
    assert watermark.since == 5
    assert not watermark.stale.is_set()


async def test_unconfirmed_renewal_is_discarded_by_a_gap(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(1))
    watermark.renew(stored(5))
    watermark.note_gap()
    watermark.renew(stored(9))
    assert watermark.since == 1


async def test_renewal_without_a_message_keeps_the_position(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(1))
    for _ in range(2):
        watermark.renew(None)
        assert watermark.since == 1
    assert not watermark.stale.is_set()
