"""The answers of functions that stand for keys, and who calls such a function when."""

from __future__ import annotations

import anyio
import pytest

from emitter_anyio._runtime.guard import Guard
from emitter_anyio._runtime.key_ring import KeyRing
from tests.client.tools import Keys

REFUSED = "A" * 32


async def test_a_ring_forgets_what_is_too_much(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emitter_anyio._runtime.key_ring._CACHED_KEYS", 2)
    ring = KeyRing(Guard())
    keys = [Keys(letter) for letter in "abc"]
    for one in keys:
        await ring.get(one)
    assert [ring.known(one) for one in keys] == [None, None, "c"]
    assert ring.known("k") == "k"
    assert await ring.get("k") == await ring.renew("k", "k") == "k"


async def test_those_whose_key_is_refused_at_one_time_ask_once(anyio_backend: object) -> None:
    ring, keys = KeyRing(Guard()), Keys(REFUSED)
    assert await ring.get(keys) == REFUSED
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(ring.renew, keys, REFUSED)
    assert keys.asked == 2
    assert await ring.renew(keys, REFUSED) == REFUSED
    assert keys.asked == 3


async def test_a_ring_asks_for_the_restoration_beside_the_others(anyio_backend: object) -> None:
    ring = KeyRing(Guard())
    restored = anyio.Event()
    asked = 0

    async def provide() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            # Its own call waits for the link, and the link for the restoration.
            await restored.wait()
        return "k"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ring.get, provide)
        await anyio.wait_all_tasks_blocked()
        assert await ring.get(provide, restoring=True) == "k"
        restored.set()
    assert ring._asking == {}
