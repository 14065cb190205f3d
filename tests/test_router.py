from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._values.router import Matcher, Router, overlap, reaches

matchers = pytest.mark.parametrize("matcher", ["emitter", "mqtt"])


def spelled_out(pattern: str, matcher: Matcher) -> re.Pattern[str]:
    """Emitter's and MQTT's rules as a regular expression over whole channels."""
    *path, last = pattern.removesuffix("/").split("/")
    said = "".join("[^/]+/" if level == "+" else re.escape(level) + "/" for level in path)
    if last == "#":
        # Under MQTT the parent is reached too; under Emitter nothing ever is.
        said += "([^/]+/)*" if matcher == "mqtt" else "(?!)"
    else:
        said += "[^/]+/" if last == "+" else re.escape(last) + "/"
        said += "([^/]+/)*" if matcher == "emitter" else ""
    return re.compile(said)


def channels(names: str, depth: int) -> Iterator[str]:
    """Every channel of these one-letter levels up to a depth."""
    for count in range(1, depth + 1):
        for path in product(names, repeat=count):
            yield "/".join(path) + "/"


def patterns(names: str, depth: int) -> Iterator[str]:
    for pattern in channels(names + "+", depth):
        yield pattern
        yield pattern + "#/"
    yield "#/"


level = st.sampled_from("ab")
a_channel = st.lists(level, min_size=1, max_size=5).map(lambda path: "/".join(path) + "/")
a_pattern = st.sampled_from(sorted(patterns("ab", 3)))


class TestReaches:
    @matchers
    def test_is_what_the_rules_say(self, matcher: Matcher) -> None:
        for pattern in patterns("ab", 3):
            rule = spelled_out(pattern, matcher)
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
    def test_by_example(self, pattern: str, channel: str, emitter: bool, mqtt: bool) -> None:
        assert reaches(pattern, channel) is reaches(pattern, channel, "emitter") is emitter
        assert reaches(pattern, channel, "mqtt") is mqtt


class TestOverlap:
    @matchers
    def test_is_whether_some_channel_reaches_both(self, matcher: Matcher) -> None:
        # "z" stands for a level that no pattern names. Two patterns of three levels have a channel
        # of at most four in common, if they have one at all.
        every = list(channels("abz", 4))
        reached = {
            pattern: {c for c in every if spelled_out(pattern, matcher).fullmatch(c)}
            for pattern in patterns("ab", 2)
        }
        for one, other in product(reached, repeat=2):
            expected = not reached[one].isdisjoint(reached[other])
            assert overlap(one, other, matcher) == expected, (one, other)


class TestRouter:
    @matchers
    @given(
        changes=st.lists(
            st.tuples(st.integers(0, 6), st.none() | a_pattern | st.just("discard")), max_size=12
        ),
        asked=st.lists(a_channel, min_size=1, max_size=4),
    )
    def test_finds_whom_a_channel_reaches(
        self,
        matcher: Matcher,
        changes: list[tuple[int, str | None]],
        asked: list[str],
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
            for channel in asked:
                expected = [
                    receiver
                    for receiver, pattern in table.items()
                    if pattern is None or spelled_out(pattern, matcher).fullmatch(channel)
                ]
                # Twice, since the second answer comes from the cache.
                assert list(router.receivers[channel]) == expected
                assert list(router.receivers[channel]) == expected
            assert list(router) == list(table)

    @matchers
    def test_a_receiver_is_reached_once_through_two_branches(self, matcher: Matcher) -> None:
        router: Router[str] = Router(matcher)
        router.add("plus", "+/b/")
        router.add("word", "a/b/")
        router.add("all", None)
        assert router.receivers["a/b/"] == ("plus", "word", "all")

    def test_a_channel_without_its_slash_is_the_same(self) -> None:
        router: Router[str] = Router()
        router.add("x", "a/")
        assert router.receivers["a/b"] == router.receivers["a/b/"] == ("x",)

    def test_a_plus_in_a_channel_is_a_word(self) -> None:
        # Nobody can publish it, but what comes from the wire need not be of the broker's making.
        router: Router[str] = Router()
        router.add("plus", "+/")
        router.add("word", "a/")
        assert router.receivers["+/"] == ("plus",)

    def test_to_discard_a_stranger_does_nothing(self) -> None:
        router: Router[str] = Router()
        router.add("x", "a/")
        router.discard("y")
        assert router.receivers["a/"] == ("x",)

    def test_the_cache_is_bounded(self) -> None:
        router: Router[str] = Router()
        router.add("x", "a/")
        for number in range(10_000):
            assert router.receivers[f"a/{number}/"] == ("x",)
            assert len(router._found) <= 4096

    def test_nothing_is_left_of_those_who_are_gone(self) -> None:
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
    def test_a_channel_may_have_any_number_of_levels(self, matcher: Matcher) -> None:
        deep = "a/" * 20_000
        router: Router[str] = Router(matcher)
        router.add("x", deep)
        router.add("y", "+/" * 20_000)
        assert router.receivers[deep] == ("x", "y")
        router.discard("y")
        assert router.receivers[deep] == ("x",)
        router.discard("x")
        assert router.receivers[deep] == ()
