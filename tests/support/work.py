"""
Count function calls, system calls and blocks of memory.

Unlike durations, these do not depend on the speed and the load of the machine.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import emitter_anyio

_LIBRARY = str(Path(emitter_anyio.__file__).parent)
_TESTING = str(Path(_LIBRARY, "testing"))
_SYSTEM = {"send", "recv", "poll", "select", "register", "unregister", "modify"}


@dataclass(frozen=True)
class Work:
    """
    Counts per message.

    :ivar calls: calls to functions of the library, and from the library to others in Python or C
    :ivar all_calls: ``calls``, and those of AnyIO and the event loop
    :ivar system_calls: calls on the socket and on the event loop's selector
    """

    calls: float
    all_calls: float
    system_calls: float


class _Counter:
    def __init__(self) -> None:
        self.calls = self.all_calls = self.system_calls = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            back = frame.f_back
            inner = _place(frame.f_code.co_filename)
            outer = "" if back is None else _place(back.f_code.co_filename)
            if "tool" in (inner, outer):
                # blockbuster wraps the socket's methods: count a wrapper as its method.
                self.calls += inner == "tool" and outer == "library"
                return
            self.all_calls += 1
            self.calls += "library" in (inner, outer)
        elif event == "c_call":
            self.system_calls += arg.__name__ in _SYSTEM
            place = _place(frame.f_code.co_filename)
            self.all_calls += place != "tool"
            self.calls += place == "library"


@lru_cache
def _place(file: str) -> str:
    # The event loop with virtual time belongs to the tests.
    if file.startswith(_LIBRARY) and not file.startswith(_TESTING):
        return "library"
    return "tool" if "coverage" in file or "blockbuster" in file else "other"


@contextmanager
def uncounted() -> Generator[None]:
    """Do not count the block, in which a test does what a peer in another process would do."""
    profile = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(profile)


async def measure_work(step: Callable[[], Awaitable[None]], messages: int, steps: int = 4) -> Work:
    """
    Count the work of some steps after two steps to warm up.

    :param messages: the number of messages in a step
    """
    await step()
    await step()
    counter = _Counter()
    before = sys.getprofile()
    gc.collect()
    gc.disable()  # a collection would run finalizers of unrelated objects
    try:
        sys.setprofile(counter)
        for _ in range(steps):
            await step()
    finally:
        sys.setprofile(before)
        gc.enable()
    total = messages * steps
    return Work(counter.calls / total, counter.all_calls / total, counter.system_calls / total)


async def leaked_blocks(step: Callable[[], Awaitable[None]], steps: int) -> int:
    """
    Return the smallest growth of allocated memory blocks in three rounds of steps.

    A leak grows in every round. One-time allocations of a loop, a cache or a coverage tool do not.
    """
    for _ in range(4):
        await step()
    growths = []
    for _ in range(3):
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(steps):
            await step()
        gc.collect()
        growths.append(sys.getallocatedblocks() - before)
    return min(growths)


async def peak_memory_bytes(step: Callable[[], Awaitable[None]]) -> int:
    """Return the peak memory of a step in bytes, after one step to warm up."""
    await step()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        await step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before


class CopiedBytes(bytes):
    """Bytes that count how many bytes slicing has copied."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(found, bytes):
            self.copied += len(found)
        return found
