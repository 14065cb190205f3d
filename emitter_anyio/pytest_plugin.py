"""
Fixtures for pytest, which loads them automatically: ``emitter_broker`` and ``emitter``.

``emitter_broker`` works in every test. ``emitter`` requires a plugin that runs asynchronous
fixtures: AnyIO's, pytest-trio, or pytest-asyncio in its automatic mode.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest
from anyio import CancelScope, Event

from emitter_anyio._backend.tasks import Tasks

from ._client import Emitter, connect

if TYPE_CHECKING:
    from .testing import BlockingBroker


@pytest.fixture
def emitter_broker() -> Iterator[BlockingBroker]:
    """Run a development broker for one test, in a thread, on a free port of 127.0.0.1."""
    from .testing import BlockingBroker  # imported late, so that loading the plugin stays fast

    with BlockingBroker() as broker:
        yield broker


@pytest.fixture
async def emitter(emitter_broker: BlockingBroker) -> AsyncIterator[Emitter]:
    """
    Connect a client to ``emitter_broker``.

    The client reconnects after a lost connection. An error that ends the client, such as an
    exception of a handler, is raised after the test.
    """
    client = connect(emitter_broker.url)
    failures: list[BaseException] = []
    entered, test_ended = Event(), Event()

    def failed(error: BaseException) -> None:
        failures.append(error)
        entered.set()

    async def run() -> None:
        async with client:
            entered.set()
            await test_ended.wait()

    # Run the client in a separate task. A client that ends in the block of a fixture would cancel
    # the task in which AnyIO's plugin runs all fixtures and tests.
    tasks = Tasks(failed)
    await tasks.open()
    tasks.start(run)
    try:
        await entered.wait()
        if not failures:
            yield client
    finally:
        test_ended.set()
        with CancelScope(shield=True):
            await tasks.stopped()
        if tasks.hosted_here:  # pytest-asyncio sets up and tears down in different tasks
            await tasks.close()
    for failure in failures:
        raise failure
