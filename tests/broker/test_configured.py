"""The broker of a program that runs with a development broker and with a real one."""

from __future__ import annotations

import pytest

from emitter_anyio import connect
from emitter_anyio.testing import Broker, ConfiguredBroker


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EMITTER_URL", "EMITTER_SECRET"):
        monkeypatch.delenv(name, raising=False)


async def test_without_variables_a_development_broker_runs(anyio_backend: object) -> None:
    configured = ConfiguredBroker()
    for _ in range(2):
        async with configured as broker, connect(broker.url) as emitter:
            assert isinstance(broker.own, Broker)
            key = await emitter.keygen(broker.secret_key, "chat/", "rw")
            assert key.channel == "chat/"
        assert configured.own is None


async def test_variables_name_a_running_broker(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMITTER_URL", broker.url)
    monkeypatch.setenv("EMITTER_SECRET", broker.secret_key)
    async with ConfiguredBroker() as configured, connect(configured.url) as emitter:
        assert configured.own is None
        assert configured.url == broker.url
        key = await emitter.keygen(configured.secret_key, "chat/", "rw")
        assert key.channel == "chat/"


@pytest.mark.parametrize(
    ("name", "missing"), [("EMITTER_URL", "EMITTER_SECRET"), ("EMITTER_SECRET", "EMITTER_URL")]
)
async def test_one_variable_alone_is_an_error_that_names_the_other(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    monkeypatch.setenv(name, "mqtt://127.0.0.1:1")
    with pytest.raises(RuntimeError, match=f"{missing} is not set"):
        async with ConfiguredBroker():
            pass
