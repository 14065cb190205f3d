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
from emitter_anyio._protocol.pending import Emission, Grant, Pending, Replay
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values import requests as requests
from emitter_anyio._values.channels import unshare
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
from emitter_anyio._values.requests import ChannelKey, Me, Request
from emitter_anyio._values.router import Matcher, overlap

KEY = "k" * 32
OTHER = "o" * 32
BAD = "b" * 32

ANY = Replay()
NONE = Replay(last=0)


def answer(operation: str, /, **fields: object) -> EmitterMessage:
    return EmitterMessage(f"emitter/{operation}/", json.dumps(fields).encode())


def no(req: int | None = None, status: int = 401, operation: str = "error") -> EmitterMessage:
    fields: dict[str, object] = {} if req is None else {"req": req}
    return answer(operation, **fields, status=status, message="the broker's words")


class Link:
    """A session with nobody at the other end: what it sends is kept, what it emits too."""

    def __init__(self, matcher: Matcher = "emitter", *, allow_collisions: bool = False) -> None:
        self.sent: list[Packet] = []
        self.emitted: list[Emission] = []
        self.wants = Wants(matcher, allow_collisions=allow_collisions)
        self.written: list[bytes] = []
        self.session = Session(self.wants, self.sent.append, self.written.append, encode_publish)

    def hear(self, *events: Answer) -> list[Emission]:
        """Take events in; gives what they emit."""
        emitted = [emission for event in events for emission in self.session.receive(event)]
        self.emitted += emitted
        return emitted

    def publish(self, key: str = KEY, channel: str = "a/") -> Pending[None]:
        topic = f"{key}/{channel}".encode()
        pending = self.session.publish_qos_1(topic, b"x", key, channel)
        self.sent.append(Publish(topic, b"x", self.session._last_id))
        return pending

    def publish_at_0(self) -> None:
        self.session.publish(b"k/a/", b"x")

    def release(self, grant: Grant) -> Pending[None] | None:
        return self.session.unsubscribe_unused(self.wants.leave(grant))

    def unwatch(self, channel: str) -> None:
        assert self.wants.unwatch(channel)
        self.session.leave_feed(channel)

    def lose(self) -> None:
        """Lose the connection; the next one has a session of its own."""
        self.wants.keep_accepted()
        self.session.lost(lambda: ConnectionLostError("gone"))
        self.session = Session(self.wants, self.sent.append, self.written.append, encode_publish)

    def subscribe(self, key: str = KEY, channel: str = "a/", replay: Replay = ANY) -> Grant:
        return self.session.subscribe(key, key, channel, replay)[0]

    def granted(self, key: str = KEY, channel: str = "a/") -> Grant:
        grant = self.subscribe(key, channel)
        self.hear(SubAck(self.last_id, (0,)))
        grant.asked.result()
        return grant

    @property
    def last_id(self) -> int:
        packet = self.sent[-1]
        assert isinstance(packet, Publish | Subscribe | Unsubscribe)
        assert packet.packet_id is not None
        return packet.packet_id


@pytest.fixture
def link() -> Link:
    return Link()


class TestPacketIds:
    def test_begin_with_1(self, link: Link) -> None:
        link.publish()
        link.subscribe()
        link.session.unsubscribe(KEY, "b/")
        link.session.request(requests.me())
        ids = [packet.packet_id for packet in link.sent if not isinstance(packet, PingReq)]  # type: ignore[union-attr]  # no DISCONNECT among them
        assert ids == [1, 2, 3, 4]

    def test_a_publish_of_qos_0_and_a_ping_have_none(self, link: Link) -> None:
        link.publish_at_0()
        link.session.ping()
        assert link.sent == [PingReq()]

    def test_go_round_and_pass_over_what_is_pending(self, link: Link) -> None:
        link.publish()
        link.session._last_id = 65534
        link.publish()
        assert link.last_id == 65535
        link.publish()
        assert link.last_id == 2

    def test_an_id_is_taken_until_the_broker_has_acknowledged(self, link: Link) -> None:
        pending = link.session.request(requests.me())
        link.hear(answer("me", req=1, status=200, id="X"))
        assert pending.done
        link.session._last_id = 0
        link.publish()
        assert link.last_id == 2
        link.hear(PubAck(1))
        link.session._last_id = 0
        link.publish()
        assert link.last_id == 1

    def test_one_whose_caller_is_gone_is_taken_too(self, link: Link) -> None:
        link.publish().awaited = False
        link.session._last_id = 0
        link.publish()
        assert link.last_id == 2

    def test_some_are_kept_for_what_cannot_wait(self, link: Link) -> None:
        for _ in range(65535 - 4096):
            assert not link.session.full
            link.publish()
        assert link.session.full
        called = []
        link.session.call_when_free(lambda: called.append("first"))
        grant = link.subscribe()
        link.release(grant)
        assert called == []
        link.hear(PubAck(100))
        assert called == ["first"]
        link.hear(PubAck(101))
        assert called == ["first"], "a waker is called once"

    def test_the_loss_of_the_link_frees_them(self, link: Link) -> None:
        for _ in range(10):
            link.publish()
        called = []
        link.session.call_when_free(lambda: called.append("freed"))
        link.lose()
        assert called == ["freed"]
        assert link.session.pending == 0

    def test_more_than_there_are_is_an_error_and_no_endless_search(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_session, "_MAX_PACKET_IDS", 3)
        for _ in range(3):
            link.publish()
        with pytest.raises(RuntimeError, match="packet id"):
            link.publish()
        link.hear(PubAck(2))
        link.publish()
        assert link.last_id == 2

    def test_whether_what_was_published_is_settled(self, link: Link) -> None:
        assert not link.session.uncertain
        link.session.request(requests.me())
        assert not link.session.uncertain
        link.publish()
        assert link.session.uncertain
        link.hear(PubAck(2))
        assert not link.session.uncertain
        link.publish_at_0()
        assert link.session.uncertain
        link.session.ping()
        link.hear(PingResp())
        assert not link.session.uncertain

    def test_how_many_are_outstanding(self, link: Link) -> None:
        link.publish()
        link.session.ping()
        assert link.session.pending == 2
        link.hear(PingResp())
        assert link.session.pending == 1
        link.hear(PubAck(1))
        assert link.session.pending == 0


class TestPublishing:
    def test_accepted(self, link: Link) -> None:
        pending = link.session.publish_qos_1(b"k/a/", b"x", KEY, "a/")
        assert not pending.done
        assert link.hear(PubAck(1)) == []
        assert pending.done
        pending.result()

    def test_refused(self, link: Link) -> None:
        pending = link.publish()
        assert link.hear(no(1)) == []
        assert not pending.done, "the acknowledgement comes behind it"
        assert link.hear(PubAck(1)) == []
        with pytest.raises(UnauthorizedError) as caught:
            pending.result()
        error = caught.value
        assert (error.operation, error.channel, error.status) == ("publish", "a/", 401)
        assert error.message == "the broker's words"
        assert error.hint is not None
        assert KEY not in str(error)

    def test_everyone_who_waits_gets_an_error_of_its_own(self, link: Link) -> None:
        pending = link.publish()
        link.hear(no(1), PubAck(1))
        caught = []
        for _ in range(2):
            with pytest.raises(UnauthorizedError) as info:
                pending.result()
            caught.append(info.value)
        assert caught[0] is not caught[1]

    def test_the_first_refusal_counts(self, link: Link) -> None:
        pending = link.publish()
        link.hear(no(1, 400), no(1, 401), PubAck(1))
        with pytest.raises(BadRequestError):
            pending.result()

    def test_an_error_of_status_200_is_none(self, link: Link) -> None:
        pending = link.publish()
        link.hear(no(1, 200), PubAck(1))
        pending.result()

    def test_refused_when_nobody_waits_any_more(self, link: Link) -> None:
        link.publish().awaited = False
        (emission,) = link.hear(no(1), PubAck(1))
        assert emission.event == "error"
        assert isinstance(emission.value, UnauthorizedError)

    def test_the_waker_is_called_once_there_is_an_outcome(self, link: Link) -> None:
        pending = link.publish()
        called = []
        pending.call_when_done(lambda: called.append("one"))
        pending.call_when_done(lambda: called.append("two"))
        assert called == []
        link.hear(PubAck(1))
        assert called == ["one", "two"]

    def test_what_is_settled_stays_as_it_is(self, link: Link) -> None:
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
    def test_a_good_answer(self, link: Link) -> None:
        request = requests.keygen(KEY, "a/", "rw", 0)
        pending = link.session.request(request)
        assert link.sent == [Publish(b"emitter/keygen/", request.body, 1)]
        made = ChannelKey(OTHER, "a/")
        emitted = link.hear(answer("keygen", req=1, status=200, key=OTHER, channel="a/"))
        assert emitted == [Emission("keygen", made)]
        assert pending.result() == made
        assert link.hear(PubAck(1)) == []
        assert pending.result() == made
        assert link.session.nonsense == 0

    def test_an_answer_has_the_options_of_its_topic(self, link: Link) -> None:
        pending = link.session.request(requests.me())
        link.hear(EmitterMessage("emitter/me/?id=7", b'{"req":1,"id":"X"}'))
        assert pending.result() == Me("X")

    def test_a_refusal_comes_on_the_topic_of_the_request(self, link: Link) -> None:
        pending = link.session.request(requests.keygen(KEY, "a/", "rw", 0))
        assert link.hear(no(1, operation="keygen")) == []
        with pytest.raises(UnauthorizedError) as caught:
            pending.result()
        assert (caught.value.operation, caught.value.channel) == ("keygen", "a/")
        link.hear(PubAck(1))
        assert link.session.pending == 0

    def test_nobody_waits_for_the_answer(self, link: Link) -> None:
        link.session.request(requests.me(), awaited=False)
        assert link.hear(answer("me", req=1, id="X"), PubAck(1)) == []
        link.session.request(requests.me(), awaited=False)
        (emission,) = link.hear(no(2, 500, "me"), PubAck(2))
        assert isinstance(emission.value, ServerError)

    def test_what_is_no_event_is_not_emitted(self, link: Link) -> None:
        pending = link.session.request(requests.history(KEY, "a/", last=1))
        assert link.hear(answer("history", req=1, messages=[])) == []
        assert pending.result() == []

    def test_an_answer_that_says_nothing_is_not_emitted(self, link: Link) -> None:
        request = requests.presence(KEY, "a/", status=False, changes=True)
        pending = link.session.request(request)
        emitted = link.hear(
            answer("presence", req=1, status=200, time=0, event="", channel="", who=None)
        )
        assert emitted == []
        assert pending.done
        assert pending.result() is None

    def test_acknowledged_without_an_answer(self, link: Link) -> None:
        pending = link.session.request(requests.history(KEY, "a/", last=1000))
        assert link.hear(PubAck(1)) == []
        with pytest.raises(RequestError, match=r"history 'a/'.*64 KiB") as caught:
            pending.result()
        assert caught.value.status is None

    def test_a_nonsensical_answer_before_the_acknowledgement(self, link: Link) -> None:
        pending = link.session.request(requests.me())
        (emission,) = link.hear(answer("me", req=1, id=5))
        assert isinstance(emission.value, RemoteProtocolError)
        assert not pending.done, "the true answer may come yet"
        link.hear(PubAck(1))
        with pytest.raises(RemoteProtocolError, match=r"me: .*id"):
            pending.result()

    def test_the_true_answer_behind_a_nonsensical_one(self, link: Link) -> None:
        pending = link.session.request(requests.me())
        link.hear(answer("me", req=1, id=5), answer("me", req=1, id="X"), PubAck(1))
        assert pending.result() == Me("X")
        assert link.session.nonsense == 1

    def test_the_first_answer_counts(self, link: Link) -> None:
        pending = link.session.request(requests.me())
        emitted = link.hear(answer("me", req=1, id="X"), answer("me", req=1, id="Y"))
        assert len(emitted) == 1
        assert pending.result() == Me("X")

    def test_the_answers_may_come_in_any_order(self, link: Link) -> None:
        first = link.session.request(requests.me())
        second = link.session.request(requests.me())
        link.hear(answer("me", req=2, id="Y"), answer("me", req=1, id="X"))
        assert (first.result(), second.result()) == (Me("X"), Me("Y"))

    def test_me_tells_the_id_of_the_connection(self, link: Link) -> None:
        assert link.session.connection_id is None
        link.session.request(requests.me())
        link.hear(answer("me", req=1, id="X"))
        assert link.session.connection_id == "X"
        link.lose()
        assert link.session.connection_id is None


class TestFlush:
    def test_without_a_refusal(self, link: Link) -> None:
        pending = link.session.ping()
        assert link.hear(PingResp()) == []
        assert pending.result() is None

    def test_the_first_refusal_among_the_publishes_of_qos_0(self, link: Link) -> None:
        for _ in range(3):
            link.publish_at_0()
        pending = link.session.ping()
        emitted = link.hear(no(status=400), no(status=401), PingResp())
        assert [type(emission.value) for emission in emitted] == [
            BadRequestError,
            UnauthorizedError,
        ]
        refusal = pending.result()
        assert isinstance(refusal, BadRequestError)
        assert refusal.operation == "publish"
        assert "flush()" in str(refusal)
        assert "qos=1" in str(refusal)

    def test_each_refusal_is_told_by_one_flush(self, link: Link) -> None:
        link.publish_at_0()
        first = link.session.ping()
        second = link.session.ping()
        link.hear(no(), PingResp(), PingResp())
        assert isinstance(first.result(), UnauthorizedError)
        assert second.result() is None

    def test_a_ping_of_the_keepalive_keeps_it_for_the_next_flush(self, link: Link) -> None:
        link.publish_at_0()
        link.session.ping(awaited=False)
        link.hear(no(), PingResp())
        pending = link.session.ping()
        link.hear(PingResp())
        assert isinstance(pending.result(), UnauthorizedError)

    def test_behind_what_settles_them_no_more_refusals_count(self, link: Link) -> None:
        for settle in ("ping", "publish", "request"):
            link.publish_at_0()
            if settle == "ping":
                link.session.ping()
                link.hear(PingResp())
            else:
                link.publish() if settle == "publish" else link.session.request(requests.me())
                link.hear(PubAck(link.last_id))
            link.emitted.clear()
            before = link.session.nonsense
            link.hear(no())
            assert link.session.nonsense == before + 1
            assert not any(
                isinstance(emission.value, UnauthorizedError) for emission in link.emitted
            )

    def test_what_was_asked_before_the_publish_does_not_settle_it(self, link: Link) -> None:
        link.publish()
        link.publish_at_0()
        (emission,) = link.hear(PubAck(1), no())
        assert isinstance(emission.value, UnauthorizedError)

    def test_an_error_of_status_200_is_no_refusal(self, link: Link) -> None:
        link.publish_at_0()
        pending = link.session.ping()
        link.hear(no(status=200), PingResp())
        assert pending.result() is None
        assert link.session.nonsense == 1


class TestSubscriptions:
    @pytest.mark.parametrize(
        ("replay", "options"),
        [
            (ANY, ""),
            (NONE, "?last=0"),
            (Replay(last=5), "?last=5"),
            (Replay(5, 1600000000, 1700000000), "?last=5&from=1600000000&until=1700000000"),
        ],
    )
    def test_the_broker_is_asked_with_the_options(
        self, link: Link, replay: Replay, options: str
    ) -> None:
        grant, by_history = link.session.subscribe(KEY, KEY, "a/", replay)
        assert link.sent == [Subscribe(1, f"{KEY}/a/{options}")]
        assert not by_history
        assert not grant.asked.done
        assert link.hear(SubAck(1, (0,))) == []
        grant.asked.result()
        assert link.wants.is_subscribed("a/")
        assert not link.wants.is_subscribed("b/")

    def test_it_is_asked_once_for_each_key_and_channel(self, link: Link) -> None:
        first = link.subscribe()
        assert link.subscribe() is first
        other = link.subscribe(OTHER)
        assert other is not first
        assert link.subscribe(OTHER) is other
        assert link.sent == [
            Subscribe(1, f"{KEY}/a/"),
            Subscribe(2, f"{OTHER}/a/?last=0"),
        ]

    def test_the_replay_of_one_more_comes_from_history(self, link: Link) -> None:
        assert link.session.subscribe(KEY, KEY, "a/", ANY)[1] is False
        assert link.session.subscribe(KEY, KEY, "a/", ANY)[1] is True
        assert link.session.subscribe(KEY, KEY, "a/", NONE)[1] is False
        assert link.session.subscribe(KEY, KEY, "a/b/", Replay(5))[1] is True
        assert link.session.subscribe(KEY, KEY, "+/b/", ANY)[1] is True
        assert link.session.subscribe(KEY, KEY, "b/", ANY)[1] is True, "it overlaps +/b/"
        assert link.session.subscribe(KEY, KEY, "c/d/", ANY)[1] is False

    def test_under_the_other_matcher_less_overlaps(self) -> None:
        link = Link("mqtt")
        link.subscribe()
        assert link.session.subscribe(KEY, KEY, "a/b/", ANY)[1] is False
        assert link.session.subscribe(KEY, KEY, "a/#/", ANY)[1] is True
        assert link.wants.overlaps("a/b/c/")
        assert not link.wants.overlaps("c/")

    def test_it_is_given_back_when_the_last_user_has_left(self, link: Link) -> None:
        grant = link.granted()
        link.subscribe()
        link.sent.clear()
        assert link.release(grant) is None
        pending = link.release(grant)
        assert link.sent == [Unsubscribe(2, f"{KEY}/a/")]
        assert pending is not None
        assert not pending.awaited
        assert link.hear(UnsubAck(2)) == []
        pending.result()
        assert not link.wants.is_subscribed("a/")

    def test_the_last_user_of_the_channel_under_any_key(self, link: Link) -> None:
        first, second = link.granted(), link.granted(OTHER)
        link.sent.clear()
        assert link.release(first) is None
        assert link.wants.is_subscribed("a/")
        assert link.release(second) is not None
        assert len(link.sent) == 1

    def test_whoever_comes_back_meanwhile_need_not_ask_again(self, link: Link) -> None:
        first, second = link.granted(), link.granted(OTHER)
        link.release(first)
        link.sent.clear()
        assert link.subscribe() is first
        assert link.sent == []
        link.release(second)
        assert link.sent == []

    def test_asked_again_after_it_was_given_back(self, link: Link) -> None:
        first = link.granted()
        link.release(first)
        second = link.subscribe()
        assert second is not first
        assert isinstance(link.sent[-1], Subscribe)
        link.hear(UnsubAck(2), SubAck(3, (0,)))
        second.asked.result()
        assert link.wants.is_subscribed("a/")

    @pytest.mark.parametrize("codes", [(128,), (), (255,), (128, 0)])
    def test_refused(self, link: Link, codes: tuple[int, ...]) -> None:
        grant = link.subscribe()
        assert link.hear(no(1), SubAck(1, codes)) == []
        with pytest.raises(UnauthorizedError) as caught:
            grant.asked.result()
        assert (caught.value.operation, caught.value.channel) == ("subscribe", "a/")
        assert not link.wants.is_subscribed("a/")
        assert link.release(grant) is None
        assert len(link.sent) == 1, "what was refused is not unsubscribed"

    def test_refused_without_a_word(self, link: Link) -> None:
        grant = link.subscribe()
        link.hear(SubAck(1, (128,)))
        with pytest.raises(RequestError, match="subscribe 'a/'") as e:
            grant.asked.result()
        assert e.value.status is None

    @pytest.mark.parametrize("code", [0, 1, 2])
    def test_only_its_acknowledgement_says_that_it_was_refused(self, link: Link, code: int) -> None:
        grant = link.subscribe()
        link.hear(no(1), SubAck(1, (code,)))
        grant.asked.result()

    def test_all_who_wait_for_it_are_refused(self, link: Link) -> None:
        first, second = link.subscribe(), link.subscribe()
        link.hear(no(1), SubAck(1, (128,)))
        for grant in (first, second):
            with pytest.raises(UnauthorizedError):
                grant.asked.result()
            assert link.release(grant) is None
        assert len(link.sent) == 1

    def test_another_key_of_the_channel_stays(self, link: Link) -> None:
        good = link.granted()
        bad = link.subscribe(BAD)
        link.hear(no(2), SubAck(2, (128,)))
        link.release(bad)
        assert link.wants.is_subscribed("a/")
        assert len(link.sent) == 2
        assert link.release(good) is not None

    def test_the_users_of_the_good_key_have_left_when_the_other_is_refused(
        self, link: Link
    ) -> None:
        good = link.granted()
        bad = link.subscribe(BAD)
        assert link.release(good) is None, "the other one may be granted"
        link.hear(no(2), SubAck(2, (128,)))
        assert link.sent[2:] == [Unsubscribe(3, f"{KEY}/a/")]
        assert link.release(bad) is None
        assert not link.wants.is_subscribed("a/")

    def test_a_refusal_of_one_that_was_asked_anew(self, link: Link) -> None:
        first = link.subscribe()
        link.release(first)
        second = link.subscribe()
        link.hear(SubAck(1, (128,)), UnsubAck(2))
        assert link.wants.is_subscribed("a/")
        link.hear(SubAck(3, (0,)))
        second.asked.result()

    def test_left_before_it_was_granted(self, link: Link) -> None:
        grant = link.subscribe()
        grant.asked.awaited = False
        pending = link.release(grant)
        assert link.sent[1:] == [Unsubscribe(2, f"{KEY}/a/")]
        assert pending is not None
        assert link.hear(SubAck(1, (0,)), UnsubAck(2)) == []
        pending.result()

    def test_left_before_it_was_refused(self, link: Link) -> None:
        grant = link.subscribe(BAD)
        link.release(grant)
        emitted = link.hear(no(1), SubAck(1, (128,)), no(2), UnsubAck(2))
        # The caller of the subscription is told; that the UNSUBSCRIBE fails too is no news.
        assert emitted == []
        with pytest.raises(UnauthorizedError):
            grant.asked.result()

    def test_two_keys_left_before_the_first_was_refused(self, link: Link) -> None:
        bad, good = link.subscribe(BAD), link.subscribe(KEY)
        link.release(bad)
        link.release(good)
        # The broker takes an UNSUBSCRIBE only with a key that it has taken.
        assert Unsubscribe(link.last_id, f"{KEY}/a/") in link.sent

    def test_an_unsubscribe_that_is_refused(self, link: Link) -> None:
        pending = link.session.unsubscribe(KEY, "a/")
        link.hear(no(1), UnsubAck(1))
        with pytest.raises(UnauthorizedError) as caught:
            pending.result()
        assert caught.value.operation == "unsubscribe"

    def test_giving_back_that_is_refused_is_told(self, link: Link) -> None:
        link.release(link.granted())
        (emission,) = link.hear(no(2), UnsubAck(2))
        assert isinstance(emission.value, UnauthorizedError)


class TestGroups:
    def test_a_group_is_part_of_what_is_asked_for(self, link: Link) -> None:
        grant = link.granted(channel="$share/g/a/")
        assert (grant.filter, grant.channel) == ("$share/g/a/", "a/")
        assert link.sent == [Subscribe(1, f"{KEY}/$share/g/a/")]
        assert link.wants.is_subscribed("$share/g/a/")
        assert not link.wants.is_subscribed("a/")
        link.release(grant)
        assert link.sent[1:] == [Unsubscribe(2, f"{KEY}/$share/g/a/")]

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
    def test_it_cannot_be_kept_apart_from_what_overlaps(
        self, link: Link, first: str, second: str
    ) -> None:
        link.subscribe(channel=first)
        with pytest.raises(SubscriptionConflictError, match="second Emitter"):
            link.subscribe(channel=second)
        assert len(link.sent) == 1
        assert not link.wants.is_subscribed(second)

    def test_what_does_not_overlap(self, link: Link) -> None:
        link.subscribe(channel="$share/g/a/")
        link.subscribe(channel="$share/g/a/")
        link.subscribe(OTHER, "$share/g/a/")
        link.subscribe(channel="$share/h/b/")
        link.subscribe(channel="c/")
        assert len(link.sent) == 4

    def test_its_replay(self, link: Link) -> None:
        grant = link.subscribe(channel="$share/g/a/")
        assert link.session.replaying("a/b/") is grant.asked
        assert link.session.in_replay(EmitterMessage("a/b/", b"x"))

    def test_a_wide_one_gets_what_its_users_publish_below_emitter(self, link: Link) -> None:
        link.granted(channel="$share/g/+/")
        forged = answer("me", req=77, id="forged")
        assert link.hear(forged) == [Emission("message", forged)]


class TestCollisions:
    def test_of_two_subscriptions(self, link: Link) -> None:
        link.subscribe(channel="p/q/")
        with pytest.raises(SubscriptionConflictError, match=r"'q/p/'.*'p/q/'.*second Emitter"):
            link.subscribe(channel="q/p/")
        assert len(link.sent) == 1
        assert not link.wants.is_subscribed("q/p/")

    def test_of_two_presence_feeds(self, link: Link) -> None:
        link.wants.watch("d/d/")
        with pytest.raises(SubscriptionConflictError, match=r"presence.*'g/g/'"):
            link.wants.watch("g/g/")
        assert not link.wants.is_watched("g/g/")

    def test_a_subscription_and_a_feed_are_apart(self, link: Link) -> None:
        link.subscribe(channel="p/q/")
        link.wants.watch("q/p/")
        assert link.wants.is_watched("q/p/")

    def test_a_channel_is_in_no_ones_way_but_others(self, link: Link) -> None:
        link.subscribe(channel="p/q/")
        link.subscribe(channel="p/q/")
        link.subscribe(OTHER, "p/q/")
        link.subscribe(channel="p/q/r/")

    def test_it_is_over_when_the_first_has_left(self, link: Link) -> None:
        link.release(link.granted(channel="p/q/"))
        link.subscribe(channel="q/p/")
        assert link.sent[-1] == Subscribe(3, f"{KEY}/q/p/")

    def test_allowed_for_brokers_without_the_fault(self) -> None:
        link = Link(allow_collisions=True)
        link.subscribe(channel="p/q/")
        link.subscribe(channel="q/p/")
        link.wants.watch("d/d/")
        link.wants.watch("g/g/")
        assert len(link.sent) == 2

    def test_the_key_is_not_shown(self, link: Link) -> None:
        link.subscribe(channel="p/q/")
        with pytest.raises(SubscriptionConflictError) as caught:
            link.subscribe(OTHER, "q/p/")
        assert KEY not in str(caught.value)
        assert OTHER not in str(caught.value)


class TestReplays:
    def test_are_under_way_until_the_acknowledgement(self, link: Link) -> None:
        grant = link.subscribe()
        assert link.session.replays
        assert link.session.replaying("a/") is grant.asked
        assert link.session.replaying("a/b/") is grant.asked
        assert link.session.replaying("b/") is None
        link.hear(SubAck(1, (0,)))
        assert not link.session.replays
        assert link.session.replaying("a/") is None

    @pytest.mark.parametrize("codes", [(128,), ()])
    def test_end_with_a_refusal(self, link: Link, codes: tuple[int, ...]) -> None:
        link.subscribe()
        link.hear(SubAck(1, codes))
        assert not link.session.replays

    def test_end_with_the_link(self, link: Link) -> None:
        link.subscribe()
        link.lose()
        assert not link.session.replays

    def test_there_are_none_where_none_is_asked_for(self, link: Link) -> None:
        link.subscribe(replay=NONE)
        link.subscribe(OTHER)
        assert not link.session.replays

    def test_are_64_kib_at_most(self, link: Link) -> None:
        link.subscribe()
        big = EmitterMessage("a/b/", b"x" * 32767)
        assert not link.session.in_replay(EmitterMessage("b/", b"x"))
        assert link.session.in_replay(big)
        assert link.session.in_replay(big)
        assert not link.session.in_replay(EmitterMessage("a/", b""))

    def test_empty_messages_count_too(self, link: Link) -> None:
        link.subscribe()
        empty = EmitterMessage("a/", b"")
        assert sum(link.session.in_replay(empty) for _ in range(70_000)) == 65536

    @pytest.mark.parametrize(
        ("replay", "nothing", "is_explicit"),
        [
            (ANY, False, False),
            (NONE, True, False),
            (Replay(last=1), False, True),
            (Replay(since=1600000000), False, True),
            (Replay(last=0, since=1600000000), True, False),
        ],
    )
    def test_what_is_asked_for(self, replay: Replay, nothing: bool, is_explicit: bool) -> None:
        assert (replay.is_empty, replay.is_explicit) == (nothing, is_explicit)


def change(channel: str = "a/", event: str = "subscribe") -> EmitterMessage:
    return answer("presence", time=1600000000, event=event, channel=channel, who={"id": "X"})


class TestPresence:
    @pytest.mark.parametrize("event", ["subscribe", "unsubscribe"])
    @pytest.mark.parametrize("channel", ["a/", "a/b/c/"])
    def test_a_change_of_what_is_watched(self, link: Link, channel: str, event: str) -> None:
        link.wants.watch("a/")
        (emission,) = link.hear(change(channel, event))
        assert emission.event == "presence"
        assert (emission.value.channel, emission.value.event) == (channel, event)

    def test_of_what_nobody_watches(self, link: Link) -> None:
        link.wants.watch("a/")
        (emission,) = link.hear(change("b/"))
        assert isinstance(emission.value, RemoteProtocolError)
        assert link.session.nonsense == 1

    def test_a_change_with_a_req_is_none(self, link: Link) -> None:
        link.wants.watch("a/")
        forged = json.loads(change().binary) | {"req": 5}
        link.hear(answer("presence", **forged))
        assert link.session.nonsense == 1

    def test_one_that_was_on_its_way_when_the_feed_was_left(self, link: Link) -> None:
        link.wants.watch("a/")
        link.unwatch("a/")
        assert link.hear(change("a/b/")) == []
        assert link.session.nonsense == 0
        link.lose()
        link.hear(change("a/b/"))
        assert link.session.nonsense == 1, "it cannot come from the link before"

    def test_none_is_on_its_way_when_the_broker_has_ended_the_feed(self, link: Link) -> None:
        link.wants.watch("a/")
        link.unwatch("a/")
        link.session.feed_ended("a/")
        link.session.feed_ended("b/")
        link.hear(change())
        assert link.session.nonsense == 1

    def test_a_feed_ends_with_its_last_user(self, link: Link) -> None:
        link.wants.watch("a/")
        link.wants.watch("a/")
        assert link.wants.is_watched("a/")
        assert link.wants.unwatch("a/") is False
        assert link.wants.is_watched("a/")
        assert link.wants.unwatch("a/") is True
        assert not link.wants.is_watched("a/")
        assert link.wants.unwatch("a/") is False
        assert link.sent == []


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
    no(),
    no(5),
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

# These name the request, and are nonsense: the true answer still counts.
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
    def test_are_dropped_and_counted(self, link: Link, forged: EmitterMessage) -> None:
        pending = link.session.request(requests.me())
        (emission,) = link.hear(forged)
        assert emission.event == "error"
        assert isinstance(emission.value, RemoteProtocolError)
        assert link.session.nonsense == 1
        assert not pending.done
        assert link.hear(forged) == [], "it is reported once"
        assert link.session.nonsense == 2
        link.hear(answer("me", req=1, status=200, id="true"), PubAck(1))
        assert pending.result() == Me("true")

    def test_the_answer_to_another_call(self, link: Link) -> None:
        asked = link.session.request(requests.me())
        published = link.publish()
        link.hear(answer("me", req=2, id="forged"), PubAck(2))
        published.result()
        assert not asked.done
        assert link.session.nonsense == 1

    @pytest.mark.parametrize(
        "late", [answer("me", req=1, id="late"), no(1, operation="me"), no(1), PubAck(1)]
    )
    def test_a_late_one(self, link: Link, late: Answer) -> None:
        pending = link.session.request(requests.me())
        link.hear(answer("me", req=1, id="X"), PubAck(1))
        link.hear(late)
        assert link.session.nonsense == 1
        assert pending.result() == Me("X")

    def test_the_answer_to_a_caller_that_is_gone(self, link: Link) -> None:
        link.session.request(requests.me()).awaited = False
        assert link.hear(answer("me", req=1, id="X"), PubAck(1)) == []
        assert link.session.nonsense == 0

    @pytest.mark.parametrize(
        "event", [PubAck(5), UnsubAck(5), SubAck(5, (0,)), PingResp(), Undecodable(12)]
    )
    def test_acknowledgements_of_nothing(self, link: Link, event: Answer) -> None:
        (emission,) = link.hear(event)
        assert isinstance(emission.value, RemoteProtocolError)
        assert link.hear(event) == []
        assert link.session.nonsense == 2

    @pytest.mark.parametrize("ask", ["publish", "request", "subscribe", "unsubscribe"])
    def test_acknowledgements_of_another_kind(self, link: Link, ask: str) -> None:
        pending: Pending[Any]
        if ask == "publish":
            pending = link.publish()
        elif ask == "request":
            pending = link.session.request(requests.me())
        elif ask == "subscribe":
            pending = link.subscribe().asked
        else:
            pending = link.session.unsubscribe(KEY, "a/")
        kinds: list[Answer] = [PubAck(1), SubAck(1, (128,)), UnsubAck(1)]
        own = {"subscribe": 1, "unsubscribe": 2}.get(ask, 0)
        right = kinds.pop(own)
        link.hear(*kinds)
        assert link.session.nonsense == 2
        assert not pending.done
        assert link.session.pending == 1
        link.hear(right)
        assert pending.done

    def test_a_second_connack(self, link: Link) -> None:
        with pytest.raises(RemoteProtocolError, match="CONNACK"):
            link.session.receive(ConnAck(0))

    def test_what_the_codec_found_malformed(self, link: Link) -> None:
        error = RemoteProtocolError("malformed")
        with pytest.raises(RemoteProtocolError) as caught:
            link.session.receive(error)
        assert caught.value is error

    def test_the_report_is_short_and_says_what_came(self, link: Link) -> None:
        (emission,) = link.hear(EmitterMessage("emitter/" + "x" * 60_000 + "/", b"{}"))
        assert "no request is waiting for it" in str(emission.value)
        assert len(str(emission.value)) < 200
        link = Link()
        (emission,) = link.hear(Undecodable(12))
        assert "a message of 12 bytes whose topic is not UTF-8" in str(emission.value)

    @pytest.mark.parametrize("forged", [*HOSTILE, *NONSENSE], ids=lambda it: repr(it)[:90])
    def test_a_wide_subscription_gets_what_its_users_publish_there(
        self, link: Link, forged: EmitterMessage
    ) -> None:
        link.granted(channel="+/")
        link.session._last_id = 0
        pending = link.session.request(requests.me())
        (emission,) = link.hear(forged)
        assert emission.event == "message"
        assert emission.value is forged
        assert link.session.nonsense == 0
        assert not pending.done

    @given(st.sampled_from(["me", "error", "presence", "keygen", "history", ""]), st.binary())
    def test_any_bytes_do_no_harm(self, operation: str, binary: bytes) -> None:
        link = Link()
        pending = link.session.request(requests.me())
        link.wants.watch("a/")
        link.hear(EmitterMessage(f"emitter/{operation}/", binary))
        assert not pending.done
        assert link.session.nonsense == 1


class TestTheLossOfTheLink:
    def test_ends_all_that_is_pending(self, link: Link) -> None:
        pending: list[Pending[Any]] = [
            link.publish(),
            link.session.request(requests.me()),
            link.session.ping(),
            link.subscribe().asked,
            link.session.unsubscribe(KEY, "b/"),
        ]
        called = []
        for one in pending:
            one.call_when_done(lambda: called.append(True))
        link.lose()
        assert len(called) == 5
        for one in pending:
            with pytest.raises(ConnectionLostError, match="gone"):
                one.result()
        assert link.session.pending == 0

    def test_leaves_alone_what_has_been_answered(self, link: Link) -> None:
        pending = link.session.request(requests.me())
        link.hear(answer("me", req=1, id="X"))
        link.lose()
        assert pending.result() == Me("X")

    def test_an_answer_from_before_counts_no_more(self, link: Link) -> None:
        link.publish_at_0()
        link.lose()
        link.hear(no())
        assert link.session.nonsense == 1

    def test_who_still_waits(self, link: Link) -> None:
        first, second = link.publish(), link.publish()
        third, ping = link.session.request(requests.me()), link.session.ping()
        link.session.ping(awaited=False)
        second.begin_wait()
        second.end_wait()
        link.hear(answer("me", req=3, id="X"))
        assert link.session.awaited() == [first, ping]
        assert third.done


class Broker:
    """A small model of the broker: it takes packets in order, and acknowledges last."""

    def __init__(self) -> None:
        self.packets: list[Packet] = []
        self.subscriptions: set[str] = set()

    def work(self) -> list[Answer]:
        """Work off the next packet."""
        packet = self.packets.pop(0)
        match packet:
            case PingReq():
                return [PingResp()]
            case Subscribe(packet_id, topic):
                key, channel = split(topic)
                if key == BAD:
                    return [no(packet_id), SubAck(packet_id, (128,))]
                self.subscriptions.add(channel)
                return [SubAck(packet_id, (0,))]
            case Unsubscribe(packet_id, topic):
                key, channel = split(topic)
                if key == BAD:
                    return [no(packet_id), UnsubAck(packet_id)]
                self.subscriptions.discard(channel)
                return [UnsubAck(packet_id)]
            case Publish(topic, payload, packet_id):
                said = self.publish(topic.decode(), payload, packet_id)
                return [*said, PubAck(packet_id)] if packet_id else said
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
                return [no(packet_id, operation="keygen")]
            if not asked:
                return [answer("me", req=packet_id, status=200, id=f"id{packet_id}")]
            return [answer("keygen", req=packet_id, status=200, key=f"{packet_id}", channel="a/")]
        return [no(packet_id)] if split(topic)[0] == BAD else []


def split(topic: str) -> tuple[str, str]:
    key, _, channel = topic.partition("/")
    return key, channel.partition("?")[0]


FILTERS = ["a/", "a/b/", "+/b/", "c/", "c/d/", "#/", "$share/g/c/", "$share/h/c/d/"]
keys = st.sampled_from([KEY, OTHER, BAD])


class Conversation(RuleBasedStateMachine):
    """A session and the model of a broker, whose answers come whenever it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.constants = _session._MAX_PACKET_IDS, _session._RESERVED_PACKET_IDS
        # So few that they come round again and again.
        _session._MAX_PACKET_IDS, _session._RESERVED_PACKET_IDS = 60, 30  # type: ignore[misc]  # put back below
        self.begin()

    def begin(self) -> None:
        self.broker = Broker()
        self.wants = Wants("emitter")
        self.session = Session(self.wants, self.send, lambda packet: None, encode_publish)
        self.coming: list[Answer] = []
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
        _session._MAX_PACKET_IDS, _session._RESERVED_PACKET_IDS = self.constants  # type: ignore[misc]  # as they were

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
            assert pair not in self.asked, "the broker is asked twice"
            self.asked.add(pair)
            self.ended.discard(pair)
        elif isinstance(packet, Unsubscribe):
            pair = split(packet.topic)
            used = {grant.filter for grant in self.users if grant not in self.refused}
            assert pair[1] not in used, "somebody still uses it"
            assert pair in self.asked | self.ended, "what was refused, or not asked for"
            self.ended |= {one for one in self.asked if one[1] == pair[1]}
            self.asked -= self.ended
        self.broker.packets.append(packet)

    @precondition(lambda self: self.broker.packets)
    @rule(count=st.integers(1, 4))
    def the_broker_works(self, count: int) -> None:
        for _ in range(min(count, len(self.broker.packets))):
            self.coming += self.broker.work()

    @precondition(lambda self: self.coming)
    @rule(count=st.integers(1, 6))
    def we_hear(self, count: int) -> None:
        for event in self.coming[:count]:
            self.hear(event)
        del self.coming[:count]

    def hear(self, event: Answer) -> None:
        if isinstance(event, SubAck) and event.codes == (128,):
            # From here on it may be asked for again.
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
            (emission,) = emitted
            assert isinstance(emission.value, UnauthorizedError)
            self.refusal_before_flush = True

    # What users do

    def expect(self, pending: Pending[Any], expected: object) -> None:
        self.all.append(pending)
        self.expected[max(self.session._pending, key=lambda id: id == self.session._last_id)] = (
            pending,
            expected,
        )

    @precondition(lambda self: not self.session.full)
    @rule(key=keys)
    def publish(self, key: str) -> None:
        topic = f"{key}/a/".encode()
        pending = self.session.publish_qos_1(topic, b"x", key, "a/")
        self.send(Publish(topic, b"x", self.session._last_id, False))
        self.expect(pending, UnauthorizedError if key == BAD else None)

    @rule(key=keys)
    def publish_at_0(self, key: str) -> None:
        self.session.publish(f"{key}/a/".encode(), b"x")
        self.send(Publish(f"{key}/a/".encode(), b"x", None, False))

    @precondition(lambda self: not self.session.full)
    @rule(key=keys, kind=st.sampled_from(["good", "too large", "nonsense", "me"]))
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
    @rule(key=keys, channel=st.sampled_from(FILTERS), replay=st.sampled_from([ANY, NONE]))
    def subscribe(self, key: str, channel: str, replay: Replay) -> None:
        before = len(self.broker.packets)
        # Nothing is delivered to "#", so that what the broker replays would reach nobody.
        overlapped = self.wants.overlaps(channel) or channel == "#/"
        group, plain = unshare(channel)
        held = {grant.filter for grant in self.users if grant not in self.refused} - {channel}
        if any((group or unshare(one)[0]) and overlap(plain, unshare(one)[1]) for one in held):
            with pytest.raises(SubscriptionConflictError, match="group"):
                self.session.subscribe(key, key, channel, replay)
            assert len(self.broker.packets) == before
            return
        grant, by_history = self.session.subscribe(key, key, channel, replay)
        assert by_history == (overlapped and replay is ANY)
        self.users.append(grant)
        if len(self.broker.packets) > before:
            packet = self.broker.packets[-1]
            assert isinstance(packet, Subscribe)
            quiet = overlapped or replay is NONE
            assert packet.topic.endswith("?last=0") == quiet
            self.expect(grant.asked, UnauthorizedError if key == BAD else None)

    @precondition(lambda self: self.users and len(self.outstanding) < 58)
    @rule(which=st.integers(0))
    def leave(self, which: int) -> None:
        grant = self.users.pop(which % len(self.users))
        self.session.unsubscribe_unused(self.wants.leave(grant))

    @rule(which=st.integers(0))
    def give_up(self, which: int) -> None:
        # The caller is gone; what it asked goes its way.
        waiting = [pending for pending, _ in self.expected.values()]
        if waiting:
            waiting[which % len(waiting)].begin_wait()
            waiting[which % len(waiting)].end_wait()

    # What others do

    @rule(
        operation=st.sampled_from(["me", "keygen", "error", "history", "x"]),
        req=st.sampled_from([0, -1, 61, "1", [1], 1.5, True, 10**20]),
    )
    def somebody_forges(self, operation: str, req: object) -> None:
        self.dropped(answer(operation, req=req, status=200, id="forged", key="f", channel="f/"))

    @rule(binary=st.sampled_from([b"", b"[]", b"{", b"\xff", b"5", b"[" * 3000]))
    def somebody_sends_nonsense(self, binary: bytes) -> None:
        self.dropped(EmitterMessage("emitter/keygen/", binary))

    @precondition(lambda self: self.outstanding)
    @rule(which=st.integers(0))
    def somebody_answers_another_question(self, which: int) -> None:
        number = sorted(self.outstanding)[which % len(self.outstanding)]
        self.dropped(answer("history", req=number, messages=[]))

    @rule(id=st.integers(61, 65535))
    def an_acknowledgement_comes_late(self, id: int) -> None:
        for event in (PubAck(id), SubAck(id, (128,)), UnsubAck(id)):
            self.dropped(event)

    def dropped(self, event: Answer) -> None:
        before = self.session.nonsense, self.session.pending
        for emission in self.session.receive(event):
            wide = emission.event == "message" and self.wants.is_subscribed("#/") is not None
            assert wide or isinstance(emission.value, RemoteProtocolError)
        assert self.session.nonsense == before[0] + 1
        assert self.session.pending == before[1]

    @rule()
    def the_link_is_lost(self) -> None:
        self.session.lost(lambda: ConnectionLostError("gone"))
        assert self.session.pending == 0
        assert all(pending.done for pending in self.all)
        self.begin()

    # What always holds

    @invariant()
    def as_much_is_pending_as_is_unacknowledged(self) -> None:
        assert self.session.pending == len(self.outstanding) + len(self.flushes)

    @invariant()
    def nothing_is_done_before_it_is_answered(self) -> None:
        for pending, _ in self.expected.values():
            assert pending.request is not None or not pending.done

    @rule()
    def in_the_end_the_broker_has_what_is_used(self) -> None:
        while self.broker.packets or self.coming:
            if self.coming:
                self.hear(self.coming.pop(0))
            else:
                self.coming += self.broker.work()
        assert self.broker.subscriptions == {
            grant.filter for grant in self.users if grant.key != BAD
        }
        assert not self.expected
        assert not self.outstanding


def outcome(pending: Pending[Any]) -> object:
    """The value, or the type of the error."""
    try:
        return pending.result()
    except EmitterError as exc:
        return type(exc)


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_who_asks_when_it_is_done_is_called_at_once() -> None:
    called: list[str] = []
    pending: Pending[int] = Pending("me")
    pending.call_when_done(lambda: called.append("before"))
    assert called == []
    pending.succeed(7)
    pending.call_when_done(lambda: called.append("after"))
    assert called == ["before", "after"]
    assert pending.result() == 7
