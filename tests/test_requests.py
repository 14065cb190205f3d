from __future__ import annotations

import base64
import contextlib
import copy
import json
import pickle
from dataclasses import FrozenInstanceError, asdict, fields
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._values import requests as requests
from emitter_anyio._values.channels import ChannelKey
from emitter_anyio._values.requests import (
    InvalidReplyError,
    Link,
    Me,
    Member,
    PresenceEvent,
    PresenceStatus,
    Request,
    parse_object,
    parse_presence_event,
    parse_refusal,
)

SECRET = "S" * 32
KEY = "k" * 32

REQUESTS: list[Request[Any]] = [
    requests.keygen(SECRET, "a/", "rw", 0),
    requests.me(),
    requests.presence(KEY, "a/", status=True, changes=None),
    requests.history(KEY, "a/", last=10),
    requests.keyban(SECRET, KEY, True),
    requests.link(KEY, "a/", "a1", ()),
]

FIELDS = ["key", "channel", "id", "links", "who", "time", "messages", "event", "banned", "name"]
FIELDS += ["req", "status", "message"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*FIELDS, "username", "payload"]),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)
answers = st.dictionaries(
    st.sampled_from(FIELDS),
    json_values,
)


def encode_id(seconds: int, counter: int = 0, node: int = 7) -> str:
    """Build the id of a stored message as the broker does, in base64."""
    fields = (0x1234, 0xFFFFFFFF - (seconds - 1514764800), 0xFFFFFFFF - counter, node, 0x9999)
    return base64.b64encode(b"".join(field.to_bytes(4, "big") for field in fields)).decode()


def encode_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class TestRequests:
    def test_keygen(self) -> None:
        request = requests.keygen(SECRET, "a/#/", "rw", 60)
        assert request.topic == "emitter/keygen/"
        assert json.loads(request.body) == {
            "key": SECRET,
            "channel": "a/#/",
            "type": "rw",
            "ttl": 60,
        }
        assert (request.key, request.channel) == (SECRET, "a/#/")

    def test_me(self) -> None:
        assert (requests.me().topic, requests.me().body) == ("emitter/me/", b"")

    @pytest.mark.parametrize("status", [True, False])
    @pytest.mark.parametrize("changes", [True, False, None])
    def test_presence_omits_changes_if_it_is_none(self, status: bool, changes: bool | None) -> None:
        request = requests.presence(KEY, "a/", status=status, changes=changes)
        expected: dict[str, object] = {"key": KEY, "channel": "a/", "status": status}
        if changes is not None:
            expected["changes"] = changes
        assert request.topic == "emitter/presence/"
        assert json.loads(request.body) == expected

    def test_history_has_the_key_in_the_channel(self) -> None:
        request = requests.history(KEY, "a/b/", last=5, since=1600000000, until=1700000000)
        assert request.topic == "emitter/history/"
        assert json.loads(request.body) == {
            "channel": f"{KEY}/a/b/?last=5&from=1600000000&until=1700000000"
        }
        assert (request.key, request.channel) == (KEY, "a/b/")

    def test_history_can_start_before_a_message(self) -> None:
        request = requests.history(KEY, "a/", last=5, before=b"\xff" * 16)
        assert json.loads(request.body) == {
            "channel": f"{KEY}/a/?last=5",
            "startFromID": "/////////////////////w==",
        }

    @pytest.mark.parametrize("banned", [True, False])
    def test_keyban(self, banned: bool) -> None:
        request = requests.keyban(SECRET, KEY, banned)
        assert request.topic == "emitter/keyban/"
        assert json.loads(request.body) == {"secret": SECRET, "target": KEY, "banned": banned}
        assert (request.key, request.channel) == (SECRET, None)

    def test_link(self) -> None:
        request = requests.link(KEY, "a/", "a1", [("me", 0), ("ttl", None), ("last", 5)])
        assert request.topic == "emitter/link/"
        body = json.loads(request.body)
        assert body == {
            "name": "a1",
            "key": KEY,
            "channel": "a/?me=0&last=5",
            "subscribe": False,
        }
        assert (request.key, request.channel) == (KEY, "a/")

    def test_all_requests_except_history_emit_events(self) -> None:
        emitted = {request.operation for request in REQUESTS if request.emits}
        assert emitted == {"keygen", "me", "presence", "keyban", "link"}

    @pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.operation)
    def test_repr_shows_no_key(self, request_: Request[Any]) -> None:
        assert SECRET not in repr(request_)
        assert KEY not in repr(request_)


class TestValidReplies:
    def test_keygen(self) -> None:
        answer = {"req": 1, "status": 200, "key": KEY, "channel": "a/"}
        assert requests.keygen(SECRET, "a/", "rw", 0).parse(answer) == ChannelKey(KEY, "a/")

    def test_me(self) -> None:
        assert requests.me().parse({"id": "X"}) == Me("X")
        parsed = requests.me().parse({"id": "X", "links": {"a1": "a/?me=0"}})
        assert parsed == Me("X", {"a1": "a/?me=0"})
        with pytest.raises(TypeError):
            parsed.links["b"] = "b/"  # type: ignore[index]  # on purpose
        with pytest.raises(TypeError):
            parsed.links.clear()  # type: ignore[attr-defined]  # on purpose
        for copied in (copy.deepcopy(parsed), pickle.loads(pickle.dumps(parsed))):
            assert copied == parsed
        assert json.loads(json.dumps(asdict(parsed))) == {"id": "X", "links": {"a1": "a/?me=0"}}

    @pytest.mark.parametrize("banned", [True, False])
    def test_keyban(self, banned: bool) -> None:
        answer = {"req": 1, "status": 200, "banned": banned}
        assert requests.keyban(SECRET, KEY, not banned).parse(answer) is banned

    def test_link(self) -> None:
        answer = {"req": 1, "status": 200, "name": "a1", "channel": "a/?me=0"}
        assert requests.link(KEY, "a/", "a1", ()).parse(answer) == Link("a1", "a/?me=0")

    def test_presence(self) -> None:
        who = [{"id": "X", "username": "ann"}, {"id": "Y"}]
        answer = {"time": 1600000000, "event": "status", "channel": "a/", "who": who}
        parsed = requests.presence(KEY, "a/", status=True, changes=None).parse(answer)
        assert parsed == PresenceStatus(
            datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC),
            "status",
            "a/",
            (Member("X", "ann"), Member("Y", None)),
        )

    def test_presence_without_a_status(self) -> None:
        # The broker's reply then contains nothing: no time, no channel and no members.
        request = requests.presence(KEY, "a/", status=False, changes=False)
        assert request.parse({"time": 0, "event": "", "channel": "", "who": None}) is None

    @pytest.mark.parametrize("event", ["subscribe", "unsubscribe"])
    def test_presence_event(self, event: str) -> None:
        answer = {"time": 1600000000, "event": event, "channel": "a/b/", "who": {"id": "X"}}
        parsed = parse_presence_event(answer)
        assert (parsed.event, parsed.channel, parsed.who) == (event, "a/b/", (Member("X"),))
        assert parsed.time.timestamp() == 1600000000
        assert parsed.time.tzinfo is UTC
        assert not isinstance(parsed, PresenceStatus)

    def test_history_is_sorted_by_time(self) -> None:
        # In the broker's order: by second, and the newest first within a second.
        sent = [("c", 1600000000, 3), ("b", 1600000000, 2), ("a", 1600000000, 1)]
        sent += [("e", 1600000001, 5), ("d", 1600000001, 4)]
        answer = {
            "messages": [
                {"id": encode_id(when, count), "channel": "a/", "payload": encode_base64(text)}
                for text, when, count in sent
            ]
        }
        found = requests.history(KEY, "a/", last=10).parse(answer)
        assert [message.as_string() for message in found] == ["a", "b", "c", "d", "e"]
        assert found[0].time == datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)
        assert found[4].time == datetime(2020, 9, 13, 12, 26, 41, tzinfo=UTC)
        assert found[0].id == base64.b64decode(encode_id(1600000000, 1))
        assert found[0].channel == "a/"

    @given(st.integers(1514764800, 1514764800 + 0xFFFFFFFF))
    def test_time_of_an_id(self, seconds: int) -> None:
        stored = {"id": encode_id(seconds), "channel": "a/", "payload": ""}
        (found,) = requests.history(KEY, "a/", last=1).parse({"messages": [stored]})
        assert found.time.timestamp() == seconds

    @pytest.mark.parametrize("rest", [{}, {"payload": None}, {"payload": ""}])
    def test_missing_payload_is_empty(self, rest: dict[str, object]) -> None:
        stored = {"id": encode_id(1600000000), "channel": "a/", **rest}
        (found,) = requests.history(KEY, "a/", last=1).parse({"messages": [stored]})
        assert found.binary == b""

    def test_empty_history(self) -> None:
        assert requests.history(KEY, "a/", last=1).parse({"messages": []}) == []


def stored(**fields: object) -> dict[str, object]:
    return {"messages": [{"id": encode_id(1600000000), "channel": "a/", "payload": ""} | fields]}


def status(**fields: object) -> dict[str, object]:
    return {"time": 1600000000, "channel": "a/", "who": []} | fields


class TestInvalidReplies:
    @pytest.mark.parametrize(
        ("binary", "pattern"),
        [
            (b"", "JSON"),
            (b"{", "JSON"),
            (b'{"a":"\xff"}', "JSON"),
            (b"[" * 65536, "JSON"),
            (b'{"a":' * 13000, "JSON"),
            (b'{"a":' + b"1" * 5000 + b"}", "JSON"),
            (b"[]", "JSON object"),
            (b"null", "JSON object"),
            (b"5", "JSON object"),
            (b'"text"', "JSON object"),
        ],
    )
    def test_payload_that_is_not_a_json_object_raises(self, binary: bytes, pattern: str) -> None:
        with pytest.raises(InvalidReplyError, match=pattern):
            parse_object(binary)

    def test_json_object_is_parsed(self) -> None:
        assert parse_object(b'{"req":1}') == {"req": 1}

    @pytest.mark.parametrize(
        ("request_", "answer", "pattern"),
        [
            (REQUESTS[0], {"channel": "a/"}, "key"),
            (REQUESTS[0], {"key": 5, "channel": "a/"}, "key"),
            (REQUESTS[0], {"key": KEY}, "channel"),
            (REQUESTS[0], {"key": KEY, "channel": ["a/"]}, "channel"),
            (REQUESTS[1], {}, "id"),
            (REQUESTS[1], {"id": None}, "id"),
            (REQUESTS[1], {"id": "X", "links": ["a1"]}, "links"),
            (REQUESTS[1], {"id": "X", "links": {"a1": 5}}, "links"),
            (REQUESTS[1], {"id": "X", "links": None}, "links"),
            (REQUESTS[2], status(who=None), "who"),
            (REQUESTS[2], status(who={"id": "X"}), "who"),
            (REQUESTS[2], status(who=["X"]), "member"),
            (REQUESTS[2], status(who=[{}]), "id"),
            (REQUESTS[2], status(who=[{"id": "X", "username": 5}]), "username"),
            (REQUESTS[2], status(time="now"), "time"),
            (REQUESTS[2], status(time=True), "time"),
            (REQUESTS[2], status(time=1.5), "time"),
            (REQUESTS[2], status(time=10**30), "time"),
            (REQUESTS[2], status(time=10**15), "time"),
            (REQUESTS[2], status(channel=None), "channel"),
            (REQUESTS[3], {}, "messages"),
            (REQUESTS[3], {"messages": {}}, "messages"),
            (REQUESTS[3], {"messages": ["x"]}, "stored message"),
            (REQUESTS[3], stored(id=5), "id"),
            (REQUESTS[3], stored(id="!"), "base64"),
            (REQUESTS[3], stored(id="ü"), "base64"),
            (REQUESTS[3], stored(id="AAAA"), "too short"),
            (REQUESTS[3], stored(payload="!"), "base64"),
            (REQUESTS[3], stored(payload=5), "base64"),
            (REQUESTS[3], stored(payload={"a": 1}), "base64"),
            (REQUESTS[3], stored(channel=5), "channel"),
            (REQUESTS[4], {}, "banned"),
            (REQUESTS[4], {"banned": 1}, "banned"),
            (REQUESTS[4], {"banned": "true"}, "banned"),
            (REQUESTS[5], {"channel": "a/"}, "name"),
            (REQUESTS[5], {"name": "a1"}, "channel"),
            (REQUESTS[5], {"name": 1, "channel": "a/"}, "name"),
        ],
    )
    def test_invalid_field_raises(
        self, request_: Request[Any], answer: dict[str, object], pattern: str
    ) -> None:
        with pytest.raises(InvalidReplyError, match=pattern):
            request_.parse(answer)

    @pytest.mark.parametrize(
        ("answer", "pattern"),
        [
            ({}, "subscribe"),
            (status(event="status", who={"id": "X"}), "subscribe"),
            (status(event=["subscribe"], who={"id": "X"}), "subscribe"),
            (status(event="subscribe", who=[{"id": "X"}]), "member"),
            (status(event="subscribe"), "member"),
            (status(event="subscribe", who={"id": "X"}, time=None), "time"),
            (status(event="subscribe", who={"id": "X"}, channel=1), "channel"),
        ],
    )
    def test_invalid_presence_event_raises(self, answer: dict[str, object], pattern: str) -> None:
        with pytest.raises(InvalidReplyError, match=pattern):
            parse_presence_event(answer)

    @given(answers)
    def test_any_object_gives_a_value_or_invalid_reply_error(self, answer: dict[str, Any]) -> None:
        for parse in (
            *(request.parse for request in REQUESTS),
            parse_presence_event,
            parse_refusal,
        ):
            with contextlib.suppress(InvalidReplyError):
                parse(answer)


class TestRefusals:
    @pytest.mark.parametrize("answer", [{}, {"status": 200}, {"status": 200, "message": 5}])
    def test_success_is_no_refusal(self, answer: dict[str, object]) -> None:
        assert parse_refusal(answer) is None

    def test_refusal_has_status_and_message(self) -> None:
        assert parse_refusal({"req": 1, "status": 401, "message": "no"}) == (401, "no")

    @pytest.mark.parametrize(
        ("answer", "pattern"),
        [
            ({"status": "401", "message": "no"}, "status"),
            ({"status": 401.0, "message": "no"}, "status"),
            ({"status": True, "message": "no"}, "status"),
            ({"status": None}, "status"),
            ({"status": [401]}, "status"),
            ({"status": 401}, "message"),
            ({"status": 401, "message": {}}, "message"),
        ],
    )
    def test_invalid_status_or_message_raises(
        self, answer: dict[str, object], pattern: str
    ) -> None:
        with pytest.raises(InvalidReplyError, match=pattern):
            parse_refusal(answer)


class TestValues:
    @pytest.mark.parametrize(
        "value",
        [
            ChannelKey(KEY, "a/"),
            Link("a1", "a/"),
            Me("X"),
            Member("X"),
            PresenceEvent(datetime.now(UTC), "subscribe", "a/", ()),
            PresenceStatus(datetime.now(UTC), "status", "a/", ()),
            REQUESTS[0],
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_values_are_frozen_and_slotted(self, value: Any) -> None:
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, "other")
        assert not hasattr(value, "__dict__")

    def test_repr_of_a_channel_key_hides_the_key(self) -> None:
        assert repr(ChannelKey(KEY, "a/")) == "ChannelKey(key=…, channel='a/')"
