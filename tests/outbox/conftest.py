"""The outbox, tested with the development broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from emitter_anyio.testing import Broker


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a file that does not exist yet."""
    return tmp_path / "out.db"


@pytest.fixture
def key(broker: Broker) -> str:
    """A key with every permission for every channel."""
    return broker.keygen("#/", "rwlsp")
