"""How far a subscription has come, as the ids of stored messages show it."""

from __future__ import annotations

from datetime import UTC, datetime

from emitter_anyio import StoredMessage
from emitter_anyio._features.watermark import Watermark


def stored(second: int, count: int = 0, node: bytes = b"node") -> StoredMessage:
    id = bytes(4) + (2**32 - 1 - second).to_bytes(4, "big") + (2**32 - 1 - count).to_bytes(4, "big")
    return StoredMessage(id + node + bytes(8), datetime.fromtimestamp(second, UTC), "a/", b"")


def test_at_first_everything_may_be_missing() -> None:
    watermark = Watermark()
    assert watermark.since is None
    assert watermark.might_be_undelivered(stored(1))
    assert not watermark.is_at(stored(1))


def test_what_is_later_is_behind_it() -> None:
    watermark = Watermark()
    watermark.begin(stored(5, 3))
    assert watermark.since == 5
    assert watermark.is_at(stored(5, 3))
    assert not watermark.is_at(stored(5, 4))
    places = [(4, 9), (5, 2), (5, 3), (5, 4), (6, 0)]
    undelivered = [watermark.might_be_undelivered(stored(*place)) for place in places]
    assert undelivered == [False, False, False, True, True]


def test_within_a_second_nodes_of_a_cluster_have_no_order() -> None:
    watermark = Watermark()
    watermark.begin(stored(5, 3))
    assert watermark.might_be_undelivered(stored(5, 1, b"else"))
    assert not watermark.might_be_undelivered(stored(4, 9, b"else"))


async def test_what_is_newest_is_believed_the_next_time(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(1))
    watermark.renew(stored(5))
    assert watermark.since == 1
    assert watermark.stale.is_set()
    watermark.renew(stored(5))
    assert watermark.since == 5
    assert not watermark.stale.is_set()


async def test_what_was_not_believed_yet_is_forgotten_with_the_link(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(1))
    watermark.renew(stored(5))
    watermark.note_gap()
    watermark.renew(stored(9))
    assert watermark.since == 1


async def test_where_nothing_can_be_told_the_old_one_stays(anyio_backend: object) -> None:
    watermark = Watermark()
    watermark.begin(stored(1))
    for _ in range(2):
        watermark.renew(None)
        assert watermark.since == 1
    assert not watermark.stale.is_set()
