"""``pub`` and ``link``."""

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


def stored(place: Background, channel: str) -> list[str]:
    key = place.key(channel, "l")

    async def read() -> list[str]:
        async with connect(place.url) as emitter:
            return [m.as_string() async for m in emitter.history(key, channel)]

    return place.call(read)


class TestPub:
    @pytest.mark.parametrize("qos", ["0", "1"])
    def test_a_message(
        self, cli: Cli, place: Background, unique: str, backend: str, qos: str
    ) -> None:
        done = cli(
            "pub", unique, "hello", "--ttl", "60", "--qos", qos, "--no-echo", "--backend", backend
        )
        assert (done.code, done.output, done.errors) == (0, "", "")
        assert stored(place, unique) == ["hello"]

    @pytest.mark.parametrize("message", [[], ["-"]])
    def test_lines(
        self, cli: Cli, place: Background, unique: str, backend: str, message: list[str]
    ) -> None:
        done = cli(
            "pub", unique, *message, "--retain", "--backend", backend, stdin=b"one\n\ntwo\nend"
        )
        assert (done.code, done.output, done.errors) == (0, "", "")
        assert stored(place, unique) == ["one", "", "two", "end"]

    def test_lines_of_a_file(
        self, cli: Cli, place: Background, unique: str, backend: str, tmp_path: Path
    ) -> None:
        # A file as standard input, for which no backend can wait.
        (tmp_path / "lines").write_text("one\ntwo\n")
        with open(tmp_path / "lines") as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", file)
            patch.setenv("EMITTER_SECRET", place.secret)
            assert main(["pub", unique, "--ttl=60", "-u", place.url, "--backend", backend]) == 0
        assert stored(place, unique) == ["one", "two"]

    def test_a_file(self, cli: Cli, place: Background, unique: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"all of it\nat once\n")
        done = cli("pub", unique, "--file", str(tmp_path / "file"), "--ttl", "60")
        assert (done.code, done.output, done.errors) == (0, "", "")
        done = cli("pub", unique, "--file", "-", "--ttl", "60", stdin=b"this\ntoo")
        assert (done.code, done.output, done.errors) == (0, "", "")
        assert stored(place, unique) == ["all of it\nat once\n", "this\ntoo"]

    def test_no_such_file(self, cli: Cli, unique: str) -> None:
        done = cli("pub", unique, "--file", "/no/such/file")
        assert done.code == 1
        assert "/no/such/file: No such file or directory" in done.error

    def test_a_message_and_a_file(self, cli: Cli, unique: str) -> None:
        done = cli("pub", unique, "hello", "--file", "x")
        assert done.code == 2
        assert "not both" in done.error

    def test_too_large(self, cli: Cli, unique: str) -> None:
        done = cli("pub", unique, stdin=b"small\n" + b"x" * 65536)
        assert done.code == 1
        assert done.error.startswith("message 2: ")

    def test_refused_with_the_likely_reasons(
        self, cli: Cli, place: Background, unique: str, backend: str
    ) -> None:
        key = place.key(unique, "r")
        done = cli("pub", unique, "hello", "--key", key, "--backend", backend)
        assert done.code == 1
        assert "401" in done.error
        assert "'w' (write)" in done.error
        assert key not in done.errors

    def test_a_refused_line_ends_it(
        self, cli: Cli, place: Background, unique: str, backend: str
    ) -> None:
        key = place.key(unique, "r")
        done = cli("pub", unique, "--key", key, "--backend", backend, stdin=b"one\ntwo\n")
        assert done.code == 1
        assert "--qos 1" in done.error

    def test_a_refused_line_ends_it_while_no_other_comes(
        self, cli: Cli, place: Background, unique: str, backend: str
    ) -> None:
        reading, writing = os.pipe()
        os.write(writing, b"one\n")
        with open(writing, "wb"):
            done = cli(
                *("pub", unique, "--key", place.key(unique, "r"), "--backend", backend),
                stdin=reading,
            )
        assert done.code == 1
        assert "401" in done.error

    def test_the_link_is_lost_under_it(
        self, cli: Cli, place: Background, unique: str, backend: str
    ) -> None:
        reading, writing = os.pipe()

        async def cut_between_lines(*, task_status: TaskStatus[None]) -> None:
            async with connect(place.url) as emitter:
                async with emitter.subscribe(place.key(unique, "r"), unique) as messages:
                    task_status.started()
                    os.write(writing, b"one\n")
                    assert (await messages.receive()).as_string() == "one"
                    for client in place.broker.clients:
                        if client.username == "publisher":
                            await place.broker.drop(client)
                    os.write(writing, b"two\n")
                    os.close(writing)

        place.start(cut_between_lines)
        done = cli(*("pub", unique, "--username", "publisher", "--backend", backend), stdin=reading)
        assert done.code == 1
        # The second one may have left before the loss was noticed.
        assert re.search("[12] of 2 messages", done.errors)
        assert place.url in done.errors

    def test_on_a_terminal(self, on_terminal: Any, place: Background, unique: str) -> None:
        on_terminal.terminal.type(b"one\ntwo\n\x04")
        code, screen = on_terminal("pub", unique, "--ttl", "60")
        assert code == 0
        assert "each line is a message; Ctrl-D ends\n" in screen.text
        assert f"published 2 to {unique}\n" in screen.text
        assert stored(place, unique) == ["one", "two"]


class TestLink:
    def test_publishes_through_it(
        self, cli: Cli, place: Background, unique: str, backend: str
    ) -> None:
        done = cli("link", "a1", unique, "-", "--ttl=60", "--backend", backend, stdin=b"one\ntwo\n")
        assert (done.code, done.output, done.errors) == (0, f"a1 {unique}?ttl=60\n", "")
        assert stored(place, unique) == ["one", "two"]

    def test_json(self, cli: Cli, unique: str) -> None:
        done = cli("link", "a1", unique, "--no-echo", "--json")
        assert done.output == f'{{"name": "a1", "channel": "{unique}?me=0"}}\n'

    def test_a_name_that_is_none(self, cli: Cli, unique: str) -> None:
        done = cli("link", "abc", unique)
        assert done.code == 2
        assert "one or two letters or digits" in done.error

    def test_the_link_to_the_broker_is_lost(
        self,
        cli: Cli,
        place: Background,
        unique: str,
        backend: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        flush = Emitter.flush

        async def cut(emitter: Emitter) -> float:
            with place.broker.lose("pingresp"):
                id = (await emitter.me()).id
                await to_thread.run_sync(place.start_soon, lambda: place.broker.drop(id))
                return await flush(emitter)

        monkeypatch.setattr(Emitter, "flush", cut)
        done = cli("link", "a", unique, "hello", "--backend", backend)
        assert (done.code, done.output) == (1, f"a {unique}\n")
        assert "lost" in done.error

    def test_the_key_is_looked_at_when_it_is_used(
        self, cli: Cli, place: Background, unique: str
    ) -> None:
        done = cli("link", "a", unique, "hello", "--key", place.key(unique, "r"))
        assert (done.code, done.output) == (1, f"a {unique}\n")
        assert "401" in done.error
