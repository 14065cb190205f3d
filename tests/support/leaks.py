"""What a test must not leave behind."""

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


def freeze_what_is_there() -> None:
    """
    Exempt every present object from collections, so that they walk only what the next test makes.

    Each test ends with a collection, and most objects belong to imported modules and to pytest.
    Frozen cycles that die later are collected after some 200 tests.
    """
    global _tests_since_full_collection  # noqa: PLW0603 - the collector is global as well
    _tests_since_full_collection += 1
    if _tests_since_full_collection == _TESTS_BETWEEN_FULL_COLLECTIONS:
        _tests_since_full_collection = 0
        gc.unfreeze()
        gc.collect()
    gc.freeze()


def living_tasks() -> set[Any]:
    """Every task of the running loop but those in which AnyIO runs each test and fixture."""
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


def tasks_of_clients(before: set[object]) -> list[str]:
    """List the names of the clients' tasks that have been started since ``before`` was noted."""
    names = (str(getattr(task, "name", task)) for task in living_tasks() - before)
    return [name for name in names if "emitter_anyio" in name and ".testing" not in name]


def open_sockets() -> set[str]:
    """The sockets that this process holds, by inode; none where the system does not list them."""
    if sys.platform != "linux":
        return set()

    held = set()
    for entry in os.listdir(_DESCRIPTORS):
        try:
            target = os.readlink(f"{_DESCRIPTORS}/{entry}")
        except OSError:  # the handle that lists the directory is closed by now
            continue

        if target.startswith("socket:"):
            held.add(target)

    return held


class Leaks:
    """A note of the tasks and sockets there are, to be compared with those there are later."""

    def __init__(self) -> None:
        freeze_what_is_there()
        self._tasks = living_tasks()
        self._sockets = open_sockets()

    def check(self) -> None:
        """
        Fail if a task or a socket is there that was not there when this object was made.

        What was dropped without being closed is collected here, so that its ResourceWarning, which
        pytest turns into an error, belongs to the test that just ran.
        """
        gc.collect()
        tasks = living_tasks() - self._tasks
        assert not tasks, f"tasks left behind: {tasks}"
        sockets = open_sockets() - self._sockets
        assert not sockets, f"sockets left open: {sockets}"
