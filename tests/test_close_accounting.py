"""The client counts `qos=0` publishes whose outcome is uncertain when the connection ends."""

from __future__ import annotations

import pytest

from emitter_anyio import connect
from tests.support.adversity import KEY, broker_in_memory
from tests.support.memory import Fault, Kind, MemoryConnectable

pytestmark = pytest.mark.virtual_time


async def test_orderly_close_leaves_no_uncertain_publish() -> None:
    connectable = MemoryConnectable()
    async with broker_in_memory(connectable):
        async with connect(connectable=connectable) as emitter:
            await emitter.publish(KEY, "a/", "x")
    assert emitter.statistics().uncertain == 0


@pytest.mark.parametrize("kind", ["stall", "reset"])
async def test_close_over_failed_connection_counts_uncertain_publish(kind: Kind) -> None:
    connectable = MemoryConnectable()
    async with broker_in_memory(connectable):
        async with connect(connectable=connectable) as emitter:
            (stream,) = connectable.streams
            Fault("to_broker", stream.outbound.delivered, kind).inject(stream)
            await emitter.publish(KEY, "a/", "x")
    assert emitter.statistics().uncertain == 1
