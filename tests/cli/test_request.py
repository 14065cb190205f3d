"""``request`` and ``serve``."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus

from emitter_anyio import EmitterError, EmitterMessage, connect
from tests.cli.conftest import Cli
from tests.support.background import Background, background
from tests.support.command import running
from tests.support.terminal import terminal

Serve = Callable[[str, Callable[[EmitterMessage], Any]], None]


@pytest.fixture
def serve(server: Background) -> Iterator[Serve]:
    """Return a function that serves a channel with a function until the test ends."""
    cancellations = []

    async def run(
        channel: str, reply: Callable[[EmitterMessage], Any], *, task_status: TaskStatus[None]
    ) -> None:
        async with connect(server.url) as emitter:
            key = server.key(f"{channel}#/", "rw")
            await emitter.serve(key, channel, reply, task_status=task_status)

    def start(channel: str, reply: Callable[[EmitterMessage], Any]) -> None:
        cancellations.append(server.start(partial(run, channel, reply)))

    yield start
    for cancel in cancellations:
        cancel()


def fail(request: EmitterMessage) -> str:
    raise RuntimeError("no")


@contextmanager
def serving(
    server: Background,
    channel: str,
    *options: str,
    backend: str = "asyncio",
    stop: signal.Signals = signal.SIGINT,
) -> Iterator[list[str]]:
    """Run ``serve``, stop it at the end, and then add the lines of its standard error."""
    environment = {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}
    arguments = ["-m", "emitter_anyio", "serve", channel, *options, "--backend", backend]
    with running(*arguments, environment=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"serving {channel}\n"
        errors: list[str] = []
        yield errors
        process.send_signal(stop)
        errors += process.communicate()[1].splitlines()
        assert process.returncode == 128 + stop


def script(folder: Path, lines: str) -> str:
    """Return a program that runs lines of a shell script."""
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


class Reader:
    """Reads a FIFO in a thread, until every process that writes to it has ended."""

    def __init__(self, fifo: Path) -> None:
        self._text = ""
        self._thread = threading.Thread(target=self._read, args=(fifo,), daemon=True)
        self._thread.start()

    def _read(self, fifo: Path) -> None:
        self._text = fifo.read_text()

    def wait_end(self) -> str:
        """Return everything that was written."""
        self._thread.join()
        return self._text


class TestRequest:
    def test_reply_is_printed(
        self, cli: Cli, serve: Serve, unique: str, backend: str, tmp_path: Path
    ) -> None:
        serve(unique, lambda request: request.binary.upper())
        done = cli("request", unique, "hello", "--backend", backend)
        assert (done.code, done.output, done.errors) == (0, "HELLO\n", "")
        done = cli("request", unique, "--backend", backend, stdin=b"two\nlines\n")
        assert (done.code, done.output, done.errors) == (0, "TWO\nLINES\n", "")
        (tmp_path / "file").write_bytes(b"file")
        done = cli("request", unique, "--file", str(tmp_path / "file"), "--raw")
        assert (done.code, done.output, done.errors) == (0, "FILE", "")

    def test_formats(self, cli: Cli, serve: Serve, unique: str) -> None:
        serve(unique, lambda request: request.binary)
        done = cli("request", unique, "hello", "--format", "json")
        (line,) = map(json.loads, done.lines)
        assert line["payload"] == "hello"
        assert line["channel"].startswith(unique)
        assert cli("request", unique, "hello", "--format", "hex").output == "68656c6c6f\n"
        done = cli("request", unique, "hello", "-v")
        assert done.output == f"{done.output.split()[0]} hello\n"
        assert done.output.startswith(unique)

    def test_lines_of_a_reply_are_kept_on_a_terminal(
        self, on_terminal: Any, serve: Serve, unique: str
    ) -> None:
        serve(unique, lambda request: b"one\n\ttwo\x1b[2J\n")
        on_terminal.terminal.type(b"ask\n\x04")
        code, screen = on_terminal("request", unique)
        assert code == 0
        assert "one\n        two\\x1b[2J\n" in screen.text.expandtabs()
        assert "sending all lines as one request; press Ctrl-D to finish" in screen.text

    def test_error_of_the_handler_is_reported(
        self, cli: Cli, serve: Serve, unique: str, backend: str
    ) -> None:
        serve(unique, fail)
        done = cli("request", unique, "hello", "--backend", backend)
        assert (done.code, done.output) == (1, "")
        assert "RuntimeError: no" in done.error

    def test_missing_reply_is_reported(self, cli: Cli, unique: str, backend: str) -> None:
        done = cli("request", unique, "hello", "--timeout", "0.01", "--backend", backend)
        assert done.code == 1
        assert "no reply within 0.01 s" in done.error
        done = cli("request", unique, "hello", "-t", "0.01", "-n", "0", "--backend", backend)
        assert done.code == 1
        assert done.error == "received no reply within 0.01 s"

    def test_several_replies(self, cli: Cli, serve: Serve, unique: str, backend: str) -> None:
        serve(unique, lambda request: "a")
        serve(unique, lambda request: "b")
        done = cli("request", unique, "hello", "--replies", "2", "--backend", backend)
        assert (done.code, sorted(done.lines), done.errors) == (0, ["a", "b"], "")
        done = cli("request", unique, "hello", "-n3", "-t0.5", "--backend", backend)
        assert (done.code, sorted(done.lines)) == (1, ["a", "b"])
        assert done.error == "received 2 of 3 replies within 0.5 s"
        done = cli("request", unique, "hello", "-n0", "-t0.5", "--backend", backend)
        assert (done.code, sorted(done.lines), done.errors) == (0, ["a", "b"], "")

    def test_errors_among_several_replies_are_reported(
        self, cli: Cli, serve: Serve, unique: str
    ) -> None:
        serve(unique, fail)
        serve(unique, lambda request: "a")
        done = cli("request", unique, "hello", "--replies", "2")
        assert (done.code, done.output) == (1, "a\n")
        assert "RuntimeError: no" in done.errors
        assert done.errors.endswith("the serving clients reported 1 error\n")

    def test_message_with_file_is_rejected(self, cli: Cli, unique: str) -> None:
        done = cli("request", unique, "hello", "--file", "x")
        assert done.code == 2
        assert "not both" in done.error

    def test_matcher_mqtt(self, cli: Cli, unique: str, tmp_path: Path) -> None:
        with (
            background(matcher="mqtt") as server,
            serving(server, unique, "--exec=cat", "--matcher=mqtt", "--group=g"),
        ):
            arguments = ["request", unique, "hello", "--matcher", "mqtt"]
            done = cli(*arguments, "--url", server.url, "--secret", server.secret)
            assert (done.code, done.output, done.errors) == (0, "hello\n", "")


class TestServe:
    def test_reply_is_the_output_of_the_program(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        with serving(server, unique, "--exec", "tr a-z 'A-Z'", backend=backend):
            for message in ("one", "two"):
                done = cli("request", unique, message)
                assert (done.code, done.output) == (0, f"{message.upper()}\n")

    def test_shell_runs_a_pipeline(self, cli: Cli, server: Background, unique: str) -> None:
        with serving(server, unique, "--shell", "--exec", "cat | tr a b; echo"):
            assert cli("request", unique, "aa").output == "bb\n"

    def test_payload_and_reply_are_bytes(
        self, cli: Cli, server: Background, unique: str, backend: str, tmp_path: Path
    ) -> None:
        payload = bytes(range(256)) * 250
        (tmp_path / "file").write_bytes(payload)
        with serving(server, unique, "--exec", "cat", backend=backend):
            done = cli("request", unique, "--file", str(tmp_path / "file"), "--format", "hex")
        assert done.output == payload.hex() + "\n"

    def test_program_need_not_read_its_input(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        with serving(server, unique, "--exec", "true", backend=backend):
            done = cli("request", unique, "x" * 60_000, "--raw")
        assert (done.code, done.output, done.errors) == (0, "", "")

    def test_failure_is_reported_to_the_requester_without_secrets(
        self, cli: Cli, server: Background, unique: str, backend: str, tmp_path: Path
    ) -> None:
        program = script(tmp_path, "echo first >&2; cat >&2; echo >&2; exit 3")
        with serving(server, unique, "--exec", program, backend=backend) as errors:
            done = cli("request", unique, f"bad {server.secret} key")
            assert (done.code, done.output) == (1, "")
            assert done.error.endswith("raised ProgramError: exit status 3: bad … key")
        first, second, note = errors
        assert (first, second) == ("emitter-anyio: first", "emitter-anyio: bad … key")
        assert note.endswith("raised an exception: exit status 3: bad … key")

    def test_failure_without_output(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        with serving(server, unique, "--shell", "--exec", "kill -9 $$", backend=backend):
            done = cli("request", unique, "x")
        assert done.error.endswith("raised ProgramError: killed by signal 9")

    def test_long_line_of_errors_is_bounded(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        command = "head -c 5000 /dev/zero | tr '\\0' x >&2; exit 1"
        with serving(server, unique, "--shell", "--exec", command) as errors:
            done = cli("request", unique, "x")
            assert "exit status 1: xxxx" in done.error
        assert sum(line.count("x") for line in errors[:-1]) >= 5000

    def test_too_large_reply_is_an_error(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        with serving(server, unique, "--exec", "yes", backend=backend):
            done = cli("request", unique, "x")
        assert done.error.endswith("the reply has more than 65,536 bytes")

    def test_program_that_has_been_removed_is_an_error(
        self, cli: Cli, server: Background, unique: str, backend: str, tmp_path: Path
    ) -> None:
        program = script(tmp_path, "true")
        with serving(server, unique, "--exec", program, backend=backend):
            os.unlink(program)
            done = cli("request", unique, "x")
        assert done.error.endswith("cannot run the program: No such file or directory")

    def test_program_gets_no_keys(self, cli: Cli, server: Background, unique: str) -> None:
        with serving(server, unique, "--exec", "env"):
            output = cli("request", unique, "x").output
        assert "PATH=" in output
        assert "EMITTER_" not in output

    def test_group(self, cli: Cli, server: Background, unique: str) -> None:
        options = ["--exec", "echo one", "--group", "g"]
        with serving(server, unique, *options), serving(server, unique, *options):
            done = cli("request", unique, "x", "-n0", "-t0.5")
        assert (done.code, done.output) == (0, "one\n")

    def test_number_of_processes_is_limited(
        self, cli: Cli, server: Background, unique: str, tmp_path: Path
    ) -> None:
        program = script(tmp_path, f"mkdir {tmp_path}/lock && sleep 0.2 && rmdir {tmp_path}/lock")

        async def ask() -> None:
            async with connect(server.url) as emitter, anyio.create_task_group() as tasks:
                key = server.key(f"{unique}#/", "rw")
                for _ in range(3):
                    tasks.start_soon(emitter.request, key, unique, "x")

        with serving(server, unique, "--exec", program, "--processes", "1"):
            server.call(ask)

    @pytest.mark.parametrize(
        ("command", "code", "words"),
        [
            ("/no/such/program x", 1, "cannot run /no/such/program: there is no such program"),
            ("'unbalanced", 2, "--exec: no closing quotation"),
            (" ", 2, "--exec: expected the name of a program"),
        ],
    )
    def test_invalid_command_is_rejected(
        self, cli: Cli, unique: str, command: str, code: int, words: str
    ) -> None:
        done = cli("serve", unique, "--exec", command)
        assert done.code == code
        assert words in done.error

    def test_refusal_is_reported(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        key = server.key(f"{unique}#/", "w")
        done = cli("serve", unique, "--exec", "cat", "--key", key, "--backend", backend)
        assert (done.code, done.output) == (1, "")
        assert "'r' (read)" in done.error

    def test_ctrl_c_on_a_terminal(self, server: Background, unique: str, backend: str) -> None:
        environment = {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}
        with terminal() as screen:
            process = screen.start(
                *("-m", "emitter_anyio", "serve", unique, "--exec", "cat", "--backend", backend),
                **environment,
            )
            screen.wait_for(f"serving {unique}\nemitter-anyio: press Ctrl-C to stop\n")
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
            screen.close_program_side()
        assert "Traceback" not in screen.text


class TestKilling:
    """A program and its child processes hold a FIFO open until they are killed."""

    @pytest.fixture
    def fifo(self, tmp_path: Path) -> Path:
        os.mkfifo(tmp_path / "fifo")
        return tmp_path / "fifo"

    @pytest.fixture
    def program(self, fifo: Path, tmp_path: Path) -> str:
        return script(tmp_path, f"exec 3> {fifo}\necho started >&3\nsleep 1000 &\nwait")

    @pytest.fixture
    def ask(self, server: Background, unique: str) -> Iterator[Callable[[float], None]]:
        """Return a function that starts a request with a timeout."""
        cancellations = []

        async def ask(timeout: float, *, task_status: TaskStatus[None]) -> None:
            async with connect(server.url) as emitter:
                task_status.started()
                with suppress(EmitterError):
                    key = server.key(f"{unique}#/", "rw")
                    await emitter.request(key, unique, "x", timeout=timeout)

        def start(timeout: float) -> None:
            cancellations.append(server.start(partial(ask, timeout)))

        yield start
        for cancel in cancellations:
            cancel()

    def test_timeout(
        self, cli: Cli, server: Background, unique: str, backend: str, program: str, fifo: Path
    ) -> None:
        options = ["--exec", program, "--timeout", "0.5"]
        with serving(server, unique, *options, backend=backend):
            reader = Reader(fifo)
            done = cli("request", unique, "x")
            assert done.error.endswith("ProgramError: the program was killed after 0.5 s")
            assert reader.wait_end() == "started\n"

    def test_cancelled_request(
        self, server: Background, unique: str, backend: str, program: str, fifo: Path, ask: Any
    ) -> None:
        with serving(server, unique, "--exec", program, backend=backend):
            ask(1)
            assert fifo.read_text() == "started\n"

    @pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
    def test_signal(
        self,
        server: Background,
        unique: str,
        backend: str,
        program: str,
        fifo: Path,
        ask: Any,
        stop: signal.Signals,
    ) -> None:
        with serving(server, unique, "--exec", program, backend=backend, stop=stop):
            ask(60)
            file = fifo.open()
            assert file.readline() == "started\n"
        with file:
            assert file.read() == ""

    def test_child_processes_that_were_left_behind(
        self, cli: Cli, server: Background, unique: str, backend: str, fifo: Path, tmp_path: Path
    ) -> None:
        lines = f"exec 3> {fifo}\nsleep 1000 < /dev/null > /dev/null 2>&1 &\necho done"
        program = script(tmp_path, lines)
        with serving(server, unique, "--exec", program, backend=backend):
            reader = Reader(fifo)
            assert cli("request", unique, "x").output == "done\n"
            assert reader.wait_end() == ""
