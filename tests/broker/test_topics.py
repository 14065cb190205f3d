"""The broker's parser of topics, compared with the client's grammar."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._values.channels import check_channel, format_topic
from emitter_anyio._values.errors import InvalidChannelError
from emitter_anyio.testing._refusals import RefusedError
from emitter_anyio.testing._topics import parse


def test_topic_is_parsed() -> None:
    topic = parse("key/a/b-c.d:e/?ttl=5&x=y&")
    assert topic.key == "key"
    assert topic.channel == "a/b-c.d:e/"
    assert topic.words == ("a", "b-c.d:e")
    assert topic.options == (("ttl", "5"), ("x", "y"))
    assert topic.safe == "a/b-c.d:e/?ttl=5&x=y"
    assert not topic.wild
    assert parse("k/a/?").safe == "a/"


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "a", "a/", "/a/", "k//", "k/a", "k//a/", "k/a//", "k/a b/", "k/a@b/", "k/é/",
        "k/a{/", "k/a,/", "k/a+/", "k/+a/", "k/##/", "k/a/?ttl=-1", "k/a/?ttl", "k/a/?ttl=",
        "k/a/?=5", "k/a/?a=1&&b=2", "k/a/?&", "k/a/?a=1?b=2", "k/a?a=1", "k/a/?a=1/", "k/a/\n",
        "k/a/?a=1\n",
    ],
)  # fmt: skip
def test_malformed_topic_is_refused(text: str) -> None:
    with pytest.raises(RefusedError) as info:
        parse(text)
    assert info.value.status == 400


@pytest.mark.parametrize("channel", ["+/", "#/", "*/", "a/+/b/", "a/#/", "a/*/"])
def test_wildcards_are_detected(channel: str) -> None:
    assert parse(f"k/{channel}").wild


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ("", None),
        ("other=1", None),
        ("last=5", 5),
        ("last=007", 7),
        ("last=0", 0),
        ("last=5&last=6", 5),
        ("last=x&last=6", None),
        ("last=5x", None),
        (f"last={2**63 - 1}", 2**63 - 1),
        (f"last={2**63}", None),
        ("last=" + "9" * 9000, None),
    ],
)
def test_number_of_an_option(options: str, number: int | None) -> None:
    assert parse(f"k/a/?{options}").number("last") == number


@given(
    st.text(st.sampled_from("ab9$-.:[]^_`\\/+#* @é{}~?&="), max_size=12) | st.text(max_size=12),
    st.booleans(),
)
def test_broker_accepts_channels_that_the_client_accepts(text: str, wildcards: bool) -> None:
    try:
        channel = check_channel(text, wildcards=wildcards)
    except InvalidChannelError:
        return
    topic = parse(format_topic("key", channel, [("last", 3), ("from", None)]))
    assert topic.key == "key"
    assert topic.channel == channel
    assert topic.wild == (channel != channel.replace("+", "").replace("#", ""))
    assert topic.number("last") == 3


@given(st.text(st.sampled_from("ab9$-.:[]^_`\\/ @é{}~?&="), max_size=12))
def test_client_accepts_channels_that_the_broker_accepts(text: str) -> None:
    try:
        topic = parse(f"key/{text}")
    except RefusedError:
        return
    assert check_channel(topic.channel) == topic.channel
