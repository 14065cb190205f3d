"""
The cluster suite: what the client promises in a cluster, and what no client can see.

The nodes are those of ``EMITTER_CLUSTER``, or three nodes of the development broker.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from emitter_anyio import Emitter

from .development_nodes import DevelopmentNodes
from .driver import Cluster, DevelopmentCluster, cluster_from_environment

PATIENCE_SECONDS = 0.3
"""The time that simulated nodes wait for each other; 2 seconds would make the tests slow."""


@pytest.fixture
async def cluster(anyio_backend: object, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    """The nodes, which all know each other."""
    real = cluster_from_environment()
    async with AsyncExitStack() as stack:
        if real is None:
            monkeypatch.setattr(
                "emitter_anyio._features.history._SLOW_PAGE_SECONDS", 0.9 * PATIENCE_SECONDS
            )
            nodes = await stack.enter_async_context(DevelopmentNodes(3, PATIENCE_SECONDS))
            yield DevelopmentCluster(nodes)
            return
        if real.disturbed or not await real.is_sound():
            await real.reset()
        yield real
        if real.disturbed:
            await real.reset()


@pytest.fixture
async def clients(cluster: Cluster) -> AsyncIterator[list[Emitter]]:
    """A client of each node."""
    async with cluster.clients() as clients:
        yield clients


@pytest.fixture
async def key(cluster: Cluster, clients: list[Emitter], unique: str) -> str:
    """A key with every permission for ``unique`` and the channels below it."""
    return await cluster.keygen(clients[0], f"{unique}#/")
