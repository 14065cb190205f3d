"""Tests that leave something behind; ``test_support.py`` runs them and sees each of them fail."""

from __future__ import annotations

import asyncio
import socket

import anyio.lowlevel
import sniffio
import trio

import emitter_anyio

left: list[object] = []  # keeps things alive beyond their test


async def test_a_task() -> None:
    if sniffio.current_async_library() == "trio":
        trio.lowlevel.spawn_system_task(trio.sleep_forever)
    else:
        left.append(asyncio.ensure_future(asyncio.sleep(3600)))


async def test_a_socket() -> None:
    left.append(socket.socket())


async def test_an_unclosed_stream() -> None:
    anyio.create_memory_object_stream[int](0)


async def test_a_blocking_call() -> None:
    # As if a module of the library had done it. Only asyncio is guarded: on Trio this passes.
    code = compile("import time; time.sleep(0)", emitter_anyio.__file__, "exec")
    exec(code)


async def test_leaving_nothing_behind() -> None:
    await anyio.lowlevel.checkpoint()
