from __future__ import annotations

import anyio
import pytest

from emitter_anyio._tasks import Tasks
from emitter_anyio.testing._service import Service


class Failing(Service):
    async def _begin(self, tasks: Tasks) -> None:
        tasks.start_soon(self._fail)

    async def _end(self, tasks: Tasks) -> None:
        tasks.stop()
        await tasks.stopped()

    async def _fail(self) -> None:
        raise ZeroDivisionError


async def test_a_task_that_fails_ends_the_block_and_leaves_bare(anyio_backend: object) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Failing():
            await anyio.sleep_forever()
