"""Every example, on both backends, and against a real Emitter where there is one."""

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
    # The broker sorts by the second only, so the first two may come either way round.
    "quickstart.py": r"""quickstart/kitchen/ (19|20) degrees
quickstart/kitchen/ (19|20) degrees
quickstart/kitchen/ 21 degrees
as it should be: publish 'quickstart/garden/': 401 .+
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
\d+ of them were read back
""",
    # Which worker gets a job is for the broker to say: carl may get none.
    "work_queue.py": r"(carl goes home with job \d+\n|job \d+: \d+, says (ann|ben)\n){12,13}",
    "presence_board.py": r"""[\d:]{8}  here is who is in  in the office: ann.*
[\d:]{8}  ben has come       in the office: ann.*
[\d:]{8}  carl has come      in the office: ann.*
[\d:]{8}  carl has left      in the office: .*
[\d:]{8}  ben has left       in the office: .*
[\d:]{8}  ann has left       in the office: nobody
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


def test_each_is_run_by_a_test() -> None:
    assert sorted(path.name for path in PROGRAMS) == sorted([*OUTPUT, *OTHERS])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_each_is_short(path: Path) -> None:
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
def test_as_its_first_lines_say(name: str, backend: str) -> None:
    done = run(f"examples/{name}", *backend.split())
    # What the library logs is to be seen: of the link that sensors.py cuts, and of a job that the
    # broker of work_queue.py hands to one who is going home, which is handed out again.
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    assert done.returncode == 0
    check(name, done.stdout)


class Program:
    """An example that runs until it is told to end."""

    def __init__(self, process: anyio.abc.Process) -> None:
        assert process.stdin
        assert process.stdout
        self._process = process
        self._stdin = process.stdin
        self._lines = BufferedByteReceiveStream(process.stdout)

    async def read_until(self, line: str) -> re.Match[str]:
        """Give the first line that is so; the others are passed over."""
        while True:
            text = (await self._lines.receive_until(b"\n", 10_000)).decode().rstrip()
            if match := re.fullmatch(line, text):
                return match

    async def type(self, line: str) -> None:
        await self._stdin.send(f"{line}\n".encode())

    async def end(self, how: signal.Signals | None) -> None:
        """End it by a signal, or by the end of its input."""
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
        await ann.read_until("-- here: ann")
        await ann.type("is anybody there?")
        async with running(
            chat, "ben", backend, EMITTER_URL=said[1], EMITTER_SECRET=said[2]
        ) as ben:
            await ben.read_until(re.escape("ann: is anybody there?"))
            await ann.read_until("-- here: ann, ben")
            await ben.type("yes")
            await ann.read_until("ben: yes")
            await ben.end(end)
        await ann.read_until("-- here: ann")
        await ann.end(end)


def test_terminal_chat_asks_for_a_name() -> None:
    done = run("examples/terminal_chat.py")
    assert (done.returncode, done.stderr.startswith("who are you?")) == (1, True)


async def test_trio_service(broker: Broker) -> None:
    where = {"EMITTER_URL": broker.url, "EMITTER_SECRET": broker.secret_key}
    key = broker.keygen("clock/#/", "rw")
    async with connect(broker.url) as emitter:
        async with running("examples/trio_service.py", **where) as service:
            await service.read_until("the clock is running")
            time = await emitter.request(key, "clock/ask/", "")
            assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\+00:00", time.as_string())
            async with emitter.subscribe(key, "clock/tick/", last=0) as ticks:
                assert (await ticks.receive()).as_object() > 0
            await service.end(signal.SIGTERM)


async def test_trio_service_with_a_broker_of_its_own(anyio_backend: object) -> None:
    async with running("examples/trio_service.py") as service:
        await service.read_until("the clock is running")
        await service.end(signal.SIGINT)


def test_thermostat(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    folder = ("-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider")
    done = run("-m", "pytest", *folder, "examples/test_thermostat.py")
    assert re.search(r"=== 8 passed in ", done.stdout), done.stdout


class TestThePage:
    PAGE = (ROOT / "docs/examples.md").read_text()

    def test_it_lists_each(self) -> None:
        listed = re.findall(r"^\| `examples/(\S+?)/?` \|", self.PAGE, re.MULTILINE)
        there = (path for path in (ROOT / "examples").iterdir() if path.name != "__pycache__")
        assert sorted(listed) == sorted(path.name for path in there)

    def test_every_command_is_one_that_a_test_runs(self) -> None:
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
                    # tests/browser.py starts it so.
                    assert line == "python -m uvicorn examples.web_chat.app:app"

    def test_every_picture_is_there(self) -> None:
        pictures = re.findall(r"^!\[.+?\]\((\S+?)\)$", self.PAGE, re.MULTILINE)
        assert len(pictures) == 3
        for picture in pictures:
            assert 0 < (ROOT / "docs" / picture).stat().st_size < 150_000
