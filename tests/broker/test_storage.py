"""The stored messages of the development broker."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._values.channels import level_hash
from emitter_anyio.testing._storage import REPLAY_LIMIT_BYTES, Storage
from emitter_anyio.testing._topics import Words

NOW = 1_700_000_000.5


def add(storage: Storage, now: float, channel: str, payload: bytes | str, ttl: int = 60) -> None:
    data = payload.encode() if isinstance(payload, str) else payload
    storage.add(now, ttl, channel, tuple(channel[:-1].split("/")), data)


def found(
    storage: Storage,
    now: float,
    channel: str,
    last: int = 100,
    since: int | None = None,
    until: int | None = None,
) -> list[str]:
    words = tuple(channel[:-1].split("/"))
    return [message.payload.decode() for message in storage.query(now, words, last, since, until)]


def test_order_is_oldest_second_first_and_newest_message_first_within_it() -> None:
    storage = Storage(1)
    for payload in "01234":
        add(storage, NOW, "a/", payload)
    for payload in "567":
        add(storage, NOW + 1, "a/", payload)
    assert found(storage, NOW + 1, "a/") == list("43210765")
    assert found(storage, NOW + 1, "a/", 4) == list("4765")
    assert found(storage, NOW + 1, "a/", 0) == []


def test_message_expires_after_its_ttl() -> None:
    storage = Storage(1)
    add(storage, NOW, "a/", "brief", 1)
    add(storage, NOW, "b/", "longer", 5)
    assert found(storage, NOW + 0.4, "a/") == ["brief"]
    assert found(storage, NOW + 0.5, "a/") == []
    assert found(storage, NOW + 4, "b/") == ["longer"]
    assert found(storage, NOW + 5, "b/") == []
    assert storage._messages == {}
    assert storage._expiries == []


def test_message_between_others_expires() -> None:
    storage = Storage(1)
    for payload, ttl in (("1", 60), ("2", 1), ("3", 60)):
        add(storage, NOW, "a/", payload, ttl)
    assert found(storage, NOW + 2, "a/") == ["3", "1"]


@pytest.mark.parametrize(
    ("query", "payloads"),
    [
        ("a/", "4321"),
        ("a/b/", "32"),
        ("a/b/c/", "3"),
        ("a/+/", "432"),
        ("a/#/", "432"),
        ("a/+/c/", "43"),
        ("+/", ""),
        ("#/", ""),
        ("z/", ""),
    ],
)
def test_query_returns_messages_at_and_below_a_channel(query: str, payloads: str) -> None:
    storage = Storage(1)
    for payload, channel in zip("12345", ("a/", "a/b/", "a/b/c/", "a/x/c/", "b/a/"), strict=True):
        add(storage, NOW, channel, payload)
    assert found(storage, NOW, query) == list(payloads)


@pytest.mark.parametrize(
    ("since", "until", "payloads"),
    [
        (0, 0, "0123"),
        (1, 2, "12"),
        (2, None, "23"),
        (None, 1, "01"),
        (3, 1, ""),
        (-(10**9), -(10**9), "0123"),
        (10**10, 10**10, "0123"),
    ],
)
def test_since_and_until(since: int | None, until: int | None, payloads: str) -> None:
    storage, start = Storage(1), int(NOW)
    for second, payload in enumerate("0123"):
        add(storage, NOW + second, "a/", payload)
    window = [start + value if value else value for value in (since, until)]
    assert found(storage, NOW + 3, "a/", 100, *window) == list(payloads)


def test_start_id_that_has_expired_skips_a_message() -> None:
    storage = Storage(1)
    for payload, ttl in (("1", 60), ("2", 60), ("3", 2), ("4", 60)):
        add(storage, NOW, "a/", payload, ttl)
    [*_, oldest] = storage.query(NOW, ("a",), 2)
    assert oldest.payload == b"3"
    for now, payloads in ((NOW, [b"2", b"1"]), (NOW + 2, [b"1"])):
        page = storage.query(now, ("a",), 9, after=oldest.id)
        assert [message.payload for message in page] == payloads


def test_result_is_limited_to_64_kib() -> None:
    storage = Storage(1)
    for second in range(5):
        add(storage, NOW + second, "a/", bytes((48 + second,)) * 16000)
    [*messages] = storage.query(NOW + 5, ("a",), 100)
    assert [message.payload[:1] for message in messages] == [b"1", b"2", b"3", b"4"]

    one = Storage(1)
    overhead = 24 + len("a/")
    add(one, NOW, "a/", bytes(REPLAY_LIMIT_BYTES - overhead))
    assert len(one.query(NOW, ("a",), 1)) == 1
    add(one, NOW, "a/", bytes(REPLAY_LIMIT_BYTES - overhead + 1))
    assert one.query(NOW, ("a",), 1) == []


def test_id_has_the_layout_of_emitter() -> None:
    storage = Storage(0x01020304)
    add(storage, NOW, "a/b/", "1")
    add(storage, NOW, "a/b/", "2")
    second, first = storage.query(NOW, ("a", "b"), 2)
    mixed, time, count, _, *levels = struct.unpack(">7I", first.id)
    assert mixed == 0x01020304 ^ level_hash("a")
    assert 0xFFFFFFFF - time + 1514764800 == int(NOW) == first.time
    assert levels == [0x01020304, level_hash("a"), level_hash("b")]
    assert 0xFFFFFFFF - count == 1
    assert second.id[8:12] == (0xFFFFFFFF - 2).to_bytes(4, "big")
    assert second.id[12:16] == first.id[12:16]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["a/", "a/b/", "b/"]), st.integers(1, 6)),
        max_size=25,
    ),
    st.integers(0, 6),
    st.sampled_from([("a",), ("a", "b"), ("a", "+"), ("b",)]),
)
def test_pages_return_each_message_once(
    published: list[tuple[int, str, int]], wait: int, query: Words
) -> None:
    storage, now, kept = Storage(7), NOW, []
    for payload, (pause, channel, ttl) in enumerate(published):
        now += pause
        add(storage, now, channel, str(payload), ttl)
        kept.append((int(now), payload, tuple(channel[:-1].split("/")), int(now) + ttl))
    now += wait
    wanted = [
        payload
        for _, payload, words, expires in kept
        if expires > now
        and len(query) <= len(words)
        and all(w in ("+", word) for w, word in zip(query, words, strict=False))
    ]
    paged: list[int] = []
    after = b""
    while page := storage.query(now, query, 2, after=after):
        paged += [int(message.payload) for message in sorted(page, key=lambda m: m.id)]
        after = max(message.id for message in page)
    assert paged == wanted[::-1]
