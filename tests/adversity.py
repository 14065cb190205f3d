"""
Sessions that use every method, over connections that fail at every byte.

`nox -s adversity` runs this file. The ordinary suite runs a sample, in `tests/test_adversity.py`.
"""

from __future__ import annotations

import logging
import os

import pytest

from tests.support.adversity import measure, run_sessions
from tests.support.memory import DIRECTIONS, Direction, Fault, Kind

PARTS = 10
"""The number of tests per direction, each with hundreds of concurrent sessions."""

STEP = int(os.environ.get("ADVERSITY_STEP", "1"))
"""The distance between two bytes: 1, or 2 in ``.ci/run``, to save time."""

pytestmark = [
    pytest.mark.virtual_time,
    pytest.mark.without_debug,
    pytest.mark.timeout(600),
]


@pytest.fixture(autouse=True)
def _quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "emitter_anyio")


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_session_survives_cut_at_every_byte(
    direction: Direction, part: int, anyio_backend_name: str
) -> None:
    # Where one backend gets an orderly end, the other gets a reset.
    kinds: tuple[Kind, ...] = ("reset", "end") if anyio_backend_name == "trio" else ("end", "reset")
    total = (await measure())[direction]
    offsets = range(part, total + 1, PARTS * STEP)
    await run_sessions(Fault(direction, n, kinds[n // PARTS % 2]) for n in offsets)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_session_survives_stall_at_every_byte(direction: Direction, part: int) -> None:
    total = (await measure())[direction]
    await run_sessions(Fault(direction, n, "stall") for n in range(part, total + 1, PARTS * STEP))
