"""Play each conversation that was recorded from an Emitter 3.1 broker."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest

from emitter_anyio.testing import Broker
from tests.broker.player import PacketConnection, Player
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


async def open_websocket(broker: Broker) -> PacketConnection:
    stream = await anyio.connect_tcp(broker.host, broker.port)
    return PacketConnection(await WebSocketStream.connect(stream))


def test_all_conversations_are_loaded() -> None:
    assert len(CONVERSATIONS) == 70


@pytest.mark.parametrize("license", LICENSES.values(), ids=[f"v{name}" for name in LICENSES])
@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_replies_match_the_recording(name: str, license: str) -> None:
    async with Broker(license=license, stats_interval=None) as broker:
        await Player(broker, PacketConnection.open).play(CONVERSATIONS[name])


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_replies_over_websocket_match_the_recording(name: str) -> None:
    # Use a fixed licence: a malformed key decrypts to random content, which might be a secret key.
    async with Broker(license=LICENSES["3"], stats_interval=None) as broker:
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
async def test_player_detects_a_different_reply(
    wanted: list[dict[str, object]], unordered: bool
) -> None:
    key = "A" * 32
    connect = {"do": "connect", "client": "a", "receives": {"a": [{"type": "connack", "code": 0}]}}
    publish = {"do": "publish", "client": "a", "topic": f"{key}/a/", "qos": 1, "id": 7}
    async with Broker(stats_interval=None) as broker:
        with pytest.raises(AssertionError, match="step 2: a wants"):
            await Player(broker, PacketConnection.open).play(
                {"steps": [connect, {**publish, "receives": {"a": wanted}, "unordered": unordered}]}
            )
