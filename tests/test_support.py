from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
import trio
import trio.testing

from tests.support.command import clean_environment
from tests.support.leaks import Leaks, running_tasks
from tests.support.secrets import SecretWatcher
from tests.support.server import real_server

LEAKS = 15
"""The number of tests in ``secret_leak_samples.py`` that show a secret."""


def run_bad_tests(name: str) -> set[tuple[str, str]]:
    """Run deliberately bad tests, and return pytest's verdict on each."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA"),
            str(Path(__file__).parent / "support" / name),
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    return {
        (verdict, name)
        for verdict, _, name in (
            line.partition(" - ")[0].replace("::", " ").split()
            for line in run.stdout.splitlines()
            if line.startswith(("PASSED ", "FAILED ", "ERROR ")) and "::" in line
        )
    }


class TestLeaks:
    async def test_leaked_task_is_detected(self) -> None:
        leaks = Leaks()
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever, name="the leaked task")
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(AssertionError, match=r"tasks left behind.*the leaked task"):
                leaks.check()

            group.cancel_scope.cancel()

        leaks.check()

    @pytest.mark.parametrize("anyio_backend", ["trio"])
    async def test_leaked_system_task_is_detected(self) -> None:
        leaks = Leaks()
        stop = trio.Event()
        task = trio.lowlevel.spawn_system_task(stop.wait)
        with pytest.raises(AssertionError, match="tasks left behind"):
            leaks.check()

        stop.set()
        while task in running_tasks():
            await anyio.lowlevel.checkpoint()

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
    async def test_open_socket_is_detected(self) -> None:
        leaks = Leaks()
        with socket.socket(), pytest.raises(AssertionError, match="sockets left open"):
            leaks.check()

        leaks.check()

    def test_leak_fails_the_test_that_caused_it(self) -> None:
        verdicts = run_bad_tests("resource_leak_samples.py")
        both = ("asyncio", "trio")
        assert {verdict for verdict in verdicts if verdict[0] != "PASSED"} == {
            *(("ERROR", f"test_leaking_a_task[{backend}]") for backend in both),
            *(("ERROR", f"test_leaking_a_socket[{backend}]") for backend in both),
            *(("FAILED", f"test_leaking_an_unclosed_stream[{backend}]") for backend in both),
            ("FAILED", "test_blocking_the_event_loop[asyncio]"),
        }


class TestSecrets:
    def test_shown_secret_fails_the_test_that_uses_it(self) -> None:
        verdicts = run_bad_tests("secret_leak_samples.py")
        # The tests pass; the check in their teardown fails.
        failed = {name for verdict, name in verdicts if verdict == "ERROR"}
        assert len(failed) == 2 * LEAKS
        clean = {f"test_without_a_secret[{backend}]" for backend in ("asyncio", "trio")}
        assert {name for verdict, name in verdicts if verdict == "PASSED"} == failed | clean
        assert "FAILED" not in {verdict for verdict, _ in verdicts}

    def test_report_does_not_show_the_secret(self) -> None:
        watcher = SecretWatcher()
        watcher.add_secrets("a-secret-key", "short", None)
        watcher.record("a log line", "subscribed to a-secret-key/a/ with short")
        assert watcher.leaks() == [
            "a log line shows a secret: subscribed to <a secret>/a/ with short"
        ]


class TestServer:
    def test_no_real_server_without_the_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("EMITTER_URL", raising=False)
        monkeypatch.delenv("EMITTER_SECRET", raising=False)
        assert real_server() is None

    @pytest.mark.parametrize(
        ("url", "host", "port", "secure"),
        [
            ("mqtt://127.0.0.1", "127.0.0.1", 8080, False),
            ("mqtt://[::1]:9", "::1", 9, False),
            ("wss://example.org", "example.org", 443, True),
        ],
    )
    def test_real_server_from_the_variables(
        self, monkeypatch: pytest.MonkeyPatch, url: str, host: str, port: int, secure: bool
    ) -> None:
        monkeypatch.setenv("EMITTER_URL", url)
        monkeypatch.setenv("EMITTER_SECRET", "s3cret")
        monkeypatch.delenv("EMITTER_OTHER_URL", raising=False)
        server = real_server()
        assert server is not None
        assert (server.url, server.host, server.port, server.secure) == (url, host, port, secure)
        assert (server.secret, server.other_url, server.broker) == ("s3cret", url, None)
        assert "s3cret" not in repr(server)
        monkeypatch.setenv("EMITTER_OTHER_URL", "mqtt://127.0.0.1:8081")
        server = real_server()
        assert server is not None
        assert server.other_url == "mqtt://127.0.0.1:8081"

    @pytest.mark.parametrize("name", ["EMITTER_URL", "EMITTER_SECRET"])
    def test_one_missing_variable_raises(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv("EMITTER_URL", "mqtt://127.0.0.1")
        monkeypatch.setenv("EMITTER_SECRET", "s3cret")
        monkeypatch.delenv(name)
        with pytest.raises(RuntimeError, match=f"^{name} is not set") as caught:
            real_server()

        assert "s3cret" not in str(caught.value)

    def test_run_with_one_missing_variable_stops(self) -> None:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "emitter"],
            cwd=Path(__file__).parent.parent,
            env=clean_environment({"EMITTER_URL": "mqtt://127.0.0.1", "EMITTER_SECRET": ""}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == pytest.ExitCode.USAGE_ERROR
        assert "EMITTER_SECRET is not set" in run.stderr
