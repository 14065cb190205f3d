"""The event that wakes a single task, on both backends."""

from __future__ import annotations

import anyio
import pytest

from emitter_anyio._backend import Wakeup, current_backend


@pytest.fixture
async def wakeup(anyio_backend: object) -> Wakeup:
    return current_backend().make_wakeup()


async def wait(wakeup: Wakeup) -> None:
    await wakeup.wait()


async def test_set_wakes_waiting_task(wakeup: Wakeup) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, wakeup)
        await anyio.wait_all_tasks_blocked()
        wakeup.set()
        wakeup.set()


async def test_wait_after_set_returns_immediately(wakeup: Wakeup) -> None:
    wakeup.set()
    await wakeup.wait()


async def test_set_after_cancelled_wait_has_no_effect(wakeup: Wakeup) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, wakeup)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    wakeup.set()
