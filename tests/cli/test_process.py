"""Programs that run for requests."""

from __future__ import annotations

import pytest
from anyio import create_task_group

from emitter_anyio._cli._process import Program, ProgramError


async def test_killed_programs_whose_output_is_unread_are_closed() -> None:
    # Before AnyIO 4.15, some of them were waited for without end on asyncio.
    async def run(timeout: float) -> None:
        with pytest.raises(ProgramError, match=r"was killed after|has more than 65,536 bytes"):
            await Program(["yes"], timeout, []).run(b"")

    async with create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(run, 60 if number % 2 else 0.001)
