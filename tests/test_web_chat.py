"""The web chat of the examples, without a browser: ``tests/browser.py`` has some."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from emitter_anyio import connect
from emitter_anyio.testing import Broker
from tests.support.asgi import Application, serving, websocket
from tests.support.command import ROOT

APP = ROOT / "examples/web_chat/app.py"
ID = "0123456789abcdef" * 2


def load(name: str = "app") -> Application:
    """Load the application: under each name, it is one of its own."""
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


@pytest.fixture
def its_broker(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Broker:
    """The broker that the application uses."""
    monkeypatch.setenv("EMITTER_URL", broker.url)
    monkeypatch.setenv("EMITTER_SECRET", broker.secret_key)
    return broker


async def test_with_a_broker_of_its_own(
    monkeypatch: pytest.MonkeyPatch, anyio_backend: object
) -> None:
    monkeypatch.delenv("EMITTER_URL", raising=False)
    app = load()
    async with serving(app), websocket(app, "/chat", name="ann") as ann:
        await ann.hear_json(people("ann"))
        await ann.say_text(ID + "<b>hello</b>")
        heard = await ann.hear_json(text("<b>hello</b>"))
        assert (heard["id"], heard["name"]) == (ID, "ann")


async def test_two_browsers(its_broker: Broker) -> None:
    app = load()
    async with serving(app), websocket(app, "/chat", name=" Ann  Lee ") as ann:
        async with websocket(app, "/chat", name="ben") as ben:
            await ann.hear_json(people("Ann Lee", "ben"))
            await ben.hear_json(people("Ann Lee", "ben"))
            await ann.say_text(ID + "hello")
            await ann.hear_json(text("hello"))
            await ben.hear_json(text("hello"))
        await ann.hear_json(people("Ann Lee"))
        await ann.say_text(ID + "are you there?")
        await ann.hear_json(text("are you there?"))
        async with websocket(app, "/chat", name="ben") as ben:
            await ben.hear_json(text("are you there?"))


async def test_a_name_is_there_until_its_last_window_is_closed(its_broker: Broker) -> None:
    app = load()
    async with serving(app), websocket(app, "/chat", name="ann") as ann:
        async with websocket(app, "/chat", name="ann"), websocket(app, "/chat") as nobody:
            await nobody.hear_json(people("ann", "Somebody"))
        await ann.hear_json(people("ann", "Somebody"))
        await ann.hear_json(people("ann"))


async def test_without_its_broker_for_a_while(its_broker: Broker) -> None:
    app = load()
    async with serving(app), websocket(app, "/chat", name="ann") as ann:
        await ann.say_text(ID + "before")
        await ann.hear_json(text("before"))
        with its_broker.refuse():
            await its_broker.drop()
            await ann.hear_json(people("ann", live=False))
            said = {"id": ID[::-1], "name": "ben", "text": "meanwhile", "at": 0}
            await its_broker.publish("webchat/room/", json.dumps(said), ttl=60)
            await ann.say_text(ID + "said while it was away")
        await ann.hear_json(people("ann"))
        await ann.hear_json(text("meanwhile"))
        await ann.hear_json(text("said while it was away"))


async def test_two_servers_are_one_chat(its_broker: Broker) -> None:
    first, second = load("first"), load("second")
    async with serving(first), websocket(first, "/chat", name="ann") as ann:
        async with anyio.create_task_group() as tasks:

            async def other() -> None:
                async with serving(second), websocket(second, "/chat", name="ben") as ben:
                    await ben.hear_json(people("ann", "ben"))
                    await ben.say_text(ID + "hello")
                    await anyio.sleep_forever()

            tasks.start_soon(other)
            await ann.hear_json(people("ann", "ben"))
            await ann.hear_json(text("hello"))
            tasks.cancel_scope.cancel()  # nobody says goodbye: presence tells
        await ann.hear_json(people("ann"))


async def test_what_others_publish_does_no_harm(its_broker: Broker) -> None:
    app = load()
    async with connect(its_broker.url) as emitter, serving(app):
        key = its_broker.keygen("webchat/#/", "rws")
        async with websocket(app, "/chat", name="ann") as ann:
            await ann.hear_json(people("ann"))
            await emitter.publish(key, "webchat/room/", b"\xff", ttl=60, qos=1)
            while (await ann.hear("websocket.send"))["text"] != "\N{REPLACEMENT CHARACTER}":
                pass
            await ann.say_text(ID + "x" * 5000)
            await ann.hear_json(text("x" * 2000))


def test_a_browser_takes_nothing_from_elsewhere() -> None:
    page = (APP.parent / "static/index.html").read_text()
    assert """<meta http-equiv="Content-Security-Policy" content="default-src 'self'">""" in page
