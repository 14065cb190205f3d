"""The web chat example over ASGI; ``tests/browser.py`` tests it in browsers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import anyio
import pytest

from emitter_anyio import ChannelKey, connect
from emitter_anyio.testing import Broker
from examples.web_chat import people as people_module
from examples.web_chat.people import People
from tests.support.asgi import Application, lifespan, websocket
from tests.support.command import ROOT

APP = ROOT / "examples/web_chat/app.py"
ID = "0123456789abcdef" * 2


def load(name: str = "app") -> Application:
    """Load the application; each name gives a separate instance."""
    spec = importlib.util.spec_from_file_location(f"examples.web_chat.{name}", APP)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app: Application = module.app
    return app


def people(*names: str, live: bool = True) -> Callable[[Any], bool]:
    return lambda said: said == {"people": [*names], "live": live}


def text(words: str) -> Callable[[Any], bool]:
    return lambda said: said.get("text") == words


def all_received(expected: list[Callable[[Any], bool]], said: Any) -> bool:
    """Remove matching entries from the list, and return whether it is empty."""
    expected[:] = [each for each in expected if not each(said)]
    return not expected


@pytest.fixture
def app_broker(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Broker:
    """The broker that the application uses."""
    monkeypatch.setenv("EMITTER_URL", broker.url)
    monkeypatch.setenv("EMITTER_SECRET", broker.secret_key)
    return broker


async def test_app_starts_its_own_broker(
    monkeypatch: pytest.MonkeyPatch, anyio_backend: object
) -> None:
    monkeypatch.delenv("EMITTER_URL", raising=False)
    app = load()
    async with lifespan(app), websocket(app, "/chat", name="ann") as ann:
        await ann.receive_json(people("ann"))
        await ann.send_text(ID + "<b>hello</b>")
        heard = await ann.receive_json(text("<b>hello</b>"))
        assert (heard["id"], heard["name"]) == (ID, "ann")


async def test_two_browsers_chat(app_broker: Broker) -> None:
    app = load()
    async with lifespan(app), websocket(app, "/chat", name=" Ann  Lee ") as ann:
        async with websocket(app, "/chat", name="ben") as ben:
            await ann.receive_json(people("Ann Lee", "ben"))
            await ben.receive_json(people("Ann Lee", "ben"))
            await ann.send_text(ID + "hello")
            await ann.receive_json(text("hello"))
            await ben.receive_json(text("hello"))
        await ann.receive_json(people("Ann Lee"))
        await ann.send_text(ID + "are you there?")
        await ann.receive_json(text("are you there?"))
        async with websocket(app, "/chat", name="ben") as ben:
            await ben.receive_json(text("are you there?"))


async def test_name_is_listed_until_its_last_window_closes(app_broker: Broker) -> None:
    app = load()
    async with lifespan(app), websocket(app, "/chat", name="ann") as ann:
        async with websocket(app, "/chat", name="ann"), websocket(app, "/chat") as unnamed:
            await unnamed.receive_json(people("ann", "Guest"))
            await ann.receive_json(people("ann", "Guest"))
        await ann.receive_json(people("ann"))


async def test_chat_continues_after_the_broker_was_unreachable(app_broker: Broker) -> None:
    app = load()
    async with lifespan(app), websocket(app, "/chat", name="ann") as ann:
        await ann.send_text(ID + "before")
        await ann.receive_json(text("before"))
        with app_broker.refuse():
            await app_broker.drop()
            await ann.receive_json(people("ann", live=False))
            said = {"id": ID[::-1], "name": "ben", "text": "during the outage", "at": 0}
            await app_broker.publish("webchat/room/", json.dumps(said), ttl=60)
            await ann.send_text(ID + "sent during the outage")
        expected = [people("ann"), text("during the outage"), text("sent during the outage")]
        await ann.receive_json(lambda said: all_received(expected, said))


async def test_two_servers_share_one_chat(app_broker: Broker) -> None:
    first, second = load("first"), load("second")
    async with lifespan(first), websocket(first, "/chat", name="ann") as ann:
        async with anyio.create_task_group() as tasks:

            async def other() -> None:
                async with lifespan(second), websocket(second, "/chat", name="ben") as ben:
                    await ben.receive_json(people("ann", "ben"))
                    await ben.send_text(ID + "hello")
                    await anyio.sleep_forever()

            tasks.start_soon(other)
            await ann.receive_json(people("ann", "ben"))
            await ann.receive_json(text("hello"))
            tasks.cancel_scope.cancel()  # without a clean close: presence reports it
        await ann.receive_json(people("ann"))


async def test_unexpected_messages_do_no_harm(app_broker: Broker) -> None:
    app = load()
    async with connect(app_broker.url) as emitter, lifespan(app):
        key = app_broker.keygen("webchat/#/", "rws")
        async with websocket(app, "/chat", name="ann") as ann:
            await ann.receive_json(people("ann"))
            await emitter.publish(key, "webchat/room/", b"\xff", ttl=60, qos=1)
            while (await ann.receive("websocket.send"))["text"] != "\N{REPLACEMENT CHARACTER}":
                pass
            await ann.send_text(ID + "x" * 5000)
            await ann.receive_json(text("x" * 2000))


@pytest.mark.parametrize("name", ["\x00\x1b" * 12, " \n", "\u202e"])
async def test_name_of_control_characters_is_replaced(app_broker: Broker, name: str) -> None:
    app = load()
    async with lifespan(app), websocket(app, "/chat", name=name) as unnamed:
        await unnamed.receive_json(people("Guest"))
        async with websocket(app, "/chat", name="a\x00nn \t lee") as ann:
            await ann.receive_json(people("ann lee", "Guest"))


async def test_simultaneous_arrivals_are_sent_as_one_list(
    app_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people_module, "PAUSE", 3600)
    app = load()
    async with lifespan(app), AsyncExitStack() as stack:
        ann = await stack.enter_async_context(websocket(app, "/chat", name="ann"))
        await ann.receive_json(people("ann"))
        for number in range(20):
            other = await stack.enter_async_context(websocket(app, "/chat", name=str(number)))
            await other.receive_json(lambda said: "ann" in said["people"])
        await ann.send_text(ID + "hello")
        lists = 0
        while (await ann.receive_json(lambda said: True)).get("text") != "hello":
            lists += 1
        assert lists <= 1


async def test_long_lists_of_names_reach_other_servers(app_broker: Broker) -> None:
    names = {chr(0x1F600 + number % 64) * 20 + f"{number:04}" for number in range(1500)}
    key = ChannelKey(app_broker.keygen("webchat/#/", "rwslp"), "webchat/#/")
    async with connect(app_broker.url, username="a") as a, connect(app_broker.url) as c:
        async with connect(app_broker.url, username="b") as b, anyio.create_task_group() as tasks:
            here, there = People("a", a, key), People("b", b, key)
            with ExitStack() as visits:
                for name in names:
                    visits.enter_context(here.visit(name))
                for server in (here, there):
                    tasks.start_soon(server.run)
                while set(there.names) != names:
                    await there.changed.wait()
                for junk in ("no JSON", [1], {"start": 0, "names": [1]}, {"start": "x"}):
                    await c.publish(key, "webchat/people/a/", junk, qos=1)
            while there.names:
                await there.changed.wait()
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("origin", "answer"),
    [
        (b"https://chat.example", "websocket.accept"),
        (b"https://evil.example", "websocket.close"),
        (b"https://chat.example.evil.example", "websocket.close"),
        (b"null", "websocket.close"),
    ],
)
async def test_other_origin_is_rejected(app_broker: Broker, origin: bytes, answer: str) -> None:
    app = load()
    headers = [(b"host", b"chat.example"), (b"origin", origin)]
    async with lifespan(app), websocket(app, "/chat", headers=headers, answer=answer):
        pass


def test_page_has_a_strict_content_security_policy() -> None:
    page = (APP.parent / "static/index.html").read_text()
    assert """<meta http-equiv="Content-Security-Policy" content="default-src 'self'">""" in page
