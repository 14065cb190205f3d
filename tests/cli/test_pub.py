"""``pub`` and ``link``: messages, lines, files, refusals and lost connections."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from anyio.abc import TaskStatus

from emitter_anyio import Emitter, connect
from emitter_anyio._cli import main
from tests.cli.conftest import Cli
from tests.support.background import Background


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
