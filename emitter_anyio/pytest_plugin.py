"""
Fixtures for pytest, which loads them automatically: ``emitter_broker`` and ``emitter``.

They require AnyIO's plugin: a test with the marker ``pytest.mark.anyio`` runs on each backend of
the fixture ``anyio_backend``.
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
    The value of the fixture ``emitter``.

    :ivar client: a client that is connected to the broker of ``emitter_broker``
    :ivar secret_key: a secret key of that broker, for ``keygen`` and ``keyban``
    """

    client: Emitter
    secret_key: str = field(repr=False)


@pytest.fixture
async def emitter_broker(anyio_backend: object) -> AsyncIterator[Broker]:
    """Run a development broker for one test, on a free port of 127.0.0.1."""
    from .testing import Broker  # imported late, so that loading the plugin stays fast

    async with Broker() as broker:
        yield broker


@pytest.fixture
async def emitter(emitter_broker: Broker) -> AsyncIterator[EmitterFixture]:
    """
    Connect a client to ``emitter_broker``.

    The client reconnects after a lost connection. An error that ends the client, such as an
    exception of a handler, is raised after the test.
    """
    client = connect(emitter_broker.url)
    failures: list[Exception] = []

    # Run the client in a separate task. A client that ends in the block of a fixture would cancel
    # the task in which AnyIO's plugin runs all fixtures and tests.
    async def run(*, task_status: TaskStatus[Emitter]) -> None:
        try:
            await client.run(task_status=task_status)
        except ConnectError:
            raise
        except Exception as exc:
            failures.append(exc)

    async with create_task_group() as task_group:
        await task_group.start(run)
        yield EmitterFixture(client, emitter_broker.secret_key)
        await client.disconnect()
    for failure in failures:
        raise failure
