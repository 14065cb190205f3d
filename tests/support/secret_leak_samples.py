"""
Tests that show a secret, as a faulty library might.

``test_support.py`` runs them and checks that all but the last fail.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

import anyio.lowlevel
import pytest

from emitter_anyio import ChannelKey, EmitterError, connect
from emitter_anyio.testing import Broker

PASSWORD = "a password that never appears"

EMPTY: dict[str, str] = {}

kept: list[object] = []  # outlives the tests


@pytest.fixture
def key(anyio_backend: object) -> str:
    return Broker().keygen("a/")


async def test_secret_in_log_message(key: str) -> None:
    logging.getLogger("emitter_anyio").debug("subscribed to %s", f"{key}/a/")


async def test_secret_in_log_argument(key: str) -> None:
    logging.getLogger("emitter_anyio.testing").info("%.3s…", key)


async def test_secret_in_logged_exception(key: str) -> None:
    try:
        EMPTY[key]
    except KeyError:
        logging.getLogger("emitter_anyio").exception("it failed")


async def test_secret_in_repr(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChannelKey, "__repr__", lambda self: f"ChannelKey({self.key!r})")
    ChannelKey(key, "a/")


async def test_secret_in_error_that_outlives_the_test(key: str) -> None:
    kept.append(EmitterError(f"no access to {key}/a/"))


async def test_secret_in_error_message(key: str) -> None:
    with suppress(EmitterError):
        raise EmitterError(f"no access to {key}/a/")


async def test_secret_in_cause(key: str) -> None:
    with suppress(EmitterError):
        try:
            EMPTY[key]
        except KeyError as exc:
            raise EmitterError("no access") from exc


async def test_secret_in_context(key: str) -> None:
    with suppress(EmitterError):
        try:
            EMPTY[key]
        except KeyError:
            raise EmitterError("no access")  # noqa: B904 - the context is what is tested


async def test_secret_in_note(key: str) -> None:
    with suppress(EmitterError):
        error = EmitterError("no access")
        error.add_note(f"with {key}")
        raise error


async def test_secret_in_exception_group(key: str) -> None:
    with suppress(EmitterError):
        raise EmitterError("no access") from ExceptionGroup("several", [ValueError(key)])


async def test_password_in_log(anyio_backend: object) -> None:
    connect("mqtt://h", username="ann", password=PASSWORD)
    logging.getLogger("emitter_anyio").info("connecting to mqtt://ann:%s@h", PASSWORD)


async def test_url_password_in_log(anyio_backend: object) -> None:
    connect("mqtt://ann:not%2Fshown%2Fever@h")
    logging.getLogger("emitter_anyio").info("connecting to %s", "mqtt://ann:not%2Fshown%2Fever@h")


async def test_licence_in_log(anyio_backend: object) -> None:
    logging.getLogger("emitter_anyio.testing").info("the licence is %s", Broker().license)


async def test_malformed_key_in_error_message(anyio_backend: object) -> None:
    emitter = connect("mqtt://h")
    with suppress(ValueError):
        await emitter.publish("not a key at all", "a/", "m")
    with suppress(EmitterError):
        raise EmitterError("not a key at all is not a key")


async def test_secret_on_stderr(key: str) -> None:
    sys.stderr.write(f"{key}\n")


async def test_without_a_secret(key: str) -> None:
    await anyio.lowlevel.checkpoint()
    logging.getLogger("emitter_anyio").info("%r", ChannelKey(key, "a/"))
    with suppress(EmitterError):
        try:
            EMPTY[key]
        except KeyError:
            raise EmitterError("no access") from None
