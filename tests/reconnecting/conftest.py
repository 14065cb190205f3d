"""Reconnecting, tested with the development broker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from emitter_anyio import Emitter
from emitter_anyio.testing import Broker
from tests.support.connections import connect_reconnecting


@pytest.fixture
async def emitter(broker: Broker) -> AsyncIterator[Emitter]:
    """A client that reconnects immediately."""
    async with connect_reconnecting(broker.url) as emitter:
        yield emitter


@pytest.fixture
def key(broker: Broker) -> str:
    """A key with every permission for every channel."""
    return broker.keygen("#/", "rwlsp")
