"""Semantics that the recorded conversations do not cover, as in Emitter's source."""

from __future__ import annotations

import base64
import json
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from emitter_anyio.testing._exchange import Exchange
from emitter_anyio.testing._keys import License
from emitter_anyio.testing._packets import MAX_REMAINING_LENGTH, PacketReader, Publish, Will
from emitter_anyio.testing._peer import Kind, Peer
from emitter_anyio.testing._refusals import EXTEND_KEY, RefusedError
from emitter_anyio.testing._requests import handle_publish
from emitter_anyio.testing._storage import RETAINED_SECONDS

UNAUTHORIZED = "the security key provided is not authorized to perform this operation"


class Recorder(Peer):
    """A connection that records its packets."""

    def __init__(self, username: str = "") -> None:
        super().__init__(self._record)
        self.set_identity(username, None)
        self.kinds: list[Kind] = []
        self._reader = PacketReader(2**20)

    def _record(self, kind: Kind, data: bytes) -> None:
        self.kinds.append(kind)
        self._reader.feed(data)

    @property
    def got(self) -> list[tuple[str, bytes]]:
        """The topics and payloads received since this was last read."""
        found = []
        while (packet := self._reader.next_packet()) is not None:
            assert isinstance(packet, Publish)
            assert not packet.qos
            assert not packet.retain
            found.append((packet.topic, packet.payload))
        return found


@pytest.fixture
def exchange() -> Exchange:
    return Exchange(License.new())


@pytest.fixture
def peer() -> Recorder:
    return Recorder()


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits, because the broker has no other nodes."""
    with pytest.raises(StopIteration):
        work.send(None)


def ask(exchange: Exchange, peer: Recorder, topic: str, payload: bytes) -> dict[str, Any]:
    run(handle_publish(exchange, peer, Publish(f"emitter/{topic}/", payload)))
    [(said_topic, said)] = peer.got
    assert said_topic == f"emitter/{topic}/"
    answer: dict[str, Any] = json.loads(said)
    return answer


def request(exchange: Exchange, peer: Recorder, topic: str, **fields: Any) -> dict[str, Any]:
    return ask(exchange, peer, topic, json.dumps(fields).encode())


def refused(status: int, message: str = "") -> dict[str, Any]:
    words = {400: "the request was invalid or cannot be otherwise served", 401: UNAUTHORIZED}
    return {"status": status, "message": message or words[status]}


def publish(
    exchange: Exchange, peer: Recorder, topic: str, payload: bytes = b"x", *, retain: bool = False
) -> None:
    run(handle_publish(exchange, peer, Publish(topic, payload, retain=retain)))


class TestJSON:
    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"{",
            b"[]",
            b'"x"',
            b"7",
            b'{"key": 7}',
            b'{"channel": null, "key": []}',
            b'{"ttl": "7"}',
            b'{"ttl": 7.0}',
            b'{"ttl": true}',
            b'{"ttl": 2147483648}',
            b'{"ttl": NaN}',
            b"[" * 60000,
            b'{"ttl": ' + b"9" * 5000 + b"}",
            b'\xef\xbb\xbf{"key": ""}',
        ],
    )
    def test_malformed_request_is_refused(
        self, exchange: Exchange, peer: Recorder, payload: bytes
    ) -> None:
        assert ask(exchange, peer, "keygen", payload) == refused(400)

    @pytest.mark.parametrize(
        "payload", [b"null", b"{}", b'{"key": null, "ttl": null, "more": [1]}', b'{"key": "\xff"}']
    )
    def test_missing_fields_are_empty(
        self, exchange: Exchange, peer: Recorder, payload: bytes
    ) -> None:
        assert ask(exchange, peer, "keygen", payload) == refused(401)

    def test_names_are_case_insensitive(self, exchange: Exchange, peer: Recorder) -> None:
        secret = exchange.license.secret_key()
        answer = request(exchange, peer, "keygen", KEY=secret, Channel="a/", tYPE="r")
        assert answer["status"] == 200

    def test_lone_surrogate_is_replaced(self, exchange: Exchange, peer: Recorder) -> None:
        secret = exchange.license.secret_key()
        payload = f'{{"key": "{secret}", "channel": "\\ud800/"}}'.encode()
        assert ask(exchange, peer, "keygen", payload)["channel"] == "?/"

    def test_replies_are_encoded_like_go(self, exchange: Exchange, peer: Recorder) -> None:
        fields = {"name": "a", "key": "k", "channel": "a/?me=0&ttl=5"}
        run(
            handle_publish(
                exchange, peer, Publish("emitter/link/", json.dumps(fields).encode(), 1, 3)
            )
        )
        [(_, said)] = peer.got
        assert said == b'{"req":3,"status":200,"name":"a","channel":"a/?me=0\\u0026ttl=5"}'


class TestKeygen:
    def test_secret_key_of_another_contract_is_refused(
        self, exchange: Exchange, peer: Recorder
    ) -> None:
        license = exchange.license
        stranger = license.encrypt(replace(license.blank_key(), contract=license.contract ^ 1))
        answer = request(exchange, peer, "keygen", key=stranger, channel="a/")
        assert answer == refused(404, "the resource requested does not exist")

    def test_secret_key_with_another_signature_is_refused(
        self, exchange: Exchange, peer: Recorder
    ) -> None:
        license = exchange.license
        forged = license.encrypt(replace(license.blank_key(), signature=license.signature ^ 1))
        assert request(exchange, peer, "keygen", key=forged, channel="a/") == refused(401)

    def test_expired_secret_key_is_refused(self, exchange: Exchange, peer: Recorder) -> None:
        old = exchange.license.encrypt(replace(exchange.license.blank_key(), expires=1))
        assert request(exchange, peer, "keygen", key=old, channel="a/") == refused(401)

    def test_key_without_extend_permission_is_refused(
        self, exchange: Exchange, peer: Recorder
    ) -> None:
        key = exchange.keygen("a/", "rwslp", 0)
        assert request(exchange, peer, "keygen", key=key, channel="a/") == refused(401)

    def test_key_expires_after_its_ttl(self, exchange: Exchange, peer: Recorder) -> None:
        fields = {"key": exchange.license.secret_key(), "channel": "a/", "type": "w"}
        brief = request(exchange, peer, "keygen", **fields, ttl=10)["key"]
        expired = request(exchange, peer, "keygen", **fields, ttl=-10)["key"]
        publish(exchange, peer, f"{brief}/a/")
        exchange.cluster.advance(11)
        for key in (brief, expired):
            with pytest.raises(RefusedError, match=UNAUTHORIZED):
                publish(exchange, peer, f"{key}/a/")


@pytest.mark.parametrize("key", ["short", "A" * 32, "é", "k" * 1000])
def test_malformed_key_is_refused(exchange: Exchange, peer: Recorder, key: str) -> None:
    with pytest.raises(RefusedError, match=UNAUTHORIZED):
        publish(exchange, peer, f"{key}/a/")


class TestExtend:
    @pytest.fixture
    def key(self, exchange: Exchange) -> str:
        return exchange.keygen("a/#/", "rwe", 0)

    def test_private_channel_with_subchannels(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        answer = request(exchange, peer, "keygen", key=key, channel="a/#/", type="rwsle")
        assert answer["channel"] == f"a/{peer.id}/#/"
        made = exchange.license.decrypt(answer["key"])
        parent = exchange.license.decrypt(key)
        assert made.salt == parent.salt
        assert [made.allows(1 << bit) for bit in range(8)] == [False, True, True] + [False] * 5
        publish(exchange, peer, f"{answer['key']}/a/{peer.id}/deep/")
        with pytest.raises(RefusedError, match=UNAUTHORIZED):
            publish(exchange, peer, f"{answer['key']}/a/")

    @pytest.mark.parametrize(
        ("channel", "answer"),
        [
            ("", refused(400)),
            ("a", refused(400)),
            ("a/+/", refused(400)),
            ("b/", refused(401)),
            ("a/" * 23, refused(500, "channel can not have more than 23 parts")),
        ],
    )
    def test_invalid_private_channel_is_refused(
        self, exchange: Exchange, peer: Recorder, key: str, channel: str, answer: dict[str, Any]
    ) -> None:
        assert request(exchange, peer, "keygen", key=key, channel=channel, type="r") == answer

    def test_banned_extend_key_is_refused(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        exchange.ban(key)
        assert request(exchange, peer, "keygen", key=key, channel="a/") == refused(401)

    def test_extend_key_does_not_permit_presence(self, exchange: Exchange, peer: Recorder) -> None:
        key = exchange.keygen("a/", "pe", 0)
        assert request(exchange, peer, "presence", key=key, channel="a/") == refused(401)

    def test_extend_key_does_not_permit_unsubscribe(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        with pytest.raises(RefusedError, match=EXTEND_KEY):
            exchange.unsubscribe(peer, f"{key}/a/")


class TestKeyban:
    def test_unban_takes_effect_immediately(self, exchange: Exchange, peer: Recorder) -> None:
        fields = {"secret": exchange.license.secret_key(), "target": exchange.keygen("a/", "w", 0)}
        for _ in range(2):
            answer = request(exchange, peer, "keyban", **fields, banned=True)
            assert answer == {"status": 200, "banned": True}
            with pytest.raises(RefusedError, match=UNAUTHORIZED):
                publish(exchange, peer, f"{fields['target']}/a/")
        for _ in range(2):
            answer = request(exchange, peer, "keyban", **fields)
            assert answer == {"status": 200, "banned": False}
            publish(exchange, peer, f"{fields['target']}/a/")

    def test_invalid_secret_or_target_is_refused(self, exchange: Exchange, peer: Recorder) -> None:
        license, target = exchange.license, exchange.keygen("a/", "w", 0)
        blank = license.blank_key()
        for secret in (
            "short",
            target,
            license.encrypt(replace(blank, expires=1)),
            license.encrypt(replace(blank, signature=license.signature ^ 1)),
        ):
            answer = request(exchange, peer, "keyban", secret=secret, target=target, banned=True)
            assert answer == refused(401)
        stranger = license.encrypt(replace(blank, contract=license.contract ^ 1))
        for bad in ("short", stranger):
            secret = license.secret_key()
            answer = request(exchange, peer, "keyban", secret=secret, target=bad, banned=True)
            assert answer == refused(401)
        assert exchange.banned == set()


class TestLinks:
    def test_link_to_a_request_topic(self, exchange: Exchange, peer: Recorder) -> None:
        request(exchange, peer, "link", name="m", key="emitter", channel="me/")
        publish(exchange, peer, "m")
        [(topic, said)] = peer.got
        assert topic == "emitter/me/"
        assert json.loads(said) == {"status": 200, "id": peer.id, "links": {"m": "me/"}}

    def test_link_to_a_wildcard_is_created_but_refused_on_use(
        self, exchange: Exchange, peer: Recorder
    ) -> None:
        key = exchange.keygen("a/#/", "rw", 0)
        fields = {"name": "w", "key": key, "channel": "a/+/", "subscribe": True}
        assert request(exchange, peer, "link", **fields)["status"] == 200
        assert peer.subscribed == {("a", "+"): "a/+/"}
        with pytest.raises(RefusedError) as info:
            publish(exchange, peer, "w")
        assert info.value.status == 403

    def test_me_lists_links_in_order(self, exchange: Exchange, peer: Recorder) -> None:
        for name in ("b", "a0", "a"):
            request(exchange, peer, "link", name=name, key="k", channel=f"{name}/?ttl=5")
        request(exchange, peer, "link", name="b", key="k", channel="c/")
        answer = request(exchange, peer, "me")
        assert list(answer["links"].items()) == [
            ("a", "a/?ttl=5"),
            ("a0", "a0/?ttl=5"),
            ("b", "c/"),
        ]

    def test_subscribing_link_does_not_replay(self, exchange: Exchange, peer: Recorder) -> None:
        key = exchange.keygen("a/", "rwsl", 0)
        publish(exchange, peer, f"{key}/a/?ttl=60")
        fields = {"name": "a", "key": key, "channel": "a/?last=5", "subscribe": True}
        assert request(exchange, peer, "link", **fields)["channel"] == "a/?last=5"

    @pytest.mark.parametrize("name", ["", "abc", "-", "é", "a\n"])
    def test_invalid_name_is_refused(self, exchange: Exchange, peer: Recorder, name: str) -> None:
        answer = request(exchange, peer, "link", name=name, key="k", channel="a/")
        assert "alphanumeric string of 1 or 2" in answer["message"]

    @pytest.mark.parametrize(("key", "channel"), [("", "a/"), ("k", "a"), ("k", "a b/"), ("k", "")])
    def test_invalid_channel_is_refused(
        self, exchange: Exchange, peer: Recorder, key: str, channel: str
    ) -> None:
        answer = request(exchange, peer, "link", name="a", key=key, channel=channel)
        assert answer == refused(400)
        assert peer.links == {}

    @pytest.mark.parametrize("topic", ["", "a", "zz"])
    def test_unknown_link_is_refused(self, exchange: Exchange, peer: Recorder, topic: str) -> None:
        with pytest.raises(RefusedError) as info:
            publish(exchange, peer, topic)
        assert info.value.status == 400


class TestPresence:
    @pytest.fixture
    def key(self, exchange: Exchange) -> str:
        return exchange.keygen("#/", "rwslp", 0)

    def test_status_lists_the_receivers_of_a_message(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        there = [Recorder("u1"), Recorder(), Recorder()]
        for each, channel in zip(there, ("a/", "a/b/", "+/b/"), strict=True):
            run(exchange.subscribe(each, f"{key}/{channel}"))
        answer = request(exchange, peer, "presence", key=key, channel="a/b")
        assert answer["channel"] == "a/b/"
        assert sorted(answer["who"], key=str) == sorted((each.who() for each in there), key=str)
        assert there[0].who() == {"id": there[0].id, "username": "u1"}
        assert there[1].who() == {"id": there[1].id}

    def test_feed_includes_subchannels_and_the_client_itself(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        for _ in range(2):
            request(exchange, peer, "presence", key=key, channel="a", changes=True, status=False)
        run(exchange.subscribe(peer, f"{key}/a/b/?last=0"))
        run(exchange.subscribe(peer, f"{key}/a/b/?last=0"))
        run(exchange.subscribe(peer, f"{key}/b/?last=0"))
        exchange.unsubscribe(peer, f"{key}/a/b/")
        exchange.unsubscribe(peer, f"{key}/a/b/")
        told = [(topic, json.loads(said)) for topic, said in peer.got]
        assert [said.pop("event") for _, said in told] == ["subscribe", "unsubscribe"]
        for topic, said in told:
            assert topic == "emitter/presence/"
            assert said.keys() == {"time", "channel", "who"}
            assert said["channel"] == "a/b/"
            assert said["who"] == {"id": peer.id}

    def test_feed_ends_with_its_connection(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        request(exchange, peer, "presence", key=key, channel="a", changes=True)
        exchange.leave(peer)
        run(exchange.subscribe(Recorder(), f"{key}/a/"))
        assert peer.got == []

    def test_ending_an_unknown_feed_succeeds(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        fields = {"key": key, "channel": "a", "changes": False, "status": False}
        assert request(exchange, peer, "presence", **fields)["status"] == 200

    @pytest.mark.parametrize("fields", [{"channel": "a b"}, {"key": ""}, {"status": 1}])
    def test_invalid_requests_are_refused(
        self, exchange: Exchange, peer: Recorder, key: str, fields: dict[str, Any]
    ) -> None:
        fields = {"key": key, "channel": "a", **fields}
        assert request(exchange, peer, "presence", **fields) == refused(400)


class TestStoring:
    @pytest.fixture
    def key(self, exchange: Exchange) -> str:
        return exchange.keygen("#/", "rwsl", 0)

    def stored(self, exchange: Exchange, peer: Recorder, key: str, options: str = "last=9") -> Any:
        return request(exchange, peer, "history", channel=f"{key}/a/?{options}")["messages"]

    @pytest.mark.parametrize(
        ("options", "retain", "seconds"),
        [
            ("", False, 0),
            ("ttl=0", False, 0),
            ("ttl=5", False, 5),
            ("ttl=5", True, 5),
            ("", True, RETAINED_SECONDS),
            ("ttl=x", True, RETAINED_SECONDS),
            ("ttl=4294967301", False, 5),
        ],
    )
    def test_storage_time(
        self,
        exchange: Exchange,
        peer: Recorder,
        key: str,
        options: str,
        retain: bool,
        seconds: int,
    ) -> None:
        publish(exchange, peer, f"{key}/a/?{options}", retain=retain)
        assert bool(self.stored(exchange, peer, key)) == (seconds > 0)
        exchange.cluster.advance(seconds - 2 if seconds else 0)
        assert bool(self.stored(exchange, peer, key)) == (seconds > 0)
        exchange.cluster.advance(2)
        assert self.stored(exchange, peer, key) == []

    def test_empty_message_is_returned_as_null(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        publish(exchange, peer, f"{key}/a/?ttl=60", b"")
        assert self.stored(exchange, peer, key)[0]["payload"] is None

    def test_pages_return_all_messages(self, exchange: Exchange, peer: Recorder, key: str) -> None:
        for number in range(5):
            publish(exchange, peer, f"{key}/a/?ttl=60", b"%d" % number)
            exchange.cluster.advance(1)
        found: list[bytes] = []
        start = ""
        while True:
            fields = {"channel": f"{key}/a/?last=2", "startFromID": start}
            page = request(exchange, peer, "history", **fields)["messages"]
            if not page:
                break
            found = [base64.b64decode(message["payload"]) for message in page] + found
            start = page[0]["id"]
        assert found == [b"0", b"1", b"2", b"3", b"4"]
        answer = request(exchange, peer, "history", channel=f"{key}/a/", startFromID="!")
        assert answer == refused(400)

    def test_history_returns_one_message_by_default(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        for _ in range(3):
            publish(exchange, peer, f"{key}/a/?ttl=60")
        assert len(self.stored(exchange, peer, key, "")) == 1
        assert self.stored(exchange, peer, key, "last=0") == []
        assert len(self.stored(exchange, peer, key, "last=9223372036854775807")) == 3
        assert len(self.stored(exchange, peer, key, "last=9223372036854775808")) == 1
        assert self.stored(exchange, peer, key, "last=9&until=1600000000") == []

    def test_reply_above_64_kib_is_not_sent(
        self, exchange: Exchange, peer: Recorder, key: str
    ) -> None:
        for _ in range(3):
            publish(exchange, peer, f"{key}/a/?ttl=60", bytes(16000))
        assert len(self.stored(exchange, peer, key)) == 3
        publish(exchange, peer, f"{key}/a/?ttl=60", bytes(16000))
        payload = json.dumps({"channel": f"{key}/a/?last=4"}).encode()
        run(handle_publish(exchange, peer, Publish("emitter/history/", payload)))
        assert peer.got == []


class TestDelivery:
    @pytest.mark.parametrize(("more", "delivered"), [(-5, True), (0, True), (1, False)])
    def test_too_large_message_is_dropped(
        self, exchange: Exchange, peer: Recorder, more: int, delivered: bool
    ) -> None:
        key = exchange.keygen("a/", "rw", 0)
        run(exchange.subscribe(peer, f"{key}/a/"))
        payload = bytes(MAX_REMAINING_LENGTH - 2 - len("a/") + more)
        publish(exchange, peer, f"{key}/a/", payload)
        assert peer.got == ([("a/", payload)] if delivered else [])

    def test_subscribe_repairs_slashes(self, exchange: Exchange, peer: Recorder) -> None:
        key = exchange.keygen("#/", "rw", 0)
        for channel in ("a//b/", "a/#", "c/#?last=5"):
            run(exchange.subscribe(peer, f"{key}/{channel}"))
        assert list(peer.subscribed.values()) == ["a/b/", "a/#/", "c/#/"]
        with pytest.raises(RefusedError):
            run(exchange.subscribe(peer, f"{key}/a///b/"))

    def test_mqtt_matcher(self, peer: Recorder) -> None:
        exchange = Exchange(License.new(), "mqtt")
        key = exchange.keygen("#/", "rw", 0)
        for channel in ("a/", "b/#/"):
            run(exchange.subscribe(peer, f"{key}/{channel}"))
        for channel in ("a/", "a/b/", "b/", "b/c/d/"):
            publish(exchange, peer, f"{key}/{channel}")
        assert [topic for topic, _ in peer.got] == ["a/", "b/c/d/"]

    def test_kinds_of_packets(self, exchange: Exchange, peer: Recorder) -> None:
        key = exchange.keygen("a/", "rwp", 0)
        request(exchange, peer, "presence", key=key, channel="a/", changes=True)
        run(exchange.subscribe(peer, f"{key}/a/"))
        publish(exchange, peer, f"{key}/a/")
        assert peer.kinds == ["reply", "message", "message"]


class TestWills:
    def leave(self, exchange: Exchange, will: Will) -> list[tuple[str, bytes]]:
        watcher, leaver = Recorder(), Recorder()
        run(exchange.subscribe(watcher, f"{exchange.keygen('#/', 'r', 0)}/a/"))
        leaver.set_identity("", will)
        for _ in range(2):  # the second call has no effect
            exchange.leave(leaver)
        return watcher.got

    def test_options_of_the_topic_are_ignored(self, exchange: Exchange, peer: Recorder) -> None:
        key = exchange.keygen("a/", "wsl", 0)
        assert self.leave(exchange, Will(f"{key}/a/?ttl=60", b"gone")) == [("a/", b"gone")]
        assert request(exchange, peer, "history", channel=f"{key}/a/")["messages"] == []

    def test_retain_stores(self, exchange: Exchange, peer: Recorder) -> None:
        key = exchange.keygen("a/", "wsl", 0)
        assert self.leave(exchange, Will(f"{key}/a/", b"gone", retain=True)) == [("a/", b"gone")]
        exchange.cluster.advance(RETAINED_SECONDS - 2)
        assert len(request(exchange, peer, "history", channel=f"{key}/a/")["messages"]) == 1

    def test_retain_stores_nothing_without_the_permission(
        self, exchange: Exchange, peer: Recorder
    ) -> None:
        key = exchange.keygen("a/", "wl", 0)
        assert self.leave(exchange, Will(f"{key}/a/", b"gone", retain=True)) == [("a/", b"gone")]
        assert request(exchange, peer, "history", channel=f"{key}/a/")["messages"] == []

    @pytest.mark.parametrize(
        ("letters", "channel"), [("r", "a/"), ("we", "a/"), ("w", "a/+/"), ("w", "a"), ("w", "b/")]
    )
    def test_refused_will_is_not_published(
        self, exchange: Exchange, letters: str, channel: str
    ) -> None:
        key = exchange.keygen("a/#/", letters, 0)
        assert self.leave(exchange, Will(f"{key}/{channel}", b"gone")) == []
