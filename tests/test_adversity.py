"""
Sessions that use every method, over connections that fail at random bytes.

In memory, this is a sample of `tests/adversity.py`, which covers every byte. There are fewer
sessions over real sockets, because they take real time.
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
"""The number of offsets per direction and kind of fault."""


@pytest.fixture(autouse=True)
def _quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "emitter_anyio")


@pytest.mark.virtual_time
@pytest.mark.parametrize("kind", ["reset", "end", "stall"])
async def test_session_survives_fault_at_random_bytes(kind: Kind) -> None:
    rng, totals = random.Random(f"{SEED} {kind}"), await measure()
    await run_sessions(
        Fault(direction, rng.randrange(totals[direction]), kind)
        for direction in DIRECTIONS
        for _ in range(SAMPLE)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_session_over_sockets_survives_fault_at_random_bytes(direction: Direction) -> None:
    rng = random.Random(f"{SEED} {direction}")
    # Few sessions at a time, and timeouts of 2 s, so that a busy machine rarely times out a working
    # connection. If that happens, the client reconnects and the session still passes.
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
            tasks.start_soon(run, rng.randrange(2000), kind)
