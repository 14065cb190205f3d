"""Publishes of `qos=0` that nobody can be sure of are counted, however the link ended."""

from __future__ import annotations

import pytest

from emitter_anyio import connect
from tests.support.adversity import KEY, broker_in_memory
from tests.support.memory import Fault, Kind, MemoryConnectable

pytestmark = pytest.mark.virtual_time


async def test_a_goodbye_that_is_heard_leaves_nothing_uncertain() -> None:
    connectable = MemoryConnectable()
    async with broker_in_memory(connectable):
        async with connect(connectable=connectable) as emitter:
            await emitter.publish(KEY, "a/", "x")
    assert emitter.statistics().uncertain == 0


@pytest.mark.parametrize("kind", ["stall", "reset"])
async def test_a_goodbye_that_is_not_heard_leaves_what_was_before_it_uncertain(kind: Kind) -> None:
    connectable = MemoryConnectable()
    async with broker_in_memory(connectable):
        async with connect(connectable=connectable) as emitter:
            (stream,) = connectable.streams
            Fault("to_broker", stream._out.taken, kind).strikes(stream)
            await emitter.publish(KEY, "a/", "x")
    assert emitter.statistics().uncertain == 1
