"""Closed or full standard streams, closed pipes, and replies with control characters."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from emitter_anyio._cli._output import flush
from emitter_anyio.testing import _requests
from tests.cli.conftest import Cli
from tests.support.background import Background, publishing
from tests.support.command import ROOT, clean_environment, running

HOSTILE = "\x1b[2J\x9b\u202e\udcff"
SHOWN = "\\x1b[2J\\x9b\\u202e\\udcff"


def shell(server: Background, *arguments: str, redirect: str) -> subprocess.CompletedProcess[str]:
    """Run a command with standard streams that a shell redirects."""
    return subprocess.run(
        ["sh", "-c", f'"$0" -W error -m emitter_anyio "$@" {redirect}', sys.executable, *arguments],
        check=False,
        cwd=ROOT,
        env=clean_environment({"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}),
        capture_output=True,
        text=True,
    )


class TestClosed:
    @pytest.mark.parametrize(
        "arguments",
        [["me"], ["sub", "a/"], ["sub", "a/", "--stats"], ["history", "a/"], ["demo"]],
        ids=" ".join,
    )
    def test_standard_output(self, server: Background, arguments: list[str]) -> None:
        done = shell(server, *arguments, redirect=">&-")
        assert done.returncode == 1
        assert done.stderr == "emitter-anyio: cannot write to standard output: it is closed\n"

    @pytest.mark.parametrize("arguments", [["pub", "a/"], ["ban"]], ids=" ".join)
    def test_standard_input(self, server: Background, arguments: list[str]) -> None:
        done = shell(server, *arguments, redirect="<&-")
        assert done.returncode == 1
        assert done.stderr == "emitter-anyio: cannot read standard input: it is closed\n"

    def test_unread_standard_input_may_be_closed(self, server: Background) -> None:
        done = shell(server, "pub", "a/", "hello", redirect="<&-")
        assert (done.returncode, done.stderr) == (0, "")

    def test_standard_error(self, server: Background) -> None:
        done = shell(server, "pub", "a/", "hello", "--key", "x" * 32, redirect="2>&-")
        assert (done.returncode, done.stdout) == (1, "")
        assert shell(server, "--help", redirect=">&-").returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="requires /dev/full")
class TestFull:
    @pytest.mark.parametrize("arguments", [["me"], ["history", "full/"]], ids=" ".join)
    def test_standard_output(self, server: Background, arguments: list[str]) -> None:
        server.publish("full/", "hello", ttl=60)
        done = shell(server, *arguments, redirect=">/dev/full")
        assert done.returncode == 1
        assert "cannot write to standard output: No space left" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_help(self, server: Background) -> None:
        done = shell(server, "--help", redirect=">/dev/full")
        assert (done.returncode, done.stderr) == (0, "")

    def test_standard_error(self, server: Background) -> None:
        done = shell(server, "pub", "a/", "hello", "--key", "x" * 32, redirect="2>/dev/full")
        assert (done.returncode, done.stdout) == (1, "")


def test_unreadable_standard_input_is_reported(cli: Cli, unique: str) -> None:
    done = cli("pub", unique, stdin=os.open(os.devnull, os.O_WRONLY))
    assert (done.code, done.error) == (1, "cannot read standard input: Bad file descriptor")


class TestReader:
    @pytest.mark.parametrize("arguments", [["sub"], ["sub", "--format=json"], ["presence"]])
    def test_closing_the_pipe_ends_an_idle_command(
        self, server: Background, unique: str, backend: str, arguments: list[str]
    ) -> None:
        command, *options = arguments
        server.when_subscribed(unique, publishing(unique, "hello"))
        line = ["-m", "emitter_anyio", command, unique, *options, "--backend", backend]
        environment = {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}
        with running(*line, environment=environment) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() != ""
            process.stdout.close()
            assert process.wait(timeout=120) == 141
            assert process.stderr.read() == ""

    def test_bytes_from_the_reader_are_ignored(
        self, server: Background, unique: str, backend: str
    ) -> None:
        server.when_subscribed(unique, publishing(unique, "hello"))
        ours, theirs = socket.socketpair()
        ours.sendall(b"makes the socket readable, although it is open\n")
        line = [sys.executable, "-m", "emitter_anyio", "sub", unique, "--backend", backend]
        environment = {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}
        with (
            ours,
            subprocess.Popen(
                line, cwd=ROOT, env=clean_environment(environment), stdout=theirs.fileno()
            ) as process,
        ):
            theirs.close()
            with ours.makefile() as lines:
                assert lines.readline() == "hello\n"
            process.send_signal(signal.SIGINT)
        assert process.returncode == 130


def test_characters_that_cannot_be_encoded_are_escaped(
    server: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setitem(_requests._HANDLERS, "me", answering(id="grüße"))
    done = shell(server, "me", redirect="")
    assert (done.returncode, done.stdout) == (0, "gr\\xfc\\xdfe\n")


def answering(**fields: Any) -> Any:
    """Return a request handler that replies with these fields."""

    async def answer(exchange: object, peer: object, payload: bytes) -> dict[str, Any]:
        return {"status": 200, **fields}

    return answer


class TestControlCharactersInReplies:
    @pytest.fixture(autouse=True)
    def _send_surrogates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def escaped(value: dict[str, Any]) -> bytes:
            # A lone surrogate cannot be encoded in UTF-8, only escaped.
            return json.dumps(value).encode()

        monkeypatch.setattr(_requests, "to_json", escaped)

    def test_keygen(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = answering(key=HOSTILE, channel=f"a/{HOSTILE}/")
        monkeypatch.setitem(_requests._HANDLERS, "keygen", answer)
        done = cli("keygen", "a/")
        assert (done.code, done.output) == (0, f"{SHOWN}\n")
        assert done.error == f"the key is for a/{SHOWN}/"
        shown = cli("keygen", "a/", "--json")
        assert shown.output.isascii()
        assert "\x1b" not in shown.output
        assert json.loads(shown.output)["key"] == HOSTILE

    def test_me(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(_requests._HANDLERS, "me", answering(id=HOSTILE))
        assert cli("me").output == f"{SHOWN}\n"

    def test_link(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = answering(name="a1", channel=f"a/{HOSTILE}/")
        monkeypatch.setitem(_requests._HANDLERS, "link", answer)
        assert cli("link", "a1", "a/").output == f"a1 a/{SHOWN}/\n"

    def test_presence(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = answering(time=0, event="status", channel=f"a/{HOSTILE}/", who=[{"id": HOSTILE}])
        monkeypatch.setitem(_requests._HANDLERS, "presence", answer)
        done = cli("presence", "a/", "--once")
        assert f"{SHOWN} is present  a/{SHOWN}/" in done.output
        done = cli("presence", "a/", "--once", "--json")
        assert json.loads(done.output)["who"][0]["id"] == HOSTILE
        monkeypatch.setitem(
            _requests._HANDLERS,
            "presence",
            answering(time=0, event="status", channel=f"a/{HOSTILE}/", who=[]),
        )
        assert f"no subscribers  a/{SHOWN}/" in cli("presence", "a/", "--once").output


def test_flush_discards_output_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        full.write("x")
        monkeypatch.setattr(sys, "stdout", full)
        flush()
