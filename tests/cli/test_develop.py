"""``demo``, ``broker`` and ``license``, and errors in the command line."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

import emitter_anyio
from emitter_anyio import Gap, connect
from emitter_anyio._cli import _demo, main
from emitter_anyio._cli._arguments import CommandError, duration, moment, ttl
from emitter_anyio._cli._commands import COMMANDS
from emitter_anyio.testing._keys import License
from tests.cli.conftest import Cli
from tests.support import tls
from tests.support.command import run, running

BACKENDS = ["asyncio", "trio"]
DEMO_STEPS = [
    *["connect", "keygen", "publish", "publish", "subscribe", "message", "message"],
    *["publish", "message", "presence", "cut", "presence", "publish", "publish"],
    *["reconnect", "resume", "message", "message", "presence", "flush", "disconnect", "next"],
]
SECRET = re.compile(r"[-_0-9A-Za-z]{32}")
"""Matches a channel key or a secret key. A licence is longer."""


CONNECT = bytes.fromhex("100c00044d5154540402000a0000")
CONNACK = bytes.fromhex("20020000")


@contextmanager
def broker(
    *arguments: str, stop: signal.Signals = signal.SIGINT
) -> Iterator[tuple[str, str, str | None]]:
    """Run the command ``broker`` on a free port, and yield its URL, licence and secret key."""
    command = ["-m", "emitter_anyio", "broker", "--port", "0", *arguments]
    with running(*command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline()
        license = process.stdout.readline()
        scheme = "mqtts" if "--tls-cert" in arguments else "mqtt"
        assert url.startswith(f"listening on {scheme}://127.0.0.1:")
        assert license.startswith("license ")
        secret = None
        if "--license" not in arguments:
            line = process.stdout.readline()
            assert line.startswith("secret key ")
            secret = line.split()[2]
        yield url.split()[2], license.split()[1], secret
        process.send_signal(stop)
        assert process.stderr.read() == ""
        assert process.stdout.read() == ""
        assert process.wait() == 0


def demo(*arguments: str, secret: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {} if secret is None else {"EMITTER_SECRET": secret}
    return run("-m", "emitter_anyio", "demo", *arguments, environment=environment)


def first_words(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines()]


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.startswith("emitter-anyio: ")
    return line


class TestDemo:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_each_step_prints_a_line(self, backend: str) -> None:
        done = demo("--backend", backend)
        assert done.stderr == ""
        assert done.returncode == 0
        assert first_words(done.stdout) == ["backend", "broker", *DEMO_STEPS]
        columns = {len(what) for what in re.findall(r"^\w+ +", done.stdout, re.MULTILINE)}
        assert len(columns) == 1
        messages = re.findall(
            r"^message +ann: '(.*)' on demo/\w+/, (.*)$", done.stdout, re.MULTILINE
        )
        assert {text for text, how in messages if how == "replayed"} == {
            "the kettle is on",
            "tea is ready",
        }
        assert messages[2:] == [
            ('{"cups":1}', "live"),
            ("the cake is ready", "resumed"),
            ("there is jam", "resumed"),
        ]
        assert "ann has missed nothing: 2 stored messages follow\n" in done.stdout
        assert re.findall(r"^presence +(.*)$", done.stdout, re.MULTILINE) == [
            "ann is present",
            "ann left",
            "ann joined",
        ]
        assert not SECRET.search(done.stdout)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_first_and_last_lines_show_what_runs_and_what_to_run_next(self, backend: str) -> None:
        first, *_, last = demo("--backend", backend).stdout.splitlines()
        assert re.match(f"backend +{backend}, on Python 3", first, re.IGNORECASE)
        assert re.match("next +python -m emitter_anyio broker ", last)

    @pytest.mark.parametrize("without", ["nothing", "Rich"])
    def test_steps_are_coloured_on_a_terminal_with_rich(
        self, on_terminal: Any, without: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if without == "Rich":
            monkeypatch.setitem(sys.modules, "rich.console", None)
        code, screen = on_terminal("demo")
        assert code == 0
        assert first_words(screen.text) == ["backend", "broker", *DEMO_STEPS]
        assert (b"\x1b[" in screen.raw) == (without == "nothing")

    def test_lost_messages_are_an_error(self) -> None:
        with pytest.raises(CommandError, match="the node restarted"):
            _demo._Demo()._show(Gap("demo/", reason="the node restarted"), "resumed")

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_url_selects_a_running_broker(self, backend: str) -> None:
        with broker() as (url, _, secret):
            by_flag = demo("--backend", backend, "--url", url, f"--secret={secret}")
            by_environment = demo("--backend", backend, "--url", url, secret=secret)
        for done in (by_flag, by_environment):
            assert done.stderr == ""
            assert done.returncode == 0
            assert first_words(done.stdout) == ["backend", *DEMO_STEPS]
            assert f"emitter_anyio doctor --url {url}" in done.stdout.splitlines()[-1]

    def test_user_name_in_the_url_takes_precedence(self) -> None:
        with broker() as (url, _, secret):
            done = demo("--url", url.replace("//", "//carol:hush@"), secret=secret)
        assert done.returncode == 0
        assert first_words(done.stdout) == ["backend", *DEMO_STEPS]
        assert "carol is present\n" in done.stdout
        assert "hush" not in done.stdout

    def test_connection_refused_is_reported_in_one_line(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        done = demo("--url", f"mqtt://127.0.0.1:{port}", secret="x")
        assert (done.returncode, first_words(done.stdout)) == (1, ["backend"])
        line = only_line(done.stderr)
        assert f"mqtt://127.0.0.1:{port}" in line
        assert line.endswith("without --url, the demo starts a broker")

    def test_lost_connection_is_reported_in_one_line(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
            with running("-m", "emitter_anyio", "demo", "--url", url, "--secret=x") as process:
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(1024)
                    connection.sendall(CONNACK)
                    assert connection.recv(1024)
                output, errors = process.communicate()
        assert process.returncode == 1
        assert first_words(output) == ["backend", "connect"]
        assert "lost the connection to" in only_line(errors)

    def test_wrong_secret_is_not_printed(self) -> None:
        wrong = "a" * 32
        with broker() as (url, _, _):
            done = demo("--url", url, secret=wrong)
        assert done.returncode == 1
        # One of 256 licences decrypts it to a secret key of another contract, which is a 404.
        assert re.search("40[14]", only_line(done.stderr))
        assert wrong not in done.stderr

    def test_timeout_is_reported(self) -> None:
        done = demo("--timeout", "0")
        assert done.returncode == 1
        assert " 0 s" in only_line(done.stderr)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_ctrl_c_exits_with_130(self, backend: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
            arguments = ["--backend", backend, "--url", url, "--secret", "x"]
            with running("-m", "emitter_anyio", "demo", *arguments) as process:
                connection, _ = listener.accept()
                with connection:
                    # The demo has sent CONNECT and waits for CONNACK.
                    assert connection.recv(1)
                    process.send_signal(signal.SIGINT)
                    output, errors = process.communicate()
        assert (process.returncode, errors) == (128 + signal.SIGINT, "")
        assert first_words(output) == ["backend"]

    def test_closed_pipe_exits_with_141(self) -> None:
        with running("-m", "emitter_anyio", "demo") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 128 + 13


class TestBroker:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
    def test_prints_url_and_keys_and_exits_on_a_signal(
        self, backend: str, stop: signal.Signals
    ) -> None:
        with broker("--backend", backend, stop=stop) as (url, license, secret):
            host, port = url.removeprefix("mqtt://").split(":")
            with socket.create_connection((host, int(port))):
                pass
            assert license.endswith(":3")
            assert secret is not None
            assert SECRET.fullmatch(secret)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_stopping_disconnects_a_client(self, backend: str) -> None:
        with broker("--backend", backend) as (url, _, _):
            host, port = url.removeprefix("mqtt://").split(":")
            connection = socket.create_connection((host, int(port)))
            connection.sendall(CONNECT)
            assert connection.recv(4) == CONNACK
        with connection:
            assert connection.recv(1) == b""

    def test_licence_option_accepts_the_keys_of_another_run(self) -> None:
        with broker() as (_, license, secret):
            pass
        with broker("--license", license) as (url, same, none):
            assert (same, none) == (license, None)
            assert demo("--url", url, secret=secret).returncode == 0

    @pytest.mark.parametrize("files", [1, 2])
    def test_tls(self, files: int, tmp_path: Path) -> None:
        certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        made = tls.certificate("127.0.0.1")
        arguments = ["--tls-cert", str(certificate)]
        if files == 1:
            made.private_key_and_cert_chain_pem.write_to_path(certificate)
        else:
            made.cert_chain_pems[0].write_to_path(certificate)
            made.private_key_pem.write_to_path(key)
            arguments += ["--tls-key", str(key)]
        with broker(*arguments) as (url, _, secret):
            assert anyio.run(
                partial(delivered_channels, url, secret, ssl_context=tls.client_context())
            ) == [
                "a/",
                "a/b/",
            ]

    @pytest.mark.parametrize("arguments", [[], ["--tls-key", __file__]])
    def test_invalid_tls_files_are_named(self, arguments: list[str]) -> None:
        done = run("-m", "emitter_anyio", "broker", "--tls-cert", __file__, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        line = only_line(done.stderr)
        assert all(path in line for path in [__file__, *arguments[1:]])
        assert "PEM" in line

    def test_matcher(self) -> None:
        with broker("--matcher", "mqtt") as (url, _, secret):
            assert anyio.run(partial(delivered_channels, url, secret, matcher="mqtt")) == ["a/"]

    def test_ctrl_c_before_the_loop_runs_sets_the_exit_code(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*args: object, **keywords: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(anyio, "run", interrupted)
        assert main(["broker"]) == 0
        assert main(["demo"]) == 128 + signal.SIGINT

    def test_used_port_is_reported(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
            done = run("-m", "emitter_anyio", "broker", "--port", port)
        assert (done.returncode, done.stdout) == (1, "")
        line = only_line(done.stderr)
        assert port in line
        assert "--port 0" in line


async def delivered_channels(url: str, secret: str | None, **options: Any) -> list[str]:
    """Publish to two channels and return those delivered to a subscriber of the first."""
    assert secret is not None
    async with connect(url, **options) as emitter:
        key = (await emitter.keygen(secret, "a/#/", "rw")).key
        async with emitter.subscribe(key, "a/") as messages:
            for channel in ("a/", "a/b/"):
                await emitter.publish(key, channel, "x", qos=1)
            await emitter.flush()
            return [
                messages.receive_nowait().channel
                for _ in range(messages.statistics().current_buffer_used)
            ]


def test_broker_suggests_a_free_port_if_the_port_is_used(cli: Cli, backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = cli("broker", "--port", port, "--backend", backend)
    assert done.code == 1
    assert done.error.endswith("in use; use --port 0 for a free port")


def test_broker_suggests_no_port_for_an_address_of_another_machine(cli: Cli, backend: str) -> None:
    done = cli("broker", "--host", "192.0.2.1", "--port", "0", "--backend", backend)
    assert done.code == 1
    assert done.error.startswith("cannot listen on 192.0.2.1 port 0: ")
    assert "--port" not in done.error


class TestLicense:
    def test_secret_key_belongs_to_the_licence(self) -> None:
        done = run("-m", "emitter_anyio", "license")
        assert (done.returncode, done.stderr) == (0, "")
        match = re.fullmatch(r"license (\S+:3)\nsecret key (\S+)\n", done.stdout)
        assert match is not None
        assert License.parse(match[1]).decrypt(match[2]).is_secret

    def test_broker_accepts_the_licence(self) -> None:
        license = run("-m", "emitter_anyio", "license").stdout.split()[1]
        with broker("--license", license) as (_, same, _):
            assert same == license


INVALID_COMMAND_LINES = {
    "no command": ([], "COMMAND"),
    "unknown command": (["dance"], "unknown command (see emitter-anyio --help)"),
    "unknown option": (["demo", "--louder"], "--louder"),
    "unknown backend": (["demo", "--backend", "curio"], "argument --backend: invalid"),
    "secret without url": (["demo", "--secret", "x"], "--url"),
    "url without secret": (["demo", "-u", "mqtt://127.0.0.1"], "EMITTER_SECRET"),
    "scheme": (["demo", "--url", "http://ann:hush@127.0.0.1", "--secret", "x"], "mqtt, mqtts"),
    "host": (["demo", "--url", "mqtt://ann:hush@", "--secret", "x"], "no host"),
    "no number": (["demo", "--timeout", "soon"], "expected a number of seconds"),
    "negative": (["demo", "--timeout", "-1"], "expected a number of seconds"),
    "unknown unit": (["demo", "--timeout", "1w"], "expected a number of seconds"),
    "part of a second": (["pub", "a/", "x", "--ttl", "1.5"], "expected a whole number of seconds"),
    "large ttl": (["keygen", "a/", "--ttl", "99999d"], "expected an integer from 0"),
    "dash": (["demo", "--url", "mqtt://127.0.0.1", "--secret", "-x"], "write --option=VALUE"),
    "unix": (["demo", "--url", "unix:///tmp/x", "--secret", "x"], "cannot use a unix:// URL"),
    "key only": (["broker", "--tls-key", "key.pem"], "--tls-key requires --tls-cert"),
    "unknown matcher": (["broker", "--matcher", "exact"], "'emitter', 'mqtt'"),
    "port range": (["broker", "--port", "65536"], "expected a port from 0 to 65535"),
    "port": (["broker", "--port", "http"], "expected a port"),
    "URL": (["demo", "mqtt://ann:hush@h"], "unrecognized arguments (see emitter-anyio demo"),
    "URL first": (["mqtt://ann:hush@h"], "unknown command"),
    "two messages": (["pub", "a/", "--ttl", "9", "x", "hush"], "unrecognized arguments (see"),
    "option last": (["pub", "a/", "--ttl", "9", "x", "--loud"], "unrecognized option --loud"),
    "channel": (["pub", "a b/"], "the character ' '"),
    "count": (["sub", "a/", "--last", "-1"], "expected an integer from 0"),
    "large count": (["sub", "a/", "--last", "9999999999"], "expected an integer from 0"),
    "no count": (["sub", "a/", "--count", "0"], "expected an integer of at least 1"),
    "no period": (["sub", "a/", "--stats", "0"], "expected more than 0 seconds"),
    "time": (["sub", "a/", "--since", "soon"], "expected a time"),
    "early time": (["sub", "a/", "--since", "5"], "from 2018 to 2066"),
    "user name": (["me", "--username", "\udcff"], "--username"),
    "extend key": (["keygen", "a/", "--key", "a b"], "--key: invalid key: it contains"),
    "link name": (["link", "abc", "a/"], "one or two letters or digits"),
    "group": (["sub", "a/", "--group", "a/b"], "must not contain a slash"),
    "licence": (["broker", "--license", "hush"], "invalid licence"),
}


MISPLACED_SECRETS = [
    ["me", "--secret", "{}"],
    ["me", "--secret={}"],
    ["me", "{}"],
    ["{}"],
    ["broker", "--port", "{}"],
    ["broker", "--matcher", "{}"],
    ["sub", "{} x"],
    ["sub", "a/", "--last", "{}"],
    ["sub", "a/", "--since", "{}"],
    ["sub", "a/", "--timeout", "{}"],
    ["sub", "a/", "--s={}"],
    ["sub", "a/", "--resume={}"],
    ["sub", "a/", "--group", "{}/x"],
    ["pub", "a/", "x", "--qos", "{}"],
    ["link", "{}", "a/"],
    ["keygen", "a/", "{}"],
    ["keygen", "{}//"],
    ["doctor", "--need", "{}"],
]


class TestUsage:
    @pytest.mark.parametrize("secret", ["hushhushhush", "HUSH(1) x = hush", "hush 'HUSH' (hush"])
    @pytest.mark.parametrize("arguments", MISPLACED_SECRETS, ids=" ".join)
    def test_misplaced_secret_is_not_printed(
        self,
        arguments: list[str],
        secret: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(SystemExit) as left:
            main([each.format(secret) for each in arguments])
        assert left.value.code == 2
        assert "hush" not in only_line(capsys.readouterr().err).lower()

    @pytest.mark.parametrize(
        ("arguments", "expected"), INVALID_COMMAND_LINES.values(), ids=INVALID_COMMAND_LINES
    )
    def test_invalid_command_line_is_reported_in_one_line(
        self,
        arguments: list[str],
        expected: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("EMITTER_SECRET", raising=False)
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert expected in only_line(errors)
        assert errors.endswith("--help)\n")
        assert "hush" not in errors

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("1700000000", 1700000000),
            ("2030-01-31T12:00:00+00:00", 1896091200),
            ("1d", 1800000000 - 86400),
            ("1.5m", 1800000000 - 90),
        ],
    )
    def test_time_formats(self, text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.time", lambda: 1800000000)
        assert moment(text) == seconds

    @pytest.mark.parametrize(
        ("text", "seconds"), [("0", 0), ("90", 90), ("1.5s", 1.5), ("10m", 600), ("2h", 7200)]
    )
    def test_duration_formats(self, text: str, seconds: float) -> None:
        assert duration(text) == seconds
        assert not isinstance(ttl("1.5d"), float)
        assert ttl("1.5d") == 129600

    def test_error_in_an_exception_group_is_reported(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*args: object, **keywords: object) -> None:
            raise ExceptionGroup("", [ExceptionGroup("", [OSError()]), CommandError("a reason")])

        monkeypatch.setattr(anyio, "run", fail)
        assert main(["demo"]) == 1
        assert only_line(capsys.readouterr().err) == "emitter-anyio: a reason"

    def test_unexpected_exception_propagates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **keywords: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(anyio, "run", fail)
        with pytest.raises(ZeroDivisionError):
            main(["demo"])

    def test_module_name_is_shown_in_errors(self) -> None:
        done = run("-m", "emitter_anyio", "demo", "--louder")
        assert (done.returncode, done.stdout) == (2, "")
        assert "see python -m emitter_anyio" in only_line(done.stderr)

    def test_version_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main(["--version"])
        assert left.value.code == 0
        assert capsys.readouterr().out == f"emitter-anyio {emitter_anyio.__version__}\n"

    @pytest.mark.parametrize(
        ("program", "shown"),
        [
            ("/usr/bin/emitter-anyio", "emitter-anyio"),
            ("/site-packages/emitter_anyio/__main__.py", "python -m emitter_anyio"),
        ],
    )
    def test_help_shows_examples_for_the_called_program(
        self,
        program: str,
        shown: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(sys, "argv", [program])
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        for arguments, example in (
            ([], f"  {shown} demo\n"),
            (["demo"], f"  EMITTER_SECRET=... {shown} demo --url 127.0.0.1:8080\n"),
            (["broker"], f"  {shown} broker --port 0 "),
            (["license"], f"  {shown} license\n"),
        ):
            with pytest.raises(SystemExit) as left:
                main([*arguments, "--help"])
            assert left.value.code == 0
            assert example in capsys.readouterr().out

    @pytest.mark.parametrize("program", ["emitter-anyio", "emitter_anyio/__main__.py"])
    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_fits_80_columns_with_one_line_per_option(
        self,
        command: str,
        program: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(sys, "argv", [program])
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if len(line) > 80] == []
        assert lines[0].startswith(f"usage: {'python -m' if '/' in program else 'emitter-anyio'}")
        options = lines[lines.index("options:") + 1 :]
        options = options[: options.index("")]
        assert [line for line in options if not line.startswith("  -")] == []
        examples = lines[lines.index("examples:") + 1 :]
        assert any(f" {command}" in line for line in examples)

    def test_main_help_fits_80_columns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        help = run("-m", "emitter_anyio", "--help").stdout
        assert [line for line in help.splitlines() if len(line) > 80] == []
        listed = re.findall(r"^ +(\w+) +\w", help.partition("commands:")[2], re.MULTILINE)
        assert set(COMMANDS) <= {*listed}
