"""Every example, on both backends, and against a real Emitter if one is configured."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any
from uuid import uuid4

import anyio
import httpx
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.memory import MemoryObjectSendStream
from websockets.sync.client import connect as connect_websocket

from emitter_anyio import ChannelKey, Emitter, connect
from emitter_anyio.testing import Broker
from tests.support.command import ROOT, open_process, run
from tests.support.server import Server

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
    # How many readings arrive in two seconds depends on how busy the machine is.
    "plain_asyncio.py": r"""(\d\.\d bar\n)+the sensor was switched off
(\d\.\d bar\n)?no reading for a second
""",
    "sharded_queue.py": r"""(\w+, job \d: \d+ by process \d+\n)+"""
    r"""a worker ended with -15; starting it again
(\w+, job \d: \d+ by process \d+\n)+""",
    "synchronous.py": r"(\w+: \d+ words\n){3}",
}
OTHERS = [
    *["terminal_chat.py", "test_thermostat.py", "trio_service.py", "app.py", "people.py"],
    *["fastapi_events.py", "litestar_channels.py"],
]
STOPPED = ["plain_asyncio.py", "presence_board.py", "sharded_queue.py", "work_queue.py"]
"""Programs that take longer than a second, so that users might press Ctrl-C."""


def check(name: str, output: str) -> None:
    assert re.fullmatch(OUTPUT[name], output), output
    if name == "work_queue.py":
        results = re.findall(r"^job (\d+): (\d+)", output, re.MULTILINE)
        assert {(int(job), int(result)) for job, result in results} == {
            (number, number**2) for number in range(1, 13)
        }
    elif name == "sharded_queue.py":
        check_shards(re.findall(r"^(\w+), job (\d): (\d+) by process (\d+)", output, re.MULTILINE))


def check_shards(results: list[tuple[str, str, str, str]]) -> None:
    """Check that each customer's jobs were done once, in order, and by at most two processes."""
    for customer in ("ann", "ben", "carl", "dora"):
        jobs = [(number, result) for name, number, result, _ in results if name == customer]
        assert jobs == [("1", "1"), ("2", "4"), ("3", "9"), ("4", "16")]
        # The worker of dora and ben is killed once.
        processes = {process for name, *_, process in results if name == customer}
        assert len(processes) == (1 if customer in ("ann", "carl") else 2)


def test_every_example_is_run_by_a_test() -> None:
    assert sorted(path.name for path in PROGRAMS) == sorted([*OUTPUT, *OTHERS])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 120


@pytest.mark.parametrize(
    ("name", "anyio_backend"),
    [
        pytest.param(name, backend, id=f"{name}-{backend}")
        for name in OUTPUT
        for backend in ("asyncio", "trio")
        if (name, backend) != ("plain_asyncio.py", "trio")
    ],
)
@pytest.mark.emitter
async def test_on_both_backends(
    name: str,
    anyio_backend: str,
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
    if name == "synchronous.py":
        # It would be called in a thread without an event loop.
        await anyio.to_thread.run_sync(module.main, anyio_backend)
    else:
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
    """
    An example that runs until it receives a signal or the end of its input.

    :ivar errors: its output on stderr
    """

    def __init__(self, process: anyio.abc.Process) -> None:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        self.errors = ""
        self._process = process
        self._stdin = process.stdin
        self._stderr = process.stderr
        self._lines = BufferedByteReceiveStream(process.stdout)

    async def read_until(self, line: str) -> re.Match[str]:
        """Skip lines until one matches, and return the match."""
        while True:
            text = (await self._lines.receive_until(b"\n", 10_000)).decode().rstrip()
            if match := re.fullmatch(line, text):
                return match

    async def read_errors_until(self, pattern: str) -> re.Match[str]:
        """Read from stderr until the pattern matches a part of it."""
        while not (match := re.search(pattern, self.errors)):
            self.errors += (await self._stderr.receive()).decode()
        return match

    async def type(self, line: str) -> None:
        await self._stdin.send(f"{line}\n".encode())

    async def end(self, how: signal.Signals | None) -> None:
        """End the program with a signal, or by closing its input."""
        if how is None:
            await self._stdin.aclose()
        else:
            self._process.send_signal(how)
        async for received in self._stderr:
            self.errors += received.decode()
        assert await self._process.wait() == 0, self.errors


@asynccontextmanager
async def running(*arguments: str, **environment: str) -> AsyncIterator[Program]:
    async with open_process(*arguments, environment=environment, stderr=PIPE) as process:
        yield Program(process)


@pytest.mark.parametrize("name", STOPPED)
async def test_ctrl_c_ends_a_program_without_a_traceback(
    anyio_backend: tuple[str, Any], name: str
) -> None:
    async with running(f"examples/{name}", anyio_backend[0]) as program:
        line = await program.read_until(r".+")
        await program.end(signal.SIGINT)
        # A worker may note a lost connection: Trio can raise KeyboardInterrupt in the broker first.
        assert "Traceback" not in program.errors
    if name == "sharded_queue.py":
        with pytest.raises(ProcessLookupError):
            os.kill(int(line[0].split()[-1]), 0)


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
            await service.read_until("clock service started.+")
            time = await emitter.request(key, "clock/ask/", "")
            assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\+00:00", time.as_string())
            async with emitter.subscribe(key, "clock/tick/", last=0) as ticks:
                assert (await ticks.receive()).as_object() > 0
            await service.end(signal.SIGTERM)


async def test_trio_service_prints_how_to_reach_and_stop_it(anyio_backend: object) -> None:
    async with running("examples/trio_service.py") as service:
        printed = await service.read_until(r" +export EMITTER_URL=(\S+) EMITTER_SECRET=(\S+)")
        where = {"EMITTER_URL": printed[1], "EMITTER_SECRET": printed[2]}
        for result in (r".*\d+\.\d+", r"[\d-]{10}T[\d:]{8}\+00:00"):
            command = (await service.read_until(r" +emitter-anyio (.+)"))[1]
            async with running("-m", "emitter_anyio", *shlex.split(command), **where) as client:
                await client.read_until(result)
        process = int((await service.read_until(r".+ kill (\d+)"))[1])
        os.kill(process, signal.SIGTERM)
        await service.end(None)


on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
"""For examples that run on asyncio only, because uvicorn does."""

SERVER = r"Uvicorn running on (http://127\.0\.0\.1:\d+)"


async def send_lines(
    http: httpx.AsyncClient, url: str, stream: MemoryObjectSendStream[str]
) -> None:
    """Send the lines of a response, as they arrive."""
    async with stream, http.stream("GET", url, timeout=60) as response:
        async for line in response.aiter_lines():
            await stream.send(line)


@on_asyncio
async def test_fastapi_sends_events_until_it_is_stopped(broker: Broker) -> None:
    where = {"EMITTER_URL": broker.url, "EMITTER_SECRET": broker.secret_key, "PORT": "0"}
    async with (
        httpx.AsyncClient() as http,
        running("examples/fastapi_events.py", **where) as server,
        anyio.create_task_group() as tasks,
    ):
        url = (await server.read_errors_until(SERVER))[1]
        assert "new EventSource" in (await http.get(f"{url}/")).text
        assert (await http.post(f"{url}/announcements", content="<b>one</b>")).status_code == 204

        send, lines = anyio.create_memory_object_stream[str](100)
        tasks.start_soon(send_lines, http, f"{url}/announcements", send)
        with lines:
            first = json.loads((await lines.receive()).removeprefix("data: "))
            assert first["text"] == "<b>one</b>"
            assert await lines.receive() == f"id: {first['id']}"
            assert await lines.receive() == ""
            assert (await http.post(f"{url}/announcements", content="two")).status_code == 204
            assert json.loads((await lines.receive()).removeprefix("data: "))["text"] == "two"
            await server.end(signal.SIGINT)
            assert [line async for line in lines][1:] == [""]
        assert not re.search("ERROR|Traceback", server.errors), server.errors


@on_asyncio
async def test_fastapi_unsubscribes_when_the_last_browser_leaves(broker: Broker) -> None:
    where = {"EMITTER_URL": broker.url, "EMITTER_SECRET": broker.secret_key, "PORT": "0"}
    async with (
        connect(broker.url) as emitter,
        emitter.watch_presence(broker.keygen("announcements/", "p"), "announcements/") as changes,
        httpx.AsyncClient() as http,
        running("examples/fastapi_events.py", **where) as server,
    ):
        url = (await server.read_errors_until(SERVER))[1]
        async with http.stream("GET", f"{url}/announcements"):
            while (await changes.receive()).event != "subscribe":
                pass
        while (await changes.receive()).event != "unsubscribe":
            pass
        await server.end(signal.SIGINT)


@on_asyncio
async def test_fastapi_answers_503_if_the_broker_does_not_reply(broker: Broker) -> None:
    where = {"EMITTER_URL": broker.url, "EMITTER_SECRET": broker.secret_key, "PORT": "0"}
    async with (
        httpx.AsyncClient() as http,
        running("examples/fastapi_events.py", **where) as server,
    ):
        url = (await server.read_errors_until(SERVER))[1]
        with broker.hold("puback"):
            said = await http.post(f"{url}/announcements", content="one", timeout=60)
            assert said.status_code == 503
        await server.end(signal.SIGINT)


@on_asyncio
async def test_litestar_reaches_the_browsers_of_every_server(broker: Broker) -> None:
    where = {"EMITTER_URL": broker.url, "EMITTER_SECRET": broker.secret_key}
    command = ("-m", "uvicorn", "examples.litestar_channels:app", "--port", "0")
    async with (
        httpx.AsyncClient() as http,
        running(*command, **where) as one,
        running(*command, **where) as two,
    ):
        url = (await one.read_errors_until(SERVER))[1]
        other = (await two.read_errors_until(SERVER))[1].replace("http", "ws")
        assert (await http.post(f"{url}/publish/news", content="first")).status_code == 204
        with await anyio.to_thread.run_sync(connect_websocket, f"{other}/live/news") as browser:
            assert await anyio.to_thread.run_sync(browser.recv) == "first"
            for name, text in (("sport", "goal"), ("news", "second")):
                await http.post(f"{url}/publish/{name}", content=text)
            assert await anyio.to_thread.run_sync(browser.recv) == "second"
            await two.end(signal.SIGINT)
        await one.end(signal.SIGINT)
        for server in (one, two):
            assert not re.search("ERROR|Traceback", server.errors), server.errors


@on_asyncio
async def test_litestar_starts_a_development_broker(anyio_backend: object) -> None:
    command = ("-m", "uvicorn", "examples.litestar_channels:app", "--port", "0")
    async with running(*command) as server, httpx.AsyncClient() as http:
        url = (await server.read_errors_until(SERVER))[1]
        assert (await http.post(f"{url}/publish/news", content="first")).status_code == 204
        await server.end(signal.SIGINT)


@pytest.mark.emitter
async def test_litestar_backend_keeps_any_channel_name_apart(server: Server) -> None:
    names = ["news", "a b", "a/b", "a/", "~$%+#?", "Nachrichten für Ümit"]

    @asynccontextmanager
    async def opening() -> AsyncIterator[tuple[Emitter, ChannelKey]]:
        async with connect(server.url) as emitter:
            yield emitter, await emitter.keygen(server.secret, "litestar/#/", "rwsl")

    from examples import litestar_channels  # takes a second

    backend = litestar_channels.EmitterChannelsBackend(opening, ttl=60)
    unique = uuid4().hex
    async with AsyncExitStack() as stack:
        await backend.on_startup()
        stack.push_async_callback(backend.on_shutdown)
        channels = [f"{unique} {name}" for name in names]
        await backend.subscribe(channels)
        events = backend.stream_events()
        stack.push_async_callback(events.aclose)
        for text in (b"one", b"two"):
            await backend.publish(text, channels)
            for channel in channels:
                assert await anext(events) == (channel, text)
        for channel in channels:
            assert await backend.get_history(channel, 1) == [b"two"]
            assert await backend.get_history(channel) == [b"one", b"two"]
        await backend.unsubscribe(channels[1:])
        await backend.publish(b"three", channels[::-1])
        assert await anext(events) == (channels[0], b"three")


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
                    assert {*others} <= {
                        *("fastapi", "litestar", "pytest", "starlette", "uvicorn", "websockets")
                    }
                case ["python", "-m", "uvicorn", app]:
                    # tests/browser.py runs the first one.
                    assert app in ("examples.web_chat.app:app", "examples.litestar_channels:app")
                case ["python", "-m", "websockets", url] | ["curl", *_, url]:
                    assert url.split("/", 3)[2:] in (
                        ["127.0.0.1:8000", "announcements"],
                        ["127.0.0.1:8000", "publish/news"],
                        ["127.0.0.1:8000", "live/news"],
                    )
                case _:
                    pytest.fail(line)

    def test_every_picture_exists(self) -> None:
        pictures = re.findall(r"^!\[.+?\]\((\S+?)\)$", self.PAGE, re.MULTILINE)
        assert len(pictures) == 3
        for picture in pictures:
            assert 0 < (ROOT / "docs" / picture).stat().st_size < 150_000
