"""Calls wait while all packet ids are in use."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from emitter_anyio import connect
from emitter_anyio.testing import Broker


async def test_publish_waits_for_free_packet_id(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emitter_anyio._protocol.session._RESERVED_PACKET_IDS", 65535 - 2)
    key = broker.keygen("a/")
    async with connect(broker.url) as emitter:
        async with anyio.create_task_group() as tasks:
            with broker.hold("puback"):
                for text in "xyz":
                    tasks.start_soon(partial(emitter.publish, key, "a/", text, qos=1))
                await anyio.wait_all_tasks_blocked()
                assert emitter.statistics().pending == 2
        assert emitter.statistics().pending == 0
