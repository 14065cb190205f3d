"""Keys, passwords, and topics and URLs that contain them, are in no log, repr or exception."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable

import anyio
import pytest

from emitter_anyio import Emitter, EmitterError, EmitterMessage, Will, connect
from tests.client.tools import Calls, enter, relay
from tests.support.connections import connect_once
from tests.support.server import Server

pytestmark = pytest.mark.emitter

PASSWORD = "hunter2-and-more"
NO_KEY = "NoSuchKeyNoSuchKeyNoSuchKeyNoSuc"
SHORT = "tooshortakey"
BROKEN = "brokenkey with spaces/and+more"


async def test_no_secret_is_shown_anywhere(
    server: Server, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    secrets = [server.secret, PASSWORD, NO_KEY, SHORT, BROKEN]

    def show(*values: object) -> None:
        shown.extend(f"{value} {value!r}" for value in values)

    async def check_failure(call: Awaitable[object]) -> None:
        with pytest.raises((EmitterError, ValueError)) as caught:
            await call
        error = caught.value
        show(error, vars(error))
        shown.extend(traceback.format_exception(error))

    url = server.url.replace("://", f"://bob:{PASSWORD}@")
    async with connect(server.url) as keymaker:
        created = await keymaker.keygen(server.secret, f"{unique}#/", "rwslp")
        weak = await keymaker.keygen(server.secret, f"{unique}#/", "s")
    secrets += [created.key, weak.key]
    key = created.key

    emitter = connect(url, will=Will(key, unique, "gone"))
    calls, errors = Calls(), Calls()

    @emitter.on("message")
    def raising(message: EmitterMessage) -> None:
        calls(message)
        raise ValueError("boom")

    emitter.on("error", errors)
    show(created, weak, Will(key, unique, "gone"), emitter, emitter.statistics())
    await check_failure(emitter.publish(key, unique, "before"))
    await check_failure(enter(connect(url.replace(str(server.port), "1"))))
    async with emitter:
        show(emitter, emitter.connection, await emitter.me())
        subscribing = emitter.subscribe(key, unique)
        show(subscribing)
        await subscribing
        async with (
            emitter.subscribe(key, unique) as messages,
            emitter.watch_presence(key, unique) as feed,
        ):
            await emitter.publish(key, unique, "m", ttl=60, qos=1)
            show(messages, messages.statistics(), await messages.receive())
            show(feed, feed.members, await feed.receive(), await emitter.presence(key, unique))
        for bad in (NO_KEY, SHORT, BROKEN, weak.key):
            await check_failure(emitter.publish(bad, unique, "m", qos=1))
            await check_failure(subscribe(emitter, bad, unique))
            await check_failure(emitter.keygen(bad, unique))
            await check_failure(emitter.presence(bad, unique))
            await check_failure(watch(emitter, bad, unique))
            await check_failure(emitter.unsubscribe(bad, f"x{unique}"))
        await emitter.publish(NO_KEY, unique, "m")
        await check_failure(emitter.flush())
        await check_failure(emitter.publish(key, "a b/", "m"))
        await check_failure(emitter.publish(key, unique, bytes(65536)))
        await check_failure(emitter.publish(key, unique, "m", qos=2))  # type: ignore[arg-type]  # on purpose
        await check_failure(emitter.keygen(server.secret, "a/" * 24))
        await check_failure(emitter.keygen(server.secret, unique, "z"))
        await check_failure(emitter.publish(key, f"{unique}p/q/", "m", ttl=-1))
        await emitter.subscribe(key, f"{unique}p/q/")
        await check_failure(subscribe(emitter, key, f"{unique}q/p/"))
        with pytest.warns(RuntimeWarning) as warned:
            emitter.subscribe(key, unique)
        show(warned[0].message)
        show(emitter.statistics())
    assert calls.values
    assert len(errors.values) >= 2
    show(*calls.values, *errors.values, emitter)
    for error in errors.values:
        shown.extend(traceback.format_exception(error))
    await check_failure(emitter.me())

    async with relay(server) as proxy:
        with pytest.raises(EmitterError) as caught:
            async with connect_once(
                host="127.0.0.1", port=proxy.port, secure=False, username="bob", password=PASSWORD
            ) as lost:
                async with lost.subscribe(key, unique):
                    proxy.cut()
                    await anyio.sleep_forever()
    shown.extend(traceback.format_exception(caught.value))

    shown.extend(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
    everything = "\n".join(shown)
    assert any(record.name == "emitter_anyio" for record in caplog.records)
    assert unique in everything
    for secret in secrets:
        assert [line for line in everything.splitlines() if secret in line] == []


async def subscribe(emitter: Emitter, key: str, channel: str) -> None:
    await emitter.subscribe(key, channel)


async def watch(emitter: Emitter, key: str, channel: str) -> None:
    await enter(emitter.watch_presence(key, channel))
