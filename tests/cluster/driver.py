"""The nodes under test, as a test drives them: simulated ones, or real ones through commands."""

from __future__ import annotations

import os
import secrets
import shlex
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import permutations
from typing import Final

import anyio

from emitter_anyio import Emitter, EmitterError, HistoryIncompleteError, connect

from .development_nodes import DevelopmentNodes

FAULTS: Final = {
    "killed": ("stop", "start"),
    "paused": ("pause", "resume"),
    "cut off": ("cut", "heal"),
}
"""By name: the action that begins a fault, and the one that ends it."""
SETTLE_SECONDS: Final = 30.0
"""The time after which nodes that do not find each other are restarted."""
PROBE_SECONDS: Final = 1.0
"""The time after which a probe between two nodes is repeated."""


class Cluster(ABC):
    """
    A cluster of two or more nodes.

    The actions are ``stop`` (like SIGKILL), ``start``, ``pause``, ``resume``, ``cut`` (from the
    other nodes, not from its clients) and ``heal``. Commands might support more.

    :ivar urls: the URLs of the nodes
    :ivar secret: the secret key of their licence
    :ivar disturbed: whether an action has been taken since :meth:`reset`
    """

    def __init__(self, urls: Sequence[str], secret: str) -> None:
        self.urls = list(urls)
        self.secret = secret
        self.disturbed = False

    async def do(self, action: str, node: int) -> None:
        """Take an action, and return once it is complete."""
        self.disturbed = True
        await self._do(action, node)

    @abstractmethod
    async def _do(self, action: str, node: int) -> None: ...

    def servers_from(self, node: int) -> list[str]:
        """Return the URLs of all nodes, with this one first."""
        return self.urls[node:] + self.urls[:node]

    async def reset(self) -> None:
        """Stop all nodes, so that they forget each other, and start them."""
        self.disturbed = True
        while self.disturbed:
            for action in ("stop", "start"):
                for node in range(len(self.urls)):
                    await self.do(action, node)
            self.disturbed = not await self.is_sound()

    async def is_sound(self) -> bool:
        """Return whether soon each node forwards to the others, and reads their stored messages."""
        with anyio.move_on_after(SETTLE_SECONDS):
            await self.ready()
            return await self._read_each_other()
        return False

    async def _read_each_other(self) -> bool:
        async with self.clients() as clients:
            key = await self.keygen(clients[0], "probe/#/")
            channel = f"probe/{secrets.token_hex(4)}/"
            for number, client in enumerate(clients):
                await client.publish(key, channel, str(number), ttl=60, qos=1)
            answers = [await read_everything(client, key, channel) for client in clients]
        return all(len(found) == len(clients) and not missing for found, missing in answers)

    async def ready(self) -> None:
        """Wait until each node forwards messages to new subscribers on each other node."""
        async with self.clients() as clients:
            key = await self.keygen(clients[0], "probe/#/")
            for (one, publisher), (other, subscriber) in permutations(enumerate(clients), 2):
                channel = f"probe/{one}/{other}/"
                while not await _forwards(key, channel, publisher, subscriber):
                    pass

    @asynccontextmanager
    async def clients(self) -> AsyncGenerator[list[Emitter]]:
        """Connect a client to each node."""
        async with AsyncExitStack() as stack:
            yield [
                await stack.enter_async_context(connect(url, retry_first_connect=True))
                for url in self.urls
            ]

    async def keygen(self, emitter: Emitter, channel: str, permissions: str = "rwslp") -> str:
        """Generate a key through a client."""
        return (await emitter.keygen(self.secret, channel, permissions)).key


async def _forwards(key: str, channel: str, publisher: Emitter, subscriber: Emitter) -> bool:
    try:
        # Subscribe again each time, because nodes might have forgotten earlier subscriptions.
        async with subscriber.subscribe(key, channel, 0) as messages:
            with anyio.move_on_after(PROBE_SECONDS):
                await anyio.sleep(PROBE_SECONDS / 10)
                await publisher.publish(key, channel, "", qos=1)
                await messages.receive()
                return True
    except EmitterError:
        await anyio.sleep(PROBE_SECONDS / 10)
    return False


class DevelopmentCluster(Cluster):
    """
    Nodes of the development broker.

    :param nodes: the running nodes
    """

    def __init__(self, nodes: DevelopmentNodes) -> None:
        super().__init__(nodes.urls, nodes.secret)
        self._nodes = nodes

    async def _do(self, action: str, node: int) -> None:
        await getattr(self._nodes, action)(node)


class CommandCluster(Cluster):
    """
    Nodes that are started, stopped and signalled by a command.

    :param command: the command, to which the action and the index of a node are appended
    """

    def __init__(self, urls: Sequence[str], secret: str, command: str) -> None:
        super().__init__(urls, secret)
        self._command = shlex.split(command)

    async def _do(self, action: str, node: int) -> None:
        await anyio.run_process([*self._command, action, str(node)], stderr=None)


def cluster_from_environment() -> CommandCluster | None:
    """
    Return the nodes of ``EMITTER_CLUSTER``, or ``None`` if that is not set.

    :raises RuntimeError: if another variable is missing
    """
    urls = os.environ.get("EMITTER_CLUSTER", "").split()
    if not urls:
        return None
    others = [os.environ.get(f"EMITTER_{name}", "") for name in ("SECRET", "CLUSTER_COMMAND")]
    if not all(others) or len(urls) < 2:
        raise RuntimeError(
            "EMITTER_CLUSTER needs the URLs of two or more nodes, EMITTER_SECRET, and "
            "EMITTER_CLUSTER_COMMAND; see CONTRIBUTING.md"
        )
    return CommandCluster(urls, *others)


def faults_from_environment() -> dict[str, tuple[str, str]]:
    """Return :data:`FAULTS`, and those of ``EMITTER_CLUSTER_FAULTS``: ``begin/end begin/end``."""
    pairs = [each.split("/") for each in os.environ.get("EMITTER_CLUSTER_FAULTS", "").split()]
    return FAULTS | {begin: (begin, end) for begin, end in pairs}


async def read_everything(
    emitter: Emitter, key: str, channel: str
) -> tuple[list[str], list[HistoryIncompleteError]]:
    """Read all stored messages, and what was reported as missing."""
    found: list[str] = []
    missing: list[HistoryIncompleteError] = []
    stored = emitter.history(key, channel, 10**6)
    while True:
        try:
            async for message in stored:
                found.append(message.as_string())  # noqa: PERF401 - keeps them before an error
        except HistoryIncompleteError as error:
            missing.append(error)
        else:
            return found, missing
