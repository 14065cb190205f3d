from __future__ import annotations

import asyncio

import anyio
import pytest

from emitter_anyio._tasks import Tasks
from emitter_anyio.testing._service import Service


class Failing(Service):
    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    async def _begin(self, tasks: Tasks) -> None:
        tasks.start_soon(self._fail)

    async def _end(self, tasks: Tasks) -> None:
        tasks.stop()
        await tasks.stopped()

    async def _fail(self) -> None:
        raise self._error


async def test_a_task_that_fails_ends_the_block_and_leaves_bare(anyio_backend: object) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Failing(ZeroDivisionError):
            await anyio.sleep_forever()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_alone_does_not_end_the_block(anyio_backend: object) -> None:
    async with Failing(asyncio.CancelledError):
        await anyio.wait_all_tasks_blocked()
