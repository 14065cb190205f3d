"""The faulty network between clients and broker, run as a separate process."""

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
    Serve ``count`` proxies to a port on loopback, until the input ends.

    The first output line lists their ports. Each input line is the number of a proxy, the name of
    a method of :class:`FaultProxy`, and its arguments.
    """
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(FaultProxy("127.0.0.1", port)) for _ in range(count)
        ]
        tasks = await stack.enter_async_context(anyio.create_task_group())
        print(json.dumps([proxy.port for proxy in proxies]), flush=True)
        async for line in anyio.wrap_file(sys.stdin):
            number, method, *arguments = json.loads(line)
            tasks.start_soon(_call, proxies[number], method, arguments)


async def _call(proxy: FaultProxy, method: str, arguments: list[Any]) -> None:
    result = getattr(proxy, method)(*arguments)
    if isawaitable(result):
        await result


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]), int(sys.argv[2]))
