from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from emitter_anyio._values import errors as errors
from emitter_anyio._values.errors import (
    BadRequestError,
    ClosedError,
    ConnectError,
    ConnectionLostError,
    ConnectRefusedError,
    EmitterError,
    ForbiddenError,
    HandlerError,
    HistoryIncompleteError,
    InvalidChannelError,
    MessageTooLargeError,
    NotFoundError,
    PaymentRequiredError,
    RemoteProtocolError,
    ReplyError,
    RequestError,
    RequestTimeoutError,
    ServerError,
    SlowConsumerError,
    SubscriptionConflictError,
    UnauthorizedError,
    WrongLoopError,
    make_request_error,
)
from emitter_anyio._values.messages import EmitterMessage
from emitter_anyio._values.text import make_printable

TREE: dict[type[Exception], tuple[type[Exception], ...]] = {
    EmitterError: (Exception,),
    ConnectError: (EmitterError,),
    ConnectRefusedError: (ConnectError,),
    ConnectionLostError: (EmitterError, anyio.BrokenResourceError),
    ClosedError: (EmitterError, anyio.ClosedResourceError),
    WrongLoopError: (EmitterError, RuntimeError),
    RequestTimeoutError: (EmitterError, TimeoutError),
    ReplyError: (EmitterError,),
    errors.DecodeError: (EmitterError, ValueError),
    RemoteProtocolError: (EmitterError,),
    SlowConsumerError: (EmitterError,),
    SubscriptionConflictError: (EmitterError,),
    HandlerError: (EmitterError,),
    InvalidChannelError: (EmitterError, ValueError),
    MessageTooLargeError: (EmitterError, ValueError),
    RequestError: (EmitterError,),
    BadRequestError: (RequestError,),
    UnauthorizedError: (RequestError,),
    PaymentRequiredError: (RequestError,),
    ForbiddenError: (RequestError,),
    NotFoundError: (RequestError,),
    ServerError: (RequestError,),
    HistoryIncompleteError: (RequestError,),
}


def below(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for child in kind.__subclasses__():
        yield from below(child)


@pytest.mark.parametrize(("kind", "bases"), TREE.items(), ids=str)
def test_the_tree(kind: type[Exception], bases: tuple[type[Exception], ...]) -> None:
    assert kind.__bases__ == bases


def test_the_tree_has_nothing_more() -> None:
    ours = {kind for kind in below(EmitterError) if vars(errors).get(kind.__name__) is kind}
    assert ours == set(TREE)


@pytest.mark.parametrize("kind", TREE)
def test_every_error_says_what_it_is(kind: type[Exception]) -> None:
    assert kind.__doc__
    assert kind.__doc__.strip()


class TestRefusal:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, BadRequestError),
            (401, UnauthorizedError),
            (402, PaymentRequiredError),
            (403, ForbiddenError),
            (404, NotFoundError),
            (500, ServerError),
            (501, ServerError),
            (599, ServerError),
            (499, RequestError),
            (600, RequestError),
            (0, RequestError),
            (-1, RequestError),
            (None, RequestError),
        ],
    )
    def test_has_the_error_of_its_status(self, status: int | None, kind: type) -> None:
        error = make_request_error(status, "no", operation="keygen", channel="a/", hint="why")
        assert type(error) is kind
        assert (error.status, error.message, error.operation, error.channel, error.hint) == (
            status,
            "no",
            "keygen",
            "a/",
            "why",
        )

    @pytest.mark.parametrize(
        ("status", "channel", "hint", "words"),
        [
            (401, "a/b/", "the key", "publish 'a/b/': 401 no way (the key)"),
            (401, None, None, "publish: 401 no way"),
            (None, "a/", None, "publish 'a/': no way"),
            (None, None, "the key", "publish: no way (the key)"),
        ],
    )
    def test_says_all_that_is_known(
        self, status: int | None, channel: str | None, hint: str | None, words: str
    ) -> None:
        error = make_request_error(
            status, "no way", operation="publish", channel=channel, hint=hint
        )
        assert str(error) == words


class TestWhatTheErrorsCarry:
    def test_the_causes_by_server(self) -> None:
        causes: dict[str, Exception] = {"mqtt://a:1": OSError("x")}
        error = ConnectError("none", causes)
        causes.clear()
        assert list(error.causes) == ["mqtt://a:1"]
        assert ConnectError("none").causes == {}

    def test_the_code_of_the_connack(self) -> None:
        error = ConnectRefusedError("no", {"mqtt://a:1": OSError("x")}, code=5)
        assert error.code == 5
        assert list(error.causes) == ["mqtt://a:1"]

    def test_the_messages_that_nobody_has_read(self) -> None:
        unread = [EmitterMessage("a/", b"x")]
        assert ConnectionLostError("gone", unread).unread is unread
        later: list[EmitterMessage] = []
        assert ConnectionLostError("gone", later).unread is later, "it may be filled later"
        one, other = ConnectionLostError("gone"), ConnectionLostError("gone")
        assert one.unread == other.unread == []
        assert one.unread is not other.unread

    def test_how_many_were_dropped(self) -> None:
        assert SlowConsumerError("full", dropped=3).dropped == 3

    def test_the_event_of_a_handler(self) -> None:
        assert HandlerError("oh", event="message").event == "message"

    @pytest.mark.parametrize(
        ("error", "anyios"),
        [
            (ConnectionLostError("x"), anyio.BrokenResourceError),
            (ClosedError("x"), anyio.ClosedResourceError),
            (RequestTimeoutError("x"), TimeoutError),
        ],
    )
    def test_code_for_any_stream_catches_them(
        self, error: Exception, anyios: type[Exception]
    ) -> None:
        with pytest.raises(anyios, match="x"):
            raise error


def test_what_a_peer_says_is_one_line_and_not_too_long() -> None:
    assert make_printable("bad\n request \x1b[2J") == "bad request ?[2J"
    assert make_printable("x" * 70000) == "x" * 200 + "…"
