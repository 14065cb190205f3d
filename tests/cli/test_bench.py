"""``bench``: its processes, what they measure, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from emitter_anyio import connect
from emitter_anyio._cli import _bench
from emitter_anyio.testing import Broker
from tests.cli.conftest import Cli, Done
from tests.support.background import Background
from tests.support.command import ROOT, clean_environment, running
from tests.support.terminal import terminal

SETTINGS = {"benchmark", "connections", "processes", "rate", "interrupted"}
RESULTS = {"seconds", "latency_ms", "failed", "lost", "duplicates", "reordered"}
MESSAGES = {"size", "qos", "messages", "messages_per_second", "bytes_per_second"}


@pytest.fixture
def bench(cli: Cli, server: Background, unique: str) -> Any:
    """Return a function that runs ``bench`` for 0.2 seconds."""

    def run(what: str, *arguments: str, url: str = server.url, key: str | None = None) -> Done:
        common = ["--url", url, "--channel", unique, "--seconds", "0.2"]
        return cli("bench", what, *common, *arguments, *(() if key is None else ("--key", key)))

    return run


class TestResults:
    @pytest.mark.parametrize(
        ("what", "more", "fields"),
        [
            ("pub", ["--qos", "0"], MESSAGES),
            ("pub", ["--qos", "1"], MESSAGES),
            ("sub", [], MESSAGES | {"published"}),
            ("rtt", [], MESSAGES),
            ("rtt", ["--qos", "1"], MESSAGES),
            ("connect", [], {"connects", "connects_per_second"}),
        ],
    )
    def test_json(
        self, bench: Any, backend: str, what: str, more: list[str], fields: set[str]
    ) -> None:
        done = bench(what, "--json", "--backend", backend, *more)
        assert (done.code, done.errors) == (0, "")
        result = json.loads(done.output)
        assert set(result) == SETTINGS | RESULTS | fields
        assert (result["benchmark"], result["interrupted"]) == (what, False)
        assert (result["failed"], result["lost"], result["duplicates"]) == (0, 0, 0)
        count = result["connects" if what == "connect" else "messages"]
        rate = result[f"{'connects' if what == 'connect' else 'messages'}_per_second"]
        assert count > 0
        assert rate == pytest.approx(count / result["seconds"], rel=0.02)
        latency = result["latency_ms"]
        if latency is not None or (what, more) != ("pub", ["--qos", "0"]):
            assert latency is not None
            assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]

    @pytest.mark.parametrize(
        ("what", "names"),
        [
            ("pub", ["messages", "latency", "failed"]),
            ("sub", ["messages", "published", "latency", "lost", "duplicates", "reordered"]),
            ("rtt", ["messages", "latency", "lost", "duplicates", "reordered"]),
            ("connect", ["connects", "latency", "failed"]),
        ],
    )
    def test_text(self, bench: Any, what: str, names: list[str]) -> None:
        more = ["--qos", "1"] if what == "pub" else []
        title, *lines = bench(what, *more).lines
        assert title.startswith(f"bench {what}: 1 connection in 1 process")
        assert (", 64 bytes, QoS" in title) == (what != "connect")
        assert [line.split()[0] for line in lines] == names
        assert "/s" in lines[0]

    def test_processes_share_the_connections(self, bench: Any, backend: str) -> None:
        more = ["--connections", "3", "--processes", "2", "--publishers", "2", "--size", "24"]
        done = bench("sub", *more, "--rate", "200", "--json", "--backend", backend)
        result = json.loads(done.output)
        assert result["published"] > 0
        assert result["messages"] == 3 * result["published"]
        assert (result["connections"], result["processes"], result["rate"]) == (3, 2, 200)

    def test_processes_without_a_connection_are_not_started(self, bench: Any) -> None:
        assert bench("pub", "--processes", "3").lines[0].startswith("bench pub: 1 connection in 1 ")

    @pytest.mark.parametrize(
        ("what", "more"), [("pub", []), ("pub", ["--qos", "1"]), ("rtt", []), ("connect", [])]
    )
    def test_rate_limits_the_messages(
        self, bench: Any, backend: str, what: str, more: list[str]
    ) -> None:
        done = bench(what, "--rate", "0.01", "--json", "--backend", backend, *more)
        result = json.loads(done.output)
        assert result["connects" if what == "connect" else "messages"] == 1

    def test_messages_of_other_runs_are_ignored(
        self, server: Background, bench: Any, unique: str
    ) -> None:
        async def disturb(broker: Broker) -> None:
            await broker.publish(unique, "short")
            await broker.publish(unique, bytes(64))

        server.when_subscribed(unique, disturb)
        result = json.loads(bench("sub", "--rate", "50", "--json").output)
        assert result["messages"] == result["published"]


class TestLosses:
    def test_lost_messages_are_counted(self, server: Background, bench: Any, backend: str) -> None:
        with server.broker.lose("message"):
            done = bench("sub", "--json", "--timeout", "0.1", "--backend", backend)
        result = json.loads(done.output)
        assert (done.code, result["messages"]) == (0, 0)
        assert result["lost"] == result["published"] > 0

    def test_lost_round_trip(self, server: Background, bench: Any) -> None:
        with server.broker.lose("message"):
            result = json.loads(bench("rtt", "--json", "--timeout", "0.15").output)
        assert (result["messages"], result["lost"]) == (0, 2)

    def test_late_message_is_not_taken_for_a_later_one(
        self, server: Background, bench: Any, unique: str, backend: str
    ) -> None:
        async def delay(broker: Broker) -> None:
            # Until the first message has been counted as lost.
            with broker.hold("message"):
                await anyio.sleep(0.5)

        server.when_subscribed(unique, delay)
        done = bench("rtt", "--json", "--timeout", "0.4", "--seconds", "0.6", "--backend", backend)
        result = json.loads(done.output)
        assert result["lost"] >= 1
        assert result["messages"] > 0
        assert result["latency_ms"]["max"] < 400

    def test_unacknowledged_messages_fail(self, bench: Any, server: Background) -> None:
        with server.broker.lose("puback"):
            done = bench("pub", "--qos", "1", "--in-flight", "2", "--timeout", "0.1", "--json")
        result = json.loads(done.output)
        assert (result["messages"], result["latency_ms"]) == (0, None)
        assert result["failed"] >= 2


class TestErrors:
    @pytest.mark.parametrize("what", ["pub", "sub", "rtt", "connect"])
    def test_broker_must_be_named(self, cli: Cli, what: str) -> None:
        done = cli("bench", what)
        assert (done.code, done.output) == (2, "")
        assert "bench requires --url, because it can overload a broker" in done.error

    def test_help_names_no_default_broker(self, cli: Cli) -> None:
        help = cli("bench", "--help").output
        assert "broker to measure (required)" in help
        assert "EMITTER_URL, else" not in help

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--size", "23", "expected an integer from 24 to 65536"),
            ("--size", "65537", "expected an integer from 24 to 65536"),
            ("--seconds", "0", "expected more than 0 seconds"),
            ("--rate", "0", "expected more than 0"),
            ("--connections", "0", "expected an integer of at least 1"),
            ("--qos", "2", "invalid choice"),
        ],
    )
    def test_invalid_option(self, bench: Any, option: str, value: str, message: str) -> None:
        done = bench("pub", option, value)
        assert done.code == 2
        assert message in done.error

    def test_refused_publish(self, server: Background, bench: Any, unique: str) -> None:
        for qos in "01":
            done = bench("pub", "--qos", qos, "--seconds", "60", key=server.key(unique, "r"))
            assert done.code == 1
            assert "401" in done.error

    def test_refused_subscription(self, server: Background, bench: Any, unique: str) -> None:
        done = bench("sub", key=server.key(unique, "w"))
        assert (done.code, done.output) == (1, "")
        assert "'r' (read)" in done.error

    def test_too_large_message(self, bench: Any) -> None:
        done = bench("pub", "--size", "65536", "--seconds", "60")
        assert done.code == 1
        assert "the message is too large" in done.error

    @pytest.mark.parametrize("what", ["pub", "connect"])
    def test_unreachable_broker(self, bench: Any, what: str) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            done = bench(what, url=f"mqtt://127.0.0.1:{unused.getsockname()[1]}")
        assert done.code == 1
        assert "Connection refused" in done.error

    def test_lost_connection_ends_it_with_the_results_until_then(
        self, server: Background, bench: Any, unique: str, backend: str
    ) -> None:
        async def drop(broker: Broker) -> None:
            (client,) = [each for each in broker.clients if unique in each.subscriptions]
            # A message of the benchmark shows that the measurement has begun.
            async with connect(broker.url) as emitter:
                async with emitter.subscribe(broker.keygen(unique, "r"), unique) as messages:
                    await messages.receive()
            await broker.drop(client)

        server.when_subscribed(unique, drop)
        done = bench("sub", "--rate", "100", "--seconds", "60", "--backend", backend)
        assert done.code == 1
        assert done.lines[0].startswith("bench sub: ")
        assert "connection" in done.error

    def test_process_that_cannot_read_a_file(
        self, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_plan, missing = _bench._plan, str(tmp_path / "missing")

        def plan(*arguments: Any) -> list[dict[str, Any]]:
            return [{**each, "password_file": missing} for each in make_plan(*arguments)]

        monkeypatch.setattr(_bench, "_plan", plan)
        done = bench("pub")
        assert (done.code, done.output) == (1, "")
        assert done.error == f"cannot read {missing}: No such file or directory"

    def test_failing_process(
        self, bench: Any, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_bench, "_PROGRAM", "")
        done = bench("pub", "--backend", backend)
        assert (done.code, done.output) == (1, "")
        assert done.error == "a process of the benchmark ended with exit code 0"


class TestEnd:
    @pytest.mark.parametrize(("ending", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_signal_prints_what_was_measured(
        self, server: Background, unique: str, backend: str, ending: signal.Signals, code: int
    ) -> None:
        arguments = ["bench", "sub", "--no-publish", "--url", server.url, "--channel", unique]
        more = ["--json", "--seconds", "60", "--backend", backend]
        environment = {"EMITTER_SECRET": server.secret}
        subscribed = threading.Event()

        async def note(broker: Broker) -> None:
            subscribed.set()

        server.when_subscribed(unique, note)
        with running("-m", "emitter_anyio", *arguments, *more, environment=environment) as process:
            subscribed.wait()
            published = subprocess.run(
                [
                    *(sys.executable, "-m", "emitter_anyio", "bench", "pub", "--json"),
                    *("--url", server.url, "--channel", unique),
                    *("--rate", "100", "--seconds", "0.2"),
                ],
                cwd=ROOT,
                env=clean_environment(environment),
                check=True,
                capture_output=True,
            )
            process.send_signal(ending)
            output, errors = process.communicate()
        assert (process.returncode, errors) == (code, "")
        result = json.loads(output)
        assert result["interrupted"]
        assert result["messages"] == json.loads(published.stdout)["messages"] > 0
        assert (result["lost"], "published" in result) == (0, False)

    @pytest.mark.parametrize("closed", ["stdin", "stdout"])
    def test_process_ends_with_the_one_that_started_it(
        self, server: Background, unique: str, backend: str, closed: str
    ) -> None:
        arguments = {
            "role": "pub",
            "numbers": [0],
            "run_id": "00000000",
            "connection_rate": 0,
            "key": server.key(unique, "w"),
            "channel": unique,
            "url": server.url,
            "size": 64,
            "qos": 0,
            "env_file": None,
            "username": None,
            "password_file": None,
            "cafile": None,
            "client_cert": None,
            "client_key": None,
        }
        with subprocess.Popen(
            [sys.executable, "-c", _bench._PROGRAM, backend],
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            if closed == "stdout":
                process.stdout.close()
            print(json.dumps(arguments), file=process.stdin, flush=True)
            if closed == "stdin":
                assert process.stdout.readline() == "ready\n"
                process.stdin.close()
            assert (process.wait(), process.stderr.read()) == (0, "")

    @pytest.mark.parametrize("rich", [True, False])
    def test_terminal_shows_a_progress_bar(
        self, server: Background, unique: str, backend: str, rich: bool
    ) -> None:
        hide = "" if rich else "sys.modules['rich.console'] = None; "
        program = f"import sys; {hide}from emitter_anyio._cli import main; sys.exit(main())"
        arguments = ["bench", "pub", "--url", server.url, "--channel", unique, "--seconds", "1.5"]
        with terminal() as screen:
            process = screen.start(
                *("-c", program, *arguments, "--backend", backend),
                EMITTER_SECRET=server.secret,
                TERM="xterm",
            )
            assert process.wait() == 0
            screen.close_program_side()
        assert ("1/2" in screen.text) == rich
        assert "bench pub: 1 connection in 1 process, 64 bytes, QoS 0\n" in screen.text
