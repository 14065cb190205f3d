"""
Test an application against a development broker, with this package's fixtures for pytest.

    python -m pip install . pytest
    python -m pytest examples/test_thermostat.py

Each test runs on asyncio and on Trio, and gets a new development broker.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest
from anyio.abc import TaskStatus

from emitter_anyio import ConnectionLostError, Emitter, UnauthorizedError
from emitter_anyio.testing import BlockingBroker

pytestmark = pytest.mark.anyio

READINGS, HEATER = "home/degrees/", "home/heater/"


# The application. In your project, import it instead.


async def run_thermostat(
    emitter: Emitter,
    key: str,
    wanted: float,
    *,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Switch the heater on below the wanted temperature, and off otherwise."""
    heating: bool | None = None
    async with emitter.subscribe(key, READINGS, last=1, resume=True) as readings:
        task_status.started()
        async for reading in readings:
            if (now := reading.as_object() < wanted) is not heating:
                heating = now
                await emitter.publish(key, HEATER, {"on": heating}, qos=1)


# The tests.


@pytest.fixture
def key(emitter_broker: BlockingBroker) -> str:
    return emitter_broker.keygen("home/#/", "rwsl")


@pytest.fixture
async def thermostat(emitter: Emitter, key: str) -> AsyncIterator[Emitter]:
    """Run a thermostat set to 20 degrees, and yield its client."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(run_thermostat, emitter, key, 20)
        yield emitter
        tasks.cancel_scope.cancel()


async def test_heater_is_switched_off_above_20_degrees(thermostat: Emitter, key: str) -> None:
    async with thermostat.subscribe(key, HEATER, last=0) as orders:
        for degrees in (18, 19, 21, 22):
            await thermostat.publish(key, READINGS, degrees)
        assert (await orders.receive()).as_object() == {"on": True}
        assert (await orders.receive()).as_object() == {"on": False}


async def test_reading_published_during_an_outage_is_read_back(
    thermostat: Emitter, emitter_broker: BlockingBroker, key: str
) -> None:
    async with thermostat.subscribe(key, HEATER, last=0) as orders:
        emitter_broker.drop()  # the client loses its connection, and reconnects
        emitter_broker.publish(READINGS, "15", ttl=60)
        assert (await orders.receive()).as_object() == {"on": True}


async def test_key_without_read_permission_is_refused(
    emitter: Emitter, emitter_broker: BlockingBroker
) -> None:
    with pytest.raises(UnauthorizedError):
        await run_thermostat(emitter, emitter_broker.keygen("home/#/", "w"), 20)


async def test_call_raises_when_the_connection_is_lost(
    thermostat: Emitter, emitter_broker: BlockingBroker
) -> None:
    async def lose_connection() -> None:
        emitter_broker.drop()

    with emitter_broker.hold("reply", "puback"):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lose_connection)
            with pytest.raises(ConnectionLostError):
                await thermostat.me()
