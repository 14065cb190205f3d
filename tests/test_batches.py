"""Splitting a batch of messages by channel and by receiver."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio import EmitterMessage
from emitter_anyio._values.batches import make_batch

CHANNELS = [f"{name}/" for name in "abcd"]
RECEIVERS = list(range(5))

lists = st.lists(
    st.builds(EmitterMessage, st.sampled_from(CHANNELS), st.binary(max_size=3)), max_size=30
)
receivers = st.fixed_dictionaries(
    {channel: st.lists(st.sampled_from(RECEIVERS), unique=True) for channel in CHANNELS}
)


@given(lists, receivers)
def test_each_receiver_gets_its_messages_in_order(
    messages: list[EmitterMessage], receivers: Mapping[str, list[int]]
) -> None:
    found = make_batch(messages).by_receiver(receivers)
    expected = {
        receiver: selected
        for receiver in RECEIVERS
        if (selected := [message for message in messages if receiver in receivers[message.channel]])
    }
    assert {receiver: batch for receiver, (batch, _) in found.items()} == expected


@given(lists)
def test_batch_by_channel_contains_every_message_in_order(messages: list[EmitterMessage]) -> None:
    batch = make_batch(messages)
    assert batch.in_order == messages
    assert batch.by_channel == {
        channel: selected
        for channel in CHANNELS
        if (selected := [message for message in messages if message.channel == channel])
    }


def test_receiver_gets_message_weight_only_if_batch_has_it() -> None:
    messages = make_batch(EmitterMessage(channel, b"one") for channel in ("a/", "b/", "a/", "c/"))
    messages.weights.update({"a/": 3, "b/": None})
    batches = messages.by_receiver({"a/": ["a"], "b/": ["b"], "c/": ["c"]})
    assert {receiver: weight for receiver, (_, weight) in batches.items()} == {
        "a": 3,
        "b": None,
        "c": None,
    }


def test_whole_batch_or_one_channel_is_passed_without_copy() -> None:
    found = make_batch(EmitterMessage(channel, b"") for channel in ("a/", "b/", "a/"))
    batches = found.by_receiver({"a/": ["all", "one"], "b/": ["all"]})
    assert batches["all"][0] is found.in_order
    assert batches["one"][0] is found.by_channel["a/"]


def test_empty_batch_has_no_receivers() -> None:
    assert make_batch([]).by_receiver({}) == {}
