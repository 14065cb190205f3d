"""
Fixtures for pytest, which finds them by itself: ``emitter_broker`` and ``emitter``.

They live under AnyIO's plugin: a test that is marked with ``pytest.mark.anyio`` runs on each
backend that the fixture ``anyio_backend`` names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from anyio import create_task_group
from anyio.abc import TaskStatus

from emitter_anyio._values.errors import ConnectError

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
    """
    A client that is connected to ``emitter_broker``, and a master key of it.

    A link that is lost comes back. What ends the client, such as a handler's exception, is raised
    after the test.
    """
    client = connect(emitter_broker.url)
    failures: list[Exception] = []

    # In a task of its own: a client that ends within a fixture's block would cancel the task in
    # which AnyIO's plugin runs every fixture and test.
    async def live(*, task_status: TaskStatus[None]) -> None:
        try:
            await client.run(task_status=task_status)
        except ConnectError:
            raise
        except Exception as exc:
            failures.append(exc)

    async with create_task_group() as task_group:
        await task_group.start(live)
        yield EmitterFixture(client, emitter_broker.secret_key)
        await client.disconnect()
    for failure in failures:
        raise failure
