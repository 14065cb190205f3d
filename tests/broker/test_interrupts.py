"""Ctrl-C while the broker and the proxy run in the program's own event loop."""

from __future__ import annotations

import sys
from types import FrameType

import anyio
import pytest
from trio import lowlevel

from emitter_anyio import connect
from emitter_anyio.testing import Broker, FaultProxy


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_trio_raises_keyboard_interrupt_in_none_of_their_tasks(anyio_backend: str) -> None:
    tasks, interruptible = set(), set()

    def note(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and "/emitter_anyio/testing/" in file and lowlevel.in_trio_task():
            task = lowlevel.current_task()
            if task.name.startswith("emitter_anyio.testing."):
                tasks.add(task.name.rpartition(".")[2])
                if not lowlevel.currently_ki_protected():
                    interruptible.add((task.name, frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        async with (
            Broker(stats_interval=0.001) as broker,
            FaultProxy(broker.host, broker.port) as proxy,
            connect(broker.url),
            connect(connectable=broker.connectable(), secure=False) as emitter,
            connect(proxy.url) as other,
        ):
            key = broker.keygen("a/")
            async with other.subscribe(key, "a/") as messages:
                await emitter.publish(key, "a/", "hello")
                await messages.receive()
                await anyio.sleep(0.01)
    finally:
        sys.setprofile(None)
    assert tasks == {
        *("_publish_stats", "_receive", "_serve", "_serve_all", "keep_accepting", "run", "serve"),
        "write",
    }
    assert not interruptible
