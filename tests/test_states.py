"""The state tables of clients and connections, for every state and step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import EndOfStream

from emitter_anyio import ClosedError, ConnectionLostError, Emitter, connect
from emitter_anyio._net.connection import CONNECTION_TRANSITIONS, ConnectionState, ConnectionStep
from emitter_anyio._net.options import make_options
from emitter_anyio._runtime.slot import TRANSITIONS, ClientState, Slot, Step
from emitter_anyio.testing import Broker
from tests.support.connections import connect_once, connect_reconnecting, while_disconnected


class StubConnection:
    """A substitute for a connection, which the slot only stores."""

    session = None


STUB: Any = StubConnection()

STEPS: dict[Step, Callable[[Slot], object]] = {
    Step.ENTER: Slot.enter,
    Step.OPEN: lambda slot: slot.open(STUB),
    Step.RESTORE: Slot.restore,
    Step.DRAIN: Slot.drain,
    Step.LOSE: lambda slot: slot.lose(EndOfStream(), None),
    Step.LEAVE: Slot.leave,
    Step.STOP: Slot.stop,
    Step.END: Slot.end,
}

PATHS: dict[ClientState, tuple[Step, ...]] = {
    ClientState.CLOSED: (),
    ClientState.CONNECTING: (Step.ENTER,),
    ClientState.RESTORING: (Step.ENTER, Step.OPEN),
    ClientState.CONNECTED: (Step.ENTER, Step.OPEN, Step.RESTORE),
    ClientState.DRAINING: (Step.ENTER, Step.OPEN, Step.RESTORE, Step.DRAIN),
    ClientState.CLOSING: (Step.ENTER, Step.OPEN, Step.RESTORE, Step.LEAVE),
    ClientState.ENDING: (Step.ENTER, Step.OPEN, Step.RESTORE, Step.STOP),
}
"""The steps that lead to each state."""


@pytest.mark.parametrize("step", Step, ids=lambda step: step.name)
@pytest.mark.parametrize("state", ClientState, ids=lambda state: state.name)
async def test_client_step_in_each_state(
    anyio_backend: object, state: ClientState, step: Step
) -> None:
    slot = Slot(make_options("mqtt://127.0.0.1", {}))
    for step_before in PATHS[state]:
        STEPS[step_before](slot)
    assert slot.state is state
    STEPS[step](slot)
    assert slot.state is TRANSITIONS.get((state, step), state)


def test_client_can_end_from_every_state() -> None:
    for state in set(ClientState) - {ClientState.CLOSED}:
        assert TRANSITIONS[state, Step.END] is ClientState.CLOSED


def test_ended_connection_does_not_change() -> None:
    for step in ConnectionStep:
        assert (ConnectionState.ENDED, step) not in CONNECTION_TRANSITIONS
    for state in set(ConnectionState) - {ConnectionState.ENDED}:
        assert CONNECTION_TRANSITIONS[state, ConnectionStep.END] is ConnectionState.ENDED


async def test_state_as_users_see_it(broker: Broker) -> None:
    emitter: Emitter = connect_reconnecting(broker.url)
    seen: list[str] = [emitter.state]
    async with emitter:
        seen.append(emitter.state)
        async with while_disconnected(emitter, broker):
            seen.append(emitter.state)
        seen.append(emitter.state)
    seen.append(emitter.state)
    assert seen == ["closed", "connected", "connecting", "connected", "closed"]


async def test_state_in_handlers_after_the_final_loss_is_closing(
    broker: Broker,
) -> None:
    seen: list[str] = []

    async def look() -> None:
        await anyio.wait_all_tasks_blocked()
        seen.append(emitter.state)
        with pytest.raises(ConnectionLostError):
            await emitter.wait_connected()

    emitter = connect_once(broker.url)
    emitter.on("disconnect", look)
    with pytest.raises(ConnectionLostError):
        async with emitter:
            await broker.drop()
            await anyio.sleep_forever()
    assert seen == ["closing"]


async def test_closed_error_after_a_failed_connect_has_the_cause(anyio_backend: object) -> None:
    emitter = connect("mqtt://127.0.0.1:1", reconnect=None)
    with pytest.raises(Exception, match="could not connect") as caught:
        async with emitter:
            raise AssertionError("entered")
    with pytest.raises(ClosedError) as later:
        await emitter.wait_connected()
    assert later.value.__cause__ is caught.value
