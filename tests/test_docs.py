"""
The README and the pages of ``docs/``: every block of code runs and prints the output below it.

``tests/support/pages.py`` lists the kinds of blocks. ``docs/not-run.txt`` lists the blocks that no
test can run, each with its reason.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import inspect
import json
import logging
import re
import shlex
import sys
import tomllib
import zlib
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from functools import partial
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import anyio
import pytest
import trustme
from anyio.lowlevel import checkpoint
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import emitter_anyio
import emitter_anyio.outbox
import emitter_anyio.testing
from emitter_anyio import Emitter, EmitterMessage, StoredMessage, connect
from emitter_anyio._net.options import Options
from emitter_anyio.outbox import Outbox
from emitter_anyio.testing import BlockingBroker, Broker, FaultProxy, virtual_backend
from tests.support.asgi import Application, lifespan, post, request, websocket
from tests.support.command import ROOT, run, running
from tests.support.connections import while_disconnected
from tests.support.pages import BLOCKS, DOCS, ELSEWHERE, PAGES, Block, block_with, defined_by
from tests.support.pytest_process import run_pytest

NOT_RUN = [
    line.split(maxsplit=1)
    for line in (DOCS / "not-run.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
BACKENDS: Final[tuple[Literal["asyncio", "trio"], ...]] = ("asyncio", "trio")
RUN = [block for block in BLOCKS if str(block) not in {where for where, _ in NOT_RUN}]


WEB_APPLICATIONS = {
    "Starlette": block_with("web-frameworks.md", "app = Starlette("),
    "FastAPI": block_with("web-frameworks.md", "app = FastAPI("),
    "Flask": block_with("web-frameworks.md", "app = Flask("),
    "monitoring": block_with("monitoring.md", "app = Starlette("),
}


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    """Give a test the blocks of some kinds, each on the backends on which it runs."""
    cases = [
        pytest.param(
            block,
            virtual_backend(backend) if block.in_virtual_time else backend,
            id=f"{block}-{backend}",
        )
        for block in RUN
        if block.kind in kinds and block not in WEB_APPLICATIONS.values()
        for backend in BACKENDS
        if backend in block.backends
    ]
    return pytest.mark.parametrize(("block", "anyio_backend"), cases)


async def call_last_function(names: dict[str, Any]) -> None:
    """
    Call the function that a block defines last, if it defines any.

    Its parameters are among those that this function can provide: a connected client, its broker,
    that broker's URL and secret key, and a key for ``chat/`` and all channels below it.
    """
    functions = [
        value
        for value in names.values()
        if inspect.isfunction(value) and value.__module__ == "the_page" and value.__name__ in names
    ]
    if not functions:
        return
    function = functions[-1]
    async with Broker() as broker, connect(broker.url) as emitter:
        values = {
            "emitter": emitter,
            "broker": broker,
            "url": broker.url,
            "secret_key": broker.secret_key,
            "key": broker.keygen("chat/#/", "rwslp"),
        }
        call = partial(function, **{name: values[name] for name in signature(function).parameters})
        if inspect.iscoroutinefunction(function):
            await call()
        else:
            await anyio.to_thread.run_sync(call)


def test_at_most_five_are_not_run_each_with_its_reason() -> None:
    assert len(NOT_RUN) <= 5
    assert {where for where, _ in NOT_RUN} <= set(map(str, BLOCKS))
    assert all(len(reason.split()) > 3 for _, reason in NOT_RUN)


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_who_runs_the_others(page: str, test: str) -> None:
    if (DOCS / page).exists():
        assert f"docs/{page}" in (ROOT / test).read_text()


class TestPython:
    @of_kind("program", "lines")
    async def test_on_each_backend(
        self,
        block: Block,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if ".pem" in block.source:
            make_certificates(tmp_path)
        monkeypatch.chdir(tmp_path)
        printed: list[str] = []
        names: dict[str, Any] = {
            "__name__": "the_page",
            "print": lambda *values: printed.append(" ".join(map(str, values))),
        }
        # Without this module's own "annotations", as users have it.
        exec(compile(block.without_run, str(block), "exec", dont_inherit=True), names)
        if block.kind == "program":
            await names["main"]()
        else:
            await call_last_function(names)
        assert "".join(f"{line}\n" for line in printed) == block.output


class TestWebApplications:
    @pytest.fixture
    async def broker(
        self, anyio_backend: object, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[Broker]:
        async with Broker() as broker:
            monkeypatch.setenv("EMITTER_URL", broker.url)
            monkeypatch.setenv("CHAT_KEY", broker.keygen("chat/", "rw"))
            yield broker

    def names(self, framework: str) -> dict[str, Any]:
        """Run the block of a framework, and return what it defines."""
        block = WEB_APPLICATIONS[framework]
        return defined_by(block.page, block.source)

    async def test_starlette(self, broker: Broker) -> None:
        app: Application = self.names("Starlette")["app"]
        presence = broker.keygen("chat/", "p")
        async with lifespan(app), websocket(app, "/listen") as browser:
            async with connect(broker.url) as other:
                async with other.watch_presence(presence, "chat/") as there:
                    while not there.members:
                        await there.receive()
            assert await post(app, "/say", b"hello") == 204
            assert (await browser.receive("websocket.send"))["text"] == "hello"

            async def lose() -> None:
                await browser.receive("websocket.send")
                await broker.drop()

            async with anyio.create_task_group() as tasks:
                with broker.lose("puback"):
                    tasks.start_soon(lose)
                    assert await post(app, "/say", b"hello") == 503

    async def test_fastapi(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        app: Application = self.names("FastAPI")["app"]
        async with lifespan(app), connect(broker.url) as other:
            async with other.subscribe(broker.keygen("chat/", "r"), "chat/") as messages:
                assert await post(app, "/say", text="hello") == 204
                assert (await messages.receive()).as_string() == "hello"
            monkeypatch.setenv("CHAT_KEY", broker.keygen("chat/", "r"))
            assert await post(app, "/say", text="hello") == 503

    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_flask(
        self, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = block_with("threads.md", "class SyncEmitter")
        save_module("sync_emitter", module, tmp_path, monkeypatch)

        def say() -> list[int]:
            names = self.names("Flask")
            client = names["app"].test_client()
            try:
                accepted = client.post("/say", data=b"hello").status_code
                monkeypatch.setenv("CHAT_KEY", broker.keygen("chat/", "r"))
                return [accepted, client.post("/say", data=b"hello").status_code]
            finally:
                names["emitter"].close()
                atexit.unregister(names["emitter"].close)

        async with connect(broker.url) as other:
            async with other.subscribe(broker.keygen("chat/", "r"), "chat/") as messages:
                assert await anyio.to_thread.run_sync(say) == [204, 503]
                assert (await messages.receive()).as_string() == "hello"


class TestMonitoring:
    @pytest.fixture(autouse=True)
    def collector_module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = block_with("monitoring.md", "class EmitterCollector")
        save_module("emitter_metrics", module, tmp_path, monkeypatch)

    @pytest.fixture
    def application(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What the application with the health endpoint defines."""
        monkeypatch.setenv("EMITTER_URL", broker.url)
        monkeypatch.setenv("CHAT_KEY", broker.keygen("chat/", "r"))
        return defined_by("monitoring.md", "app = Starlette(")

    async def test_metrics(self, broker: Broker, application: dict[str, Any]) -> None:
        app: Application = application["app"]
        assert (await get_metrics(app))["emitter_connected"] == 0
        async with lifespan(app), connect(broker.url) as other:
            collector = application["collector"]
            async with other.watch_presence(broker.keygen("chat/", "p"), "chat/") as there:
                while not there.members:
                    await there.receive()
            await other.publish(broker.keygen("chat/", "w"), "chat/", "hello", qos=1)
            while collector.streams["chat"].statistics().received == 0:
                await checkpoint()
            found = await get_metrics(app)
            assert found["emitter_connected"] == found["emitter_connections_total"] == 1
            assert found["emitter_received_total"] == 1
            assert found["emitter_stream_received_total chat"] == 1
            assert found["emitter_stream_delay_seconds chat"] == 0
            page = (DOCS / "monitoring.md").read_text()
            alerts = re.findall(
                r"\bemitter_\w+", page.partition("## Alerts")[2].partition("\n## ")[0]
            )
            assert set(alerts) <= {name.partition(" ")[0] for name in found}
        assert not collector.streams
        assert "emitter_stream_received_total chat" not in await get_metrics(app)

    async def test_metrics_of_a_slow_consumer(self, broker: Broker) -> None:
        key = broker.keygen("chat/", "rw")
        async with connect(broker.url) as emitter:
            collector = sys.modules["emitter_metrics"].EmitterCollector(emitter)
            registry = CollectorRegistry()
            registry.register(collector)
            async with emitter.subscribe(key, "chat/", buffer=4) as messages:
                with collector.watching("chat", messages):
                    for _ in range(3):
                        await emitter.publish(key, "chat/", "x", qos=1)
                    messages.receive_nowait()
                    found = samples(generate_latest(registry).decode())
        assert found["emitter_stream_buffered chat"] == 2
        assert found["emitter_stream_peak_ratio chat"] == 0.75
        assert found["emitter_stream_delay_seconds chat"] > 0

    async def test_health(self, broker: Broker, application: dict[str, Any]) -> None:
        app: Application = application["app"]
        emitter: Emitter = application["emitter"]
        assert await request(app, "GET", "/live") == (200, "alive")
        assert await request(app, "GET", "/ready") == (503, "closed")
        async with lifespan(app):
            assert await request(app, "GET", "/ready") == (200, "ready")
            async with while_disconnected(emitter, broker):
                assert await request(app, "GET", "/ready") == (503, "connecting")

            async def lose_connection() -> None:
                while not emitter.statistics().pending:
                    await checkpoint()
                await broker.drop()

            while emitter.statistics().pending:
                await checkpoint()
            with broker.lose("reply", "puback"):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(lose_connection)
                    response = await request(app, "GET", "/ready")
            assert response == (503, "no reply from the broker")

    async def test_json_logs(self, broker: Broker, capsys: pytest.CaptureFixture[str]) -> None:
        defined_by("monitoring.md", "class JSONFormatter")
        logger = logging.getLogger("emitter_anyio")
        async with connect(broker.url):
            logger.debug("not logged")
        try:
            raise ValueError("a reason\nin two lines")
        except ValueError:
            logger.exception("failed")
        *info, error = map(json.loads, capsys.readouterr().err.splitlines())
        assert [line["level"] for line in info] == ["INFO", "INFO"]
        assert all(line.keys() == {"time", "level", "logger", "message"} for line in info)
        assert {line["logger"] for line in info} == {"emitter_anyio"}
        assert info[0]["message"].startswith("connected to")
        assert datetime.fromisoformat(info[0]["time"]).tzinfo is UTC
        assert (error["level"], error["message"]) == ("ERROR", "failed")
        assert error["exception"].endswith("ValueError: a reason\nin two lines")


async def get_metrics(app: Application) -> dict[str, float]:
    status, text = await request(app, "GET", "/metrics")
    assert status == 200
    return samples(text)


def samples(text: str) -> dict[str, float]:
    """Parse Prometheus's text format. A name is followed by the values of its labels."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def save_module(name: str, block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a block under the name with which another block imports it, and import it."""
    (folder / f"{name}.py").write_text(block.source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, name, importlib.import_module(name))


@pytest.fixture(autouse=True)
def keep_logging() -> Iterator[None]:
    """Undo what a block configures."""
    loggers = [logging.getLogger(), logging.getLogger("emitter_anyio")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


class TestForPytest:
    @pytest.mark.parametrize("block", [block for block in RUN if block.kind == "test"], ids=str)
    def test_for_pytest(self, block: Block, tmp_path: Path) -> None:
        names = re.findall(r"^(?:async )?def (test_\w+)", block.source, re.MULTILINE)
        outcomes = run_pytest(tmp_path, block.source, block.config)
        assert outcomes.keys() == {"PASSED"}
        assert {name.partition("[")[0] for name in outcomes["PASSED"]} == set(names)


def make_certificates(folder: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    client = authority.issue_cert("client@example.org")
    client.private_key_pem.write_to_path(folder / "client.key")
    for pem in client.cert_chain_pems:
        pem.write_to_path(folder / "client.pem", append=True)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOR_USERS = {"nox", "pytest", "pytest-asyncio", "pytest-trio", "emitter_anyio", "."}


class TestShell:
    @pytest.mark.parametrize("block", [block for block in RUN if block.kind == "shell"], ids=str)
    def test_each_line(self, block: Block) -> None:
        assert not block.output
        for line in block.source.splitlines():
            for command in line.split(" && "):
                self.do(block, shlex.split(command))

    def do(self, block: Block, words: list[str]) -> None:
        match words:
            case ["python", "-m", "pip", "install", *packages]:
                for package in packages:
                    name, _, extra = package.rstrip("]").partition("[")
                    assert name in FOR_USERS
                    assert not extra or extra in PROJECT["project"]["optional-dependencies"]
            case ["python", "-m", "nox"]:
                pass  # it runs this test
            case ["python", "-m", "nox", "-s", session]:
                assert f"\ndef {session}(session: nox.Session)" in (ROOT / "noxfile.py").read_text()
            case ["python", "-m", "emitter_anyio", "broker", *_]:
                # The port that is named may be taken on this machine.
                with running(*words[1:4], "--port", "0") as process:
                    assert process.stdout is not None
                    said = [process.stdout.readline().split()[0] for _ in range(3)]
                assert said == ["listening", "license", "secret"]
            case ["python", "-m", "emitter_anyio" | "benchmarks.fleets", *_]:
                done = run(*words[1:])
                assert (done.returncode, done.stderr) == (0, "")
            case _:
                pytest.fail(f"{block}: this is not tested: {words}")


class TestReference:
    TEXT = "".join((DOCS / f"{page}.md").read_text() for page in ("reference", "exceptions"))
    OPTIONS = (DOCS / "connect-options.md").read_text()

    def listed(self) -> Iterator[str]:
        """The names that the reference has, as ``Class.member`` or ``name``."""
        inside = ""
        for line in self.TEXT.splitlines():
            if found := re.match(r"\.\. auto(class|exception|function)::\s+(\w+)", line):
                inside = found[2]
                yield inside
            elif found := re.match(r"\.\. py:type::\s+(\w+)", line):
                yield found[1]
            elif found := re.match(r"( *)\.\. auto(?:method|attribute)::\s+([\w.]+)", line):
                yield f"{inside}.{found[2]}" if found[1] else found[2]
            elif found := re.match(r" +:members: (.+)", line):
                for member in found[1].split(", "):
                    yield f"{inside}.{member}"

    def test_every_name_is_there_once(self) -> None:
        listed = list(self.listed())
        assert sorted(set(listed)) == sorted(listed)
        top = {name for name in listed if "." not in name}
        explained = {"Key", "Payload", "Overflow", "Timeout"}
        modules = emitter_anyio, emitter_anyio.outbox, emitter_anyio.testing
        assert top == explained.union(*map(public, modules))

    @pytest.mark.parametrize(
        "kind",
        [Emitter, EmitterMessage, Outbox, StoredMessage, BlockingBroker, Broker, FaultProxy],
    )
    def test_every_member_is_there(self, kind: type) -> None:
        listed = {name for name in self.listed() if name.startswith(f"{kind.__name__}.")}
        members = {
            name
            for name, member in inspect.getmembers_static(kind)
            if not name.startswith("_") and (callable(member) or isinstance(member, property))
            if name.islower()  # the original SDK's names stand beside ours
        }
        assert listed == {f"{kind.__name__}.{name}" for name in members}

    def test_every_option_is_in_the_table(self) -> None:
        table = self.OPTIONS[self.OPTIONS.index("| option |") :].partition("\n\n")[0]
        named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
        assert set(named) == set(Options.__dataclass_fields__) | {"host", "port", "secure"}


def public(module: ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "annotations" and not inspect.ismodule(value)
    }


def test_every_module_is_in_the_map() -> None:
    page = (DOCS.parent / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)/`[^|]* \| (.+) \|$", page, re.MULTILINE))
    library = Path(emitter_anyio.__file__).parent
    for package in (
        "_values",
        "_backend",
        "_protocol",
        "_streams",
        "_net",
        "_runtime",
        "_features",
    ):
        modules = {path.stem for path in library.glob(f"{package}/*.py")} - {"__init__"}
        assert modules == set(re.findall(r"`(\w+)`", rows[package])) & modules, package
    commands = {path.stem for path in library.glob("_cli/_*.py")} - {"__init__"}
    assert commands <= set(re.findall(r"`(_\w+)`", page))


class TestErrors:
    def test_every_error_is_in_the_tree(self) -> None:
        """With the same parent, by the indentation of the list."""
        page = (DOCS / "exceptions.md").read_text()
        tree: dict[str, str] = {}
        above: dict[int, str] = {}
        for indent, name in re.findall(r"^( *)- \[`(\w+)`\]", page, re.MULTILINE):
            above[len(indent)] = name
            if indent:
                tree[name] = above[len(indent) - 2]
        errors = {
            value
            for value in (*vars(emitter_anyio).values(), *vars(emitter_anyio.outbox).values())
            if inspect.isclass(value) and issubclass(value, emitter_anyio.EmitterError)
        }
        assert tree == {
            error.__name__: error.__bases__[0].__name__
            for error in errors - {emitter_anyio.EmitterError}
        }


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, DOCS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestMadeByScripts:
    def test_inventories(self) -> None:
        made = script("inventories/make.py")
        assert {path.stem for path in DOCS.glob("inventories/*.inv")} == set(made.NAMES)
        for project in made.NAMES:
            kept = (DOCS / "inventories" / f"{project}.inv").read_bytes()
            # Another zlib packs other bytes.
            packed = kept.split(b"zlib.\n", 1)[1]
            assert zlib.decompress(packed).decode() == "".join(made.lines(project))

    def test_diagrams(self) -> None:
        for name, draw in script("pictures/diagrams.py").DIAGRAMS.items():
            assert (DOCS / "pictures" / f"{name}.svg").read_text() == draw()

    def test_every_picture_is_on_a_page(self) -> None:
        text = "".join(page.read_text() for page in PAGES)
        shown = re.findall(r"(?:^:file: |\]\()pictures/([\w.-]+)", text, re.MULTILINE)
        pictures = {
            path.name for path in DOCS.glob("pictures/*") if path.suffix in (".svg", ".png")
        }
        assert set(shown) == pictures
