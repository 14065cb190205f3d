"""Tests in which a key is shown, as if the library had; ``test_support.py`` sees each one fail."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

import anyio.lowlevel
import pytest

from emitter_anyio import ChannelKey, EmitterError, connect
from emitter_anyio.testing import Broker

PASSWORD = "a password that nobody sees"

NOTHING: dict[str, str] = {}

left: list[object] = []  # keeps things alive beyond their test


@pytest.fixture
def key(anyio_backend: object) -> str:
    return Broker().keygen("a/")


async def test_a_log_line(key: str) -> None:
    logging.getLogger("emitter_anyio").debug("subscribed to %s", f"{key}/a/")


async def test_an_argument_of_a_log_line(key: str) -> None:
    logging.getLogger("emitter_anyio.testing").info("%.3s…", key)


async def test_an_exception_in_the_log(key: str) -> None:
    try:
        NOTHING[key]
    except KeyError:
        logging.getLogger("emitter_anyio").exception("it failed")


async def test_a_repr(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChannelKey, "__repr__", lambda self: f"ChannelKey({self.key!r})")
    ChannelKey(key, "a/")


async def test_an_error_that_outlives_the_test(key: str) -> None:
    left.append(EmitterError(f"no access to {key}/a/"))


async def test_an_error_message(key: str) -> None:
    with suppress(EmitterError):
        raise EmitterError(f"no access to {key}/a/")


async def test_a_cause(key: str) -> None:
    with suppress(EmitterError):
        try:
            NOTHING[key]
        except KeyError as exc:
            raise EmitterError("no access") from exc


async def test_a_context(key: str) -> None:
    with suppress(EmitterError):
        try:
            NOTHING[key]
        except KeyError:
            raise EmitterError("no access")  # noqa: B904 - on purpose


async def test_a_note(key: str) -> None:
    with suppress(EmitterError):
        error = EmitterError("no access")
        error.add_note(f"with {key}")
        raise error


async def test_one_error_of_a_group(key: str) -> None:
    with suppress(EmitterError):
        raise EmitterError("no access") from ExceptionGroup("several", [ValueError(key)])


async def test_a_password(anyio_backend: object) -> None:
    connect("mqtt://h", username="ann", password=PASSWORD)
    logging.getLogger("emitter_anyio").info("connecting to mqtt://ann:%s@h", PASSWORD)


async def test_a_password_in_a_url(anyio_backend: object) -> None:
    connect("mqtt://ann:not%2Fshown%2Fever@h")
    logging.getLogger("emitter_anyio").info("connecting to %s", "mqtt://ann:not%2Fshown%2Fever@h")


async def test_a_licence(anyio_backend: object) -> None:
    logging.getLogger("emitter_anyio.testing").info("the licence is %s", Broker().license)


async def test_a_key_that_is_none(anyio_backend: object) -> None:
    emitter = connect("mqtt://h")
    with suppress(ValueError):
        await emitter.publish("not a key at all", "a/", "m")
    with suppress(EmitterError):
        raise EmitterError("not a key at all is no key")


async def test_what_is_printed(key: str) -> None:
    sys.stderr.write(f"{key}\n")


async def test_showing_nothing(key: str) -> None:
    await anyio.lowlevel.checkpoint()
    logging.getLogger("emitter_anyio").info("%r", ChannelKey(key, "a/"))
    with suppress(EmitterError):
        try:
            NOTHING[key]
        except KeyError:
            raise EmitterError("no access") from None
