"""Real Emitter nodes on loopback, whose connections to each other can be cut."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream

from emitter_anyio.testing import Broker
from tests.support.ports import pick_port

NODE_HOST: Final = "127.0.1."
RELAY_HOST: Final = "127.0.2."
"""The others connect to a node at its relay. Each node has its own address in both networks, so
that a relay recognizes by the address who connects."""

_CRASHES: Final = "panic", "fatal error", "unexpected fault"
"""The beginnings of the lines in which a Go program prints why it crashes."""


class EmitterNodes:
    """
    The nodes of a real Emitter cluster, each a process.

    :param binary: the program
    :param count: the number of nodes
    :param directory: where each node gets a directory for its configuration, storage and log
    """

    def __init__(self, binary: str, count: int, directory: Path) -> None:
        broker = Broker()
        self.secret = broker.secret_key
        self._license = broker.license
        self._binary = binary
        self._directory = directory
        hosts = [f"{each}{i + 1}" for i in range(count) for each in (NODE_HOST, RELAY_HOST)]
        self.cluster_port = pick_port(*hosts, "127.0.0.1")
        self._ports = [pick_port() for _ in range(count)]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * count
        self._cut: set[int] = set()
        self._parted: set[int] = set()
        self._silent: set[int] = set()
        self._deaf: set[int] = set()
        self._slow: dict[int, anyio.CancelScope] = {}
        self._relays = [_Relay(self, index) for index in range(count)]
        self._stack = AsyncExitStack()

    @property
    def urls(self) -> list[str]:
        """The URLs of the nodes."""
        return [f"mqtt://127.0.0.1:{port}" for port in self._ports]

    async def __aenter__(self) -> Self:
        listeners = [
            await self._stack.enter_async_context(
                await anyio.create_tcp_listener(
                    local_host=f"{RELAY_HOST}{index + 1}", local_port=self.cluster_port
                )
            )
            for index in range(len(self._relays))
        ]
        # The relays end before their listeners are closed, because serve() would raise an error.
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(self._tasks.cancel_scope.cancel)
        for index, (listener, relay) in enumerate(zip(listeners, self._relays, strict=True)):
            self._tasks.start_soon(listener.serve, relay.serve)
            await self.start(index)
        self._tasks.start_soon(self._restart_crashed)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for index in range(len(self._ports)):
            await self.stop(index)
        await self._stack.aclose()

    async def start(self, index: int) -> None:
        """Start a node unless it is running, and wait until it accepts clients."""
        if self._processes[index] is not None:
            return
        directory = self._directory / f"node-{index}"
        directory.mkdir(parents=True, exist_ok=True)
        count = len(self._ports)
        relays = [f"{RELAY_HOST}{i + 1}:{self.cluster_port}" for i in range(count)]
        configuration = {
            "listen": f"127.0.0.1:{self._ports[index]}",
            "license": self._license,
            "cluster": {
                "name": f"00:00:00:00:00:{index + 1:02x}",
                "listen": f"{NODE_HOST}{index + 1}:{self.cluster_port}",
                "advertise": relays[index],
                # If nodes connect to each other in the same moment, both close the connection, and
                # might forget each other's subscriptions.
                "seed": relays[0],
                "passphrase": "test",
                "dir": str(directory / "state"),
            },
            "storage": {"provider": "ssd", "config": {"dir": str(directory / "storage")}},
        }
        (directory / "emitter.conf").write_text(json.dumps(configuration))
        with (directory / "log").open("ab") as log:
            process = subprocess.Popen(  # noqa: ASYNC220 - starting takes a millisecond
                [self._binary, "-c", str(directory / "emitter.conf")],
                cwd=directory,
                env={"HOME": str(directory)},
                stdout=log,
                stderr=log,
            )
        self._processes[index] = process
        while True:
            with suppress(OSError):
                await (await anyio.connect_tcp("127.0.0.1", self._ports[index])).aclose()
                return
            if process.poll() is not None:
                raise RuntimeError(f"node {index} ended with {process.returncode}")
            await anyio.sleep(0.02)

    async def stop(self, index: int) -> None:
        """Kill a node."""
        process, self._processes[index] = self._processes[index], None
        if process is not None:
            process.kill()
            process.wait()

    async def terminate(self, index: int) -> None:
        """Stop a node with SIGTERM."""
        process, self._processes[index] = self._processes[index], None
        if process is not None:
            process.terminate()
            await anyio.to_thread.run_sync(process.wait)

    async def bounce(self, index: int) -> None:
        """Kill and start a node three times."""
        for _ in range(3):
            await self.stop(index)
            await self.start(index)

    async def pause(self, index: int) -> None:
        """Suspend a node."""
        self._signal(index, signal.SIGSTOP)

    async def resume(self, index: int) -> None:
        """Continue a suspended node."""
        self._signal(index, signal.SIGCONT)

    async def cut(self, index: int) -> None:
        """Close the connections between a node and the others, and refuse new ones."""
        self._cut.add(index)
        self._close_cut()

    async def part(self, index: int) -> None:
        """Close the connections between a node and the next one, and refuse new ones."""
        self._parted.add(index)
        self._close_cut()

    async def heal(self, index: int) -> None:
        """Accept connections between a node and the others again."""
        self._cut.discard(index)
        self._parted.discard(index)

    async def silence(self, index: int) -> None:
        """Stop forwarding between a node and the others, without closing connections."""
        self._silent.add(index)

    async def unsilence(self, index: int) -> None:
        """Forward between a node and the others again."""
        self._silent.discard(index)

    async def deafen(self, index: int) -> None:
        """Stop forwarding from the others to a node, but not in the other direction."""
        self._deaf.add(index)

    async def undeafen(self, index: int) -> None:
        """Forward from the others to a node again."""
        self._deaf.discard(index)

    async def slow(self, index: int) -> None:
        """Suspend a node for nine tenths of the time."""
        self._slow[index] = scope = anyio.CancelScope()

        async def alternate() -> None:
            with scope:
                while True:
                    self._signal(index, signal.SIGSTOP)
                    await anyio.sleep(0.18)
                    self._signal(index, signal.SIGCONT)
                    await anyio.sleep(0.02)

        self._tasks.start_soon(alternate)

    async def unslow(self, index: int) -> None:
        """Run a node at full speed again."""
        self._slow.pop(index).cancel()
        self._signal(index, signal.SIGCONT)

    async def erase(self, index: int) -> None:
        """Kill a node, and delete its stored messages and its state."""
        await self.stop(index)
        for name in ("storage", "state"):
            shutil.rmtree(self._directory / f"node-{index}" / name, ignore_errors=True)

    def are_cut(self, one: int, other: int) -> bool:
        """Return whether two nodes are cut off from each other."""
        ends = {one, other}
        parted = any({each, (each + 1) % len(self._ports)} == ends for each in self._parted)
        return parted or not self._cut.isdisjoint(ends)

    def is_held(self, source: int, sink: int) -> bool:
        """Return whether nothing is forwarded from one node to another."""
        return sink in self._deaf or not self._silent.isdisjoint((source, sink))

    def _close_cut(self) -> None:
        for relay in self._relays:
            relay.close_cut()

    async def _restart_crashed(self) -> None:
        """Restart nodes that end by themselves, and print why."""
        while True:
            await anyio.sleep(0.5)
            for index, process in enumerate(self._processes):
                if process is not None and process.poll() is not None:
                    log = (self._directory / f"node-{index}" / "log").read_text(errors="replace")
                    reasons = [line for line in log.splitlines() if line.startswith(_CRASHES)]
                    print(f"node {index} crashed: {reasons[-1:]}", file=sys.stderr, flush=True)
                    self._processes[index] = None
                    with suppress(RuntimeError):  # crashed again, for example on a full disk
                        await self.start(index)

    def _signal(self, index: int, number: int) -> None:
        process = self._processes[index]
        if process is not None:
            process.send_signal(number)


class _Relay:
    """What the other nodes take for a node."""

    def __init__(self, nodes: EmitterNodes, index: int) -> None:
        self._nodes = nodes
        self._index = index
        self._connections: dict[anyio.CancelScope, tuple[int, int]] = {}

    async def serve(self, connection: SocketStream) -> None:
        """Relay a connection until one of its two nodes is cut off."""
        host = connection.extra(SocketAttribute.remote_address)[0]
        ends = int(host.rpartition(".")[2]) - 1, self._index
        async with connection:
            with anyio.CancelScope() as scope:
                self._connections[scope] = ends
                try:
                    await self._relay(connection, ends)
                finally:
                    del self._connections[scope]

    async def _relay(self, connection: SocketStream, ends: tuple[int, int]) -> None:
        if self._nodes.are_cut(*ends):
            return
        host, port = f"{NODE_HOST}{self._index + 1}", self._nodes.cluster_port
        # Nodes find each other by the addresses from which others connect.
        source = f"{RELAY_HOST}{ends[0] + 1}"
        with suppress(OSError):
            async with (
                await anyio.connect_tcp(host, port, local_host=source) as node,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(self._copy, node, connection, (ends[1], ends[0]))
                await self._copy(connection, node, ends)
                tasks.cancel_scope.cancel()

    def close_cut(self) -> None:
        """Close the connections between nodes that are cut off from each other."""
        for scope, ends in self._connections.items():
            if self._nodes.are_cut(*ends):
                scope.cancel()

    async def _copy(self, source: ByteStream, sink: ByteStream, nodes: tuple[int, int]) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                data = await source.receive()
                while self._nodes.is_held(*nodes):
                    await anyio.sleep(0.05)
                await sink.send(data)
        await anyio.aclose_forcefully(source)
        await anyio.aclose_forcefully(sink)
