"""The matchers of the development broker, and share groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio.testing._matching import Matcher, Subscriptions, Trie
from emitter_anyio.testing._topics import Words

words = st.sampled_from(["a", "b", "c"])
channels = st.lists(words, min_size=1, max_size=4).map(tuple)
filters = st.lists(st.sampled_from(["a", "b", "+", "#"]), min_size=1, max_size=4).map(tuple)
holders = st.integers(0, 3)
steps = st.lists(st.tuples(st.booleans(), filters, holders), max_size=30)


def by_prefix(wanted: Words, channel: Words) -> bool:
    return len(wanted) <= len(channel) and all(
        word in ("+", level) for word, level in zip(wanted, channel, strict=False)
    )


def by_length(wanted: Words, channel: Words) -> bool:
    if "#" in wanted:
        head = wanted[: wanted.index("#")]
        return len(channel) > len(head) and by_prefix(head, channel)
    return len(wanted) == len(channel) and by_prefix(wanted, channel)


@pytest.mark.parametrize(("matcher", "reaches"), [("emitter", by_prefix), ("mqtt", by_length)])
@given(steps=steps, channel=channels)
def test_trie_matches_like_comparing_each_filter(
    matcher: Matcher,
    reaches: Callable[[Words, Words], bool],
    steps: list[tuple[bool, Words, int]],
    channel: Words,
) -> None:
    trie: Trie[int] = Trie(matcher)
    held: set[tuple[Words, int]] = set()
    for adding, wanted, holder in steps:
        if adding:
            trie.add(wanted, holder)
            held.add((wanted, holder))
        elif (wanted, holder) in held:
            trie.remove(wanted, holder)
            held.remove((wanted, holder))
    if matcher == "mqtt":  # levels after # are ignored
        held = {(w, h) for w, h in held if "#" not in w[:-1]}
    assert set(trie.match(channel)) == {h for w, h in held if reaches(w, channel)}
    for wanted, holder in list(held):
        trie.remove(wanted, holder)


@given(held=st.sets(st.tuples(filters, holders)))
def test_removing_all_filters_empties_the_trie(held: set[tuple[Words, int]]) -> None:
    trie: Trie[int] = Trie()
    for wanted, holder in held:
        trie.add(wanted, holder)
    for wanted, holder in held:
        trie.remove(wanted, holder)
    assert trie._root.children == {}


def test_subscriber_with_several_matches_receives_one_copy() -> None:
    subscriptions: Subscriptions[str] = Subscriptions()
    for wanted in (("a",), ("a", "b"), ("a", "+"), ("+",)):
        subscriptions.add(wanted, "x")
    assert subscriptions.receivers(("a", "b")) == ["x"]


def test_random_member_of_a_group_is_chosen() -> None:
    subscriptions: Subscriptions[int] = Subscriptions()
    for member in range(3):
        subscriptions.add(("$share", "g", "a"), member)
    chosen = [subscriptions.receivers(("a", "b")) for _ in range(200)]
    assert all(len(each) == 1 for each in chosen)
    assert {each for [each] in chosen} == {0, 1, 2}
    assert subscriptions.receivers(("b",)) == []


def test_member_of_a_group_receives_one_copy() -> None:
    subscriptions: Subscriptions[str] = Subscriptions()
    subscriptions.add(("a",), "plain")
    subscriptions.add(("$share", "g", "a"), "plain")
    subscriptions.add(("$share", "h", "+"), "other")
    assert subscriptions.receivers(("a",)) == ["plain", "other"]


def test_excluded_subscriber_is_skipped_in_groups() -> None:
    subscriptions: Subscriptions[str] = Subscriptions()
    for member in ("me", "you"):
        subscriptions.add(("$share", "g", "a"), member)
        subscriptions.add(("b",), member)
    for _ in range(50):
        assert subscriptions.receivers(("a",), "me") == ["you"]
    assert subscriptions.receivers(("b",), "me") == ["you"]
    subscriptions.remove(("$share", "g", "a"), "you")
    assert subscriptions.receivers(("a",), "me") == []
