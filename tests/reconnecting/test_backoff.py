"""``Backoff``: how long, how often and to which server a client tries to reconnect."""

from __future__ import annotations

import random
from typing import Any

import anyio
import pytest

from emitter_anyio import Backoff, ConnectError, ConnectionLostError, EmitterError, connect
from emitter_anyio.testing import Broker
from tests.support.peer import Peer, memory_peer

# The value


def test_ceiling_doubles_up_to_the_maximum() -> None:
    backoff = Backoff(initial=0.5, maximum=3)
    assert [backoff.longest(attempt) for attempt in range(5)] == [0.5, 1, 2, 3, 3]


def test_ceiling_is_never_below_the_spread() -> None:
    backoff = Backoff(initial=0.5, maximum=3, spread=2)
    assert [backoff.longest(attempt) for attempt in range(5)] == [2, 2, 2, 3, 3]
    assert Backoff(spread=60).longest(20) == 60


def test_ceiling_of_a_huge_attempt_number_is_the_maximum() -> None:
    assert Backoff().longest(10**9) == 30


def test_delay_is_drawn_between_0_and_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return high

    monkeypatch.setattr(random, "uniform", uniform)
    backoff = Backoff(initial=1, maximum=4)
    assert [backoff.delay(attempt) for attempt in range(4)] == [1, 2, 4, 4]
    assert drawn == [(0, 1), (0, 2), (0, 4), (0, 4)]


def test_delays_are_spread_over_the_whole_range() -> None:
    delays = {Backoff().delay(3) for _ in range(100)}
    assert len(delays) > 90
    assert all(0 <= delay <= 0.8 for delay in delays)


def test_delay_can_be_0() -> None:
    assert Backoff(initial=0, maximum=0).delay(7) == 0


@pytest.mark.parametrize("value", ["1", None, True, 1j])
def test_time_that_is_not_a_number_raises_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"initial.*seconds"):
        Backoff(initial=value)
    with pytest.raises(TypeError, match=r"maximum.*seconds"):
        Backoff(maximum=value)
    with pytest.raises(TypeError, match=r"spread.*seconds"):
        Backoff(spread=value)


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_time_out_of_range_raises_value_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"initial.* 0"):
        Backoff(initial=value)


def test_maximum_below_initial_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"initial.*2.*1"):
        Backoff(initial=2, maximum=1)


@pytest.mark.parametrize("value", [1.5, "3", True])
def test_tries_that_are_not_an_int_raise_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"tries.*None"):
        Backoff(tries=value)


@pytest.mark.parametrize("value", [0, -1])
def test_tries_below_1_suggest_reconnect_none(value: int) -> None:
    with pytest.raises(ValueError, match="reconnect=None"):
        Backoff(tries=value)


def test_backoff_is_a_value() -> None:
    assert Backoff(1, 2, 3, 4) == Backoff(initial=1, maximum=2, spread=3, tries=4)
    assert repr(Backoff()) == "Backoff(initial=0.1, maximum=30, spread=0, tries=None)"


# A series of tries


class Attempts:
    """
    A script for a memory peer that records when the client tries to connect.

    :param lifetimes: the seconds that each connection lasts; ``None`` makes the try fail
    """

    def __init__(self, *lifetimes: float | None) -> None:
        self.times: list[float] = []
        self._lifetimes = [float("inf") if lifetime is None else lifetime for lifetime in lifetimes]
        self._opens = [lifetime is not None for lifetime in lifetimes]
        self._played = 0

    async def before(self, attempt: int) -> None:
        self.times.append(anyio.current_time())
        if not self._opens[attempt - 1]:
            self._played += 1
            raise OSError("refused")

    async def play(self, peer: Peer) -> None:
        lifetime = self._lifetimes[self._played]
        self._played += 1
        with anyio.move_on_after(lifetime):
            await peer.serve()

    @property
    def waits(self) -> list[float]:
        """The seconds between two tries."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@pytest.fixture
def longest_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(low: float, high: float) -> float:
        return high

    monkeypatch.setattr(random, "uniform", uniform)


def exactly(*seconds: float) -> Any:
    # asyncio's virtual clock overshoots each deadline a little.
    return pytest.approx(list(seconds), abs=1e-6)


async def run_client(attempts: Attempts, backoff: Backoff) -> EmitterError | None:
    """Sleep in a client's block, and return the exception that ends it."""
    async with memory_peer(attempts.play, before=attempts.before) as connectable:
        try:
            async with connect(connectable=connectable, reconnect=backoff):
                await anyio.sleep_forever()
        except EmitterError as exc:
            return exc
    return None


@pytest.mark.virtual_time
@pytest.mark.usefixtures("longest_waits")
async def test_client_ends_when_the_tries_are_used_up(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "emitter_anyio")
    attempts = Attempts(100, None, None, None)
    lost = await run_client(attempts, Backoff(1, 3, tries=3))
    assert attempts.waits == exactly(101, 2, 3)
    assert isinstance(lost, ConnectionLostError)
    assert isinstance(lost.__cause__, ConnectError)
    assert str(lost.__cause__.__cause__) == "refused"
    assert "3 tries" in str(lost)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "WARNING", "INFO", "INFO", "INFO", "ERROR"]
    _, _, *tries, last = caplog.messages
    for number, text in enumerate(tries, 1):
        assert str(number) in text
        assert str(lost.__cause__) in text
    assert last == str(lost)


@pytest.mark.virtual_time
@pytest.mark.usefixtures("longest_waits")
async def test_connection_that_lasted_10_seconds_resets_the_backoff(
    anyio_backend: object,
) -> None:
    attempts = Attempts(100, None, None, 10.1, None, None, None)
    assert "3 tries" in str(await run_client(attempts, Backoff(1, 30, tries=3)))
    assert attempts.waits == exactly(101, 2, 4, 11.1, 2, 4)


@pytest.mark.virtual_time
@pytest.mark.usefixtures("longest_waits")
async def test_connection_lost_within_10_seconds_does_not_reset_the_backoff(
    anyio_backend: object,
) -> None:
    attempts = Attempts(100, 0.25, 9.9, 0.25)
    assert "3 tries" in str(await run_client(attempts, Backoff(1, 30, tries=3)))
    assert attempts.waits == exactly(101, 2.25, 13.9)


@pytest.mark.virtual_time
@pytest.mark.usefixtures("longest_waits")
async def test_no_wait_has_a_ceiling_below_the_spread(anyio_backend: object) -> None:
    attempts = Attempts(100, None, None, 100, None, None, None)
    assert "3 tries" in str(await run_client(attempts, Backoff(1, 30, spread=3, tries=3)))
    assert attempts.waits == exactly(103, 3, 4, 103, 3, 4)


@pytest.mark.virtual_time
async def test_permanent_failure_is_logged_as_a_warning_once_per_cause(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "emitter_anyio")
    codes = iter([0, 5, 5, 3, 4])

    async def play(peer: Peer) -> None:
        await peer.accept(next(codes))

    async with memory_peer(play) as connectable:
        with pytest.raises(ConnectionLostError):
            async with connect(connectable=connectable, reconnect=Backoff(tries=4)):
                await anyio.sleep_forever()
    tries = [record for record in caplog.records if "to reconnect failed" in record.getMessage()]
    assert [record.levelname for record in tries] == ["WARNING", "INFO", "INFO", "WARNING"]


@pytest.mark.virtual_time
@pytest.mark.usefixtures("longest_waits")
async def test_tries_none_never_gives_up(anyio_backend: object) -> None:
    attempts = Attempts(100, *[None] * 50, 1000)
    with anyio.move_on_after(1600):
        await run_client(attempts, Backoff(1, 30))
    assert attempts.waits == exactly(101, 2, 4, 8, 16, *[30] * 46)


@pytest.mark.virtual_time
async def test_entering_tries_once(anyio_backend: object) -> None:
    attempts = Attempts(None)
    assert type(await run_client(attempts, Backoff(1, 30))) is ConnectError
    assert len(attempts.times) == 1


# Several servers


async def test_next_server_is_tried_first(anyio_backend: object) -> None:
    async with Broker() as one, Broker() as two, Broker() as three:
        urls = [broker.url for broker in (one, two, three)]
        seen = []
        async with (
            connect(servers=urls, reconnect=Backoff(0, 0)) as emitter,
            emitter.stream("connect") as connected,
        ):
            for broker in (one, two, three, one):
                assert emitter.connection is not None
                seen.append(emitter.connection.server)
                await broker.drop()
                await connected.receive()
        assert seen == [*urls, urls[0]]


async def test_server_that_is_down_is_skipped(anyio_backend: object) -> None:
    async with Broker() as one, Broker() as two, Broker() as three:
        urls = [broker.url for broker in (one, two, three)]
        async with (
            connect(servers=urls, reconnect=Backoff(0, 0)) as emitter,
            emitter.stream("connect") as connected,
        ):
            with two.refuse():
                await one.drop()
                await connected.receive()
            assert emitter.connection is not None
            assert emitter.connection.server == three.url
            assert isinstance(emitter.connection.last_error, EOFError | OSError)


async def test_error_with_all_servers_down_has_every_cause(anyio_backend: object) -> None:
    async with Broker() as one, Broker() as two:
        with pytest.raises(ConnectionLostError) as caught:
            async with connect(
                servers=[one.url, two.url], reconnect=Backoff(0.001, 0.001, tries=2)
            ):
                with one.refuse(), two.refuse():
                    await one.drop()
                    await anyio.sleep_forever()
        assert isinstance(caught.value.__cause__, ConnectError)
        assert list(caught.value.__cause__.causes) == [two.url, one.url]
