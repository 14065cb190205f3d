"""The pieces of docs/reconnecting.md, run."""

from __future__ import annotations

import re

from emitter_anyio import connect
from tests.support.command import ROOT
from tests.test_readme import Place, piece, place, run_piece

__all__ = ["place"]

GAPS, KEYS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/reconnecting.md").read_text(), re.DOTALL
)


async def test_gaps(place: Place) -> None:
    async with place.emitter.watch_presence(place.key, "chat/") as changes:
        async with connect(place.broker.url) as emitter:
            async with piece(GAPS, place.names | {"emitter": emitter}) as printed:
                while (await changes.receive()).event != "subscribe":
                    pass
                (id,) = {client.id for client in place.broker.clients if client.subscriptions}
                await place.broker.drop(id)
                await place.broker.publish("chat/", "meanwhile", ttl=60)
                assert await printed.receive() == "away; 1 read back, complete: True"
                assert await printed.receive() == "meanwhile True"


async def test_keys(place: Place) -> None:
    names = place.names | {"SECRET": place.broker.secret_key}
    assert await run_piece(KEYS, names) == ["hello"]
