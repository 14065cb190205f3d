from __future__ import annotations

import pytest

from emitter_anyio._values.errors import (
    BadRequestError,
    NotFoundError,
    RequestError,
    ServerError,
    UnauthorizedError,
)
from emitter_anyio._values.hints import make_refusal

SECRET = "S" * 32
KEY = "k" * 32


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, BadRequestError), (404, NotFoundError), (500, ServerError), (None, RequestError)],
)
def test_refusal_other_than_401_has_no_hint(status: int | None, kind: type[RequestError]) -> None:
    error = make_refusal(status, "no", "publish", KEY, "a/")
    assert type(error) is kind
    assert error.hint is None
    assert (error.status, error.message, error.operation, error.channel) == (
        status,
        "no",
        "publish",
        "a/",
    )


def test_keygen_refused_with_404_hints_at_secret_of_another_broker() -> None:
    hint = make_refusal(404, "no", "keygen", KEY, "a/").hint
    assert hint is not None
    assert "the broker's secret key" in hint


def test_refusal_without_key_has_no_hint() -> None:
    assert make_refusal(401, "no", "me", None, None).hint is None


@pytest.mark.parametrize(
    ("operation", "permission"),
    [
        ("publish", "'w' (write)"),
        ("subscribe", "'r' (read)"),
        ("unsubscribe", "'r' (read)"),
        ("presence", "'p' (presence)"),
        ("history", "'l' (load)"),
        ("link", "permission"),
    ],
)
def test_hint_names_permission_that_might_be_missing(operation: str, permission: str) -> None:
    error = make_refusal(401, "no", operation, KEY, "a/")
    assert isinstance(error, UnauthorizedError)
    assert error.hint is not None
    assert permission in error.hint
    assert "'+/'" in error.hint


@pytest.mark.parametrize(
    ("key", "operation", "words", "hint"),
    [
        ("chat", "publish", "no", "expected 32 characters, got 4"),
        (KEY[:-1] + "!", "keygen", "no", "32 characters"),
        (KEY + "k", "publish", "no", "got 33"),
        (KEY, "publish", "the key with extend permission …", "extend"),
        (SECRET, "keygen", "no", "permission 'e'"),
        (SECRET, "keyban", "no", "secret"),
    ],
)
def test_hint_names_malformed_key_or_missing_secret(
    key: str, operation: str, words: str, hint: str
) -> None:
    error = make_refusal(401, words, operation, key, "a/")
    assert error.hint is not None
    assert hint in error.hint
    assert key not in str(error)


def test_hint_for_group_names_channel_of_group_key() -> None:
    channel = "$share/g/a/"
    error = make_refusal(401, "no", "subscribe", KEY, channel)
    assert error.hint is not None
    assert repr(channel) in error.hint


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, "link"),
        (401, "'w'"),
        (403, None),
    ],
)
def test_hint_for_publish_with_link_depends_on_status(status: int, hint: str | None) -> None:
    error = make_refusal(status, "no", "publish_with_link", None, None)
    assert (hint or "") in (error.hint or "")
    assert (error.hint is None) == (hint is None)
