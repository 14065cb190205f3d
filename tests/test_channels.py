from __future__ import annotations

import math
import string
from datetime import UTC, datetime, timedelta, timezone, tzinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._values.channels import (
    MAX_KEY_LEVELS,
    channel_hash,
    check_channel,
    check_group,
    check_key,
    check_target,
    format_options,
    format_topic,
    level_hash,
    levels,
    share,
    unix_seconds,
    unshare,
)
from emitter_anyio._values.checks import check_optional_int, is_int, is_number
from emitter_anyio._values.errors import InvalidChannelError

# The broker's security/channel.go: the codes 45 to 58 without the slash, 65 to 122, and 36.
ALPHABET = "".join(chr(c) for c in (36, 45, 46, *range(48, 59), *range(65, 123)))

words = st.text(ALPHABET, min_size=1, max_size=6)
parts = st.lists(words, min_size=1, max_size=6)


def is_valid(channel: str, wildcards: bool) -> bool:
    """Check the broker's grammar without a regular expression."""
    *path, last = channel.removesuffix("/").split("/")
    plain = [level != "" and set(level) <= set(ALPHABET) for level in (*path, last)]
    if wildcards:
        plain = [ok or level == "+" for ok, level in zip(plain, (*path, last), strict=True)]
        plain[-1] = plain[-1] or last == "#"
    return all(plain)


class TestCheckChannel:
    @given(parts)
    def test_valid_channel_is_returned_and_split_into_levels(self, path: list[str]) -> None:
        channel = "/".join(path) + "/"
        assert check_channel(channel) == channel
        assert levels(channel) == path

    @given(parts)
    def test_missing_trailing_slash_is_added(self, path: list[str]) -> None:
        assert check_channel("/".join(path)) == "/".join(path) + "/"

    @given(st.text(ALPHABET + "/+# @\u00e9", max_size=12), st.booleans())
    def test_accepts_exactly_what_the_broker_accepts(self, channel: str, wildcards: bool) -> None:
        try:
            whole = check_channel(channel, wildcards=wildcards)
        except InvalidChannelError:
            assert not is_valid(channel, wildcards)
        else:
            assert is_valid(channel, wildcards)
            assert whole == channel.removesuffix("/") + "/"

    @pytest.mark.parametrize("code", range(128))
    def test_each_ascii_character_is_accepted_or_named(self, code: int) -> None:
        channel = f"a{chr(code)}b/"
        if chr(code) in ALPHABET + "/":
            assert check_channel(channel) == channel
        else:
            with pytest.raises(InvalidChannelError) as caught:
                check_channel(channel, wildcards=True)
            assert repr(chr(code)) in str(caught.value)

    @pytest.mark.parametrize(
        ("channel", "reason"),
        [
            ("", "empty"),
            ("/", "empty"),
            ("///", "empty"),
            ("/a/", "empty level"),
            ("a//b/", "empty level"),
            ("a//", "empty level"),
            ("a b/", "' '"),
            ("a\n/", r"'\\n'"),
            ("a/\u00fc/", "'\u00fc'"),
            ("\u0661/", "\u0661"),
            ("a/b+/", r"'\+'"),
            ("a/++/", r"'\+'"),
            ("*/", r"'\*'"),
            ("a/?last=5/", r"'\?'"),
            ("a/#/b/", "'#'"),
        ],
    )
    def test_error_names_mistake_and_channel(self, channel: str, reason: str) -> None:
        with pytest.raises(InvalidChannelError, match=reason) as caught:
            check_channel(channel, wildcards=True)
        if channel.strip("/"):
            assert repr(channel) in str(caught.value)

    @pytest.mark.parametrize("channel", ["+/", "#/", "a/+/b/", "a/+", "a/#"])
    def test_wildcards_are_accepted_only_if_enabled(self, channel: str) -> None:
        assert check_channel(channel, wildcards=True) == channel.removesuffix("/") + "/"
        with pytest.raises(InvalidChannelError, match="wildcard"):
            check_channel(channel)

    @pytest.mark.parametrize("channel", [None, 5, b"a/", ["a"]])
    def test_other_type_raises_type_error(self, channel: str) -> None:
        with pytest.raises(TypeError, match=f"{type(channel).__name__}"):
            check_channel(channel)


class TestGroups:
    @given(words, parts)
    def test_share_puts_group_before_channel(self, group: str, path: list[str]) -> None:
        channel = "/".join(path) + "/"
        assert check_group(group) == group
        assert share(group, channel) == f"$share/{group}/{channel}"
        assert unshare(share(group, channel)) == (group, channel)

    @given(parts)
    def test_channel_without_group_is_unchanged(self, path: list[str]) -> None:
        channel = "/".join(path) + "/"
        assert share(None, channel) == channel
        if path[0] != "$share":
            assert unshare(channel) == (None, channel)

    @pytest.mark.parametrize("channel", ["$share/", "$share/g/", "a/$share/g/", "$shared/g/a/"])
    def test_similar_channel_is_not_a_group(self, channel: str) -> None:
        assert unshare(channel) == (None, channel)

    @pytest.mark.parametrize("group", ["", "a/b", "+", "#", "a b", "/g"])
    def test_invalid_group_name_is_rejected(self, group: str) -> None:
        with pytest.raises(InvalidChannelError):
            check_group(group)

    def test_trailing_slash_of_group_is_removed(self) -> None:
        assert check_group("g/") == "g"


class TestCheckTarget:
    def test_target_may_have_wildcards(self) -> None:
        assert check_target("a/+/#") == "a/+/#/"

    def test_target_has_at_most_23_levels(self) -> None:
        assert MAX_KEY_LEVELS == 23
        assert check_target("a/" * 22 + "#") == "a/" * 22 + "#/"
        with pytest.raises(InvalidChannelError, match=r"24.*23"):
            check_target("a/" * 24)

    def test_invalid_channel_is_rejected(self) -> None:
        with pytest.raises(InvalidChannelError, match="empty level"):
            check_target("a//")


class TestCheckKey:
    @given(st.text(string.ascii_letters + string.digits + "-_", min_size=1))
    def test_accepts_characters_of_keys(self, key: str) -> None:
        assert check_key(key) == key

    @given(st.text(min_size=1))
    def test_rejects_characters_that_would_change_topic_without_showing_key(self, key: str) -> None:
        if all("!" <= c <= "~" and c not in "/?#+" for c in key):
            assert check_key(key) == key
            return
        with pytest.raises(ValueError, match="invalid key: it contains") as caught:
            check_key(key)
        if len(key) > 20:
            assert key not in str(caught.value)

    @pytest.mark.parametrize("bad", ["/", "?", "#", "+", " ", "\n", "\x7f", "\u00e9"])
    def test_error_names_character_and_position(self, bad: str) -> None:
        with pytest.raises(ValueError, match="position 6") as caught:
            check_key(f"secret{bad}word")
        assert repr(bad) in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "word" not in str(caught.value)

    def test_empty_key_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            check_key("")

    @pytest.mark.parametrize("key", [None, 5, b"key"])
    def test_other_type_raises_type_error(self, key: str) -> None:
        with pytest.raises(TypeError, match=f"{type(key).__name__}"):
            check_key(key)


class TestNumbers:
    def test_bool_is_not_a_number(self) -> None:
        assert is_int(3)
        assert is_number(3)
        assert is_number(0.5)
        assert not is_int(0.5)
        assert not is_int(True)
        assert not is_number(True)
        assert not is_int("3")
        assert not is_number("3")

    @pytest.mark.parametrize("value", [0, 1, 2**31 - 1])
    def test_int_in_range_is_returned(self, value: int) -> None:
        assert check_optional_int("last", value) == value

    def test_none_is_returned(self) -> None:
        assert check_optional_int("last", None) is None
        assert unix_seconds("since", None) is None

    @pytest.mark.parametrize("value", [-1, 2**31, 10**400], ids=["-1", "2**31", "10**400"])
    def test_int_out_of_range_is_rejected(self, value: int) -> None:
        with pytest.raises(ValueError, match=r"last.*0 to 2147483647.* -?\d+"):
            check_optional_int("last", value)

    @pytest.mark.parametrize("value", [1.0, "1", True, b""])
    def test_other_type_raises_type_error(self, value: int) -> None:
        with pytest.raises(TypeError, match=f"last.*{type(value).__name__}"):
            check_optional_int("last", value)


class _ZoneWithoutOffset(tzinfo):
    def utcoffset(self, when: datetime | None) -> None:
        return None

    def dst(self, when: datetime | None) -> None:
        return None

    def tzname(self, when: datetime | None) -> None:
        return None


class TestUnixSeconds:
    @given(st.integers(1514764800, 3029529600), st.integers(-14, 14))
    def test_datetime_of_any_zone_is_converted(self, seconds: int, hours: int) -> None:
        zone = timezone(timedelta(hours=hours))
        assert unix_seconds("since", datetime.fromtimestamp(seconds, zone)) == seconds
        assert unix_seconds("since", seconds) == seconds

    def test_fraction_of_second_is_dropped(self) -> None:
        assert unix_seconds("since", 1600000000.9) == 1600000000

    @pytest.mark.parametrize(
        "value",
        [
            *(0, 1514764799, 3029529601, -1.5, math.nan, math.inf, -math.inf, 10**400),
            *(datetime(2017, 12, 31, tzinfo=UTC), datetime(2067, 1, 1, tzinfo=UTC)),
        ],
    )
    def test_time_that_the_broker_would_ignore_is_rejected(self, value: float | datetime) -> None:
        with pytest.raises(ValueError, match=r"until.*2018.*2066"):
            unix_seconds("until", value)

    @pytest.mark.parametrize("zone", [None, _ZoneWithoutOffset()])
    def test_naive_datetime_is_rejected(self, zone: tzinfo | None) -> None:
        with pytest.raises(ValueError, match=r"since.*naive"):
            unix_seconds("since", datetime(2024, 1, 1, tzinfo=zone))

    @pytest.mark.parametrize("value", ["2024", True, b"", timedelta(1)])
    def test_other_type_raises_type_error(self, value: float) -> None:
        with pytest.raises(TypeError, match=f"since.*{type(value).__name__}"):
            unix_seconds("since", value)


class TestFormatTopic:
    @given(
        words,
        parts,
        st.lists(st.tuples(words, st.none() | st.integers(0, 2**31 - 1)), max_size=4),
    )
    def test_topic_can_be_split_into_its_parts(
        self, key: str, path: list[str], options: list[tuple[str, int | None]]
    ) -> None:
        channel = "/".join(path) + "/"
        topic = format_topic(key, channel, options)
        place, _, query = topic.partition("?")
        assert place == f"{key}/{channel}"
        pairs = [tuple(pair.split("=")) for pair in query.split("&")] if query else []
        assert pairs == [(name, str(value)) for name, value in options if value is not None]

    def test_topic_without_options_has_no_question_mark(self) -> None:
        assert format_topic("k", "a/") == "k/a/"
        assert format_topic("k", "a/", [("last", None)]) == "k/a/"

    def test_format_options_adds_options_to_channel(self) -> None:
        assert format_options("a/", [("me", 0), ("ttl", None)]) == "a/?me=0"
        assert format_options("a/", [("ttl", None)]) == "a/"

    def test_option_of_zero_is_kept(self) -> None:
        assert format_topic("k", "a/", [("last", 0), ("from", 7)]) == "k/a/?last=0&from=7"


def murmur(data: bytes, seed: int) -> int:
    """Compute MurmurHash3 (x86, 32 bits), as it is defined."""

    def rotated(value: int, by: int) -> int:
        return (value << by | value >> 32 - by) % 2**32

    value = seed
    for at in range(0, len(data), 4):
        block = data[at : at + 4]
        mixed = rotated(int.from_bytes(block, "little") * 0xCC9E2D51 % 2**32, 15)
        value ^= mixed * 0x1B873593 % 2**32
        if len(block) == 4:
            value = (rotated(value, 13) * 5 + 0xE6546B64) % 2**32
    value ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        value = (value ^ value >> shift) * factor % 2**32
    return value


class TestChannelHash:
    @pytest.mark.parametrize(
        ("data", "seed", "published"),
        [
            (b"", 0, 0),
            (b"", 1, 0x514E28B7),
            (b"test", 0x9747B28C, 0x704B81DC),
            (b"Hello, world!", 0x9747B28C, 0x24884CBA),
            (b"\xff\xff\xff\xff", 0, 0x76293B50),
            (b"!Ce\x87", 0x5082EDEE, 0x2362F9DE),
            (b"!", 0, 0x72661CF4),
        ],
    )
    def test_reference_implementation_is_murmur3(
        self, data: bytes, seed: int, published: int
    ) -> None:
        assert murmur(data, seed) == published

    @given(st.text(max_size=20))
    def test_level_hash_is_that_of_the_broker(self, level: str) -> None:
        expected = int.from_bytes(murmur(level.encode(), 37).to_bytes(4, "little"), "big")
        assert level_hash(level) == expected

    @given(st.permutations(["a", "b", "c", "dd"]))
    def test_hash_does_not_depend_on_order_of_levels(self, path: list[str]) -> None:
        assert channel_hash("/".join(path) + "/") == channel_hash("a/b/c/dd/")

    @pytest.mark.parametrize(
        ("one", "other"), [("p/q/", "q/p/"), ("d/d/", "g/g/"), ("a/b/b/", "a/c/c/")]
    )
    def test_colliding_channels_have_equal_hash(self, one: str, other: str) -> None:
        assert channel_hash(one) == channel_hash(other)

    @given(words, words, words)
    def test_different_siblings_have_different_hashes(
        self, parent: str, one: str, other: str
    ) -> None:
        assert channel_hash(f"{parent}/{one}/") == level_hash(parent) ^ level_hash(one)
        same = channel_hash(f"{parent}/{one}/") == channel_hash(f"{parent}/{other}/")
        assert same == (one == other)


def test_topic_longer_than_65535_bytes_is_rejected() -> None:
    whole = format_topic("k", "a" * 65532 + "/")
    assert len(whole) == 65535
    with pytest.raises(InvalidChannelError, match=r"65536.*65535"):
        format_topic("k", "a" * 65533 + "/")
