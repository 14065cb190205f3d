"""``presence``: lines, JSON and the live table."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest
from anyio.abc import TaskStatus

from emitter_anyio import ConnectOptions, connect
from tests.cli.conftest import Cli
from tests.support.background import Background
from tests.support.command import running
from tests.support.terminal import terminal


@contextmanager
def subscribed(server: Background, channel: str, name: str | None) -> Iterator[None]:
    """Keep a client with this user name subscribed to a channel."""
    options: ConnectOptions = {} if name is None else {"username": name}

    async def stay(*, task_status: TaskStatus[None]) -> None:
        async with connect(server.url, **options) as emitter:
            async with emitter.subscribe(server.key(channel, "r"), channel, last=0):
                task_status.started()
                await anyio.sleep_forever()

    leave = server.start(stay)
    try:
        yield
    finally:
        leave()


class TestOnce:
    def test_text(self, cli: Cli, server: Background, unique: str, backend: str) -> None:
        with subscribed(server, unique, "an\x1bn"):
            done = cli("presence", unique, "--once", "--backend", backend)
        assert (done.code, done.errors) == (0, "")
        assert done.output[8:] == f"  an\\x1bn is present  {unique}\n"

    def test_no_subscribers(self, cli: Cli, unique: str) -> None:
        done = cli("presence", unique, "--once")
        assert done.output[8:] == f"  no subscribers  {unique}\n"

    def test_json(self, cli: Cli, server: Background, unique: str) -> None:
        with subscribed(server, unique, None):
            done = cli("presence", unique, "--once", "--json")
        event = json.loads(done.output)
        assert (event["event"], event["channel"]) == ("status", unique)
        assert [(len(who["id"]), who["username"]) for who in event["who"]] == [(26, None)]

    def test_refusal_names_the_missing_permission(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        done = cli("presence", unique, "--key", server.key(unique, "r"))
        assert done.code == 1
        assert "'p' (presence)" in done.error


def environment(server: Background) -> dict[str, str]:
    return {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret, "TERM": "xterm"}


class TestChanges:
    @pytest.mark.parametrize("as_json", [False, True])
    def test_changes_are_printed_to_a_pipe(
        self, server: Background, unique: str, backend: str, as_json: bool
    ) -> None:
        more = ["--json"] if as_json else []
        arguments = ["presence", unique, "--backend", backend, *more]
        with running("-m", "emitter_anyio", *arguments, environment=environment(server)) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]
            with subscribed(server, unique, "ann"):
                lines.append(process.stdout.readline())
            lines.append(process.stdout.readline())
            process.send_signal(signal.SIGINT)
            assert process.communicate() == ("", "")
        assert process.returncode == 130
        if as_json:
            events = [json.loads(line) for line in lines]
            assert [each["event"] for each in events] == ["status", "subscribe", "unsubscribe"]
            assert events[1]["who"][0]["username"] == "ann"
        else:
            assert [line[10:].split("  ")[0] for line in lines] == [
                "no subscribers",
                "ann joined",
                "ann left",
            ]

    @pytest.mark.parametrize("rich", [True, False])
    def test_changes_are_shown_on_a_terminal(
        self, server: Background, unique: str, backend: str, rich: bool
    ) -> None:
        hide = "" if rich else "sys.modules['rich.console'] = None; "
        program = f"import sys; {hide}from emitter_anyio._cli import main; sys.exit(main())"
        with terminal() as screen:
            process = screen.start(
                *("-c", program, "presence", unique, "--backend", backend), **environment(server)
            )
            screen.wait_for("0 present" if rich else "no subscribers")
            with subscribed(server, unique, "ann"):
                screen.wait_for("ann joined")
            screen.wait_for("ann left")
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
            screen.close_program_side()
        assert "Traceback" not in screen.text
        if rich:
            assert "1 present" in screen.text
            # The cursor is shown again at the end.
            assert screen.raw.rindex(b"\x1b[?25h") > screen.raw.rindex(b"\x1b[?25l")
