"""Which of the messages that came in one go are for whom."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio import EmitterMessage
from emitter_anyio._values.batches import make_batch

CHANNELS = [f"{name}/" for name in "abcd"]
WHO = list(range(5))

lists = st.lists(
    st.builds(EmitterMessage, st.sampled_from(CHANNELS), st.binary(max_size=3)), max_size=30
)
receivers = st.fixed_dictionaries(
    {channel: st.lists(st.sampled_from(WHO), unique=True) for channel in CHANNELS}
)


@given(lists, receivers)
def test_everybody_gets_theirs_in_order(
    messages: list[EmitterMessage], receivers: Mapping[str, list[int]]
) -> None:
    found = make_batch(messages).by_receiver(receivers)
    expected = {
        who: theirs
        for who in WHO
        if (theirs := [message for message in messages if who in receivers[message.channel]])
    }
    assert {who: batch for who, (batch, _) in found.items()} == expected


@given(lists)
def test_sorting_loses_nothing(messages: list[EmitterMessage]) -> None:
    sorted_ = make_batch(messages)
    assert sorted_.in_order == messages
    assert sorted_.by_channel == {
        channel: theirs
        for channel in CHANNELS
        if (theirs := [message for message in messages if message.channel == channel])
    }


def test_the_size_is_known_where_it_is_said() -> None:
    messages = make_batch(EmitterMessage(channel, b"one") for channel in ("a/", "b/", "a/", "c/"))
    messages.weights.update({"a/": 3, "b/": None})
    batches = messages.by_receiver({"a/": ["a"], "b/": ["b"], "c/": ["c"]})
    assert {who: each for who, (_, each) in batches.items()} == {"a": 3, "b": None, "c": None}


def test_nothing_is_copied_for_who_gets_all_or_one_channel() -> None:
    found = make_batch(EmitterMessage(channel, b"") for channel in ("a/", "b/", "a/"))
    batches = found.by_receiver({"a/": ["all", "one"], "b/": ["all"]})
    assert batches["all"][0] is found.in_order
    assert batches["one"][0] is found.by_channel["a/"]


def test_nobody_gets_anything_of_nothing() -> None:
    assert make_batch([]).by_receiver({}) == {}
