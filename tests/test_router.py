from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._values.router import Matcher, Router, overlap, reaches

matchers = pytest.mark.parametrize("matcher", ["emitter", "mqtt"])


def as_regex(pattern: str, matcher: Matcher) -> re.Pattern[str]:
    """Return a pattern as a regular expression over channels, by Emitter's or MQTT's rules."""
    *path, last = pattern.removesuffix("/").split("/")
    regex = "".join("[^/]+/" if level == "+" else re.escape(level) + "/" for level in path)
    if last == "#":
        # MQTT's rule includes the parent channel; Emitter's matches nothing.
        regex += "([^/]+/)*" if matcher == "mqtt" else "(?!)"
    else:
        regex += "[^/]+/" if last == "+" else re.escape(last) + "/"
        regex += "([^/]+/)*" if matcher == "emitter" else ""
    return re.compile(regex)


def channels(names: str, depth: int) -> Iterator[str]:
    """Yield every channel with these one-letter levels, up to a depth."""
    for count in range(1, depth + 1):
        for path in product(names, repeat=count):
            yield "/".join(path) + "/"


def patterns(names: str, depth: int) -> Iterator[str]:
    for pattern in channels(names + "+", depth):
        yield pattern
        yield pattern + "#/"
    yield "#/"


level = st.sampled_from("ab")
channel_strategy = st.lists(level, min_size=1, max_size=5).map(lambda path: "/".join(path) + "/")
pattern_strategy = st.sampled_from(sorted(patterns("ab", 3)))


class TestReaches:
    @matchers
    def test_reaches_follows_the_rules(self, matcher: Matcher) -> None:
        for pattern in patterns("ab", 3):
            rule = as_regex(pattern, matcher)
            for channel in channels("ab", 5):
                expected = rule.fullmatch(channel) is not None
                assert reaches(pattern, channel, matcher) == expected, (pattern, channel)

    @pytest.mark.parametrize(
        ("pattern", "channel", "emitter", "mqtt"),
        [
            ("a/", "a/", True, True),
            ("a/", "a/b/", True, False),
            ("a/b/", "a/", False, False),
            ("a/", "ab/", False, False),
            ("+/", "a/b/", True, False),
            ("a/+/", "a/b/c/", True, False),
            ("a/+/", "a/", False, False),
            ("a/#/", "a/b/", False, True),
            ("a/#/", "a/", False, True),
            ("#/", "a/b/", False, True),
        ],
    )
    def test_reaches_examples(self, pattern: str, channel: str, emitter: bool, mqtt: bool) -> None:
        assert reaches(pattern, channel) is reaches(pattern, channel, "emitter") is emitter
        assert reaches(pattern, channel, "mqtt") is mqtt


class TestOverlap:
    @matchers
    def test_patterns_overlap_if_a_channel_reaches_both(self, matcher: Matcher) -> None:
        # "z" is a level that no pattern names. If two patterns of three levels have a channel in
        # common, they have one of at most four levels.
        every = list(channels("abz", 4))
        reached = {
            pattern: {c for c in every if as_regex(pattern, matcher).fullmatch(c)}
            for pattern in patterns("ab", 2)
        }
        for one, other in product(reached, repeat=2):
            expected = not reached[one].isdisjoint(reached[other])
            assert overlap(one, other, matcher) == expected, (one, other)


class TestRouter:
    @matchers
    @given(
        changes=st.lists(
            st.tuples(st.integers(0, 6), st.none() | pattern_strategy | st.just("discard")),
            max_size=12,
        ),
        looked_up=st.lists(channel_strategy, min_size=1, max_size=4),
    )
    def test_receivers_of_a_channel(
        self,
        matcher: Matcher,
        changes: list[tuple[int, str | None]],
        looked_up: list[str],
    ) -> None:
        router: Router[int] = Router(matcher)
        table: dict[int, str | None] = {}
        for receiver, pattern in changes:
            if pattern == "discard":
                router.discard(receiver)
                table.pop(receiver, None)
            elif receiver not in table:
                router.add(receiver, pattern)
                table[receiver] = pattern
            for channel in looked_up:
                expected = [
                    receiver
                    for receiver, pattern in table.items()
                    if pattern is None or as_regex(pattern, matcher).fullmatch(channel)
                ]
                # Twice, because the second result comes from the cache.
                assert list(router.receivers[channel]) == expected
                assert list(router.receivers[channel]) == expected
            assert list(router) == list(table)

    @matchers
    def test_receiver_is_found_once_through_two_branches(self, matcher: Matcher) -> None:
        router: Router[str] = Router(matcher)
        router.add("plus", "+/b/")
        router.add("word", "a/b/")
        router.add("all", None)
        assert router.receivers["a/b/"] == ("plus", "word", "all")

    def test_channel_without_its_slash_is_equivalent(self) -> None:
        router: Router[str] = Router()
        router.add("x", "a/")
        assert router.receivers["a/b"] == router.receivers["a/b/"] == ("x",)

    def test_plus_in_a_channel_is_literal(self) -> None:
        # Clients cannot publish to such a channel, but a peer might send one.
        router: Router[str] = Router()
        router.add("plus", "+/")
        router.add("word", "a/")
        assert router.receivers["+/"] == ("plus",)

    def test_discarding_an_unknown_receiver_does_nothing(self) -> None:
        router: Router[str] = Router()
        router.add("x", "a/")
        router.discard("y")
        assert router.receivers["a/"] == ("x",)

    def test_cache_is_bounded(self) -> None:
        router: Router[str] = Router()
        router.add("x", "a/")
        for number in range(10_000):
            assert router.receivers[f"a/{number}/"] == ("x",)
            assert len(router._found) <= 4096

    def test_discarded_receivers_leave_no_branches(self) -> None:
        router: Router[int] = Router()
        router.add(0, "a/")
        for number in range(1, 9):
            router.add(number, f"a/b/{number % 3}/+/")
        for number in range(1, 9):
            router.discard(number)
        assert list(router._tree._root.children) == ["a"]
        assert not router._tree._root.children["a"].children
        router.discard(0)
        assert not router._tree._root.children

    @matchers
    def test_channel_can_have_any_number_of_levels(self, matcher: Matcher) -> None:
        deep = "a/" * 20_000
        router: Router[str] = Router(matcher)
        router.add("x", deep)
        router.add("y", "+/" * 20_000)
        assert router.receivers[deep] == ("x", "y")
        router.discard("y")
        assert router.receivers[deep] == ("x",)
        router.discard("x")
        assert router.receivers[deep] == ()
