"""``presence``, as lines, as JSON and as a board."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest
from anyio.abc import TaskStatus

from emitter_anyio import connect
from tests.cli.conftest import Cli
from tests.support.background import Background
from tests.support.command import ROOT, running
from tests.support.terminal import terminal


@contextmanager
def there(place: Background, channel: str, name: str | None) -> Iterator[None]:
    """Have somebody be there."""
    options = {} if name is None else {"username": name}

    async def be(*, task_status: TaskStatus[None]) -> None:
        async with connect(place.url, **options) as emitter:
            async with emitter.subscribe(place.key(channel, "r"), channel, last=0):
                task_status.started()
                await anyio.sleep_forever()

    leave = place.start(be)
    try:
        yield
    finally:
        leave()


class TestOnce:
    def test_lines(self, cli: Cli, place: Background, unique: str, backend: str) -> None:
        with there(place, unique, "an\x1bn"):
            done = cli("presence", unique, "--once", "--backend", backend)
        assert (done.code, done.errors) == (0, "")
        assert done.output[8:] == f"  an\\x1bn is here  {unique}\n"

    def test_nobody(self, cli: Cli, unique: str) -> None:
        done = cli("presence", unique, "--once")
        assert done.output[8:] == f"  nobody is here  {unique}\n"

    def test_json(self, cli: Cli, place: Background, unique: str) -> None:
        with there(place, unique, None):
            done = cli("presence", unique, "--once", "--json")
        told = json.loads(done.output)
        assert (told["event"], told["channel"]) == ("status", unique)
        assert [(len(who["id"]), who["username"]) for who in told["who"]] == [(26, None)]

    def test_refused(self, cli: Cli, place: Background, unique: str) -> None:
        done = cli("presence", unique, "--key", place.key(unique, "r"))
        assert done.code == 1
        assert "'p' (presence)" in done.error


def environment(place: Background) -> dict[str, str]:
    return {"EMITTER_URL": place.url, "EMITTER_SECRET": place.secret, "TERM": "xterm"}


class TestChanges:
    @pytest.mark.parametrize("as_json", [False, True])
    def test_in_a_pipe(self, place: Background, unique: str, backend: str, as_json: bool) -> None:
        more = ["--json"] if as_json else []
        arguments = ["presence", unique, "--backend", backend, *more]
        with running("-m", "emitter_anyio", *arguments, environment=environment(place)) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]
            with there(place, unique, "ann"):
                lines.append(process.stdout.readline())
            lines.append(process.stdout.readline())
            process.send_signal(signal.SIGINT)
            assert process.communicate() == ("", "")
        assert process.returncode == 130
        if as_json:
            told = [json.loads(line) for line in lines]
            assert [each["event"] for each in told] == ["status", "subscribe", "unsubscribe"]
            assert told[1]["who"][0]["username"] == "ann"
        else:
            assert [line[10:].split("  ")[0] for line in lines] == [
                "nobody is here",
                "ann has come",
                "ann has left",
            ]

    @pytest.mark.parametrize("rich", [True, False])
    def test_on_a_terminal(self, place: Background, unique: str, backend: str, rich: bool) -> None:
        hide = "" if rich else "sys.modules['rich.console'] = None; "
        program = f"import sys; {hide}from emitter_anyio._cli import main; sys.exit(main())"
        with terminal() as screen:
            process = subprocess.Popen(
                [sys.executable, "-c", program, "presence", unique, "--backend", backend],
                cwd=ROOT,
                env={**os.environ, **environment(place)},
                stdin=screen.program_fd,
                stdout=screen.program_fd,
                stderr=screen.program_fd,
                start_new_session=True,
            )
            screen.wait_for("0 here" if rich else "nobody is here")
            with there(place, unique, "ann"):
                screen.wait_for("ann has come")
            screen.wait_for("ann has left")
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
            screen.close_program_side()
        assert "Traceback" not in screen.text
        if rich:
            assert "1 here" in screen.text
            # The cursor is back.
            assert screen.raw.rindex(b"\x1b[?25h") > screen.raw.rindex(b"\x1b[?25l")
