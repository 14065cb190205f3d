"""Work, counted: calls, system calls, blocks of memory. No clock is asked."""

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
_SYSTEM = {"send", "recv", "poll", "select", "register", "unregister", "modify"}


@dataclass(frozen=True)
class Work:
    """
    What was done for each message.

    :ivar calls: of functions of the library, and from there of others, in Python or C
    :ivar all_calls: those, and what AnyIO and the event loop call for it
    :ivar system_calls: on the socket, and those of the event loop
    """

    calls: float
    all_calls: float
    system_calls: float


class _Counter:
    def __init__(self) -> None:
        self.calls = self.all_calls = self.system_calls = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        # Returns and exceptions have events of their own, which say nothing new.
        if event == "call":
            back = frame.f_back
            inner = _place(frame.f_code.co_filename)
            outer = "" if back is None else _place(back.f_code.co_filename)
            if "tool" in (inner, outer):
                # The guard against blocked loops stands before the socket's methods.
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
    if file.startswith(_LIBRARY):
        return "library"
    # What watches the tests.
    return "tool" if "coverage" in file or "blockbuster" in file else "other"


@contextmanager
def uncounted() -> Generator[None]:
    """Let a test do what a peer would do, in a process of its own."""
    profile = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(profile)


async def work_of(step: Callable[[], Awaitable[None]], messages: int, steps: int = 4) -> Work:
    """
    Count what some steps need, once they have run themselves in.

    :param messages: how many messages a step has
    """
    await step()
    await step()
    counter = _Counter()
    before = sys.getprofile()
    gc.collect()
    gc.disable()  # what it would clean up is somebody else's
    try:
        sys.setprofile(counter)
        for _ in range(steps):
            await step()
    finally:
        sys.setprofile(before)
        gc.enable()
    total = messages * steps
    return Work(counter.calls / total, counter.all_calls / total, counter.system_calls / total)


async def blocks_kept(step: Callable[[], Awaitable[None]], steps: int) -> int:
    """
    Return how many blocks of memory each of three rounds of steps leaves at least.

    A leak grows in every round. What a loop, a cache or a coverage tool allocates once does not.
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


async def peak_of(step: Callable[[], Awaitable[None]]) -> int:
    """How many bytes of memory a step needs at the same time, once it has run in."""
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
    """Bytes that count how many of them are sliced out."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(found, bytes):
            self.copied += len(found)
        return found
