"""``consume``: the cursor file, restarts and crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emitter_anyio.testing import Broker
from tests.cli.conftest import Cli
from tests.support.background import Background, subscriber
from tests.support.command import ROOT, clean_environment, running


@pytest.fixture
def cursor(tmp_path: Path) -> Path:
    return tmp_path / "cursor"


def unreadable(opening: Any) -> Any:
    """Return a replacement of ``open`` that cannot open descriptors."""

    def replacement(name: Any, *arguments: Any, **options: Any) -> Any:
        if str(name).startswith("/dev/fd/"):
            raise PermissionError(13, "Permission denied")
        return opening(name, *arguments, **options)

    return replacement


def payloads(lines: list[str]) -> list[str]:
    return [json.loads(line)["payload"] for line in lines]


class TestCursor:
    def test_restart_continues_after_the_last_message(
        self, cli: Cli, server: Background, unique: str, backend: str, cursor: Path
    ) -> None:
        for each in ("one", "two", "three"):
            server.publish(unique, each, ttl=60)
        arguments = ["consume", unique, "--cursor", str(cursor), "--backend", backend]
        done = cli(*arguments, "--count", "2")
        assert (done.code, payloads(done.lines), done.errors) == (0, ["one", "two"], "")
        message = json.loads(done.lines[0])
        assert message["channel"] == unique
        assert message["time"].endswith("Z")
        assert message["id"]
        server.publish(unique, "four", ttl=60)
        done = cli(*arguments, "--count", "2")
        assert (done.code, payloads(done.lines), done.errors) == (0, ["three", "four"], "")
        saved = json.loads(cursor.read_text())
        assert saved["channel"] == unique
        assert [path.name for path in cursor.parent.iterdir()] == ["cursor"]

    def test_new_begins_with_the_next_message(
        self, cli: Cli, server: Background, unique: str, backend: str, cursor: Path
    ) -> None:
        server.publish(unique, "old", ttl=60)

        async def publish(broker: Broker) -> None:
            await broker.publish(unique, "new", ttl=60)

        arguments = ["consume", unique, "--cursor", str(cursor), "--new", "--backend", backend]
        done = cli(*arguments, "--timeout", "0.5", "--format", "text")
        assert (done.code, done.output, done.errors) == (0, "", "")
        server.call(lambda: publish(server.broker))
        # The file says where to continue.
        done = cli(*arguments, "--count", "1", "--format", "text")
        assert (done.code, done.output, done.errors) == (0, "new\n", "")

    def test_missing_messages_are_an_error(
        self, cli: Cli, unique: str, backend: str, cursor: Path
    ) -> None:
        arguments = ["consume", unique, "--cursor", str(cursor), "--backend", backend]
        done = cli(*arguments, "--count", "1", "--timeout", "0.1")
        assert done.code == 1
        assert done.error == "received 0 of 1 message within 0.1 s"

    def test_cursor_of_another_channel_is_rejected(
        self, cli: Cli, unique: str, cursor: Path
    ) -> None:
        assert cli("consume", unique, "-c", str(cursor), "-t", "0.1").code == 0
        done = cli("consume", f"{unique}a/", "-c", str(cursor))
        assert done.code == 1
        assert f"cannot use {cursor}: it is the cursor of another channel" in done.error

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"channel": "a/", "cursor": 1}', "[" * 100_000, b"\xff"]
    )
    def test_other_file_is_rejected(
        self, cli: Cli, unique: str, cursor: Path, content: str | bytes
    ) -> None:
        cursor.write_bytes(content if isinstance(content, bytes) else content.encode())
        done = cli("consume", unique, "-c", str(cursor))
        assert done.code == 1
        assert f"cannot read {cursor}: it is not a cursor file" in done.error

    def test_invalid_cursor_is_rejected(self, cli: Cli, unique: str, cursor: Path) -> None:
        cursor.write_text(json.dumps({"channel": unique, "cursor": "1.x"}))
        done = cli("consume", unique, "-c", str(cursor))
        assert done.code == 1
        assert f"cannot use {cursor}: invalid cursor" in done.error

    def test_unreadable_and_unwritable_files_are_reported(
        self, cli: Cli, unique: str, tmp_path: Path
    ) -> None:
        done = cli("consume", unique, "-c", str(tmp_path))
        assert (done.code, done.error) == (1, f"cannot read {tmp_path}: Is a directory")
        name = f"{tmp_path}/no/cursor"
        done = cli("consume", unique, "-c", name)
        assert (done.code, done.error) == (1, f"cannot write {name}: No such file or directory")

    @pytest.mark.parametrize("channel", ["+/a/", "a/#/"])
    def test_channel_without_stored_messages_is_rejected(
        self, cli: Cli, cursor: Path, channel: str
    ) -> None:
        assert cli("consume", channel, "-c", str(cursor)).code == 2


class TestDurability:
    def test_output_is_on_the_disk_before_the_cursor(
        self,
        cli: Cli,
        server: Background,
        unique: str,
        backend: str,
        cursor: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        server.publish(unique, "one", ttl=60)
        events: list[Any] = []
        fsync, replace, write = os.fsync, os.replace, os.write

        def note_fsync(descriptor: int) -> None:
            events.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2][:8])
            fsync(descriptor)

        def note_replace(source: str, target: str) -> None:
            events.append("replace")
            replace(source, target)

        def note_write(descriptor: int, data: bytes) -> int:
            if b"one" in data:
                events.append("write")
            return write(descriptor, data)

        arguments = ["consume", unique, "--cursor", str(cursor), "--backend", backend]
        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "replace", note_replace)
        monkeypatch.setattr(os, "write", note_write)
        assert cli(*arguments, "--count", "1").code == 0
        folder = cursor.parent.name[:8]
        saved = [".cursor-", "replace", folder]
        begin, output = events[:4], events[4:]
        # pytest captures standard output in a file.
        assert begin == [*saved, "write"]
        assert output[1:] == saved
        assert output[0] != ".cursor-"

    def test_previous_cursor_is_kept_if_the_new_one_cannot_be_written(
        self,
        cli: Cli,
        server: Background,
        unique: str,
        backend: str,
        cursor: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        arguments = ["consume", unique, "--cursor", str(cursor), "--backend", backend]
        assert cli(*arguments, "--timeout", "0.1").code == 0
        before = cursor.read_text()

        def fail(source: str, target: str) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        done = cli(*arguments)
        assert (done.code, done.error) == (1, f"cannot write {cursor}: No space left on device")
        assert cursor.read_text() == before
        assert [path.name for path in cursor.parent.iterdir()] == ["cursor"]

    @pytest.mark.parametrize(
        ("before", "options", "after"),
        [
            ("", [], "one\n"),
            ("complete\n", [], "complete\none\n"),
            ("incompl", [], "incompl\none\n"),
            ("incompl", ["--raw"], "incomplone"),
        ],
    )
    def test_incomplete_line_of_a_killed_process_is_ended(
        self,
        server: Background,
        unique: str,
        cursor: Path,
        before: str,
        options: list[str],
        after: str,
        tmp_path: Path,
    ) -> None:
        server.publish(unique, "one", ttl=60)
        (tmp_path / "output").write_text(before)
        arguments = ["consume", unique, "--cursor", str(cursor), "--count=1", "--format=text"]
        with open(tmp_path / "output", "a") as output:
            subprocess.run(
                [sys.executable, "-m", "emitter_anyio", *arguments, *options],
                check=True,
                cwd=ROOT,
                env=clean_environment({"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}),
                stdout=output,
            )
        assert (tmp_path / "output").read_text() == after

    def test_unreadable_output_is_not_ended(
        self, cli: Cli, unique: str, cursor: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        os.write(1, b"incomplete")
        monkeypatch.setattr("builtins.open", unreadable(open))
        assert cli("consume", unique, "-c", str(cursor), "-t", "0.1").output == "incomplete"

    def test_symbolic_link_is_kept(
        self, cli: Cli, unique: str, cursor: Path, tmp_path: Path
    ) -> None:
        cursor.symlink_to(tmp_path / "target")
        assert cli("consume", unique, "-c", str(cursor), "-t", "0.1").code == 0
        assert cursor.is_symlink()
        assert (tmp_path / "target").exists()

    def test_kill_loses_no_message(
        self, server: Background, unique: str, backend: str, cursor: Path
    ) -> None:
        """More messages than the pipe takes, so that the process is killed while it writes."""
        messages = [f"{number} {'x' * 1000}" for number in range(400)]
        for each in messages:
            server.publish(unique, each, ttl=60)
        arguments = ["-m", "emitter_anyio", "consume", unique, "--cursor", str(cursor)]
        arguments += ["--backend", backend, "--format", "text"]
        environment = {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}
        found: list[str] = []
        with running(*arguments, environment=environment) as process:
            assert process.stdout is not None
            while len(found) < 250:
                found.append(process.stdout.readline().removesuffix("\n"))
            process.send_signal(signal.SIGKILL)
            found += process.stdout.read().split("\n")
        killed = len(found)
        assert killed < 400
        with running(*arguments, environment=environment) as process:
            assert process.stdout is not None
            while found[-1] != messages[-1]:
                found.append(process.stdout.readline().removesuffix("\n"))
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
        assert set(messages) <= set(found)
        # At most the messages that were written since the last save are repeated.
        assert len(found) <= len(messages) + 256 + 1
        # The second process has continued, not started again.
        assert messages[0] not in found[1:]

    def test_lost_connection(
        self, server: Background, unique: str, backend: str, cursor: Path
    ) -> None:
        async def drop() -> None:
            await server.broker.drop(subscriber(server.broker))
            await server.broker.publish(unique, "two", ttl=60)

        server.publish(unique, "one", ttl=60)
        arguments = ["-m", "emitter_anyio", "consume", unique, "--cursor", str(cursor)]
        environment = {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}
        with running(*arguments, "--backend", backend, environment=environment) as process:
            assert process.stdout is not None
            assert payloads([process.stdout.readline()]) == ["one"]
            server.call(drop)
            assert payloads([process.stdout.readline()]) == ["two"]
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130

    def test_closing_the_pipe_exits_with_141(
        self, server: Background, unique: str, backend: str, cursor: Path
    ) -> None:
        server.publish(unique, "one", ttl=60)
        arguments = ["-m", "emitter_anyio", "consume", unique, "--cursor", str(cursor)]
        environment = {"EMITTER_URL": server.url, "EMITTER_SECRET": server.secret}
        with running(*arguments, "--backend", backend, environment=environment) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() != ""
            process.stdout.close()
            assert process.wait() == 141
            assert process.stderr.read() == ""
