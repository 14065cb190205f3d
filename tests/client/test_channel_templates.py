"""Channel templates in the place of channels with wildcards."""

from __future__ import annotations

from typing import Any

import pytest

from emitter_anyio import Channel, Emitter, EmitterMessage, Will
from tests.client.tools import Calls
from tests.support.server import Server

pytestmark = pytest.mark.emitter


@pytest.fixture
def template(unique: str) -> Channel:
    return Channel(f"{unique}{{id}}/temp/")


async def test_a_stream_of_a_template_receives_what_matches(
    emitter: Emitter, key: str, template: Channel
) -> None:
    async with emitter.subscribe(key, template, last=0) as messages:
        for number in (7, 8):
            await emitter.publish(key, template.format(id=number), str(number))
        for number in (7, 8):
            message = await messages.receive()
            assert template.match(message.channel) == {"id": message.as_string()}
            assert message.as_string() == str(number)


async def test_handlers_and_event_streams_take_a_template(
    emitter: Emitter, key: str, unique: str, template: Channel
) -> None:
    calls = Calls()
    emitter.on("message", calls, channel=template)
    async with emitter.stream("message", channel=template) as messages:
        await emitter.subscribe(key, template, last=0)
        await emitter.publish(key, f"{unique}7/temp/", "x")
        assert (await messages.receive()).channel == f"{unique}7/temp/"
        (message,) = await calls.get(1)
        assert message.channel == f"{unique}7/temp/"
        await emitter.unsubscribe(key, template)
        await emitter.publish(key, f"{unique}7/temp/", "x")
        await emitter.flush()
    assert len(calls.values) == 1


async def test_keys_history_and_presence_take_a_template(
    emitter: Emitter, server: Server, unique: str, template: Channel
) -> None:
    created = await emitter.keygen(server.secret, template, "rwslp")
    assert created.channel == template.pattern
    channel = template.format(id=7)
    await emitter.publish(created.key, channel, "x", ttl=60, qos=1)
    stored = [one async for one in emitter.history(created.key, template)]
    assert [template.match(one.channel) for one in stored] == [{"id": "7"}]
    async with emitter.subscribe(created.key, channel, last=0):
        status = await emitter.presence(created.key, template)
        assert status.channel == template.pattern
        async with emitter.watch_presence(created.key, template) as feed:
            assert (await feed.receive()).channel == template.pattern


async def test_calls_that_need_one_channel_reject_a_template(
    emitter: Emitter, key: str, template: Channel
) -> None:
    wrong: Any = template

    def handler(request: EmitterMessage) -> bytes:
        return request.binary  # pragma: no cover - it is never called

    for call in (
        lambda: emitter.publish(key, wrong, "x"),
        lambda: emitter.link(key, wrong, "a1"),
        lambda: emitter.request(key, wrong, "x"),
        lambda: emitter.serve(key, wrong, handler),
    ):
        with pytest.raises(TypeError, match=r"Channel\.format"):
            await call()
    with pytest.raises(TypeError, match=r"Channel\.format"):
        Will(key, wrong, "x")
