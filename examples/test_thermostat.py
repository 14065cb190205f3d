"""
Testing your application against a real broker, with the fixtures that this package has for pytest.

    python -m pip install . pytest
    python -m pytest examples/test_thermostat.py

Each test runs on asyncio and on Trio, with a development broker of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest
from anyio.abc import TaskStatus

from emitter_anyio import ConnectionLostError, Emitter, UnauthorizedError
from emitter_anyio.pytest_plugin import EmitterFixture
from emitter_anyio.testing import Broker

pytestmark = pytest.mark.anyio

READINGS, HEATER = "home/degrees/", "home/heater/"


# The application. In your project, import it.


async def run_thermostat(
    emitter: Emitter,
    key: str,
    wanted: float,
    *,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Turn the heater on and off, and say so once for each change."""
    heating: bool | None = None
    async with emitter.subscribe(key, READINGS, last=1, resume=True) as readings:
        task_status.started()
        async for reading in readings:
            if (now := reading.as_object() < wanted) is not heating:
                heating = now
                await emitter.publish(key, HEATER, {"on": heating}, qos=1)


# Its tests.


@pytest.fixture
async def key(emitter_broker: Broker) -> str:
    return emitter_broker.keygen("home/#/", "rwsl")


@pytest.fixture
async def thermostat(emitter: EmitterFixture, key: str) -> AsyncIterator[Emitter]:
    """A thermostat that wants 20 degrees, and the client that it uses."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(run_thermostat, emitter.client, key, 20)
        yield emitter.client
        tasks.cancel_scope.cancel()


async def test_it_heats_until_it_is_warm(thermostat: Emitter, key: str) -> None:
    async with thermostat.subscribe(key, HEATER, last=0) as orders:
        for degrees in (18, 19, 21, 22):
            await thermostat.publish(key, READINGS, degrees)
        assert (await orders.receive()).as_object() == {"on": True}
        assert (await orders.receive()).as_object() == {"on": False}


async def test_it_reads_back_what_it_missed(
    thermostat: Emitter, emitter_broker: Broker, key: str
) -> None:
    async with thermostat.subscribe(key, HEATER, last=0) as orders:
        await emitter_broker.drop()  # the network fails, and comes back by itself
        await emitter_broker.publish(READINGS, "15", ttl=60)
        assert (await orders.receive()).as_object() == {"on": True}


async def test_a_key_that_may_only_write(emitter: EmitterFixture, emitter_broker: Broker) -> None:
    with pytest.raises(UnauthorizedError):
        await run_thermostat(emitter.client, emitter_broker.keygen("home/#/", "w"), 20)


async def test_a_call_whose_link_is_lost(thermostat: Emitter, emitter_broker: Broker) -> None:
    with emitter_broker.hold("answer", "puback"):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter_broker.drop)
            with pytest.raises(ConnectionLostError):
                await thermostat.me()
