"""
A session of every verb, with the link failing at every single byte.

Too many for the ordinary suite, which has a sample of them: `nox -s adversity` runs this file.
"""

from __future__ import annotations

import logging
import os

import pytest

from tests.support.adversity import measure, run_sessions
from tests.support.memory import DIRECTIONS, Direction, Fault, Kind

PARTS = 10
"""So many loops, each with hundreds of sessions at once."""

STEP = int(os.environ.get("ADVERSITY_STEP", "1"))
"""Every byte, or every third one where ``.ci/run`` sets 3: each session is longer than it was."""

pytestmark = [
    pytest.mark.virtual_time,
    pytest.mark.without_debug,
    pytest.mark.timeout(600),
]


@pytest.fixture(autouse=True)
def _without_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "emitter_anyio")


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_cut_at_every_byte(direction: Direction, part: int, anyio_backend_name: str) -> None:
    # What the one backend meets as an orderly end, the other one meets as a reset.
    kinds: tuple[Kind, ...] = ("reset", "end") if anyio_backend_name == "trio" else ("end", "reset")
    total = (await measure())[direction]
    offsets = range(part, total + 1, PARTS * STEP)
    await run_sessions(Fault(direction, n, kinds[n // PARTS % 2]) for n in offsets)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_stalled_at_every_byte(direction: Direction, part: int) -> None:
    total = (await measure())[direction]
    await run_sessions(Fault(direction, n, "stall") for n in range(part, total + 1, PARTS * STEP))
