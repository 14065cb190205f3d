"""
Run the nodes of a cluster on loopback, and a command that uses them.

``python -m tests.cluster -- pytest tests/cluster`` starts nodes of the development broker, and with
``--emitter PATH`` real Emitter nodes. The command finds them by its environment, as
``CONTRIBUTING.md`` describes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import ByteStream

from .development_nodes import DevelopmentNodes
from .emitter_nodes import EmitterNodes

ACTIONS: Final = (
    *("start", "stop", "pause", "resume", "cut", "heal"),
    *("terminate", "bounce", "part", "erase"),
    *("silence", "unsilence", "deafen", "undeafen", "slow", "unslow"),
)


async def obey(nodes: DevelopmentNodes | EmitterNodes, connection: ByteStream) -> None:
    """Obey the command of one connection, and send the reason if that fails."""
    async with connection:
        action, index = (await connection.receive()).decode().split()
        try:
            if action not in ACTIONS:
                raise ValueError(f"unknown action {action!r}; expected one of {', '.join(ACTIONS)}")
            await getattr(nodes, action)(int(index))
        except Exception as exc:
            await connection.send(f"{action} {index}: {exc}\n".encode())


async def main(options: argparse.Namespace, directory: Path) -> int:
    """Run the nodes and the command, and return its exit code."""
    socket = directory / "control"
    send = Path(__file__).with_name("send.py")
    async with AsyncExitStack() as stack:
        nodes: DevelopmentNodes | EmitterNodes = (
            DevelopmentNodes(options.nodes)
            if options.emitter is None
            else EmitterNodes(options.emitter, options.nodes, directory)
        )
        tasks = await stack.enter_async_context(anyio.create_task_group())
        listener = await stack.enter_async_context(await anyio.create_unix_listener(socket))
        await stack.enter_async_context(nodes)

        async def serve(connection: ByteStream) -> None:
            await obey(nodes, connection)

        tasks.start_soon(listener.serve, serve)
        environment = {
            "EMITTER_CLUSTER": " ".join(nodes.urls),
            "EMITTER_SECRET": nodes.secret,
            "EMITTER_CLUSTER_COMMAND": shlex.join([sys.executable, str(send), str(socket)]),
        }
        print(environment["EMITTER_CLUSTER"], flush=True)
        process = await anyio.open_process(
            options.command, stdin=None, stdout=None, stderr=None, env={**os.environ, **environment}
        )
        try:
            code = await process.wait()
        finally:
            tasks.cancel_scope.cancel()
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--emitter", metavar="PATH", help="Emitter's program; default: none")
    parser.add_argument("--nodes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--directory", type=Path, help="where to keep storage and logs")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (options.directory or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        sys.exit(anyio.run(main, options, directory))
