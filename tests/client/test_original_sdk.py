"""Every name in the README of the original Emitter SDK for Python works here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from emitter_anyio import Emitter, EmitterMessage, connect
from tests.client.tools import Calls, texts
from tests.support.server import Server

pytestmark = pytest.mark.emitter

EVENTS = ("connect", "disconnect", "message", "presence", "keygen", "me")


class Program:
    """A program written for the original SDK, with ``await`` added."""

    def __init__(self, server: Server, channel: str) -> None:
        self.server = server
        self.channel = channel  # without a trailing slash, as in that README
        self.emitter = connect(
            {
                "host": server.host,
                "port": server.port,
                "secure": server.secure,
                "keepalive": 30,
            }
        )
        self.calls = {event: Calls() for event in (*EVENTS, "keyban", "link", "error")}
        for event, calls in self.calls.items():
            on: Any = self.emitter.on
            on(event, calls)
        self.key = ""

    async def message(self, payload: object) -> EmitterMessage:
        await self.emitter.subscribe(self.key, self.channel)
        await self.emitter.publish(self.key, self.channel, payload)
        (message,) = await self.calls["message"].get(1)
        assert isinstance(message, EmitterMessage)
        return message


async def connects(program: Program) -> None:
    assert isinstance(program.emitter, Emitter)
    assert await program.calls["connect"].get(1) == [None]


async def disconnects(program: Program) -> None:
    await program.emitter.disconnect()
    assert program.calls["disconnect"].values == [None]


async def publishes(program: Program) -> None:
    message = await program.message("Hello Emitter!")
    assert message.asString() == "Hello Emitter!"


async def publishes_with_a_ttl(program: Program) -> None:
    await program.emitter.publish(program.key, program.channel, "stored", ttl=60)
    await program.emitter.subscribe(program.key, program.channel)
    assert texts(await program.calls["message"].get(1)) == ["stored"]


async def publishes_without_a_ttl(program: Program) -> None:
    for ttl in (None, 0):
        await program.emitter.publish(program.key, program.channel, "m", ttl)
    await program.emitter.subscribe(program.key, program.channel, 10)
    await program.emitter.flush()
    assert program.emitter.statistics().received == 0


async def subscribes(program: Program) -> None:
    message = await program.message("m")
    assert message.channel == f"{program.channel}/"


async def subscribes_with_last(program: Program) -> None:
    for number in ("1", "2", "3"):
        await program.emitter.publish(program.key, program.channel, number, 60)
    await program.emitter.subscribe(program.key, program.channel, last=2)
    assert sorted(texts(await program.calls["message"].get(2))) == ["2", "3"]


async def unsubscribes(program: Program) -> None:
    await program.message("one")
    await program.emitter.unsubscribe(program.key, program.channel)
    await program.emitter.publish(program.key, program.channel, "two")
    await program.emitter.disconnect()
    assert texts(program.calls["message"].values) == ["one"]


async def emits_presence(program: Program) -> None:
    await program.emitter.presence(program.key, program.channel)
    (status,) = await program.calls["presence"].get(1)
    assert (status.event, status.channel, status.who) == ("status", f"{program.channel}/", ())


async def emits_keygen(program: Program) -> None:
    await program.emitter.keygen(program.server.secret, program.channel)
    (_, created) = await program.calls["keygen"].get(2)
    assert (len(created.key), created.channel) == (32, f"{program.channel}/")


async def publishes_with_link(program: Program) -> None:
    emitter = program.emitter
    await emitter.link(program.key, program.channel, "a0", subscribe=True, ttl=60)
    await emitter.publish_with_link("a0", "Hello Emitter!")
    assert texts(await program.calls["message"].get(1)) == ["Hello Emitter!"]
    assert dict((await emitter.me()).links) == {"a0": f"{program.channel}/?ttl=60"}


async def emits_keyban(program: Program) -> None:
    await program.emitter.keyban(program.server.secret, program.key, True)
    assert await program.calls["keyban"].get(1) == [True]
    await program.emitter.publish(program.key, program.channel, "m")
    (error,) = await program.calls["error"].get(1)
    assert error.status == 401


async def emits_me(program: Program) -> None:
    await program.emitter.me()
    (me,) = await program.calls["me"].get(1)
    assert me.id
    assert dict(me.links) == {}


async def emits_error(program: Program) -> None:
    await program.emitter.publish("A" * 32, program.channel, "m")
    (error,) = await program.calls["error"].get(1)
    assert (error.status, bool(error.message)) == (401, True)


async def on_adds_a_handler(program: Program) -> None:
    more = Calls()
    program.emitter.on("message", more)
    await program.message("m")
    assert texts(await more.get(1)) == ["m"]


async def decodes_text(program: Program) -> None:
    assert (await program.message("grüß")).asString() == "grüß"


async def decodes_objects(program: Program) -> None:
    assert (await program.message('{"a": 1}')).asObject() == {"a": 1}


async def decodes_bytes(program: Program) -> None:
    message = await program.message("x")
    assert message.asBinary() == message.binary == b"x"


ROWS: dict[str, Callable[[Program], Awaitable[None]]] = {
    "connect(options), event connect": connects,
    "Emitter.disconnect(), event disconnect": disconnects,
    "Emitter.publish(key, channel, message)": publishes,
    "Emitter.publish(key, channel, message, ttl=60)": publishes_with_a_ttl,
    "Emitter.publish(key, channel, message, 0)": publishes_without_a_ttl,
    "Emitter.subscribe(key, channel), event message": subscribes,
    "Emitter.subscribe(key, channel, last=2)": subscribes_with_last,
    "Emitter.unsubscribe(key, channel)": unsubscribes,
    "Emitter.presence(key, channel), event presence": emits_presence,
    "Emitter.keygen(key, channel), event keygen": emits_keygen,
    "Emitter.link(key, channel, name), publish_with_link(name, message)": publishes_with_link,
    "Emitter.keyban(secret, target, banned)": emits_keyban,
    "Emitter.me(), event me": emits_me,
    "Emitter.on(event, handler)": on_adds_a_handler,
    "event error": emits_error,
    "EmitterMessage.asString()": decodes_text,
    "EmitterMessage.asObject()": decodes_objects,
    "EmitterMessage.asBinary(), .binary": decodes_bytes,
}


@pytest.mark.parametrize("row", ROWS)
async def test_original_sdk(row: str, server: Server, unique: str) -> None:
    program = Program(server, unique.rstrip("/"))
    async with program.emitter:
        program.key = (await program.emitter.keygen(server.secret, program.channel, "rwslp")).key
        await ROWS[row](program)
