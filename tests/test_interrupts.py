"""Ctrl-C on Trio while objects are entered and left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trio import lowlevel

from emitter_anyio import connect
from emitter_anyio._backend.tasks import Tasks
from emitter_anyio.outbox import Outbox
from emitter_anyio.testing import Broker, FaultProxy


@pytest.mark.parametrize("anyio_backend", ["trio"])
@pytest.mark.parametrize("method", ["open", "stop", "close"])
async def test_entering_and_leaving_are_not_interrupted(
    anyio_backend: str, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    protected = []
    original: Any = getattr(Tasks, method)

    def note(tasks: Tasks) -> Any:
        protected.append(lowlevel.currently_ki_protected())
        return original(tasks)

    monkeypatch.setattr(Tasks, method, note)
    async with (
        Broker() as broker,
        FaultProxy(broker.host, broker.port) as proxy,
        connect(proxy.url) as emitter,
        Outbox(tmp_path / "out.db", emitter, broker.keygen("a/", "w")),
    ):
        pass
    assert protected
    assert all(protected)
