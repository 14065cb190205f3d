"""
Fixtures for pytest, which finds them by itself: ``emitter_broker`` and ``emitter``.

They live under AnyIO's plugin: mark a test with ``pytest.mark.anyio``, or set ``anyio_mode = "auto"``,
and it runs on each backend that the fixture ``anyio_backend`` names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from ._client import Emitter, connect

if TYPE_CHECKING:
    from .testing import Broker


@dataclass(frozen=True, slots=True)
class EmitterFixture:
    """
    What the fixture ``emitter`` gives.

    :ivar client: a client that is connected to the broker of ``emitter_broker``
    :ivar secret_key: a master key of that broker, for ``keygen`` and ``keyban``
    """

    client: Emitter
    secret_key: str = field(repr=False)


@pytest.fixture
async def emitter_broker(anyio_backend: object) -> AsyncIterator[Broker]:
    """A development broker of this test's own, which listens on a free port of loopback."""
    from .testing import Broker  # not before a test asks for it

    async with Broker() as broker:
        yield broker


@pytest.fixture
async def emitter(emitter_broker: Broker) -> AsyncIterator[EmitterFixture]:
    """A client that is connected to ``emitter_broker``, and a master key of it."""
    async with connect(emitter_broker.url) as client:
        yield EmitterFixture(client, emitter_broker.secret_key)
