"""Nodes of the development broker in this process."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from emitter_anyio.testing import Broker


class DevelopmentNodes:
    """
    The nodes of a simulated cluster.

    :param count: the number of nodes
    :param patience: the seconds that a node waits for the others
    """

    def __init__(self, count: int, patience: float = 2) -> None:
        first = Broker(patience=patience)
        more = [Broker(cluster=first, patience=patience) for _ in range(count - 1)]
        self.nodes = [first, *more]
        self.secret = first.secret_key
        self._stack = AsyncExitStack()

    @property
    def urls(self) -> list[str]:
        """The URLs of the nodes."""
        return [node.url for node in self.nodes]

    async def __aenter__(self) -> Self:
        for node in self.nodes:
            await self._stack.enter_async_context(node)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def start(self, index: int) -> None:
        """Start a stopped node, with its stored messages."""
        await self.nodes[index].restart()

    async def stop(self, index: int) -> None:
        """Stop a node as SIGKILL does."""
        await self.nodes[index].stop()

    async def pause(self, index: int) -> None:
        """Suspend a node."""
        self.nodes[index].pause()

    async def resume(self, index: int) -> None:
        """Continue a suspended node."""
        self.nodes[index].resume()

    async def cut(self, index: int) -> None:
        """Cut the connections between a node and the others."""
        self.nodes[index].cut()

    async def heal(self, index: int) -> None:
        """Restore the connections between a node and the others."""
        self.nodes[index].heal()

    async def erase(self, index: int) -> None:
        """Stop a node, and delete its stored messages."""
        await self.nodes[index].restart(forget=True)
        await self.nodes[index].stop()
