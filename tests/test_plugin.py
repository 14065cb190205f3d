"""The pytest plugin, and the pages of ``docs/`` about testing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sniffio

from emitter_anyio.pytest_plugin import EmitterFixture
from emitter_anyio.testing import Broker, FaultProxy
from tests.support.command import run
from tests.support.logs import logged
from tests.support.pages import BLOCKS, DOCS
from tests.support.pytest_process import run_pytest

TESTING_PAGES = "".join(
    (DOCS / f"{name}.md").read_text() for name in ("development-broker", "fault-injection")
)
(MODULE,) = (
    block.source for block in BLOCKS if (block.page, block.kind) == ("fixtures.md", "test")
)


def on_both_backends(*names: str) -> list[str]:
    return sorted(f"{name}[{backend}]" for name in names for backend in ("asyncio", "trio"))


class TestFixtures:
    async def test_a_broker_and_a_client_that_is_connected_to_it(
        self, emitter: EmitterFixture, emitter_broker: Broker
    ) -> None:
        assert emitter.secret_key == emitter_broker.secret_key
        made = await emitter.client.keygen(emitter.secret_key, "a/", "rw")
        async with emitter.client.subscribe(made.key, "a/") as messages:
            await emitter_broker.publish("a/", sniffio.current_async_library())
            assert (await messages.receive()).as_string() in ("asyncio", "trio")
        [client] = emitter_broker.clients
        assert client.id == (await emitter.client.me()).id

    async def test_the_secret_is_not_shown(self, emitter: EmitterFixture) -> None:
        assert emitter.secret_key not in repr(emitter)
        assert repr(emitter.client) in repr(emitter)

    async def test_the_client_leaves_before_the_broker(
        self, emitter: EmitterFixture, emitter_broker: Broker, caplog: pytest.LogCaptureFixture
    ) -> None:
        await emitter.client.disconnect()
        assert emitter.client.state == "closed"
        assert logged(caplog) == []

    def test_what_fails_in_them(self, tmp_path: Path) -> None:
        outcomes = run_pytest(tmp_path, TROUBLE)
        assert sorted(outcomes["PASSED"]) == on_both_backends(
            "test_a_lost_connection_does_not_end_the_test",
            "test_a_handler_fails",
            "test_the_next_one",
        )
        assert sorted(outcomes["FAILED"]) == on_both_backends("test_that_fails")
        assert sorted(outcomes["ERROR"]) == on_both_backends(
            "test_a_handler_fails", "TestRefused::test_cannot_connect"
        )

    def test_nothing_is_loaded_before_it_is_asked_for(self) -> None:
        program = "import emitter_anyio.pytest_plugin, json, sys; print(json.dumps([*sys.modules]))"
        done = run("-c", program)
        assert done.returncode == 0
        loaded = set(json.loads(done.stdout))
        assert "emitter_anyio.pytest_plugin" in loaded
        assert not loaded & {"emitter_anyio.testing", "emitter_anyio._cli", "wsproto", "trio"}


TROUBLE = """
import anyio
import pytest

pytestmark = pytest.mark.anyio


async def test_a_lost_connection_does_not_end_the_test(emitter, emitter_broker):
    with emitter_broker.refuse():
        await emitter_broker.drop()
        while emitter.client.state == "connected":
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()


async def test_a_handler_fails(emitter, emitter_broker):
    emitter.client.on("message", lambda message: 1 / 0)
    await emitter.client.subscribe(emitter_broker.keygen("a/"), "a/")
    await emitter_broker.publish("a/", "x")
    await emitter.client.wait_closed()


async def test_that_fails(emitter):
    assert emitter.client.state == "closed"


class TestRefused:
    @pytest.fixture
    async def emitter_broker(self, emitter_broker):
        with emitter_broker.refuse():
            yield emitter_broker

    async def test_cannot_connect(self, emitter):
        pass


async def test_the_next_one(emitter):
    await emitter.client.me()
"""


class TestPages:
    def test_module_on_the_page_fails_when_its_code_is_wrong(self, tmp_path: Path) -> None:
        # Mistakes in the code under test, and in what the tests set up.
        source = MODULE.replace('{"degrees": degrees}', '{"degrees": 0}').replace('"r")', '"w")')
        source = source.replace("emitter_broker.lose(", "emitter_broker.hold(")
        source = source.replace(".refuse()", ".hold()").replace("await proxy.cut()", "return")
        names = re.findall(r"^async def (test_\w+)", MODULE, re.MULTILINE)
        assert len(names) == 6
        # A reply that is held back is as late as one that is lost.
        names.remove("test_missing_reply_times_out")
        outcomes = run_pytest(tmp_path, source)
        assert sorted(outcomes["FAILED"]) == on_both_backends(*names)

    def test_unittest_module_on_the_page_passes(self, tmp_path: Path) -> None:
        (source,) = (
            block.source
            for block in BLOCKS
            if block.page == "fixtures.md" and "import unittest" in block.source
        )
        (tmp_path / "test_chat.py").write_text(source)
        done = run("-m", "unittest", "discover", "-s", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "Ran 1 test" in done.stderr

    @pytest.mark.parametrize("thing", [Broker, FaultProxy])
    def test_every_public_method_is_on_a_page(self, thing: type) -> None:
        names = [name for name in vars(thing) if not name.startswith("_")]
        assert len(names) > 5
        for name in names:
            assert re.search(rf"`(await |with )?{name}\b", TESTING_PAGES), name
