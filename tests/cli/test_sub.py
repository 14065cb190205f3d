"""``sub``: formats, options, lost connections and signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from emitter_anyio import connect
from emitter_anyio.testing import Broker
from tests.cli.conftest import Cli
from tests.support.background import Background, publishing, subscriber
from tests.support.command import ROOT, clean_environment, running
from tests.support.terminal import terminal


class TestFormats:
    def test_text(self, cli: Cli, server: Background, unique: str, backend: str) -> None:
        server.when_subscribed(unique, publishing(unique, "one", b"\xff\x1b"))
        done = cli("sub", unique, "--count", "1", "--backend", backend)
        assert (done.code, done.output, done.errors) == (0, "one\n", "")

    def test_verbose(self, cli: Cli, server: Background, unique: str) -> None:
        server.when_subscribed(unique, publishing(f"{unique}a/", "one", "two"))
        done = cli("sub", unique, "-n", "2", "-v")
        assert done.output == f"{unique}a/ one\n{unique}a/ two\n"

    def test_json(self, cli: Cli, server: Background, unique: str, backend: str) -> None:
        server.when_subscribed(unique, publishing(unique, "öne", b"\xff"))
        done = cli("sub", unique, "--count", "2", "--format", "json", "--backend", backend)
        first, second = map(json.loads, done.lines)
        assert first.pop("time").endswith("Z")
        assert first == {"channel": unique, "payload": "öne"}
        assert second["payload_base64"] == "/w=="

    def test_hex(self, cli: Cli, server: Background, unique: str) -> None:
        server.when_subscribed(unique, publishing(unique, b"\x00\xff"))
        done = cli("sub", unique, "--count", "1", "--format", "hex")
        assert done.output == "00ff\n"

    def test_control_characters_are_escaped_on_a_terminal(
        self, on_terminal: Any, server: Background, unique: str, backend: str
    ) -> None:
        server.when_subscribed(unique, publishing(unique, "a\x1b[2J[b]\u202e"))
        code, screen = on_terminal("sub", unique, "--count", "1", "--backend", backend)
        assert code == 0
        assert f"subscribed to {unique}; press Ctrl-C to stop\n" in screen.text
        assert f"{unique} a\\x1b[2J[b]\\u202e\n" in screen.text
        assert b"\x1b[36m" in screen.raw

    def test_json_on_a_terminal(self, on_terminal: Any, server: Background, unique: str) -> None:
        server.when_subscribed(unique, publishing(unique, b"\xc2\x9b"))
        code, screen = on_terminal("sub", unique, "--count", "1", "--format", "json")
        assert code == 0
        assert '"payload": "\\u009b"' in screen.text

    @pytest.mark.parametrize("without", ["colour", "Rich", "a capable terminal"])
    def test_output_is_plain_on_a_terminal(
        self,
        on_terminal: Any,
        server: Background,
        unique: str,
        without: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if without == "colour":
            monkeypatch.setenv("NO_COLOR", "1")
        elif without == "Rich":
            monkeypatch.setitem(sys.modules, "rich.console", None)
        else:
            monkeypatch.setenv("TERM", "dumb")
        server.when_subscribed(unique, publishing(unique, "hello"))
        code, screen = on_terminal("sub", unique, "--count", "1")
        assert code == 0
        assert f"{unique} hello\r\n".encode() in screen.raw


class TestRaw:
    def test_output_has_exactly_the_bytes(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        server.when_subscribed(unique, publishing(unique, "x" * 60_000, "\x1b\n", "end"))
        done = cli("sub", unique, "--raw", "--count", "3", "--backend", backend)
        assert (done.code, done.output) == (0, "x" * 60_000 + "\x1b\nend")

    def test_on_a_terminal(self, on_terminal: Any, server: Background, unique: str) -> None:
        server.when_subscribed(unique, publishing(unique, "a\x1b[1mb"))
        code, screen = on_terminal("sub", unique, "--raw", "--count", "1")
        assert code == 0
        assert screen.raw.endswith(b"a\x1b[1mb")

    def test_channel_with_raw_is_rejected(self, cli: Cli, unique: str) -> None:
        done = cli("sub", unique, "--raw", "--verbose")
        assert done.code == 2
        assert "not allowed with" in done.error


class TestSeveralChannels:
    def test_messages_of_all_channels_are_printed(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        one, two = f"{unique}1/", f"{unique}2/"
        server.publish(one, "stored", ttl=60)

        async def publish(broker: Broker) -> None:
            await broker.publish(one, "live")
            await broker.publish(f"{two}below/", "live")

        server.when_subscribed(two, publish)
        arguments = ["sub", one, "--last", "1", two, "-v", "--backend", backend]
        done = cli(*arguments, "--count", "3")
        assert (done.code, done.errors) == (0, "")
        assert sorted(done.lines) == [f"{one} live", f"{one} stored", f"{two}below/ live"]

    def test_group(self, cli: Cli, server: Background, unique: str) -> None:
        one, two = f"{unique}1/", f"{unique}2/"
        server.when_subscribed(f"$share/g/{two}", publishing(two, "a job"))
        done = cli("sub", one, two, "--group", "g", "--count", "1")
        assert (done.code, done.output) == (0, "a job\n")

    @pytest.mark.parametrize(("one", "two"), [("", "a/"), ("a/", "a/"), ("+/b/", "a/+/")])
    def test_overlapping_channels_are_rejected(
        self, cli: Cli, unique: str, one: str, two: str
    ) -> None:
        done = cli("sub", f"{unique}{one}", f"{unique}{two}")
        assert done.code == 2
        assert f"cannot print {unique}{one} and {unique}{two} together" in done.error

    def test_refusal_of_the_second_channel(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        key = server.key(f"{unique}1/", "r")
        arguments = ["sub", f"{unique}1/", f"{unique}2/", "--key", key, "--backend", backend]
        done = cli(*arguments)
        assert (done.code, done.output) == (1, "")
        assert f"{unique}2/" in done.error

    def test_refusal_when_the_subscription_is_restored(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        key = server.key(f"{unique}#/", "r")

        async def drop(broker: Broker) -> None:
            async with connect(broker.url) as emitter:
                await emitter.keyban(broker.secret_key, key)
            await broker.drop(subscriber(broker))

        server.when_subscribed(f"{unique}2/", drop)
        arguments = ["sub", f"{unique}1/", f"{unique}2/", "--key", key, "--backend", backend]
        done = cli(*arguments)
        assert (done.code, done.output) == (1, "")
        assert "401" in done.errors


class TestOptions:
    def test_last_and_since_limit_the_replay(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        for number in range(3):
            server.publish(unique, str(number), ttl=60)
        done = cli("sub", unique, "--last", "2", "--since", "1h", "--count", "2")
        assert sorted(done.lines) == ["1", "2"]

    def test_group(self, cli: Cli, server: Background, unique: str, backend: str) -> None:
        server.when_subscribed(f"$share/g/{unique}", publishing(unique, "a job"))
        done = cli("sub", unique, "--group", "g", "--count", "1", "--backend", backend)
        assert (done.code, done.output) == (0, "a job\n")

    @pytest.mark.parametrize("command", ["sub", "presence"])
    def test_hash_is_rejected_with_the_parent_channel(
        self, cli: Cli, unique: str, command: str
    ) -> None:
        done = cli(command, f"{unique}#")
        assert done.code == 2
        assert f"use {unique}, which" in done.error
        assert "--matcher mqtt" in done.error

    def test_group_with_replay_is_rejected(self, cli: Cli, unique: str) -> None:
        done = cli("sub", unique, "--group", "g", "--last", "1")
        assert done.code == 2
        assert "group" in done.error

    def test_wildcard(self, cli: Cli, server: Background, unique: str) -> None:
        server.when_subscribed(unique, publishing(f"{unique}a/", "hello"))
        done = cli("sub", f"{unique}+/", "--count", "1", "--matcher", "emitter")
        assert (done.code, done.output) == (0, "hello\n")

    def test_many_messages_are_printed_in_order(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        numbers = [str(number) for number in range(3000)]
        server.when_subscribed(unique, publishing(unique, *numbers))
        done = cli("sub", unique, "--count", "2500", "--backend", backend)
        assert (done.code, done.errors, done.lines) == (0, "", numbers[:2500])

    def test_timeout(self, cli: Cli, unique: str, backend: str) -> None:
        assert cli("sub", unique, "--timeout", "0", "--backend", backend).code == 0
        done = cli("sub", unique, "--timeout", "0", "--count", "3", "--backend", backend)
        assert done.code == 1
        assert "0 of 3 messages" in done.error

    def test_refusal_names_the_missing_permission(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        done = cli("sub", unique, "--key", server.key(unique, "w"))
        assert done.code == 1
        assert "'r' (read)" in done.error


class TestReplay:
    @pytest.mark.parametrize("option", [["--last", "2"], ["--since", "1h"]])
    def test_key_without_permission_l_is_reported(
        self, cli: Cli, server: Background, unique: str, option: list[str], backend: str
    ) -> None:
        key = server.key(unique, "r")
        done = cli("sub", unique, *option, "--key", key, "--backend", backend)
        assert (done.code, done.output) == (1, "")
        assert "lacks permission l" in done.error
        assert done.error.endswith("; the key is from --key")
        done = cli("sub", unique, "--resume", "--key", key, "--backend", backend)
        assert done.code == 1
        assert "'l' (load)" in done.error

    @pytest.mark.parametrize("channel", ["{}", "{}+/", "+/{}"])
    def test_key_with_permission_l_is_accepted(
        self, cli: Cli, server: Background, unique: str, channel: str
    ) -> None:
        channel = channel.format(unique)
        key = server.key("#/" if channel[0] == "+" else f"{unique}#/", "rl")
        done = cli("sub", channel, "--last", "2", "--timeout", "0", "--key", key)
        assert (done.code, done.errors) == (0, "")

    def test_no_replay_requires_no_permission(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        key = server.key(unique, "r")
        for option in ([], ["--last", "0"]):
            assert cli("sub", unique, *option, "--timeout", "0", "--key", key).code == 0


class TestStats:
    def test_total_is_printed_at_the_end(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        server.when_subscribed(unique, publishing(unique, *["hello"] * 1000))
        done = cli("sub", unique, "--stats", "--count", "1000", "--backend", backend)
        assert done.code == 0
        assert re.match(r"total   1,000 messages in \d.* s  [\d,]+/s  [\d.,]+ MB/s", done.lines[-1])

    def test_each_period_is_printed(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        done = cli(
            # Long enough for a period to end on a busy machine.
            *("sub", unique, "--stats=0.01", "--timeout=1", "--format=json"),
            *("--backend", backend),
        )
        assert done.code == 0
        *periods, total = map(json.loads, done.lines)
        assert {line["span"] for line in periods} == {"period"}
        assert (total["span"], total["messages"], total["bytes"]) == ("total", 0, 0)


class TestLostConnection:
    def test_reconnection_and_gap_are_noted(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        async def drop(broker: Broker) -> None:
            await broker.drop(subscriber(broker))

        server.when_subscribed(unique, drop, publishing(unique, "hello"))
        done = cli("sub", unique, "--count", "1", "--backend", backend)
        assert (done.code, done.output) == (0, "hello\n")
        lost, *others = done.errors.splitlines()
        assert server.url in lost
        assert any(server.url in line for line in others)
        assert any("missing" in line for line in others)

    def test_resume_prints_stored_messages(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        async def drop(broker: Broker) -> None:
            await broker.drop(subscriber(broker))
            await broker.publish(unique, "stored", ttl=60)

        server.when_subscribed(unique, drop, publishing(unique, "after"))
        done = cli(
            *("sub", unique, "--resume", "--count", "2", "--format", "json"), "--backend", backend
        )
        assert done.code == 0
        first, second = map(json.loads, done.lines)
        assert (first["payload"], first["replayed"]) == ("stored", True)
        assert second["payload"] == "after"
        assert "resumed with 1 stored message\n" in done.errors


def environment(server: Background) -> dict[str, str]:
    return {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}


class TestProcess:
    def test_lines_are_flushed_and_ctrl_c_exits_with_130(
        self, server: Background, unique: str, backend: str
    ) -> None:
        server.when_subscribed(unique, publishing(unique, "hello"))
        arguments = ["-m", "emitter_anyio", "sub", unique, "--backend", backend]
        with running(*arguments, environment=environment(server)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "hello\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate() == ("", "")
        assert process.returncode == 130

    def test_ctrl_c_prints_the_total(self, server: Background, unique: str, backend: str) -> None:
        server.when_subscribed(unique, publishing(unique, "hello"))
        arguments = ["sub", unique, "--stats=0.01", "--backend", backend]
        with running("-m", "emitter_anyio", *arguments, environment=environment(server)) as process:
            assert process.stdout is not None
            while "  1 message " not in process.stdout.readline():
                pass
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate()
        assert output.splitlines()[-1].startswith("total   1 message ")
        assert (errors, process.returncode) == ("", 130)

    def test_closing_the_pipe_exits_with_141(
        self, server: Background, unique: str, backend: str
    ) -> None:
        for _ in range(2):
            server.publish(unique, "x" * 30000, ttl=60)
        arguments = ["-m", "emitter_anyio", "sub", unique, "--last=2", "--backend", backend]
        with running(*arguments, environment=environment(server)) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 141

    def test_head_ends_the_command_without_a_message(
        self, server: Background, unique: str, backend: str
    ) -> None:
        server.when_subscribed(unique, publishing(unique, *map(str, range(1000))))
        sub = f'"{sys.executable}" -W error -m emitter_anyio sub {unique} --backend {backend}'
        done = subprocess.run(
            ["sh", "-c", f"({sub}; echo $? >&2) | head -n 1"],
            check=True,
            cwd=ROOT,
            env=clean_environment(environment(server)),
            capture_output=True,
        )
        assert (done.stdout, done.stderr) == (b"0\n", b"141\n")

    def test_ctrl_c_on_a_terminal_exits_with_130(
        self, server: Background, unique: str, backend: str
    ) -> None:
        server.when_subscribed(unique, publishing(unique, "hello"))
        with terminal() as screen:
            process = screen.start(
                *("-m", "emitter_anyio", "sub", unique, "--backend", backend),
                **environment(server),
            )
            screen.wait_for(f"{unique} hello\n")
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
            screen.close_program_side()
        assert "Traceback" not in screen.text

    def test_closed_port_is_reported(self, cli: Cli, unique: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        done = cli("sub", unique, "--url", f"mqtt://127.0.0.1:{port}")
        assert (done.code, done.output) == (1, "")
        assert "connect" in done.error
