"""``pub`` and ``link``: messages, lines, files, refusals and lost connections."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import sleep_until, to_thread
from anyio.abc import TaskStatus

from emitter_anyio import Emitter, connect
from emitter_anyio._cli import _outgoing, main
from emitter_anyio._cli._input import remaining_bytes
from tests.cli.conftest import Cli
from tests.support.background import Background
from tests.support.command import ROOT, clean_environment, running
from tests.support.terminal import terminal


def stored(server: Background, channel: str) -> list[str]:
    key = server.key(channel, "l")

    async def read() -> list[str]:
        async with connect(server.url) as emitter:
            return [m.as_string() async for m in emitter.history(key, channel)]

    return server.call(read)


class TestPub:
    @pytest.mark.parametrize("qos", ["0", "1"])
    def test_message_is_published(
        self, cli: Cli, server: Background, unique: str, backend: str, qos: str
    ) -> None:
        done = cli(
            "pub", unique, "hello", "--ttl", "60", "--qos", qos, "--no-echo", "--backend", backend
        )
        assert (done.code, done.output, done.errors) == (0, "", "")
        assert stored(server, unique) == ["hello"]

    @pytest.mark.parametrize(
        "arguments",
        [
            ["{}", "--ttl", "60", "-1"],
            ["--ttl", "60", "{}", "-1"],
            ["{}", "--no-echo", "--ttl", "60", "--", "-1"],
            ["--ttl", "60", "--", "{}", "-1"],
        ],
        ids=" ".join,
    )
    def test_options_between_the_arguments(
        self, cli: Cli, server: Background, unique: str, arguments: list[str]
    ) -> None:
        done = cli("pub", *[each.format(unique) for each in arguments])
        assert (done.code, done.errors) == (0, "")
        assert stored(server, unique) == ["-1"]

    @pytest.mark.parametrize("message", [[], ["-"]])
    def test_lines_of_a_pipe_are_published(
        self, cli: Cli, server: Background, unique: str, backend: str, message: list[str]
    ) -> None:
        done = cli(
            "pub", unique, *message, "--retain", "--backend", backend, stdin=b"one\n\ntwo\nend"
        )
        assert (done.code, done.output, done.errors) == (0, "", "")
        assert stored(server, unique) == ["one", "", "two", "end"]

    def test_lines_of_a_regular_file_are_published(
        self, cli: Cli, server: Background, unique: str, backend: str, tmp_path: Path
    ) -> None:
        # No backend can wait for a regular file.
        (tmp_path / "lines").write_text("one\ntwo\n")
        with open(tmp_path / "lines") as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", file)
            patch.setenv("EMITTER_SECRET", server.secret)
            assert main(["pub", unique, "--ttl=60", "-u", server.url, "--backend", backend]) == 0
        assert stored(server, unique) == ["one", "two"]

    def test_file_is_published_as_one_message(
        self, cli: Cli, server: Background, unique: str, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_bytes(b"all of\nthe file\n")
        done = cli("pub", unique, "--file", str(tmp_path / "file"), "--ttl", "60")
        assert (done.code, done.output, done.errors) == (0, "", "")
        done = cli("pub", unique, "--file", "-", "--ttl", "60", stdin=b"this\ntoo")
        assert (done.code, done.output, done.errors) == (0, "", "")
        assert stored(server, unique) == ["all of\nthe file\n", "this\ntoo"]

    def test_missing_file_is_reported(self, cli: Cli, unique: str) -> None:
        done = cli("pub", unique, "--file", "/no/such/file")
        assert done.code == 1
        assert "/no/such/file: No such file or directory" in done.error

    def test_message_with_file_is_rejected(self, cli: Cli, unique: str) -> None:
        done = cli("pub", unique, "hello", "--file", "x")
        assert done.code == 2
        assert "not both" in done.error

    def test_too_large_line_is_reported_with_its_number(self, cli: Cli, unique: str) -> None:
        done = cli("pub", unique, stdin=b"small\n" + b"x" * 65536)
        assert done.code == 1
        assert done.error.startswith("message 2: ")
        assert done.error.endswith("the maximum is 65536 bytes")

    def test_refusal_names_the_missing_permission(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        key = server.key(unique, "r")
        done = cli("pub", unique, "hello", "--key", key, "--backend", backend)
        assert done.code == 1
        assert "401" in done.error
        assert "'w' (write)" in done.error
        assert key not in done.errors

    def test_refused_line_ends_the_command(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        key = server.key(unique, "r")
        done = cli("pub", unique, "--key", key, "--backend", backend, stdin=b"one\ntwo\n")
        assert done.code == 1
        assert "--qos 1" in done.error

    def test_refused_line_ends_the_command_while_it_waits_for_input(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        reading, writing = os.pipe()
        os.write(writing, b"one\n")
        with open(writing, "wb"):
            done = cli(
                *("pub", unique, "--key", server.key(unique, "r"), "--backend", backend),
                stdin=reading,
            )
        assert done.code == 1
        assert "401" in done.error

    def test_lost_connection_makes_messages_uncertain(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        reading, writing = os.pipe()

        async def cut_between_lines(*, task_status: TaskStatus[None]) -> None:
            async with connect(server.url) as emitter:
                async with emitter.subscribe(server.key(unique, "r"), unique) as messages:
                    task_status.started()
                    os.write(writing, b"one\n")
                    assert (await messages.receive()).as_string() == "one"
                    for client in server.broker.clients:
                        if client.username == "publisher":
                            await server.broker.drop(client)
                    os.write(writing, b"two\n")
                    os.close(writing)

        server.start(cut_between_lines)
        done = cli(*("pub", unique, "--username", "publisher", "--backend", backend), stdin=reading)
        assert done.code == 1
        # The second message might have been written before the client detected the loss.
        assert re.search("[12] of 2 messages", done.errors)
        assert server.url in done.errors

    def test_lines_are_read_from_a_terminal(
        self, on_terminal: Any, server: Background, unique: str
    ) -> None:
        on_terminal.terminal.type(b"one\ntwo\n\x04")
        code, screen = on_terminal("pub", unique, "--ttl", "60")
        assert code == 0
        assert "publishing each line as a message; press Ctrl-D to finish\n" in screen.text
        assert f"published 2 messages to {unique}\n" in screen.text
        assert stored(server, unique) == ["one", "two"]


class TestRepeating:
    def test_count(
        self, cli: Cli, server: Background, unique: str, backend: str, tmp_path: Path
    ) -> None:
        done = cli("pub", unique, "hello", "--count", "3", "--ttl=60", "--backend", backend)
        assert (done.code, done.output, done.errors) == (0, "", "")
        (tmp_path / "file").write_bytes(b"file")
        done = cli("pub", unique, "--file", str(tmp_path / "file"), "-n2", "--ttl=60")
        assert (done.code, done.output, done.errors) == (0, "", "")
        assert stored(server, unique) == ["hello"] * 3 + ["file"] * 2

    @pytest.mark.parametrize("lines", [False, True])
    def test_interval(
        self,
        cli: Cli,
        server: Background,
        unique: str,
        backend: str,
        lines: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        deadlines: list[float] = []

        async def record(deadline: float) -> None:
            deadlines.append(deadline)
            await sleep_until(deadline)

        monkeypatch.setattr(_outgoing, "sleep_until", record)
        arguments = [] if lines else ["a", "--count", "3"]
        arguments += ["--interval", "0.01", "--ttl=60", "--backend", backend]
        done = cli("pub", unique, *arguments, stdin=b"a\na\na\n")
        assert (done.code, done.errors) == (0, "")
        assert stored(server, unique) == ["a", "a", "a"]
        first, second, third = deadlines
        assert first == 0
        assert third >= second + 0.01

    def test_interval_without_count_runs_until_ctrl_c(
        self, server: Background, unique: str, backend: str
    ) -> None:
        async def receive() -> None:
            async with connect(server.url) as emitter:
                async with emitter.subscribe(server.key(unique, "r"), unique) as messages:
                    for _ in range(3):
                        assert (await messages.receive()).as_string() == "hello"

        arguments = ["pub", unique, "hello", "--interval", "0.01", "--backend", backend]
        environment = {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}
        with running("-m", "emitter_anyio", *arguments, environment=environment) as process:
            server.call(receive)
            process.send_signal(signal.SIGINT)
            assert process.communicate() == ("", "")
        assert process.returncode == 130

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--count=2"], "--count requires a message or --file"),
            (["-", "--count=2"], "--count requires a message or --file"),
            (["--replay=x", "--count=2"], "--count requires a message or --file"),
            (["--replay=x", "--interval=2"], "cannot use --interval with --replay; use --speed"),
            (["--replay=x", "--file=x"], "give --file or --replay, not both"),
            (["hello", "--replay=x"], "give a message or --replay, not both"),
            (["hello", "--speed=2"], "--speed requires --replay"),
            (["--replay=x", "--speed=-1"], "expected a number of at least 0"),
            (["--replay=x", "--speed=x"], "expected a number of at least 0"),
        ],
        ids=str,
    )
    def test_invalid_combination_is_rejected(
        self, cli: Cli, unique: str, arguments: list[str], words: str
    ) -> None:
        done = cli("pub", unique, *arguments)
        assert done.code == 2
        assert words in done.error


class TestReplay:
    def record(self, channel: str, second: float, payload: str = "x") -> str:
        time = datetime.fromtimestamp(2_000_000_000 + second, UTC).isoformat()
        return json.dumps({"time": time, "channel": channel, "payload": payload})

    @pytest.mark.parametrize("command", ["sub", "history"])
    def test_output_of_other_commands_is_published_again(
        self, cli: Cli, server: Background, unique: str, backend: str, tmp_path: Path, command: str
    ) -> None:
        payloads = [b"one", b"\xff\x00", "drei ü\n".encode()]
        for number, payload in enumerate(payloads):
            server.publish(f"{unique}{number}/", payload, ttl=60)
        options = ["--last=3", "--format=json"] + ["--count=3"] * (command == "sub")
        recorded = cli(command, unique, *options).output
        (tmp_path / "file").write_text(recorded)
        replay = ["pub", unique, "--replay", str(tmp_path / "file"), "--speed=0", "--ttl=60"]
        done = cli(*replay, "--backend", backend)
        assert (done.code, done.output, done.errors) == (0, "", "")
        for number, payload in enumerate(payloads):
            found = cli("history", f"{unique}{number}/", "--format=hex").lines
            assert found == [payload.hex()] * 2

    @pytest.mark.parametrize("speed", [[], ["--speed=100"], ["--speed=0"]], ids=str)
    def test_times_between_messages_are_kept(
        self,
        cli: Cli,
        server: Background,
        unique: str,
        backend: str,
        speed: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        deadlines: list[float] = []

        async def record(deadline: float) -> None:
            deadlines.append(deadline)

        monkeypatch.setattr(_outgoing, "sleep_until", record)
        lines = [self.record(unique, second, str(second)) for second in (0, 100, 50, 250)]
        stdin = "\n\n".join(lines).encode()
        arguments = ["pub", unique, "--replay=-", *speed, "--ttl=60", "--backend", backend]
        done = cli(*arguments, stdin=stdin)
        assert (done.code, done.errors) == (0, "")
        assert stored(server, unique) == ["0", "100", "50", "250"]
        waits = [deadline - deadlines[0] for deadline in deadlines]
        expected = {"[]": [0, 100, 50, 250], "['--speed=100']": [0, 1, 0.5, 2.5]}
        assert waits == pytest.approx(expected.get(str(speed), []))

    def test_messages_of_other_channels_are_skipped(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        other = f"x{unique}"
        lines = [self.record(other, 0), self.record(unique, 0), self.record(f"{unique}a/", 0)]
        done = cli("pub", unique, "--replay=-", "--ttl=60", stdin="\n".join(lines).encode())
        assert (done.code, done.error) == (0, "skipped 1 message of other channels")
        assert stored(server, unique) == ["x", "x"]
        assert stored(server, other) == []

    @pytest.mark.parametrize(
        "line",
        [
            "not JSON",
            "[]",
            "{}",
            '{"channel": "a/", "payload": "x"}',
            '{"channel": "a/", "time": "yesterday", "payload": "x"}',
            '{"channel": "a/", "time": 1, "payload": "x"}',
            '{"channel": "a//", "time": "2030-01-31T12:00:00Z", "payload": "x"}',
            '{"channel": "a/", "time": "2030-01-31T12:00:00Z", "payload": 1}',
            '{"channel": "a/", "time": "2030-01-31T12:00:00Z", "payload": "\\ud800"}',
            '{"channel": "a/", "time": "2030-01-31T12:00:00Z", "payload_base64": "?"}',
            "[" * 30_000,
        ],
        ids=lambda line: line[:70],
    )
    def test_other_lines_are_reported(
        self, cli: Cli, unique: str, tmp_path: Path, line: str
    ) -> None:
        path = tmp_path / "file"
        path.write_text(f"{self.record(unique, 0)}\n{line}\n")
        done = cli("pub", unique, "--replay", str(path))
        assert done.code == 1
        assert done.error == (
            f"cannot replay {path}: line 2 is not a message that 'sub --format json' or 'history' "
            "printed"
        )
        done = cli("pub", unique, "--replay=-", stdin=b"x")
        assert "cannot replay standard input: line 1 is not" in done.error

    def test_missing_file_is_reported(self, cli: Cli, unique: str) -> None:
        done = cli("pub", unique, "--replay", "/no/such/file")
        assert (done.code, done.error) == (
            1,
            "cannot read /no/such/file: No such file or directory",
        )


class TestProgress:
    @pytest.mark.parametrize("source", ["count", "replay"])
    def test_bar_is_shown_on_a_terminal(
        self,
        on_terminal: Any,
        server: Background,
        unique: str,
        backend: str,
        source: str,
        tmp_path: Path,
    ) -> None:
        line = json.dumps({"time": "2030-01-31", "channel": unique, "payload": "x"})
        (tmp_path / "file").write_text(f"{line}\n" * 100)
        arguments = {
            "count": ["hello", "--count=100"],
            "replay": [f"--replay={tmp_path / 'file'}"],
        }[source]
        code, screen = on_terminal("pub", unique, *arguments, "--backend", backend)
        assert code == 0
        assert f"publishing to {unique}" in screen.text
        assert ("0/100" if source == "count" else "kB") in screen.text
        assert f"published 100 messages to {unique}\n" in screen.text

    def test_bar_is_shown_for_the_lines_of_a_file(
        self, server: Background, unique: str, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("line\n" * 1000)
        with terminal() as screen, open(tmp_path / "file") as file:
            subprocess.run(
                [sys.executable, "-m", "emitter_anyio", "pub", unique],
                check=True,
                cwd=ROOT,
                env=clean_environment({"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}),
                stdin=file,
                stdout=screen.program_fd,
                stderr=screen.program_fd,
            )
            screen.close_program_side()
        assert f"publishing to {unique}" in screen.text
        assert "/5.0 kB" in screen.text
        assert f"published 1,000 messages to {unique}\n" in screen.text

    def test_size_of_the_input(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("0123456789")
        reading, writing = os.pipe()
        with (
            open(tmp_path / "file") as file,
            open(reading) as pipe,
            open(writing, "w"),
        ):
            file.seek(4)
            monkeypatch.setattr("sys.stdin", file)
            assert anyio.run(remaining_bytes, "-") == 6
            monkeypatch.setattr("sys.stdin", pipe)
            assert anyio.run(remaining_bytes, "-") == 0
        monkeypatch.setattr("sys.stdin", None)
        assert anyio.run(remaining_bytes, "-") == 0
        assert anyio.run(remaining_bytes, str(tmp_path / "file")) == 10
        assert anyio.run(remaining_bytes, str(tmp_path)) == 0
        assert anyio.run(remaining_bytes, str(tmp_path / "no")) == 0


class TestLink:
    def test_lines_are_published_through_the_link(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        done = cli("link", "a1", unique, "-", "--ttl=60", "--backend", backend, stdin=b"one\ntwo\n")
        assert (done.code, done.output, done.errors) == (0, f"a1 {unique}?ttl=60\n", "")
        assert stored(server, unique) == ["one", "two"]

    def test_json(self, cli: Cli, unique: str) -> None:
        done = cli("link", "a1", unique, "--no-echo", "--json")
        assert done.output == f'{{"name": "a1", "channel": "{unique}?me=0"}}\n'

    def test_invalid_name_is_rejected(self, cli: Cli, unique: str) -> None:
        done = cli("link", "abc", unique)
        assert done.code == 2
        assert "one or two letters or digits" in done.error

    def test_lost_connection_is_reported(
        self,
        cli: Cli,
        server: Background,
        unique: str,
        backend: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        flush = Emitter.flush

        async def cut(emitter: Emitter) -> float:
            with server.broker.lose("pingresp"):
                id = (await emitter.me()).id
                await to_thread.run_sync(server.start_soon, lambda: server.broker.drop(id))
                return await flush(emitter)

        monkeypatch.setattr(Emitter, "flush", cut)
        done = cli("link", "a", unique, "hello", "--backend", backend)
        assert (done.code, done.output) == (1, f"a {unique}\n")
        assert "lost" in done.error

    def test_refused_key_is_reported_when_a_message_is_published(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        done = cli("link", "a", unique, "hello", "--key", server.key(unique, "r"))
        assert (done.code, done.output) == (1, f"a {unique}\n")
        assert "401" in done.error
