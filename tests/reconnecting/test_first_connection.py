"""Entering with ``retry_first_connect=True`` while the broker cannot be reached."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import anyio
import pytest

from emitter_anyio import (
    Backoff,
    ClosedError,
    ConnectError,
    ConnectRefusedError,
    Emitter,
    UnauthorizedError,
    Will,
    connect,
)
from emitter_anyio.testing import Broker
from tests.reconnecting.test_backoff import Attempts, exactly
from tests.support.peer import Peer, memory_peer
from tests.test_transport import refusing_port

FAST = Backoff(initial=0.001, maximum=0.01)


class FailedTries:
    """A trace hook that counts failed attempts to connect."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = anyio.Event()

    def __call__(self, name: str, details: Mapping[str, object]) -> None:
        if name == "connect.failed":
            self.count += 1
            self._changed.set()
            self._changed = anyio.Event()

    async def wait(self, count: int) -> None:
        while self.count < count:
            await self._changed.wait()


def retrying(port: int, failed: FailedTries) -> Emitter:
    url = f"mqtt://127.0.0.1:{port}"
    return connect(url, reconnect=FAST, retry_first_connect=True, trace=failed)


@pytest.fixture
def longest_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)


async def start_later(port: int, failed: FailedTries, stop: anyio.Event) -> None:
    """Run a broker from the third failed try on."""
    await failed.wait(3)
    async with Broker(port=port):
        await stop.wait()


@pytest.mark.parametrize("run", [False, True])
async def test_client_connects_when_the_broker_has_started(
    anyio_backend: object, run: bool
) -> None:
    port, failed, stop = refusing_port(), FailedTries(), anyio.Event()
    emitter = retrying(port, failed)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start_later, port, failed, stop)
        if run:
            await tasks.start(emitter.run)
            assert emitter.state == "connected"
            await emitter.disconnect()
        else:
            async with emitter:
                await emitter.flush()
                assert emitter.connection is not None
                assert isinstance(emitter.connection.last_error, ConnectError)
        stop.set()
    assert failed.count >= 3


async def test_client_is_connecting_until_it_is_cancelled(anyio_backend: object) -> None:
    failed = FailedTries()
    emitter = retrying(refusing_port(), failed)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(emitter.run)
        await failed.wait(2)
        assert emitter.state == "connecting"
        tasks.cancel_scope.cancel()
    assert emitter.state == "closed"


async def test_disconnect_ends_the_tries(anyio_backend: object) -> None:
    failed = FailedTries()
    emitter = retrying(refusing_port(), failed)

    async def disconnect() -> None:
        await failed.wait(2)
        await emitter.disconnect()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(disconnect)
        with pytest.raises(ClosedError, match=r"disconnect\(\)"):
            async with emitter:
                pytest.fail("it connected")  # pragma: no cover
    assert emitter.state == "closed"


@pytest.mark.virtual_time
async def test_deadline_of_the_caller_ends_the_tries(anyio_backend: object) -> None:
    attempts = Attempts(*[None] * 1000)
    async with memory_peer(attempts.play, before=attempts.before) as connectable:
        start = anyio.current_time()
        with pytest.raises(TimeoutError):
            with anyio.fail_after(3600):
                async with connect(connectable=connectable, retry_first_connect=True):
                    pytest.fail("it connected")  # pragma: no cover
        assert anyio.current_time() - start == pytest.approx(3600)
    assert len(attempts.times) > 100


@pytest.mark.virtual_time
@pytest.mark.usefixtures("longest_delays")
async def test_delays_are_those_of_the_backoff(anyio_backend: object) -> None:
    attempts = Attempts(None, None, None, None, 100)
    async with memory_peer(attempts.play, before=attempts.before) as connectable:
        backoff = Backoff(1, 3, spread=2)
        async with connect(connectable=connectable, reconnect=backoff, retry_first_connect=True):
            pass
    assert attempts.waits == exactly(2, 2, 3, 3)


@pytest.mark.virtual_time
async def test_last_of_the_tries_raises(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "emitter_anyio")
    attempts = Attempts(None, None, None, 100)
    async with memory_peer(attempts.play, before=attempts.before) as connectable:
        emitter = connect(
            connectable=connectable, reconnect=Backoff(tries=3), retry_first_connect=True
        )
        with pytest.raises(ConnectError, match="refused"):
            async with emitter:
                pytest.fail("it connected")  # pragma: no cover
        assert len(attempts.times) == 3
        logged = [(record.levelname, record.getMessage()) for record in caplog.records]
        reason = "could not connect to the connectable: refused"
        assert logged == [
            ("WARNING", f"try 1 to connect failed: {reason}"),
            ("INFO", f"try 2 to connect failed: {reason}"),
        ]
        # Entering again begins a new series.
        async with emitter:
            assert emitter.state == "connected"


@pytest.mark.virtual_time
async def test_each_permanent_cause_is_logged_as_a_warning_once(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    codes = iter((3, 4, 4, 5, 4, 5, 0))

    async def script(peer: Peer) -> None:
        if (code := next(codes)) == 0:
            await peer.serve()
        else:
            await peer.accept(code)

    async with memory_peer(script) as connectable:
        async with connect(connectable=connectable, retry_first_connect=True):
            pass
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    for warning, words in zip(
        warnings, ("unavailable", "bad user name", "authorized"), strict=True
    ):
        assert words in warning


async def test_key_function_of_the_will_is_called_again(broker: Broker) -> None:
    calls = 0

    async def get_key() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise OSError("the key service has not started")
        return broker.keygen("a/", "w")

    async with connect(
        broker.url, reconnect=FAST, retry_first_connect=True, will=Will(get_key, "a/", "gone")
    ):
        assert calls == 3


async def test_refusal_of_a_call_in_the_block_is_not_retried(broker: Broker) -> None:
    with pytest.raises(UnauthorizedError):
        async with connect(broker.url, reconnect=FAST, retry_first_connect=True) as emitter:
            await emitter.publish("A" * 32, "a/", "x", qos=1)


@pytest.mark.virtual_time
async def test_without_the_option_each_server_is_tried_once(anyio_backend: object) -> None:
    async def refuse(peer: Peer) -> None:
        await peer.accept(5)

    async with memory_peer(refuse) as connectable:
        with pytest.raises(ConnectRefusedError):
            async with connect(connectable=connectable):
                pytest.fail("it connected")  # pragma: no cover
        assert len(connectable.streams) == 1


@pytest.mark.parametrize("reconnect", [None, False])
def test_option_without_reconnecting_is_rejected(reconnect: Any) -> None:
    with pytest.raises(TypeError, match="retry_first_connect requires reconnect"):
        connect("mqtt://h", reconnect=reconnect, retry_first_connect=True)
