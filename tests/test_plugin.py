"""The pytest plugin, and the pages of ``docs/`` about testing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sniffio

from emitter_anyio import Emitter
from emitter_anyio.testing import BlockingBroker, Broker, FaultProxy
from tests.support.command import run
from tests.support.logs import logged
from tests.support.pages import DOCS, block_with
from tests.support.pytest_process import run_pytest

TESTING_PAGES = "".join(
    (DOCS / f"{name}.md").read_text() for name in ("development-broker", "fault-injection")
)
MODULE = block_with("fixtures.md", "test_broken_network_ends_the_block").source


def on_both_backends(*names: str) -> list[str]:
    return sorted(f"{name}[{backend}]" for name in names for backend in ("asyncio", "trio"))


CONFIGURATIONS = {
    "anyio": 'anyio_mode = "auto"',
    "trio": "trio_mode = true",
    "asyncio": 'asyncio_mode = "auto"\nasyncio_default_fixture_loop_scope = "function"',
}
"""What the tests of each plugin require in pyproject.toml."""


class TestFixtures:
    async def test_client_is_connected_to_the_broker(
        self, emitter: Emitter, emitter_broker: BlockingBroker
    ) -> None:
        made = await emitter.keygen(emitter_broker.secret_key, "a/", "rw")
        async with emitter.subscribe(made.key, "a/") as messages:
            emitter_broker.publish("a/", sniffio.current_async_library())
            assert (await messages.receive()).as_string() in ("asyncio", "trio")
        [client] = emitter_broker.clients
        assert client.id == (await emitter.me()).id

    async def test_client_leaves_before_the_broker(
        self, emitter: Emitter, emitter_broker: BlockingBroker, caplog: pytest.LogCaptureFixture
    ) -> None:
        await emitter.disconnect()
        assert emitter.state == "closed"
        assert logged(caplog) == []

    def test_broker_in_a_synchronous_test(self, emitter_broker: BlockingBroker) -> None:
        assert emitter_broker.clients == []

    @pytest.mark.parametrize("plugin", CONFIGURATIONS)
    def test_failures(self, plugin: str, tmp_path: Path) -> None:
        config = f"[tool.pytest.ini_options]\n{CONFIGURATIONS[plugin]}\n"
        outcomes = run_pytest(tmp_path, TROUBLE, config)
        backends = ["[asyncio]", "[trio]"] if plugin == "anyio" else [""]
        expected = {
            outcome: sorted(f"{name}{backend}" for name in names for backend in backends)
            for outcome, names in (PYTEST_TRIO_OUTCOMES if plugin == "trio" else OUTCOMES).items()
        }
        assert {outcome: sorted(names) for outcome, names in outcomes.items()} == expected

    def test_nothing_is_loaded_before_it_is_asked_for(self) -> None:
        program = "import emitter_anyio.pytest_plugin, json, sys; print(json.dumps([*sys.modules]))"
        done = run("-c", program)
        assert done.returncode == 0
        loaded = set(json.loads(done.stdout))
        assert "emitter_anyio.pytest_plugin" in loaded
        assert not loaded & {"emitter_anyio.testing", "emitter_anyio._cli", "wsproto", "trio"}


TROUBLE = """
import pytest


async def test_message_arrives(emitter, emitter_broker):
    async with emitter.subscribe(emitter_broker.keygen("a/", "rw"), "a/") as messages:
        emitter_broker.publish("a/", "x")
        assert (await messages.receive()).as_string() == "x"


async def test_lost_connection_does_not_end_the_test(emitter, emitter_broker):
    async with emitter.stream("connect") as connects:
        emitter_broker.drop()
        await connects.receive()
    await emitter.me()


async def test_handler_fails(emitter, emitter_broker):
    emitter.on("message", lambda message: 1 / 0)
    await emitter.subscribe(emitter_broker.keygen("a/"), "a/")
    emitter_broker.publish("a/", "x")
    await emitter.wait_closed()


async def test_failing(emitter):
    assert emitter.state == "closed"


class TestRefused:
    @pytest.fixture
    def emitter_broker(self, emitter_broker):
        with emitter_broker.refuse():
            yield emitter_broker

    async def test_cannot_connect(self, emitter):
        pass


async def test_next(emitter):
    await emitter.me()
"""


OUTCOMES = {
    "PASSED": [
        "test_message_arrives",
        "test_lost_connection_does_not_end_the_test",
        "test_handler_fails",
        "test_next",
    ],
    "FAILED": ["test_failing"],
    "ERROR": ["test_handler_fails", "TestRefused::test_cannot_connect"],
}
PYTEST_TRIO_OUTCOMES = {
    # An exception of a fixture is a failure of the test.
    "PASSED": [name for name in OUTCOMES["PASSED"] if name not in OUTCOMES["ERROR"]],
    "FAILED": [*OUTCOMES["FAILED"], *OUTCOMES["ERROR"]],
}


class TestPages:
    def test_module_on_the_page_fails_when_its_code_is_wrong(self, tmp_path: Path) -> None:
        # Mistakes in the code under test, and in what the tests set up.
        source = MODULE.replace('{"degrees": degrees}', '{"degrees": 0}').replace('"r")', '"w")')
        source = source.replace("emitter_broker.lose(", "emitter_broker.hold(")
        source = source.replace(".refuse()", ".hold()").replace("await proxy.cut()", "return")
        source = source.replace("emitter_broker.drop()", "await emitter.disconnect()")
        names = re.findall(r"^async def (test_\w+)", MODULE, re.MULTILINE)
        assert len(names) == 7
        # A reply that is held back is as late as one that is lost.
        names.remove("test_missing_reply_times_out")
        outcomes = run_pytest(tmp_path, source)
        assert sorted(outcomes["FAILED"]) == on_both_backends(*names)

    def test_unittest_module_on_the_page_passes(self, tmp_path: Path) -> None:
        source = block_with("fixtures.md", "import unittest").source
        (tmp_path / "test_chat.py").write_text(source)
        done = run("-m", "unittest", "discover", "-s", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "Ran 2 tests" in done.stderr

    @pytest.mark.parametrize("thing", [Broker, FaultProxy])
    def test_every_public_method_is_on_a_page(self, thing: type) -> None:
        names = [name for name in vars(thing) if not name.startswith("_")]
        assert len(names) > 5
        for name in names:
            assert re.search(rf"`(await |with )?{name}\b", TESTING_PAGES), name
