"""The client suite: behaviour of the public API against any broker.

The tests use only public names and a fresh channel each, so that they also run against a real
Emitter (see the fixture ``server``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from emitter_anyio import Emitter, connect
from tests.support.server import Server


@pytest.fixture
async def emitter(server: Server) -> AsyncIterator[Emitter]:
    """A connected client."""
    async with connect(server.url) as emitter:
        yield emitter


@pytest.fixture
async def other(server: Server) -> AsyncIterator[Emitter]:
    """A second connected client, with username bob; on another node if there are several."""
    async with connect(server.other_url, username="bob") as other:
        yield other


@pytest.fixture
async def key(emitter: Emitter, server: Server, unique: str) -> str:
    """A key with every permission for ``unique`` and the channels below it."""
    return (await emitter.keygen(server.secret, f"{unique}#/", "rwslp")).key
