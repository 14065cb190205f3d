"""The client suite: what the client promises, towards whichever broker there is.

It uses the public API alone, and channels of its own, so that the same tests run against a real
Emitter (see the fixture ``server``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from emitter_anyio import Emitter, connect
from tests.support.server import Server


@pytest.fixture
async def emitter(server: Server) -> AsyncIterator[Emitter]:
    """A client that is connected."""
    async with connect(server.url) as emitter:
        yield emitter


@pytest.fixture
async def other(server: Server) -> AsyncIterator[Emitter]:
    """Another client, called bob, that is connected; to another node, if there are several."""
    async with connect(server.other_url, username="bob") as other:
        yield other


@pytest.fixture
async def key(emitter: Emitter, server: Server, unique: str) -> str:
    """A key that may do everything in ``unique`` and below."""
    return (await emitter.keygen(server.secret, f"{unique}#/", "rwslp")).key
