"""The network between the clients and the broker, in a process of its own: it fails when told."""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from inspect import isawaitable
from typing import Any

import anyio

from emitter_anyio.testing import FaultProxy


async def main(port: int, count: int) -> None:
    """
    Serve so many proxies to a port of loopback, until the input ends.

    The first line out has their ports. Each line in has the number of one, the name of a method of
    :class:`FaultProxy`, and its arguments.
    """
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(FaultProxy("127.0.0.1", port)) for _ in range(count)
        ]
        tasks = await stack.enter_async_context(anyio.create_task_group())
        print(json.dumps([proxy.port for proxy in proxies]), flush=True)
        async for line in anyio.wrap_file(sys.stdin):
            number, verb, *arguments = json.loads(line)
            tasks.start_soon(_do, proxies[number], verb, arguments)


async def _do(proxy: FaultProxy, verb: str, arguments: list[Any]) -> None:
    result = getattr(proxy, verb)(*arguments)
    if isawaitable(result):
        await result


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]), int(sys.argv[2]))
