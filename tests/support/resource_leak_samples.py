"""Tests that leak resources. ``test_support.py`` runs them and checks that they fail."""

from __future__ import annotations

import asyncio
import socket

import anyio.lowlevel
import sniffio
import trio

import emitter_anyio

kept: list[object] = []  # outlives the tests


async def test_leaking_a_task() -> None:
    if sniffio.current_async_library() == "trio":
        trio.lowlevel.spawn_system_task(trio.sleep_forever)
    else:
        kept.append(asyncio.ensure_future(asyncio.sleep(3600)))


async def test_leaking_a_socket() -> None:
    kept.append(socket.socket())


async def test_leaking_an_unclosed_stream() -> None:
    anyio.create_memory_object_stream[int](0)


async def test_blocking_the_event_loop() -> None:
    # Pretend that a module of the library blocks. blockbuster only watches asyncio, so this test
    # passes on Trio.
    code = compile("import time; time.sleep(0)", emitter_anyio.__file__, "exec")
    exec(code)


async def test_without_a_leak() -> None:
    await anyio.lowlevel.checkpoint()
