"""Detect tasks and sockets that a test leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from typing import Any, Final

import sniffio
import trio

_DESCRIPTORS: Final = "/proc/self/fd"

_TESTS_BETWEEN_FULL_COLLECTIONS: Final = 200

_tests_since_full_collection = 0


def freeze_existing_objects() -> None:
    """
    Freeze the garbage collector's objects, so that a collection visits only newer ones.

    Each test ends with a collection, and most objects belong to imported modules and to pytest.
    Frozen cycles are collected after 200 tests.
    """
    global _tests_since_full_collection  # noqa: PLW0603 - the collector is global too
    _tests_since_full_collection += 1
    if _tests_since_full_collection == _TESTS_BETWEEN_FULL_COLLECTIONS:
        _tests_since_full_collection = 0
        gc.unfreeze()
        gc.collect()
    gc.freeze()


def running_tasks() -> set[Any]:
    """Return the tasks of the running event loop, except those in which AnyIO runs tests."""
    if sniffio.current_async_library() == "asyncio":
        return {
            task
            for task in asyncio.all_tasks()
            if not getattr(task.get_coro(), "__qualname__", "").startswith("TestRunner.")
        }

    tasks = set()
    waiting = [trio.lowlevel.current_root_task()]
    while waiting:
        task = waiting.pop()
        if task is not None:
            tasks.add(task)
            for nursery in task.child_nurseries:
                waiting.extend(nursery.child_tasks)

    return tasks


def client_tasks(before: set[object]) -> list[str]:
    """Return the names of the clients' tasks that are not in ``before``."""
    names = (str(getattr(task, "name", task)) for task in running_tasks() - before)
    return [name for name in names if "emitter_anyio" in name and ".testing" not in name]


def open_sockets() -> set[str]:
    """Return this process's sockets by inode: an empty set except on Linux."""
    if sys.platform != "linux":
        return set()

    held = set()
    for entry in os.listdir(_DESCRIPTORS):
        try:
            target = os.readlink(f"{_DESCRIPTORS}/{entry}")
        except OSError:  # the descriptor that listed the directory is closed now
            continue

        if target.startswith("socket:"):
            held.add(target)

    return held


class Leaks:
    """A snapshot of the tasks and sockets, to compare with those that exist later."""

    def __init__(self) -> None:
        freeze_existing_objects()
        self._tasks = running_tasks()
        self._sockets = open_sockets()

    def check(self) -> None:
        """
        Fail if there is a task or a socket that is not in the snapshot.

        This also collects objects that were dropped without being closed, so that their
        ResourceWarning, which pytest turns into an error, fails the test that just ran.
        """
        gc.collect()
        tasks = running_tasks() - self._tasks
        assert not tasks, f"tasks left behind: {tasks}"
        sockets = open_sockets() - self._sockets
        assert not sockets, f"sockets left open: {sockets}"
