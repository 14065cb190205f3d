"""The figures that each node publishes every second."""

from __future__ import annotations

import pytest

from emitter_anyio import Emitter, NodeStats, decode_stats
from tests.support.server import Server

pytestmark = pytest.mark.emitter


async def test_figures_count_clients_and_messages(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    stats_key = await emitter.keygen(server.secret, "stats/#/", "r")
    async with (
        emitter.subscribe(key, unique),
        emitter.subscribe(stats_key, "stats/+/", last=0, decode=decode_stats) as messages,
    ):
        for _ in range(5):
            await emitter.publish(key, unique, "m", qos=1)
        received = sent = 0
        newest: dict[str, NodeStats] = {}
        # Other nodes and other clients publish as well.
        async for message in messages:
            assert message.channel.startswith("stats/")
            stats = message.value
            if stats.node in newest:
                assert stats.start >= newest[stats.node].start
            newest[stats.node] = stats
            received, sent = received + stats.received, sent + stats.sent
            if received >= 5 and sent >= 5:
                break
    assert sum(stats.connections for stats in newest.values()) >= 1
    assert max(stats.subscriptions for stats in newest.values()) >= 2
    assert {stats.address for stats in newest.values()}
