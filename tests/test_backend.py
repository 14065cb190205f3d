"""What wakes one task, on either backend."""

from __future__ import annotations

import anyio
import pytest

from emitter_anyio._backend import Wakeup, current_backend


@pytest.fixture
async def wakeup(anyio_backend: object) -> Wakeup:
    return current_backend().make_wakeup()


async def wait(wakeup: Wakeup) -> None:
    await wakeup.wait()


async def test_it_wakes_the_one_who_waits(wakeup: Wakeup) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, wakeup)
        await anyio.wait_all_tasks_blocked()
        wakeup.set()
        wakeup.set()


async def test_who_comes_later_does_not_wait(wakeup: Wakeup) -> None:
    wakeup.set()
    await wakeup.wait()


async def test_nobody_is_left_to_be_woken(wakeup: Wakeup) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, wakeup)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    wakeup.set()
