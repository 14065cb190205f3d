"""The background tasks of the broker and of the proxy."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from emitter_anyio._backend.tasks import Tasks
from emitter_anyio.testing._service import Service


def failing(error: type[BaseException]) -> Service:
    async def fail() -> None:
        raise error

    async def start(tasks: Tasks) -> None:
        tasks.start_soon(fail)

    async def end(tasks: Tasks) -> None:
        tasks.stop()
        await tasks.stopped()

    return Service("Failing", start, end)


async def test_failing_task_ends_the_block_with_its_error_unwrapped(anyio_backend: object) -> None:
    with pytest.raises(ZeroDivisionError):
        async with failing(ZeroDivisionError):
            await anyio.sleep_forever()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cancelled_task_does_not_end_the_block(anyio_backend: object) -> None:
    async with failing(asyncio.CancelledError):
        await anyio.wait_all_tasks_blocked()
