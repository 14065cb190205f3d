"""Channel templates."""

from __future__ import annotations

import pickle
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio import Channel, InvalidChannelError
from emitter_anyio._values.channels import is_level
from emitter_anyio._values.router import Matcher, reaches

LEVELS = st.text("$-.0189:AZ[\\]^_`az", min_size=1, max_size=4)


class Name(str, Enum):  # noqa: UP042 - StrEnum formats as what it is
    KITCHEN = "kitchen"


class Number(int, Enum):
    SEVEN = 7


def test_a_template_has_a_pattern() -> None:
    template = Channel("sensors/{id}/temp")
    assert template.template == "sensors/{id}/temp/"
    assert template.pattern == "sensors/+/temp/"
    assert template.matcher == "emitter"
    assert repr(template) == "Channel(template='sensors/{id}/temp/', matcher='emitter')"


def test_a_template_is_a_value() -> None:
    template = Channel("a/{b}")
    assert template == Channel("a/{b}/")
    assert template != Channel("a/{c}/")
    assert template != Channel("a/{b}/", matcher="mqtt")
    assert len({template, Channel("a/{b}/")}) == 1
    assert pickle.loads(pickle.dumps(template)) == template
    with pytest.raises(AttributeError):
        template.template = "c/"  # type: ignore[misc]  # it is frozen


@pytest.mark.parametrize(
    ("template", "channel", "found"),
    [
        ("sensors/{id}/temp/", "sensors/7/temp/", {"id": "7"}),
        ("sensors/{id}/temp/", "sensors/7/temp", {"id": "7"}),
        ("sensors/{id}/temp/", "sensors/7/temp/max/", {"id": "7"}),
        ("sensors/{id}/temp/", "sensors/7/humidity/", None),
        ("sensors/{id}/temp/", "sensors/7/", None),
        ("{building}/+/{room}/", "b1/f2/r3/", {"building": "b1", "room": "r3"}),
        ("chat/", "chat/lobby/", {}),
        ("chat/{room}/", "chat/+/", None),
        ("chat/{room}/", "chat//", None),
        ("chat/{room}/", "", None),
    ],
)
def test_matching_follows_the_prefix_rule(
    template: str, channel: str, found: dict[str, str] | None
) -> None:
    assert Channel(template).match(channel) == found


@pytest.mark.parametrize(
    ("template", "channel", "found"),
    [
        ("sensors/{id}/temp/", "sensors/7/temp/", {"id": "7"}),
        ("sensors/{id}/temp/", "sensors/7/temp/max/", None),
        ("sensors/{id}/#/", "sensors/7/temp/max/", {"id": "7"}),
        ("sensors/{id}/#/", "sensors/7/", {"id": "7"}),
    ],
)
def test_matching_follows_the_rules_of_mqtt(
    template: str, channel: str, found: dict[str, str] | None
) -> None:
    assert Channel(template, matcher="mqtt").match(channel) == found


@given(id=LEVELS, name=LEVELS)
def test_what_was_formatted_matches(id: str, name: str) -> None:
    template = Channel("a/{id}/b/{name}/")
    channel = template.format(id=id, name=name)
    assert template.match(channel) == {"id": id, "name": name}


@pytest.mark.parametrize("matcher", ["emitter", "mqtt"])
@given(parts=st.lists(LEVELS | st.sampled_from("ab"), min_size=1, max_size=4))
def test_a_template_matches_what_its_pattern_receives(matcher: Matcher, parts: list[str]) -> None:
    template = Channel("a/{id}/b/", matcher=matcher)
    channel = "/".join(parts) + "/"
    reached = reaches(template.pattern, channel, matcher)
    assert (template.match(channel) is not None) == reached


def test_formatting_takes_text_and_numbers() -> None:
    template = Channel("sensors/{id}/{self}/")
    assert template.format(id=7, self="kitchen") == "sensors/7/kitchen/"
    assert template.format(id=Number.SEVEN, self=Name.KITCHEN) == "sensors/7/kitchen/"


@pytest.mark.parametrize("value", ["", "a/b", "/", "+", "#", "a b", "ä", "{id}", "a/", "\n", "a\n"])
def test_a_value_that_is_not_one_level_is_rejected(value: str) -> None:
    assert not is_level(value)
    with pytest.raises(InvalidChannelError, match=r"invalid id .*one level"):
        Channel("a/{id}/").format(id=value)


@pytest.mark.parametrize("value", [None, True, 1.5, b"a", ["a"]])
def test_a_value_of_another_type_is_rejected(value: Any) -> None:
    with pytest.raises(TypeError, match="id must be a str or an int"):
        Channel("a/{id}/").format(id=value)


def test_a_value_that_is_too_long_is_rejected() -> None:
    with pytest.raises(InvalidChannelError, match="65535"):
        Channel("a/{id}/").format(id="x" * 65535)


def test_missing_and_unknown_names_are_rejected() -> None:
    with pytest.raises(TypeError, match="missing b"):
        Channel("{a}/{b}/").format(a=1)
    with pytest.raises(TypeError, match="unknown b"):
        Channel("{a}/").format(a=1, b=2)


@pytest.mark.parametrize(("template", "matcher"), [("a/{b}/+/", "emitter"), ("{b}/#/", "mqtt")])
def test_a_template_with_a_wildcard_cannot_be_formatted(template: str, matcher: Matcher) -> None:
    with pytest.raises(InvalidChannelError, match="wildcard"):
        Channel(template, matcher=matcher).format(b=1)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "empty"),
        ("/", "empty"),
        ("a//{b}/", "empty level"),
        ("a b/{c}/", "' '"),
        ("a/{b/", "whole level"),
        ("a/b}/", "whole level"),
        ("a/v{b}/", "whole level"),
        ("a/{b}c/", "whole level"),
        ("a/{}/", "whole level"),
        ("a/{1}/", "whole level"),
        ("a/{b}{c}/", "whole level"),
        ("a/{{b}}/", "whole level"),
        ("{a}/{a}/", "occurs twice"),
        ("a/#/{b}/", "last level"),
        ("a/{b}/#/", "use 'a/{b}/'"),
        ("#/", r"use '\+/'"),
        ("$share/g/{a}/", "group="),
    ],
)
def test_a_malformed_template_is_rejected(template: str, words: str) -> None:
    with pytest.raises(InvalidChannelError, match=f"invalid template.*{words}"):
        Channel(template)


def test_other_arguments_are_checked() -> None:
    wrong: Any = 5
    with pytest.raises(TypeError, match="template must be a str"):
        Channel(wrong)
    with pytest.raises(TypeError, match="matcher must be a str"):
        Channel("a/", matcher=wrong)
    wrong = "emqx"
    with pytest.raises(ValueError, match="matcher must be 'emitter' or 'mqtt'"):
        Channel("a/", matcher=wrong)
    wrong = b"a/"
    with pytest.raises(TypeError, match="channel must be a str"):
        Channel("a/").match(wrong)
