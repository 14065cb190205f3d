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
    make_decode_error,
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


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


@pytest.mark.parametrize(("kind", "bases"), TREE.items(), ids=str)
def test_error_has_documented_bases(
    kind: type[Exception], bases: tuple[type[Exception], ...]
) -> None:
    assert kind.__bases__ == bases


def test_tree_lists_every_error() -> None:
    library_errors = {
        kind for kind in subclasses(EmitterError) if vars(errors).get(kind.__name__) is kind
    }
    assert library_errors == set(TREE)


@pytest.mark.parametrize("kind", TREE)
def test_error_has_docstring(kind: type[Exception]) -> None:
    assert kind.__doc__
    assert kind.__doc__.strip()


class TestRequestError:
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
    def test_class_depends_on_status(self, status: int | None, kind: type) -> None:
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
    def test_message_contains_all_known_facts(
        self, status: int | None, channel: str | None, hint: str | None, words: str
    ) -> None:
        error = make_request_error(
            status, "no way", operation="publish", channel=channel, hint=hint
        )
        assert str(error) == words


class TestErrorAttributes:
    def test_connect_error_has_causes_by_server(self) -> None:
        causes: dict[str, Exception] = {"mqtt://a:1": OSError("x")}
        error = ConnectError("none", causes)
        causes.clear()
        assert list(error.causes) == ["mqtt://a:1"]
        assert ConnectError("none").causes == {}

    def test_connect_refused_error_has_connack_code(self) -> None:
        error = ConnectRefusedError("no", {"mqtt://a:1": OSError("x")}, code=5)
        assert error.code == 5
        assert list(error.causes) == ["mqtt://a:1"]

    def test_connection_lost_error_has_unread_messages(self) -> None:
        unread = [EmitterMessage("a/", b"x")]
        assert ConnectionLostError("gone", unread).unread is unread
        later: list[EmitterMessage] = []
        assert ConnectionLostError("gone", later).unread is later, "the client fills it later"
        one, other = ConnectionLostError("gone"), ConnectionLostError("gone")
        assert one.unread == other.unread == []
        assert one.unread is not other.unread

    def test_slow_consumer_error_has_dropped_count(self) -> None:
        assert SlowConsumerError("full", dropped=3).dropped == 3

    def test_handler_error_has_event(self) -> None:
        assert HandlerError("oh", event="message").event == "message"

    @pytest.mark.parametrize(
        ("error", "base"),
        [
            (ConnectionLostError("x"), anyio.BrokenResourceError),
            (ClosedError("x"), anyio.ClosedResourceError),
            (RequestTimeoutError("x"), TimeoutError),
        ],
    )
    def test_error_can_be_caught_as_anyio_error(
        self, error: Exception, base: type[Exception]
    ) -> None:
        with pytest.raises(base, match="x"):
            raise error


def test_text_of_peer_is_shortened_to_one_printable_line() -> None:
    assert make_printable("bad\n request \x1b[2J") == "bad request ?[2J"
    assert make_printable("x" * 70000) == "x" * 200 + "…"


def test_a_decode_error_shows_the_reason_unless_it_might_contain_a_key() -> None:
    error = make_decode_error("subscribe('a/')", EmitterMessage("a/", b"x\x1b"), ValueError("n\no"))
    assert str(error) == (
        "subscribe('a/'): cannot decode the message of 2 bytes from 'a/': ValueError: n o"
    )
    assert isinstance(error.__cause__, ValueError)
    error = make_decode_error("x", EmitterMessage("emitter/keygen/", b"key"), ValueError("key"))
    assert str(error).endswith("'emitter/keygen/': ValueError")
