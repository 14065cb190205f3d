"""Conversations that were recorded from a real Emitter 3.1 broker, each a test of its own."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest

from emitter_anyio.testing import Broker
from tests.broker.player import Link, Player
from tests.broker.websocket import WebSocketStream

HERE = Path(__file__).parent
CONVERSATIONS = {
    path.stem: json.loads(path.read_text())
    for path in sorted(HERE.joinpath("conversations").glob("*.json"))
}
LICENSES = {
    str(version): vector["licence"]
    for version, vector in enumerate(json.loads(HERE.joinpath("key-vectors.json").read_text()), 1)
}


async def open_websocket(broker: Broker) -> Link:
    stream = await anyio.connect_tcp(broker.host, broker.port)
    return Link(await WebSocketStream.connect(stream))


def test_all_conversations_are_here() -> None:
    assert len(CONVERSATIONS) == 70


@pytest.mark.parametrize("license", LICENSES.values(), ids=[f"v{name}" for name in LICENSES])
@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_the_broker_answers_as_recorded(name: str, license: str) -> None:
    async with Broker(license=license) as broker:
        await Player(broker, Link.open).play(CONVERSATIONS[name])


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_and_over_websocket(name: str) -> None:
    # What is no key reads as another noise under each licence, and now and then as a master key.
    async with Broker(license=LICENSES["3"]) as broker:
        await Player(broker, open_websocket).play(CONVERSATIONS[name])


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param([], id="nothing"),
        pytest.param([{"type": "puback", "id": 8}], id="another value"),
        pytest.param([{"type": "puback", "id": 7}] * 2, id="more"),
    ],
)
@pytest.mark.parametrize("unordered", [False, True])
async def test_the_player_notices_another_answer(
    wanted: list[dict[str, object]], unordered: bool
) -> None:
    key = "A" * 32
    connect = {"do": "connect", "client": "a", "receives": {"a": [{"type": "connack", "code": 0}]}}
    publish = {"do": "publish", "client": "a", "topic": f"{key}/a/", "qos": 1, "id": 7}
    async with Broker() as broker:
        with pytest.raises(AssertionError, match="step 2: a wants"):
            await Player(broker, Link.open).play(
                {"steps": [connect, {**publish, "receives": {"a": wanted}, "unordered": unordered}]}
            )
