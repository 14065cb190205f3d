"""
A session of every verb, over a link that fails at some byte.

In memory this is a sample of `tests/adversity.py`, which has every byte. Over real sockets there
are fewer, and all of their time is the clock's.
"""

from __future__ import annotations

import logging
import random

import anyio
import pytest

from emitter_anyio.testing import Broker, FaultProxy
from tests.support.adversity import LICENSE, Session, measure, run_sessions
from tests.support.memory import DIRECTIONS, Direction, Fault, Kind

pytestmark = pytest.mark.without_debug

SEED = 1883
SAMPLE = 8
"""So many offsets of each direction, for each kind of fault."""


@pytest.fixture(autouse=True)
def _without_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "emitter_anyio")


@pytest.mark.virtual_time
@pytest.mark.parametrize("kind", ["reset", "end", "stall"])
async def test_a_link_may_fail_at_any_byte(kind: Kind) -> None:
    chance, totals = random.Random(f"{SEED} {kind}"), await measure()
    await run_sessions(
        Fault(direction, chance.randrange(totals[direction]), kind)
        for direction in DIRECTIONS
        for _ in range(SAMPLE)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_a_real_link_may_fail_at_any_byte(direction: Direction) -> None:
    chance = random.Random(f"{SEED} {direction}")
    # The times below are the clock's. They, and how many sessions there are at a time, keep a busy
    # machine from taking links for dead that are whole. Where it does, the session just goes on.
    limiter = anyio.CapacityLimiter(5)

    async def run(offset: int, kind: Kind) -> None:
        async with (
            limiter,
            Broker(license=LICENSE) as broker,
            FaultProxy(broker.host, broker.port) as proxy,
        ):
            session = Session(broker, proxy.url, lost=proxy.resume, keepalive=2, connect_timeout=2)
            if kind == "stall":
                proxy.stall_after(offset, direction)
            else:
                proxy.cut_after(offset, direction, reset=kind == "reset")
            await session.run()

    async with anyio.create_task_group() as tasks:
        for number in range(25):
            kind: Kind = "stall" if number % 5 == 0 else "reset" if number % 2 else "end"
            tasks.start_soon(run, chance.randrange(2000), kind)
