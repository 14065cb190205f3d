"""
Fleets of clients that lose their broker together, in virtual time.

``python -m benchmarks.fleets`` runs the same simulations with 10,000 clients.
"""

from __future__ import annotations

import math
from typing import Literal

import pytest

from benchmarks import fleets
from benchmarks.fleets import Plan, Result, parse_backoff, peak, run
from emitter_anyio import Backoff

CLIENTS = 500
MAX_BYTES_PER_CLIENT = 250_000
"""Far above the measured memory of a client with its half of the broker, 110 KB."""

pytestmark = pytest.mark.timeout(600)  # on a busy machine, 500 clients can take a minute
on_both_backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
Backend = Literal["asyncio", "trio"]


@pytest.fixture(autouse=True)
def _without_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off asyncio's debug mode, which would make these tests several times slower."""
    monkeypatch.delenv("PYTHONASYNCIODEBUG", raising=False)


def check(result: Result, *, lost: int = CLIENTS) -> None:
    """Check what holds for each outage: no client is forgotten, and memory is bounded."""
    assert result.lost == lost
    assert len(result.restored) == lost
    assert result.forgotten == 0
    assert result.bytes_restored < MAX_BYTES_PER_CLIENT


@pytest.mark.parametrize(("backend", "seed"), [("asyncio", 1), ("trio", 2)])
def test_default_backoff_restores_all_clients_of_a_broker_that_was_away(
    backend: Backend, seed: int
) -> None:
    result = run(Plan(CLIENTS, "away", seconds=10, seed=seed, backend=backend))
    check(result)
    # Ceilings of 0.1, 0.2, 0.4 and 0.8 s: most clients make four tries in the first second.
    assert result.peak < 5 * CLIENTS
    # From the seventh try, the ceilings are 6.4 s and more.
    assert result.peak_after < CLIENTS / 3
    # At most two more waits, of at most 12.8 and 25.6 s.
    assert result.last_restored < 12.8 + 25.6


@on_both_backends
def test_spread_limits_the_tries_per_second(backend: Backend) -> None:
    result = run(
        Plan(CLIENTS, "away", seconds=10, backoff=Backoff(spread=20), seed=3, backend=backend)
    )
    check(result)
    # On average, the clients make 2 / 20 tries per second each.
    assert result.peak < 2 * CLIENTS * 2 / 20
    assert result.last_restored < 20 + 30


@on_both_backends
def test_clients_of_a_lost_node_spread_over_the_other_nodes(backend: Backend) -> None:
    lost = math.ceil(CLIENTS / 3)
    hasty = run(Plan(CLIENTS, "node", backend=backend))
    check(hasty, lost=lost)
    assert hasty.last_restored < 1
    patient = run(Plan(CLIENTS, "node", backoff=Backoff(spread=20), backend=backend))
    check(patient, lost=lost)
    assert patient.peak < 2 * lost * 2 / 20
    assert patient.last_restored < 21


@on_both_backends
def test_keys_that_expire_together_are_renewed_once_by_each_client(backend: Backend) -> None:
    result = run(Plan(CLIENTS, "keys", backoff=Backoff(spread=20), backend=backend))
    check(result)
    assert len(result.key_requests) == CLIENTS
    assert peak(result.key_requests) < 2 * CLIENTS * 2 / 20


@on_both_backends
def test_slow_broker_restores_all_clients(backend: Backend) -> None:
    # Each client needs two requests: CONNECT and SUBSCRIBE.
    result = run(
        Plan(CLIENTS, "slow", rate=25, backoff=Backoff(spread=80), seed=4, backend=backend)
    )
    check(result)
    assert len(result.tries) < 2 * CLIENTS
    assert 2 * CLIENTS / 25 - 10 < result.last_restored < 2 * 80


def test_overloaded_broker_restores_few_clients_without_spread() -> None:
    # The broker spends its time on clients that have stopped waiting.
    result = run(Plan(200, "slow", rate=2, patience=120))
    assert result.lost == 200
    assert len(result.restored) < 100
    assert not result.complete


def test_same_seed_gives_the_same_figures() -> None:
    one, two = (run(Plan(50, seed=5)) for _ in range(2))
    assert one.tries == two.tries
    assert one.restored == two.restored
    assert run(Plan(50, seed=6)).tries != one.tries


def test_peak_is_the_largest_number_within_a_second() -> None:
    assert peak([]) == 0
    assert peak([3.0]) == 1
    assert peak([0.0, 0.5, 0.9, 1.5, 1.0]) == 3
    assert peak([1.0, 2.0, 3.0]) == 1


def test_backoff_is_parsed() -> None:
    assert parse_backoff("") == Backoff()
    assert parse_backoff("initial=1,maximum=60,spread=10,tries=3") == Backoff(1, 60, 10, 3)


def test_command_prints_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--clients", "10", "--outage", "node", "--backoff", "spread=2", "--seed", "7"]
    assert fleets.main(arguments) == 0
    assert '"lost": 4, "restored": 4' in capsys.readouterr().out


def test_command_fails_if_a_client_is_not_restored() -> None:
    assert fleets.main(["--clients", "10", "--patience", "0"]) == 1


def test_table_has_the_figures() -> None:
    results = [run(Plan(10)), run(Plan(10, patience=0, backoff=Backoff(spread=5)))]
    first, second = fleets.table(results).splitlines()[2:]
    assert first.startswith("| 10 | away | `Backoff()` |")
    assert "| `Backoff(spread=5)` |" in second
    assert second.endswith("| 0 after 0 s |")
