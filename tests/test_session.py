from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from emitter_anyio._protocol import session as _session
from emitter_anyio._protocol.fast_path import encode_publish
from emitter_anyio._protocol.packets import (
    Answer,
    ConnAck,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Undecodable,
    UnsubAck,
    Unsubscribe,
)
from emitter_anyio._protocol.pending import Emission, Grant, Pending, Refusal, Replay
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values import requests as requests
from emitter_anyio._values.channels import ChannelKey, unshare
from emitter_anyio._values.errors import (
    BadRequestError,
    ConnectionLostError,
    EmitterError,
    RemoteProtocolError,
    RequestError,
    ServerError,
    SubscriptionConflictError,
    UnauthorizedError,
)
from emitter_anyio._values.messages import EmitterMessage
from emitter_anyio._values.requests import Me, Request
from emitter_anyio._values.router import Matcher, overlap

KEY = "k" * 32
OTHER = "o" * 32
BAD = "b" * 32

DEFAULT_REPLAY = Replay()
NO_REPLAY = Replay(last=0)


def answer(operation: str, /, **fields: object) -> EmitterMessage:
    return EmitterMessage(f"emitter/{operation}/", json.dumps(fields).encode())


def refusal(req: int | None = None, status: int = 401, operation: str = "error") -> EmitterMessage:
    fields: dict[str, object] = {} if req is None else {"req": req}
    return answer(operation, **fields, status=status, message="message from the broker")


class SessionHarness:
    """A session without a broker, which records what it sends and emits."""

    def __init__(self, matcher: Matcher = "emitter", *, allow_collisions: bool = False) -> None:
        self.sent: list[Packet] = []
        self.emitted: list[Emission] = []
        self.refusals: list[Refusal] = []
        self.wants = Wants(matcher, allow_collisions=allow_collisions)
        self.written: list[bytes] = []
        self.session = Session(self.wants, self.sent.append, self.written.append, encode_publish)

    def receive(self, *events: Answer) -> list[Emission]:
        """Receive events, and return what they emit to users."""
        emitted = [emission for event in events for emission in self.session.receive(event)]
        self.refusals += [value for event, value in emitted if event == "refused"]
        emitted = [emission for emission in emitted if emission.event != "refused"]
        self.emitted += emitted
        return emitted

    def publish(self, key: str = KEY, channel: str = "a/") -> Pending[None]:
        topic = f"{key}/{channel}".encode()
        pending = self.session.publish_qos_1(topic, b"x", key, channel)
        self.sent.append(Publish(topic, b"x", self.session._last_id))
        return pending

    def publish_qos_0(self) -> None:
        self.session.publish(b"k/a/", b"x")

    def release(self, grant: Grant) -> Pending[None] | None:
        return self.session.unsubscribe_unused(self.wants.leave(grant))

    def unwatch(self, channel: str) -> None:
        assert self.wants.unwatch(channel)
        self.session.leave_feed()

    def lose(self) -> None:
        """Lose the connection, and start the session of the next one."""
        self.wants.keep_accepted()
        self.session.lost(lambda: ConnectionLostError("gone"))
        self.session = Session(self.wants, self.sent.append, self.written.append, encode_publish)

    def subscribe(
        self, key: str = KEY, channel: str = "a/", replay: Replay = DEFAULT_REPLAY
    ) -> Grant:
        return self.session.subscribe(key, key, channel, replay)[0]

    def subscribe_accepted(self, key: str = KEY, channel: str = "a/") -> Grant:
        grant = self.subscribe(key, channel)
        self.receive(SubAck(self.last_id, (0,)))
        grant.asked.result()
        return grant

    @property
    def last_id(self) -> int:
        packet = self.sent[-1]
        assert isinstance(packet, Publish | Subscribe | Unsubscribe)
        assert packet.packet_id is not None
        return packet.packet_id


@pytest.fixture
def harness() -> SessionHarness:
    return SessionHarness()


class TestPacketIds:
    def test_packet_ids_start_at_1(self, harness: SessionHarness) -> None:
        harness.publish()
        harness.subscribe()
        harness.session.unsubscribe(KEY, "b/")
        harness.session.request(requests.me())
        ids = [packet.packet_id for packet in harness.sent if not isinstance(packet, PingReq)]  # type: ignore[union-attr]  # no DISCONNECT among them
        assert ids == [1, 2, 3, 4]

    def test_qos_0_publish_and_ping_have_no_packet_id(self, harness: SessionHarness) -> None:
        harness.publish_qos_0()
        harness.session.ping()
        assert harness.sent == [PingReq()]

    def test_packet_ids_wrap_around_and_skip_pending_ones(self, harness: SessionHarness) -> None:
        harness.publish()
        harness.session._last_id = 65534
        harness.publish()
        assert harness.last_id == 65535
        harness.publish()
        assert harness.last_id == 2

    def test_packet_id_is_in_use_until_acknowledged(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.me())
        harness.receive(answer("me", req=1, status=200, id="X"))
        assert pending.done
        harness.session._last_id = 0
        harness.publish()
        assert harness.last_id == 2
        harness.receive(PubAck(1))
        harness.session._last_id = 0
        harness.publish()
        assert harness.last_id == 1

    def test_packet_id_of_a_cancelled_call_stays_in_use(self, harness: SessionHarness) -> None:
        harness.publish().awaited = False
        harness.session._last_id = 0
        harness.publish()
        assert harness.last_id == 2

    def test_some_packet_ids_are_reserved_for_packets_that_cannot_wait(
        self, harness: SessionHarness
    ) -> None:
        for _ in range(65535 - 4096):
            assert not harness.session.full
            harness.publish()
        assert harness.session.full
        called = []
        harness.session.call_when_free(lambda: called.append("first"))
        grant = harness.subscribe()
        harness.release(grant)
        assert called == []
        harness.receive(PubAck(100))
        assert called == ["first"]
        harness.receive(PubAck(101))
        assert called == ["first"], "the callback was called twice"

    def test_lost_connection_frees_packet_ids(self, harness: SessionHarness) -> None:
        for _ in range(10):
            harness.publish()
        called = []
        harness.session.call_when_free(lambda: called.append("freed"))
        harness.lose()
        assert called == ["freed"]
        assert harness.session.pending == 0

    def test_running_out_of_packet_ids_raises(
        self, harness: SessionHarness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_session, "_MAX_PACKET_IDS", 3)
        for _ in range(3):
            harness.publish()
        with pytest.raises(RuntimeError, match="packet id"):
            harness.publish()
        harness.receive(PubAck(2))
        harness.publish()
        assert harness.last_id == 2

    def test_uncertain_while_publishes_are_unacknowledged(self, harness: SessionHarness) -> None:
        assert not harness.session.uncertain
        harness.session.request(requests.me())
        assert not harness.session.uncertain
        harness.publish()
        assert harness.session.uncertain
        harness.receive(PubAck(2))
        assert not harness.session.uncertain
        harness.publish_qos_0()
        assert harness.session.uncertain
        harness.session.ping()
        harness.receive(PingResp())
        assert not harness.session.uncertain

    def test_pending_counts_outstanding_packets(self, harness: SessionHarness) -> None:
        harness.publish()
        harness.session.ping()
        assert harness.session.pending == 2
        harness.receive(PingResp())
        assert harness.session.pending == 1
        harness.receive(PubAck(1))
        assert harness.session.pending == 0


class TestPublishing:
    def test_accepted_publish(self, harness: SessionHarness) -> None:
        pending = harness.session.publish_qos_1(b"k/a/", b"x", KEY, "a/")
        assert not pending.done
        assert harness.receive(PubAck(1)) == []
        assert pending.done
        pending.result()

    def test_refused_publish(self, harness: SessionHarness) -> None:
        pending = harness.publish()
        assert harness.receive(refusal(1)) == []
        assert not pending.done, "done before the acknowledgement"
        assert harness.receive(PubAck(1)) == []
        with pytest.raises(UnauthorizedError) as caught:
            pending.result()
        error = caught.value
        assert (error.operation, error.channel, error.status) == ("publish", "a/", 401)
        assert error.message == "message from the broker"
        assert error.hint is not None
        assert KEY not in str(error)
        assert harness.refusals == [Refusal("publish", "a/", 401)]

    def test_each_result_call_raises_its_own_error(self, harness: SessionHarness) -> None:
        pending = harness.publish()
        harness.receive(refusal(1), PubAck(1))
        caught = []
        for _ in range(2):
            with pytest.raises(UnauthorizedError) as info:
                pending.result()
            caught.append(info.value)
        assert caught[0] is not caught[1]

    def test_first_refusal_is_raised(self, harness: SessionHarness) -> None:
        pending = harness.publish()
        harness.receive(refusal(1, 400), refusal(1, 401), PubAck(1))
        with pytest.raises(BadRequestError):
            pending.result()

    def test_error_with_status_200_is_not_a_refusal(self, harness: SessionHarness) -> None:
        pending = harness.publish()
        harness.receive(refusal(1, 200), PubAck(1))
        pending.result()

    def test_refusal_without_a_waiting_caller_emits_error(self, harness: SessionHarness) -> None:
        harness.publish().awaited = False
        (emission,) = harness.receive(refusal(1), PubAck(1))
        assert emission.event == "error"
        assert isinstance(emission.value, UnauthorizedError)

    def test_callbacks_are_called_when_done(self, harness: SessionHarness) -> None:
        pending = harness.publish()
        called = []
        pending.call_when_done(lambda: called.append("one"))
        pending.call_when_done(lambda: called.append("two"))
        assert called == []
        harness.receive(PubAck(1))
        assert called == ["one", "two"]

    def test_first_outcome_is_final(self, harness: SessionHarness) -> None:
        pending: Pending[int] = Pending("x")
        pending.succeed(1)
        pending.fail(ZeroDivisionError)
        pending.succeed(2)
        assert pending.result() == 1
        failed: Pending[int] = Pending("x")
        failed.fail(ZeroDivisionError)
        failed.succeed(1)
        failed.fail(ValueError)
        with pytest.raises(ZeroDivisionError):
            failed.result()


class TestRequests:
    def test_reply_completes_the_request(self, harness: SessionHarness) -> None:
        request = requests.keygen(KEY, "a/", "rw", 0)
        pending = harness.session.request(request)
        assert harness.sent == [Publish(b"emitter/keygen/", request.body, 1)]
        made = ChannelKey(OTHER, "a/")
        emitted = harness.receive(answer("keygen", req=1, status=200, key=OTHER, channel="a/"))
        assert emitted == [Emission("keygen", made)]
        assert pending.result() == made
        assert harness.receive(PubAck(1)) == []
        assert pending.result() == made
        assert harness.session.nonsense == 0

    def test_reply_topic_can_have_options(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.me())
        harness.receive(EmitterMessage("emitter/me/?id=7", b'{"req":1,"id":"X"}'))
        assert pending.result() == Me("X")

    def test_refusal_on_the_topic_of_the_request(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.keygen(KEY, "a/", "rw", 0))
        assert harness.receive(refusal(1, operation="keygen")) == []
        with pytest.raises(UnauthorizedError) as caught:
            pending.result()
        assert (caught.value.operation, caught.value.channel) == ("keygen", "a/")
        harness.receive(PubAck(1))
        assert harness.session.pending == 0

    def test_unawaited_request_emits_only_a_refusal(self, harness: SessionHarness) -> None:
        harness.session.request(requests.me(), awaited=False)
        assert harness.receive(answer("me", req=1, id="X"), PubAck(1)) == []
        harness.session.request(requests.me(), awaited=False)
        (emission,) = harness.receive(refusal(2, 500, "me"), PubAck(2))
        assert isinstance(emission.value, ServerError)

    def test_reply_that_is_not_an_event_is_not_emitted(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.history(KEY, "a/", last=1))
        assert harness.receive(answer("history", req=1, messages=[])) == []
        assert pending.result() == []

    def test_empty_presence_reply_is_not_emitted(self, harness: SessionHarness) -> None:
        request = requests.presence(KEY, "a/", status=False, changes=True)
        pending = harness.session.request(request)
        emitted = harness.receive(
            answer("presence", req=1, status=200, time=0, event="", channel="", who=None)
        )
        assert emitted == []
        assert pending.done
        assert pending.result() is None

    def test_acknowledgement_without_a_reply_raises(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.history(KEY, "a/", last=1000))
        assert harness.receive(PubAck(1)) == []
        with pytest.raises(RequestError, match=r"history 'a/'.*64 KiB") as caught:
            pending.result()
        assert caught.value.status is None

    def test_invalid_reply_raises_after_the_acknowledgement(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.me())
        (emission,) = harness.receive(answer("me", req=1, id=5))
        assert isinstance(emission.value, RemoteProtocolError)
        assert not pending.done, "done before a valid reply could arrive"
        harness.receive(PubAck(1))
        with pytest.raises(RemoteProtocolError, match=r"me: .*id"):
            pending.result()

    def test_valid_reply_after_an_invalid_one_counts(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.me())
        harness.receive(answer("me", req=1, id=5), answer("me", req=1, id="X"), PubAck(1))
        assert pending.result() == Me("X")
        assert harness.session.nonsense == 1

    def test_first_reply_counts(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.me())
        emitted = harness.receive(answer("me", req=1, id="X"), answer("me", req=1, id="Y"))
        assert len(emitted) == 1
        assert pending.result() == Me("X")

    def test_replies_can_arrive_in_any_order(self, harness: SessionHarness) -> None:
        first = harness.session.request(requests.me())
        second = harness.session.request(requests.me())
        harness.receive(answer("me", req=2, id="Y"), answer("me", req=1, id="X"))
        assert (first.result(), second.result()) == (Me("X"), Me("Y"))

    def test_me_sets_the_connection_id(self, harness: SessionHarness) -> None:
        assert harness.session.connection_id is None
        harness.session.request(requests.me())
        harness.receive(answer("me", req=1, id="X"))
        assert harness.session.connection_id == "X"
        harness.lose()
        assert harness.session.connection_id is None


class TestFlush:
    def test_flush_without_a_refusal(self, harness: SessionHarness) -> None:
        pending = harness.session.ping()
        assert harness.receive(PingResp()) == []
        assert pending.result() is None

    def test_flush_returns_the_first_refusal_of_a_qos_0_publish(
        self, harness: SessionHarness
    ) -> None:
        for _ in range(3):
            harness.publish_qos_0()
        pending = harness.session.ping()
        emitted = harness.receive(refusal(status=400), refusal(status=401), PingResp())
        assert [type(emission.value) for emission in emitted] == [
            BadRequestError,
            UnauthorizedError,
        ]
        error = pending.result()
        assert isinstance(error, BadRequestError)
        assert error.operation == "publish"
        assert "flush()" in str(error)
        assert "qos=1" in str(error)

    def test_each_refusal_is_returned_by_one_flush(self, harness: SessionHarness) -> None:
        harness.publish_qos_0()
        first = harness.session.ping()
        second = harness.session.ping()
        harness.receive(refusal(), PingResp(), PingResp())
        assert isinstance(first.result(), UnauthorizedError)
        assert second.result() is None

    def test_keepalive_ping_leaves_the_refusal_for_the_next_flush(
        self, harness: SessionHarness
    ) -> None:
        harness.publish_qos_0()
        harness.session.ping(awaited=False)
        harness.receive(refusal(), PingResp())
        pending = harness.session.ping()
        harness.receive(PingResp())
        assert isinstance(pending.result(), UnauthorizedError)

    def test_refusal_after_a_later_acknowledgement_is_nonsense(
        self, harness: SessionHarness
    ) -> None:
        for barrier in ("ping", "publish", "request"):
            harness.publish_qos_0()
            if barrier == "ping":
                harness.session.ping()
                harness.receive(PingResp())
            else:
                harness.publish() if barrier == "publish" else harness.session.request(
                    requests.me()
                )
                harness.receive(PubAck(harness.last_id))
            harness.emitted.clear()
            before = harness.session.nonsense
            harness.receive(refusal())
            assert harness.session.nonsense == before + 1
            assert not any(
                isinstance(emission.value, UnauthorizedError) for emission in harness.emitted
            )

    def test_earlier_packet_does_not_settle_a_later_publish(self, harness: SessionHarness) -> None:
        harness.publish()
        harness.publish_qos_0()
        (emission,) = harness.receive(PubAck(1), refusal())
        assert isinstance(emission.value, UnauthorizedError)

    def test_flush_ignores_an_error_with_status_200(self, harness: SessionHarness) -> None:
        harness.publish_qos_0()
        pending = harness.session.ping()
        harness.receive(refusal(status=200), PingResp())
        assert pending.result() is None
        assert harness.session.nonsense == 1


class TestSubscriptions:
    @pytest.mark.parametrize(
        ("replay", "options"),
        [
            (DEFAULT_REPLAY, ""),
            (NO_REPLAY, "?last=0"),
            (Replay(last=5), "?last=5"),
            (Replay(5, 1600000000, 1700000000), "?last=5&from=1600000000&until=1700000000"),
        ],
    )
    def test_subscribe_packet_has_the_replay_options(
        self, harness: SessionHarness, replay: Replay, options: str
    ) -> None:
        grant, by_history = harness.session.subscribe(KEY, KEY, "a/", replay)
        assert harness.sent == [Subscribe(1, f"{KEY}/a/{options}")]
        assert not by_history
        assert not grant.asked.done
        assert harness.receive(SubAck(1, (0,))) == []
        grant.asked.result()
        assert harness.wants.is_subscribed("a/")
        assert not harness.wants.is_subscribed("b/")

    def test_one_subscribe_packet_per_key_and_channel(self, harness: SessionHarness) -> None:
        first = harness.subscribe()
        assert harness.subscribe() is first
        other = harness.subscribe(OTHER)
        assert other is not first
        assert harness.subscribe(OTHER) is other
        assert harness.sent == [
            Subscribe(1, f"{KEY}/a/"),
            Subscribe(2, f"{OTHER}/a/?last=0"),
        ]

    def test_replay_of_an_overlapping_subscription_comes_from_history(
        self, harness: SessionHarness
    ) -> None:
        assert harness.session.subscribe(KEY, KEY, "a/", DEFAULT_REPLAY)[1] is False
        assert harness.session.subscribe(KEY, KEY, "a/", DEFAULT_REPLAY)[1] is True
        assert harness.session.subscribe(KEY, KEY, "a/", NO_REPLAY)[1] is False
        assert harness.session.subscribe(KEY, KEY, "a/b/", Replay(5))[1] is True
        assert harness.session.subscribe(KEY, KEY, "+/b/", DEFAULT_REPLAY)[1] is True
        assert harness.session.subscribe(KEY, KEY, "b/", DEFAULT_REPLAY)[1] is True, (
            "it overlaps +/b/"
        )
        assert harness.session.subscribe(KEY, KEY, "c/d/", DEFAULT_REPLAY)[1] is False

    def test_fewer_channels_overlap_with_the_mqtt_matcher(self) -> None:
        harness = SessionHarness("mqtt")
        harness.subscribe()
        assert harness.session.subscribe(KEY, KEY, "a/b/", DEFAULT_REPLAY)[1] is False
        assert harness.session.subscribe(KEY, KEY, "a/#/", DEFAULT_REPLAY)[1] is True
        assert harness.wants.overlaps("a/b/c/")
        assert not harness.wants.overlaps("c/")

    def test_unsubscribe_after_the_last_user_left(self, harness: SessionHarness) -> None:
        grant = harness.subscribe_accepted()
        harness.subscribe()
        harness.sent.clear()
        assert harness.release(grant) is None
        pending = harness.release(grant)
        assert harness.sent == [Unsubscribe(2, f"{KEY}/a/")]
        assert pending is not None
        assert not pending.awaited
        assert harness.receive(UnsubAck(2)) == []
        pending.result()
        assert not harness.wants.is_subscribed("a/")

    def test_unsubscribe_after_the_last_user_with_any_key_left(
        self, harness: SessionHarness
    ) -> None:
        first, second = harness.subscribe_accepted(), harness.subscribe_accepted(OTHER)
        harness.sent.clear()
        assert harness.release(first) is None
        assert harness.wants.is_subscribed("a/")
        assert harness.release(second) is not None
        assert len(harness.sent) == 1

    def test_grant_is_reused_while_the_channel_is_subscribed(self, harness: SessionHarness) -> None:
        first, second = harness.subscribe_accepted(), harness.subscribe_accepted(OTHER)
        harness.release(first)
        harness.sent.clear()
        assert harness.subscribe() is first
        assert harness.sent == []
        harness.release(second)
        assert harness.sent == []

    def test_subscribing_again_after_unsubscribe(self, harness: SessionHarness) -> None:
        first = harness.subscribe_accepted()
        harness.release(first)
        second = harness.subscribe()
        assert second is not first
        assert isinstance(harness.sent[-1], Subscribe)
        harness.receive(UnsubAck(2), SubAck(3, (0,)))
        second.asked.result()
        assert harness.wants.is_subscribed("a/")

    @pytest.mark.parametrize("codes", [(128,), (), (255,), (128, 0)])
    def test_refused_subscription(self, harness: SessionHarness, codes: tuple[int, ...]) -> None:
        grant = harness.subscribe()
        assert harness.receive(refusal(1), SubAck(1, codes)) == []
        with pytest.raises(UnauthorizedError) as caught:
            grant.asked.result()
        assert (caught.value.operation, caught.value.channel) == ("subscribe", "a/")
        assert not harness.wants.is_subscribed("a/")
        assert harness.release(grant) is None
        assert len(harness.sent) == 1, "a refused subscription was unsubscribed"

    def test_suback_failure_without_an_error_message(self, harness: SessionHarness) -> None:
        grant = harness.subscribe()
        harness.receive(SubAck(1, (128,)))
        with pytest.raises(RequestError, match="subscribe 'a/'") as e:
            grant.asked.result()
        assert e.value.status is None

    @pytest.mark.parametrize("code", [0, 1, 2])
    def test_error_message_without_a_failure_code_is_no_refusal(
        self, harness: SessionHarness, code: int
    ) -> None:
        grant = harness.subscribe()
        harness.receive(refusal(1), SubAck(1, (code,)))
        grant.asked.result()

    def test_all_waiting_users_are_refused(self, harness: SessionHarness) -> None:
        first, second = harness.subscribe(), harness.subscribe()
        harness.receive(refusal(1), SubAck(1, (128,)))
        for grant in (first, second):
            with pytest.raises(UnauthorizedError):
                grant.asked.result()
            assert harness.release(grant) is None
        assert len(harness.sent) == 1

    def test_refused_key_does_not_affect_another_key(self, harness: SessionHarness) -> None:
        good = harness.subscribe_accepted()
        bad = harness.subscribe(BAD)
        harness.receive(refusal(2), SubAck(2, (128,)))
        harness.release(bad)
        assert harness.wants.is_subscribed("a/")
        assert len(harness.sent) == 2
        assert harness.release(good) is not None

    def test_unsubscribe_when_the_last_pending_key_is_refused(
        self, harness: SessionHarness
    ) -> None:
        good = harness.subscribe_accepted()
        bad = harness.subscribe(BAD)
        assert harness.release(good) is None, "the other key might still be accepted"
        harness.receive(refusal(2), SubAck(2, (128,)))
        assert harness.sent[2:] == [Unsubscribe(3, f"{KEY}/a/")]
        assert harness.release(bad) is None
        assert not harness.wants.is_subscribed("a/")

    def test_late_refusal_of_a_replaced_subscription(self, harness: SessionHarness) -> None:
        first = harness.subscribe()
        harness.release(first)
        second = harness.subscribe()
        harness.receive(SubAck(1, (128,)), UnsubAck(2))
        assert harness.wants.is_subscribed("a/")
        harness.receive(SubAck(3, (0,)))
        second.asked.result()

    def test_subscription_left_before_it_was_accepted(self, harness: SessionHarness) -> None:
        grant = harness.subscribe()
        grant.asked.awaited = False
        pending = harness.release(grant)
        assert harness.sent[1:] == [Unsubscribe(2, f"{KEY}/a/")]
        assert pending is not None
        assert harness.receive(SubAck(1, (0,)), UnsubAck(2)) == []
        pending.result()

    def test_subscription_left_before_it_was_refused(self, harness: SessionHarness) -> None:
        grant = harness.subscribe(BAD)
        harness.release(grant)
        emitted = harness.receive(refusal(1), SubAck(1, (128,)), refusal(2), UnsubAck(2))
        # subscribe() raises the refusal, so that of the UNSUBSCRIBE is not reported as well.
        assert emitted == []
        with pytest.raises(UnauthorizedError):
            grant.asked.result()

    def test_unsubscribe_uses_a_key_that_might_be_accepted(self, harness: SessionHarness) -> None:
        bad, good = harness.subscribe(BAD), harness.subscribe(KEY)
        harness.release(bad)
        harness.release(good)
        # The broker accepts an UNSUBSCRIBE only with a key that it accepts.
        assert Unsubscribe(harness.last_id, f"{KEY}/a/") in harness.sent

    def test_refused_unsubscribe_raises(self, harness: SessionHarness) -> None:
        pending = harness.session.unsubscribe(KEY, "a/")
        harness.receive(refusal(1), UnsubAck(1))
        with pytest.raises(UnauthorizedError) as caught:
            pending.result()
        assert caught.value.operation == "unsubscribe"

    def test_refused_automatic_unsubscribe_emits_error(self, harness: SessionHarness) -> None:
        harness.release(harness.subscribe_accepted())
        (emission,) = harness.receive(refusal(2), UnsubAck(2))
        assert isinstance(emission.value, UnauthorizedError)


class TestGroups:
    def test_group_is_part_of_the_filter(self, harness: SessionHarness) -> None:
        grant = harness.subscribe_accepted(channel="$share/g/a/")
        assert (grant.filter, grant.channel) == ("$share/g/a/", "a/")
        assert harness.sent == [Subscribe(1, f"{KEY}/$share/g/a/")]
        assert harness.wants.is_subscribed("$share/g/a/")
        assert not harness.wants.is_subscribed("a/")
        harness.release(grant)
        assert harness.sent[1:] == [Unsubscribe(2, f"{KEY}/$share/g/a/")]

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("a/", "$share/g/a/"),
            ("$share/g/a/", "a/"),
            ("$share/g/a/", "$share/h/a/"),
            ("a/", "$share/g/a/b/"),
            ("$share/g/+/b/", "a/b/"),
        ],
    )
    def test_group_conflicts_with_overlapping_subscriptions(
        self, harness: SessionHarness, first: str, second: str
    ) -> None:
        harness.subscribe(channel=first)
        with pytest.raises(SubscriptionConflictError, match="second Emitter"):
            harness.subscribe(channel=second)
        assert len(harness.sent) == 1
        assert not harness.wants.is_subscribed(second)

    def test_group_does_not_conflict_with_other_channels(self, harness: SessionHarness) -> None:
        harness.subscribe(channel="$share/g/a/")
        harness.subscribe(channel="$share/g/a/")
        harness.subscribe(OTHER, "$share/g/a/")
        harness.subscribe(channel="$share/h/b/")
        harness.subscribe(channel="c/")
        assert len(harness.sent) == 4

    def test_group_replay(self, harness: SessionHarness) -> None:
        grant = harness.subscribe(channel="$share/g/a/")
        assert harness.session.replaying("a/b/") is grant.asked
        assert harness.session.in_replay(EmitterMessage("a/b/", b"x"))

    def test_wildcard_group_receives_messages_published_below_emitter(
        self, harness: SessionHarness
    ) -> None:
        harness.subscribe_accepted(channel="$share/g/+/")
        forged = answer("me", req=77, id="forged")
        assert harness.receive(forged) == [Emission("message", forged)]


class TestCollisions:
    def test_subscriptions_with_equal_hashes_conflict(self, harness: SessionHarness) -> None:
        harness.subscribe(channel="p/q/")
        with pytest.raises(SubscriptionConflictError, match=r"'q/p/'.*'p/q/'.*second Emitter"):
            harness.subscribe(channel="q/p/")
        assert len(harness.sent) == 1
        assert not harness.wants.is_subscribed("q/p/")

    def test_presence_feeds_with_equal_hashes_conflict(self, harness: SessionHarness) -> None:
        harness.wants.watch("d/d/")
        with pytest.raises(SubscriptionConflictError, match=r"presence.*'g/g/'"):
            harness.wants.watch("g/g/")
        assert not harness.wants.is_watched("g/g/")

    def test_subscription_and_feed_do_not_conflict(self, harness: SessionHarness) -> None:
        harness.subscribe(channel="p/q/")
        harness.wants.watch("q/p/")
        assert harness.wants.is_watched("q/p/")

    def test_channel_does_not_conflict_with_itself(self, harness: SessionHarness) -> None:
        harness.subscribe(channel="p/q/")
        harness.subscribe(channel="p/q/")
        harness.subscribe(OTHER, "p/q/")
        harness.subscribe(channel="p/q/r/")

    def test_conflict_ends_with_the_first_subscription(self, harness: SessionHarness) -> None:
        harness.release(harness.subscribe_accepted(channel="p/q/"))
        harness.subscribe(channel="q/p/")
        assert harness.sent[-1] == Subscribe(3, f"{KEY}/q/p/")

    def test_collisions_can_be_allowed(self) -> None:
        harness = SessionHarness(allow_collisions=True)
        harness.subscribe(channel="p/q/")
        harness.subscribe(channel="q/p/")
        harness.wants.watch("d/d/")
        harness.wants.watch("g/g/")
        assert len(harness.sent) == 2

    def test_conflict_error_does_not_show_keys(self, harness: SessionHarness) -> None:
        harness.subscribe(channel="p/q/")
        with pytest.raises(SubscriptionConflictError) as caught:
            harness.subscribe(OTHER, "q/p/")
        assert KEY not in str(caught.value)
        assert OTHER not in str(caught.value)


class TestReplays:
    def test_replay_lasts_until_the_acknowledgement(self, harness: SessionHarness) -> None:
        grant = harness.subscribe()
        assert harness.session.replays
        assert harness.session.replaying("a/") is grant.asked
        assert harness.session.replaying("a/b/") is grant.asked
        assert harness.session.replaying("b/") is None
        harness.receive(SubAck(1, (0,)))
        assert not harness.session.replays
        assert harness.session.replaying("a/") is None

    @pytest.mark.parametrize("codes", [(128,), ()])
    def test_replay_ends_with_a_refusal(
        self, harness: SessionHarness, codes: tuple[int, ...]
    ) -> None:
        harness.subscribe()
        harness.receive(SubAck(1, codes))
        assert not harness.session.replays

    def test_replay_ends_with_the_connection(self, harness: SessionHarness) -> None:
        harness.subscribe()
        harness.lose()
        assert not harness.session.replays

    def test_no_replay_if_none_is_requested(self, harness: SessionHarness) -> None:
        harness.subscribe(replay=NO_REPLAY)
        harness.subscribe(OTHER)
        assert not harness.session.replays

    def test_replay_is_limited_to_64_kib(self, harness: SessionHarness) -> None:
        harness.subscribe()
        big = EmitterMessage("a/b/", b"x" * 32767)
        assert not harness.session.in_replay(EmitterMessage("b/", b"x"))
        assert harness.session.in_replay(big)
        assert harness.session.in_replay(big)
        assert not harness.session.in_replay(EmitterMessage("a/", b""))

    def test_empty_replayed_messages_count(self, harness: SessionHarness) -> None:
        harness.subscribe()
        empty = EmitterMessage("a/", b"")
        assert sum(harness.session.in_replay(empty) for _ in range(70_000)) == 65536

    @pytest.mark.parametrize(
        ("replay", "is_empty", "is_explicit"),
        [
            (DEFAULT_REPLAY, False, False),
            (NO_REPLAY, True, False),
            (Replay(last=1), False, True),
            (Replay(since=1600000000), False, True),
            (Replay(last=0, since=1600000000), True, False),
        ],
    )
    def test_replay_properties(self, replay: Replay, is_empty: bool, is_explicit: bool) -> None:
        assert (replay.is_empty, replay.is_explicit) == (is_empty, is_explicit)


def change(channel: str = "a/", event: str = "subscribe") -> EmitterMessage:
    return answer("presence", time=1600000000, event=event, channel=channel, who={"id": "X"})


class TestPresence:
    @pytest.mark.parametrize("event", ["subscribe", "unsubscribe"])
    @pytest.mark.parametrize("channel", ["a/", "a/b/c/"])
    def test_change_in_a_watched_channel_is_emitted(
        self, harness: SessionHarness, channel: str, event: str
    ) -> None:
        harness.wants.watch("a/")
        (emission,) = harness.receive(change(channel, event))
        assert emission.event == "presence"
        assert (emission.value.channel, emission.value.event) == (channel, event)

    def test_change_in_an_unwatched_channel_is_nonsense(self, harness: SessionHarness) -> None:
        harness.wants.watch("a/")
        (emission,) = harness.receive(change("b/"))
        assert isinstance(emission.value, RemoteProtocolError)
        assert harness.session.nonsense == 1

    def test_change_with_a_req_is_nonsense(self, harness: SessionHarness) -> None:
        harness.wants.watch("a/")
        forged = json.loads(change().binary) | {"req": 5}
        harness.receive(answer("presence", **forged))
        assert harness.session.nonsense == 1

    def test_change_after_the_feed_was_left_is_ignored(self, harness: SessionHarness) -> None:
        harness.wants.watch("a/")
        harness.unwatch("a/")
        assert harness.receive(change("a/b/")) == []
        assert harness.session.nonsense == 0
        harness.lose()
        harness.receive(change("a/b/"))
        assert harness.session.nonsense == 1, "the new connection cannot have changes in transit"

    def test_feed_ends_with_its_last_user(self, harness: SessionHarness) -> None:
        harness.wants.watch("a/")
        harness.wants.watch("a/")
        assert harness.wants.is_watched("a/")
        assert harness.wants.unwatch("a/") is False
        assert harness.wants.is_watched("a/")
        assert harness.wants.unwatch("a/") is True
        assert not harness.wants.is_watched("a/")
        assert harness.wants.unwatch("a/") is False
        assert harness.sent == []


DEEP = b'{"a":' * 13_000

HOSTILE: list[EmitterMessage] = [
    answer("me", req=2, status=200, id="forged"),
    answer("me", req=0, status=200, id="forged"),
    answer("me", req=-1, status=200, id="forged"),
    answer("me", req=10**30, status=200, id="forged"),
    answer("me", req=65537, status=200, id="forged"),
    answer("me", status=200, id="forged"),
    answer("me", req=None, status=200, id="forged"),
    answer("me", req="1", status=200, id="forged"),
    answer("me", req=True, status=200, id="forged"),
    answer("me", req=1.0, status=200, id="forged"),
    answer("me", req=[1], status=200, id="forged"),
    answer("me", req={"1": 1}, status=200, id="forged"),
    answer("keygen", req=1, status=200, key=KEY, channel="a/"),
    answer("error", req=1, status=401, message="forged"),
    answer("nothing", req=1, status=200, id="forged"),
    answer("me/deeper", req=1, status=200, id="forged"),
    refusal(),
    refusal(5),
    EmitterMessage("emitter/", b'{"req":1,"id":"forged"}'),
    EmitterMessage("emitter/me/", b'[{"req":1,"id":"forged"}]'),
    EmitterMessage("emitter/me/", b""),
    EmitterMessage("emitter/me/", b"1"),
    EmitterMessage("emitter/me/", b"null"),
    EmitterMessage("emitter/me/", b'"text"'),
    EmitterMessage("emitter/me/", b"\xff\xfe"),
    EmitterMessage("emitter/me/", b"["),
    EmitterMessage("emitter/me/", b"[" * 65536),
    EmitterMessage("emitter/me/", DEEP),
    EmitterMessage("emitter/me/", DEEP + b"1" + b"}" * 13_000),
    EmitterMessage("emitter/me/", b'{"req":' + b"9" * 60_000 + b"}"),
    EmitterMessage("emitter/presence/", DEEP),
    EmitterMessage("emitter/error/", DEEP),
    answer("presence", time=1, event="subscribe", channel="z/", who={"id": "X"}),
    answer("presence", time=[], event="subscribe", channel="z/", who=[]),
    answer("error", status="401", message={}),
]

# Invalid replies with the right packet id; a valid reply still counts after them.
NONSENSE: list[EmitterMessage] = [
    answer("me", req=1, status=200),
    answer("me", req=1, status=200, id=5),
    answer("me", req=1, status=200, id=["X"]),
    answer("me", req=1, status=200, id="X", links=[]),
    answer("me", req=1, status=200, id="X", links={"a": 1}),
    answer("me", req=1, status="200", id="X"),
    answer("me", req=1, status=[], id="X"),
    answer("me", req=1, status=401),
    answer("me", req=1, status=401, message=5),
]


class TestHostileAnswers:
    @pytest.mark.parametrize("forged", [*HOSTILE, *NONSENSE], ids=lambda it: repr(it)[:90])
    def test_forged_message_is_dropped_and_counted(
        self, harness: SessionHarness, forged: EmitterMessage
    ) -> None:
        pending = harness.session.request(requests.me())
        (emission,) = harness.receive(forged)
        assert emission.event == "error"
        assert isinstance(emission.value, RemoteProtocolError)
        assert harness.session.nonsense == 1
        assert not pending.done
        assert harness.receive(forged) == [], "reported twice"
        assert harness.session.nonsense == 2
        harness.receive(answer("me", req=1, status=200, id="true"), PubAck(1))
        assert pending.result() == Me("true")

    def test_reply_of_the_wrong_kind_is_nonsense(self, harness: SessionHarness) -> None:
        asked = harness.session.request(requests.me())
        published = harness.publish()
        harness.receive(answer("me", req=2, id="forged"), PubAck(2))
        published.result()
        assert not asked.done
        assert harness.session.nonsense == 1

    @pytest.mark.parametrize(
        "late", [answer("me", req=1, id="late"), refusal(1, operation="me"), refusal(1), PubAck(1)]
    )
    def test_late_reply_is_nonsense(self, harness: SessionHarness, late: Answer) -> None:
        pending = harness.session.request(requests.me())
        harness.receive(answer("me", req=1, id="X"), PubAck(1))
        harness.receive(late)
        assert harness.session.nonsense == 1
        assert pending.result() == Me("X")

    def test_reply_to_a_cancelled_call_is_ignored(self, harness: SessionHarness) -> None:
        harness.session.request(requests.me()).awaited = False
        assert harness.receive(answer("me", req=1, id="X"), PubAck(1)) == []
        assert harness.session.nonsense == 0

    @pytest.mark.parametrize(
        "event", [PubAck(5), UnsubAck(5), SubAck(5, (0,)), PingResp(), Undecodable(12)]
    )
    def test_unexpected_acknowledgement_is_nonsense(
        self, harness: SessionHarness, event: Answer
    ) -> None:
        (emission,) = harness.receive(event)
        assert isinstance(emission.value, RemoteProtocolError)
        assert harness.receive(event) == []
        assert harness.session.nonsense == 2

    @pytest.mark.parametrize("operation", ["publish", "request", "subscribe", "unsubscribe"])
    def test_acknowledgement_of_the_wrong_kind_is_nonsense(
        self, harness: SessionHarness, operation: str
    ) -> None:
        pending: Pending[Any]
        if operation == "publish":
            pending = harness.publish()
        elif operation == "request":
            pending = harness.session.request(requests.me())
        elif operation == "subscribe":
            pending = harness.subscribe().asked
        else:
            pending = harness.session.unsubscribe(KEY, "a/")
        kinds: list[Answer] = [PubAck(1), SubAck(1, (128,)), UnsubAck(1)]
        own = {"subscribe": 1, "unsubscribe": 2}.get(operation, 0)
        right = kinds.pop(own)
        harness.receive(*kinds)
        assert harness.session.nonsense == 2
        assert not pending.done
        assert harness.session.pending == 1
        harness.receive(right)
        assert pending.done

    def test_second_connack_raises(self, harness: SessionHarness) -> None:
        with pytest.raises(RemoteProtocolError, match="CONNACK"):
            harness.session.receive(ConnAck(0))

    def test_error_of_the_codec_is_raised(self, harness: SessionHarness) -> None:
        error = RemoteProtocolError("malformed")
        with pytest.raises(RemoteProtocolError) as caught:
            harness.session.receive(error)
        assert caught.value is error

    def test_report_is_short_and_names_the_message(self, harness: SessionHarness) -> None:
        (emission,) = harness.receive(EmitterMessage("emitter/" + "x" * 60_000 + "/", b"{}"))
        assert "no request is waiting for it" in str(emission.value)
        assert len(str(emission.value)) < 200
        harness = SessionHarness()
        (emission,) = harness.receive(Undecodable(12))
        assert "a message of 12 bytes whose topic is not UTF-8" in str(emission.value)

    @pytest.mark.parametrize("forged", [*HOSTILE, *NONSENSE], ids=lambda it: repr(it)[:90])
    def test_wildcard_subscription_receives_messages_published_below_emitter(
        self, harness: SessionHarness, forged: EmitterMessage
    ) -> None:
        harness.subscribe_accepted(channel="+/")
        harness.session._last_id = 0
        pending = harness.session.request(requests.me())
        (emission,) = harness.receive(forged)
        assert emission.event == "message"
        assert emission.value is forged
        assert harness.session.nonsense == 0
        assert not pending.done

    @given(st.sampled_from(["me", "error", "presence", "keygen", "history", ""]), st.binary())
    def test_any_bytes_do_no_harm(self, operation: str, binary: bytes) -> None:
        harness = SessionHarness()
        pending = harness.session.request(requests.me())
        harness.wants.watch("a/")
        harness.receive(EmitterMessage(f"emitter/{operation}/", binary))
        assert not pending.done
        assert harness.session.nonsense == 1


class TestConnectionLoss:
    def test_loss_fails_all_pending_calls(self, harness: SessionHarness) -> None:
        pending: list[Pending[Any]] = [
            harness.publish(),
            harness.session.request(requests.me()),
            harness.session.ping(),
            harness.subscribe().asked,
            harness.session.unsubscribe(KEY, "b/"),
        ]
        called = []
        for one in pending:
            one.call_when_done(lambda: called.append(True))
        harness.lose()
        assert len(called) == 5
        for one in pending:
            with pytest.raises(ConnectionLostError, match="gone"):
                one.result()
        assert harness.session.pending == 0

    def test_loss_does_not_affect_answered_calls(self, harness: SessionHarness) -> None:
        pending = harness.session.request(requests.me())
        harness.receive(answer("me", req=1, id="X"))
        harness.lose()
        assert pending.result() == Me("X")

    def test_refusal_from_an_earlier_connection_is_nonsense(self, harness: SessionHarness) -> None:
        harness.publish_qos_0()
        harness.lose()
        harness.receive(refusal())
        assert harness.session.nonsense == 1

    def test_awaited_lists_calls_that_still_wait(self, harness: SessionHarness) -> None:
        first, second = harness.publish(), harness.publish()
        third, ping = harness.session.request(requests.me()), harness.session.ping()
        harness.session.ping(awaited=False)
        second.begin_wait()
        second.end_wait()
        harness.receive(answer("me", req=3, id="X"))
        assert harness.session.awaited() == [first, ping]
        assert third.done


class Broker:
    """A small model of the broker: it handles packets in order and acknowledges last."""

    def __init__(self) -> None:
        self.packets: list[Packet] = []
        self.subscriptions: set[str] = set()

    def handle_next(self) -> list[Answer]:
        """Handle the next packet."""
        packet = self.packets.pop(0)
        match packet:
            case PingReq():
                return [PingResp()]
            case Subscribe(packet_id, topic):
                key, channel = split(topic)
                if key == BAD:
                    return [refusal(packet_id), SubAck(packet_id, (128,))]
                self.subscriptions.add(channel)
                return [SubAck(packet_id, (0,))]
            case Unsubscribe(packet_id, topic):
                key, channel = split(topic)
                if key == BAD:
                    return [refusal(packet_id), UnsubAck(packet_id)]
                self.subscriptions.discard(channel)
                return [UnsubAck(packet_id)]
            case Publish(topic, payload, packet_id):
                replies = self.publish(topic.decode(), payload, packet_id)
                return [*replies, PubAck(packet_id)] if packet_id else replies
        raise AssertionError(packet)

    def publish(self, topic: str, payload: bytes, packet_id: int | None) -> list[Answer]:
        if topic.startswith("emitter/"):
            assert packet_id is not None
            asked = json.loads(payload) if payload else {}
            if asked.get("ttl") == 1:
                return []
            if asked.get("ttl") == 2:
                return [answer("keygen", req=packet_id, status=200, key=5)]
            if asked.get("key") == BAD:
                return [refusal(packet_id, operation="keygen")]
            if not asked:
                return [answer("me", req=packet_id, status=200, id=f"id{packet_id}")]
            return [answer("keygen", req=packet_id, status=200, key=f"{packet_id}", channel="a/")]
        return [refusal(packet_id)] if split(topic)[0] == BAD else []


def split(topic: str) -> tuple[str, str]:
    key, _, channel = topic.partition("/")
    return key, channel.partition("?")[0]


FILTERS = ["a/", "a/b/", "+/b/", "c/", "c/d/", "$share/g/c/", "$share/h/c/d/"]
key_strategy = st.sampled_from([KEY, OTHER, BAD])


class Conversation(RuleBasedStateMachine):
    """A session and a model broker, whose packets arrive at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.constants = _session._MAX_PACKET_IDS, _session._RESERVED_PACKET_IDS
        # Few enough to wrap around repeatedly.
        _session._MAX_PACKET_IDS, _session._RESERVED_PACKET_IDS = 60, 30  # type: ignore[misc]  # restored in teardown()
        self.start()

    def start(self) -> None:
        self.broker = Broker()
        self.wants = Wants("emitter")
        self.session = Session(self.wants, self.send, lambda packet: None, encode_publish)
        self.in_transit: list[Answer] = []
        self.outstanding: dict[int, str] = {}
        self.pings = 0
        self.users: list[Grant] = []
        self.refused: set[Grant] = set()
        self.asked: set[tuple[str, str]] = set()
        self.ended: set[tuple[str, str]] = set()
        self.expected: dict[int, tuple[Pending[Any], object]] = {}
        self.flushes: list[Pending[RequestError | None] | None] = []
        self.refusal_before_flush = False
        self.all: list[Pending[Any]] = []

    def teardown(self) -> None:
        _session._MAX_PACKET_IDS, _session._RESERVED_PACKET_IDS = self.constants  # type: ignore[misc]  # restored

    # The wire

    def send(self, packet: Packet) -> None:
        if not isinstance(packet, PingReq):
            assert isinstance(packet, Publish | Subscribe | Unsubscribe)
            if packet.packet_id is not None:
                assert 1 <= packet.packet_id <= 60
                assert packet.packet_id not in self.outstanding, "an id is used twice"
                self.outstanding[packet.packet_id] = type(packet).__name__
        if isinstance(packet, Subscribe):
            pair = split(packet.topic)
            assert pair not in self.asked, "subscribed twice"
            self.asked.add(pair)
            self.ended.discard(pair)
        elif isinstance(packet, Unsubscribe):
            pair = split(packet.topic)
            used = {grant.filter for grant in self.users if grant not in self.refused}
            assert pair[1] not in used, "the channel still has users"
            assert pair in self.asked | self.ended, "never subscribed, or refused"
            self.ended |= {one for one in self.asked if one[1] == pair[1]}
            self.asked -= self.ended
        self.broker.packets.append(packet)

    @precondition(lambda self: self.broker.packets)
    @rule(count=st.integers(1, 4))
    def broker_handles_packets(self, count: int) -> None:
        for _ in range(min(count, len(self.broker.packets))):
            self.in_transit += self.broker.handle_next()

    @precondition(lambda self: self.in_transit)
    @rule(count=st.integers(1, 6))
    def packets_arrive(self, count: int) -> None:
        for event in self.in_transit[:count]:
            self.receive(event)
        del self.in_transit[:count]

    def receive(self, event: Answer) -> None:
        if isinstance(event, SubAck) and event.codes == (128,):
            # From here on, the same key and channel may be subscribed again.
            grant = self.session._pending[event.packet_id].grant
            assert grant is not None
            self.refused.add(grant)
            if self.wants.find(grant.key, grant.filter) is grant:
                self.asked.discard((grant.key, grant.filter))
                self.ended.discard((grant.key, grant.filter))
        emitted = list(self.session.receive(event))
        if isinstance(event, PubAck | SubAck | UnsubAck):
            del self.outstanding[event.packet_id]
            pending, expected = self.expected.pop(event.packet_id, (None, None))
            if pending is not None:
                assert pending.done
                assert outcome(pending) == expected
        elif isinstance(event, PingResp):
            flush = self.flushes.pop(0)
            if flush is not None:
                assert flush.done
                assert (flush.result() is not None) == self.refusal_before_flush
                self.refusal_before_flush = False
        elif isinstance(event, EmitterMessage) and b'"req"' not in event.binary:
            # A refused publish of QoS 0.
            refused, emission = emitted
            assert refused.value == Refusal("publish", None, 401)
            assert isinstance(emission.value, UnauthorizedError)
            self.refusal_before_flush = True

    # Actions of users

    def expect(self, pending: Pending[Any], expected: object) -> None:
        self.all.append(pending)
        self.expected[max(self.session._pending, key=lambda id: id == self.session._last_id)] = (
            pending,
            expected,
        )

    @precondition(lambda self: not self.session.full)
    @rule(key=key_strategy)
    def publish(self, key: str) -> None:
        topic = f"{key}/a/".encode()
        pending = self.session.publish_qos_1(topic, b"x", key, "a/")
        self.send(Publish(topic, b"x", self.session._last_id, False))
        self.expect(pending, UnauthorizedError if key == BAD else None)

    @rule(key=key_strategy)
    def publish_qos_0(self, key: str) -> None:
        self.session.publish(f"{key}/a/".encode(), b"x")
        self.send(Publish(f"{key}/a/".encode(), b"x", None, False))

    @precondition(lambda self: not self.session.full)
    @rule(key=key_strategy, kind=st.sampled_from(["good", "too large", "nonsense", "me"]))
    def request(self, key: str, kind: str) -> None:
        ttl = {"too large": 1, "nonsense": 2}.get(kind, 0)
        asked: Request[Any] = (
            requests.me() if kind == "me" else requests.keygen(key, "a/", "r", ttl)
        )
        pending = self.session.request(asked)
        number = self.session._last_id
        expected: object
        if kind == "me":
            expected = Me(f"id{number}")
        elif kind == "too large":
            expected = RequestError
        elif kind == "nonsense":
            expected = RemoteProtocolError
        else:
            expected = UnauthorizedError if key == BAD else ChannelKey(f"{number}", "a/")
        self.expect(pending, expected)

    @rule(awaited=st.booleans())
    def flush(self, awaited: bool) -> None:
        pending = self.session.ping(awaited=awaited)
        self.all.append(pending)
        self.flushes.append(pending if awaited else None)

    @precondition(lambda self: not self.session.full)
    @rule(
        key=key_strategy,
        channel=st.sampled_from(FILTERS),
        replay=st.sampled_from([DEFAULT_REPLAY, NO_REPLAY]),
    )
    def subscribe(self, key: str, channel: str, replay: Replay) -> None:
        before = len(self.broker.packets)
        overlapped = self.wants.overlaps(channel)
        group, plain = unshare(channel)
        held = {grant.filter for grant in self.users if grant not in self.refused} - {channel}
        if any((group or unshare(one)[0]) and overlap(plain, unshare(one)[1]) for one in held):
            with pytest.raises(SubscriptionConflictError, match="group"):
                self.session.subscribe(key, key, channel, replay)
            assert len(self.broker.packets) == before
            return
        grant, by_history = self.session.subscribe(key, key, channel, replay)
        assert by_history == (overlapped and replay is DEFAULT_REPLAY)
        self.users.append(grant)
        if len(self.broker.packets) > before:
            packet = self.broker.packets[-1]
            assert isinstance(packet, Subscribe)
            without_replay = overlapped or replay is NO_REPLAY
            assert packet.topic.endswith("?last=0") == without_replay
            self.expect(grant.asked, UnauthorizedError if key == BAD else None)

    @precondition(lambda self: self.users and len(self.outstanding) < 58)
    @rule(which=st.integers(0))
    def leave(self, which: int) -> None:
        grant = self.users.pop(which % len(self.users))
        self.session.unsubscribe_unused(self.wants.leave(grant))

    @rule(which=st.integers(0))
    def cancel_call(self, which: int) -> None:
        # The caller stops waiting, but its packet stays outstanding.
        waiting = [pending for pending, _ in self.expected.values()]
        if waiting:
            waiting[which % len(waiting)].begin_wait()
            waiting[which % len(waiting)].end_wait()

    # Actions of other clients

    @rule(
        operation=st.sampled_from(["me", "keygen", "error", "history", "x"]),
        req=st.sampled_from([0, -1, 61, "1", [1], 1.5, True, 10**20]),
    )
    def forged_reply_arrives(self, operation: str, req: object) -> None:
        self.check_dropped(
            answer(operation, req=req, status=200, id="forged", key="f", channel="f/")
        )

    @rule(binary=st.sampled_from([b"", b"[]", b"{", b"\xff", b"5", b"[" * 3000]))
    def invalid_reply_arrives(self, binary: bytes) -> None:
        self.check_dropped(EmitterMessage("emitter/keygen/", binary))

    @precondition(lambda self: self.outstanding)
    @rule(which=st.integers(0))
    def reply_of_the_wrong_kind_arrives(self, which: int) -> None:
        number = sorted(self.outstanding)[which % len(self.outstanding)]
        self.check_dropped(answer("history", req=number, messages=[]))

    @rule(id=st.integers(61, 65535))
    def unexpected_acknowledgement_arrives(self, id: int) -> None:
        for event in (PubAck(id), SubAck(id, (128,)), UnsubAck(id)):
            self.check_dropped(event)

    def check_dropped(self, event: Answer) -> None:
        before = self.session.nonsense, self.session.pending
        for emission in self.session.receive(event):
            assert isinstance(emission.value, RemoteProtocolError)
        assert self.session.nonsense == before[0] + 1
        assert self.session.pending == before[1]

    @rule()
    def connection_is_lost(self) -> None:
        self.session.lost(lambda: ConnectionLostError("gone"))
        assert self.session.pending == 0
        assert all(pending.done for pending in self.all)
        self.start()

    # Invariants

    @invariant()
    def pending_equals_unacknowledged(self) -> None:
        assert self.session.pending == len(self.outstanding) + len(self.flushes)

    @invariant()
    def no_call_is_done_before_its_reply(self) -> None:
        for pending, _ in self.expected.values():
            assert pending.request is not None or not pending.done

    @rule()
    def broker_has_exactly_the_used_subscriptions(self) -> None:
        while self.broker.packets or self.in_transit:
            if self.in_transit:
                self.receive(self.in_transit.pop(0))
            else:
                self.in_transit += self.broker.handle_next()
        assert self.broker.subscriptions == {
            grant.filter for grant in self.users if grant.key != BAD
        }
        assert not self.expected
        assert not self.outstanding


def outcome(pending: Pending[Any]) -> object:
    """Return the result, or the type of the error."""
    try:
        return pending.result()
    except EmitterError as exc:
        return type(exc)


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_callback_added_when_done_is_called_immediately() -> None:
    called: list[str] = []
    pending: Pending[int] = Pending("me")
    pending.call_when_done(lambda: called.append("before"))
    assert called == []
    pending.succeed(7)
    pending.call_when_done(lambda: called.append("after"))
    assert called == ["before", "after"]
    assert pending.result() == 7
