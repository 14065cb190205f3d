"""Presence feeds that are left in the turn in which a new connection restores them."""

from __future__ import annotations

from emitter_anyio._runtime.supervisor import Restoring
from emitter_anyio.testing import Broker
from tests.support.connections import connect_reconnecting


async def test_feed_left_before_it_is_restored_is_not_requested(broker: Broker) -> None:
    key = broker.keygen("a/", "p")
    async with connect_reconnecting(broker.url) as emitter:
        connection = emitter._slot.connection
        assert connection is not None
        requester = emitter._requester.bind(connection)
        restoring = Restoring(connection, requester, lambda *arguments: None)
        async with emitter.watch_presence(key, "a/"):
            await emitter.presence(key, "a/", changes=True)
            restored = list(emitter._presence.restore(restoring))
            await emitter.presence(key, "a/", changes=False)
        await emitter.flush()
        for one in restored:
            await one.answered()
        assert len(restored) == 2
        assert emitter.statistics().pending == 0
        (client,) = broker.clients
        assert not client.peer.watched
