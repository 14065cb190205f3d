"""What a client does when its link is lost, towards the development broker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from emitter_anyio import Emitter
from emitter_anyio.testing import Broker
from tests.support.connections import connect_reconnecting


@pytest.fixture
async def emitter(broker: Broker) -> AsyncIterator[Emitter]:
    """A client whose link is soon back."""
    async with connect_reconnecting(broker.url) as emitter:
        yield emitter


@pytest.fixture
def key(broker: Broker) -> str:
    """A key for everything."""
    return broker.keygen("#/", "rwlsp")
