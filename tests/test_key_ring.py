"""The key ring calls key functions, caches their keys and renews refused ones."""

from __future__ import annotations

import anyio
import pytest

from emitter_anyio._runtime.guard import Guard
from emitter_anyio._runtime.key_ring import KeyRing
from tests.client.tools import Keys

REFUSED = "A" * 32


async def test_key_ring_evicts_oldest_keys(
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


async def test_concurrent_renewals_of_refused_key_call_function_once(anyio_backend: object) -> None:
    ring, keys = KeyRing(Guard()), Keys(REFUSED)
    assert await ring.get(keys) == REFUSED
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(ring.renew, keys, REFUSED)
    assert keys.calls == 2
    assert await ring.renew(keys, REFUSED) == REFUSED
    assert keys.calls == 3


async def test_restoration_calls_key_function_although_a_call_is_pending(
    anyio_backend: object,
) -> None:
    ring = KeyRing(Guard())
    restored = anyio.Event()
    asked = 0

    async def provide() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            # This call needs the connection, which is usable only after the restoration.
            await restored.wait()
        return "k"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ring.get, provide)
        await anyio.wait_all_tasks_blocked()
        assert await ring.get(provide, restoring=True) == "k"
        restored.set()
    assert ring._calls == {}
