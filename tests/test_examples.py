"""Every example, on both backends, and against a real Emitter if one is configured."""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from emitter_anyio import connect
from emitter_anyio.testing import Broker
from tests.support.command import ROOT, open_process, run

PROGRAMS = sorted((ROOT / "examples").rglob("*.py"))
OUTPUT = {
    # The broker sorts stored messages by second only, so the first two can be in either order.
    "quickstart.py": r"""quickstart/kitchen/ (19|20) degrees
quickstart/kitchen/ (19|20) degrees
quickstart/kitchen/ 21 degrees
refused as expected: publish 'quickstart/garden/': 401 .+
""",
    "handlers.py": r"""connected
presence: status \['houston'\]
handlers/countdown/ 3
handlers/countdown/ 2
handlers/countdown/ 1
handlers/countdown/ 0
disconnected
""",
    "sensors.py": r"""attic: 10 readings, 25\.45 degrees on average
cellar: 10 readings, 12\.45 degrees on average
kitchen: 10 readings, 21\.45 degrees on average
\d+ of the readings were read back after the connection was lost
""",
    # The broker chooses a worker for each job, so carl might get none.
    "work_queue.py": r"(carl quits without doing job \d+\n|job \d+: \d+ \(by (ann|ben)\)\n){12,13}",
    "presence_board.py": r"""[\d:]{8}  current status  in the office: ann.*
[\d:]{8}  ben arrived     in the office: ann.*
[\d:]{8}  carl arrived    in the office: ann.*
[\d:]{8}  carl left       in the office: .*
[\d:]{8}  ben left        in the office: .*
[\d:]{8}  ann left        in the office: -
""",
    "request_reply.py": r"""1 / 4 = 0\.25
1 / 0: request 'calculator/divide/': .+ZeroDivisionError: division by zero
request 'calculator/multiply/': no reply within 0\.2 s; .+
""",
}
OTHERS = ["terminal_chat.py", "test_thermostat.py", "trio_service.py", "app.py", "people.py"]


def check(name: str, output: str) -> None:
    assert re.fullmatch(OUTPUT[name], output), output
    if name == "work_queue.py":
        results = re.findall(r"^job (\d+): (\d+)", output, re.MULTILINE)
        assert {(int(job), int(result)) for job, result in results} == {
            (number, number**2) for number in range(1, 13)
        }


def test_every_example_is_run_by_a_test() -> None:
    assert sorted(path.name for path in PROGRAMS) == sorted([*OUTPUT, *OTHERS])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 120


@pytest.mark.parametrize("name", OUTPUT)
@pytest.mark.emitter
async def test_on_both_backends(
    name: str,
    anyio_backend: tuple[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = ROOT / "examples" / name
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look up their module
    spec.loader.exec_module(module)
    await module.main()
    check(name, capsys.readouterr().out)


@pytest.mark.parametrize("backend", ["", "trio"])
@pytest.mark.parametrize("name", OUTPUT)
def test_command_in_the_docstring_runs(name: str, backend: str) -> None:
    done = run(f"examples/{name}", *backend.split())
    # Users see what the library logs: the lost connection of sensors.py, or the job in
    # work_queue.py that the broker delivers to the worker that quits.
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    assert done.returncode == 0
    check(name, done.stdout)


class Program:
    """An example that runs until it receives a signal or the end of its input."""

    def __init__(self, process: anyio.abc.Process) -> None:
        assert process.stdin
        assert process.stdout
        self._process = process
        self._stdin = process.stdin
        self._lines = BufferedByteReceiveStream(process.stdout)

    async def read_until(self, line: str) -> re.Match[str]:
        """Skip lines until one matches, and return the match."""
        while True:
            text = (await self._lines.receive_until(b"\n", 10_000)).decode().rstrip()
            if match := re.fullmatch(line, text):
                return match

    async def type(self, line: str) -> None:
        await self._stdin.send(f"{line}\n".encode())

    async def end(self, how: signal.Signals | None) -> None:
        """End the program with a signal, or by closing its input."""
        if how is None:
            await self._stdin.aclose()
        else:
            self._process.send_signal(how)
        assert await self._process.wait() == 0


@asynccontextmanager
async def running(*arguments: str, **environment: str) -> AsyncIterator[Program]:
    async with open_process(*arguments, environment=environment) as process:
        yield Program(process)


@pytest.mark.parametrize("end", [None, signal.SIGINT], ids=["end of input", "Ctrl-C"])
async def test_terminal_chat(anyio_backend: tuple[str, Any], end: signal.Signals | None) -> None:
    chat, backend = "examples/terminal_chat.py", anyio_backend[0]
    async with running(chat, "ann", backend) as ann:
        said = await ann.read_until(r"EMITTER_URL=(\S+) EMITTER_SECRET=(\S+) \\")
        await ann.read_until("-- online: ann")
        await ann.type("is anyone here?")
        async with running(
            chat, "ben", backend, EMITTER_URL=said[1], EMITTER_SECRET=said[2]
        ) as ben:
            await ben.read_until(re.escape("ann: is anyone here?"))
            await ann.read_until("-- online: ann, ben")
            await ben.type("yes")
            await ann.read_until("ben: yes")
            await ben.end(end)
        await ann.read_until("-- online: ann")
        await ann.end(end)


def test_terminal_chat_without_a_name_prints_its_usage() -> None:
    done = run("examples/terminal_chat.py")
    assert (done.returncode, done.stderr.startswith("usage:")) == (1, True)


async def test_trio_service(broker: Broker) -> None:
    where = {"EMITTER_URL": broker.url, "EMITTER_SECRET": broker.secret_key}
    key = broker.keygen("clock/#/", "rw")
    async with connect(broker.url) as emitter:
        async with running("examples/trio_service.py", **where) as service:
            await service.read_until("clock service started")
            time = await emitter.request(key, "clock/ask/", "")
            assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\+00:00", time.as_string())
            async with emitter.subscribe(key, "clock/tick/", last=0) as ticks:
                assert (await ticks.receive()).as_object() > 0
            await service.end(signal.SIGTERM)


async def test_trio_service_starts_a_development_broker(anyio_backend: object) -> None:
    async with running("examples/trio_service.py") as service:
        await service.read_until("clock service started")
        await service.end(signal.SIGINT)


def test_thermostat(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    folder = ("-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider")
    done = run("-m", "pytest", *folder, "-pno:asyncio", "examples/test_thermostat.py")
    assert re.search(r"=== 8 passed in ", done.stdout), done.stdout


class TestThePage:
    PAGE = (ROOT / "docs/examples.md").read_text()

    def test_lists_every_example(self) -> None:
        listed = re.findall(r"^\| `examples/(\S+?)/?` \|", self.PAGE, re.MULTILINE)
        there = (path for path in (ROOT / "examples").iterdir() if path.name != "__pycache__")
        assert sorted(listed) == sorted(path.name for path in there)

    def test_every_command_is_run_by_a_test(self) -> None:
        blocks = re.findall(r"^```sh\n(.+?)^```$", self.PAGE, re.MULTILINE | re.DOTALL)
        for line in "".join(blocks).splitlines():
            match re.sub(r"\b[A-Z_]+=\S+ ", "", line).split():
                case ["python", program, *_] if program.startswith("examples/"):
                    assert Path(program).name in [*OUTPUT, *OTHERS]
                case ["python", "-m", "pytest", program]:
                    assert Path(program).name in OTHERS
                case ["python", "-m", "pip", "install", ".", *others]:
                    assert {*others} <= {"starlette", "uvicorn", "websockets", "pytest"}
                case _:
                    # tests/browser.py runs this command.
                    assert line == "python -m uvicorn examples.web_chat.app:app"

    def test_every_picture_exists(self) -> None:
        pictures = re.findall(r"^!\[.+?\]\((\S+?)\)$", self.PAGE, re.MULTILINE)
        assert len(pictures) == 3
        for picture in pictures:
            assert 0 < (ROOT / "docs" / picture).stat().st_size < 150_000
