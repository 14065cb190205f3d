"""A program that is killed at random moments. ``python -m tests.soak.outbox`` is the long round."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.soak.outbox import Check, Kills

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_no_accepted_message_is_lost_when_program_is_killed(
    anyio_backend: object, backend: str, path: Path
) -> None:
    seed = random.randrange(10**6)
    kills = Kills(path, backend, 4, seed)
    await kills()
    assert kills.check.accepted
    assert kills.breaches() == [], f"python -m tests.soak.outbox --backend {backend} --seed {seed}"


def test_accounting_finds_losses_duplicates_and_wrong_order() -> None:
    check = Check()
    check.accepted = {("a/", 1), ("a/", 2), ("b/", 1)}
    check.arrived["a/"] = [2, 1, 2]
    assert check.lost == {("b/", 1)}
    assert check.duplicates == 1
    assert check.disordered == [("a/", 1, 2)]
    assert len(check.breaches()) == 2
    check.arrived["a/"] = [1, 2, 1, 2, 3]
    assert check.disordered == []
