"""What the soak has found, each in the smallest form that shows it."""

from __future__ import annotations

import anyio
import pytest

from emitter_anyio import EmitterMessage, _subscribing, connect
from emitter_anyio._resuming import Watermark
from emitter_anyio._subscribing import Subscription

from .support.peer import Peer, memory_peer

KEY = "k" * 32


class TestWhatIsDoneForASubscription:
    async def test_ends_when_it_begins_behind_the_end(self) -> None:
        subscription = Subscription(KEY, "a/", None)
        subscription.end()
        with subscription.scope():
            await anyio.sleep_forever()

    async def test_is_forgotten_when_it_is_done(self) -> None:
        subscription = Subscription(KEY, "a/", None)
        with subscription.scope():
            assert subscription._scopes
        assert not subscription._scopes

    async def test_asks_nothing_when_it_ends_in_the_turn_in_which_the_time_is_up(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_subscribing, "RENEWED", 0)
        async with memory_peer(Peer.serve) as connectable:
            async with connect(connectable=connectable) as emitter:
                watermark = Watermark("a/")
                watermark.push(EmitterMessage("a/", b""))
                left = Subscription(KEY, "a/", None)
                await emitter._keep_watermark(left, watermark)
                await emitter._resume(left, watermark)
                watermark.close()
