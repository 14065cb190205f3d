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
from emitter_anyio import connect
from emitter_anyio._cli import main
from emitter_anyio._cli._arguments import CommandError, moment
from emitter_anyio.testing._keys import License
from tests.support import tls
from tests.support.command import run, running

BACKENDS = ["asyncio", "trio"]
STORY = [
    *["connect", "keygen", "publish", "publish", "subscribe", "message", "message"],
    *["publish", "message", "presence", "presence", "message", "presence"],
    *["flush", "disconnect"],
]
SECRET = re.compile(r"[-_0-9A-Za-z]{32}")
"""What a key looks like, and a secret key; a licence is longer."""


CONNECT = bytes.fromhex("100c00044d5154540402000a0000")
CONNACK = bytes.fromhex("20020000")


@contextmanager
def broker(
    *arguments: str, stop: signal.Signals = signal.SIGINT
) -> Iterator[tuple[str, str, str | None]]:
    """Run ``broker`` on a free port for a block: its URL, licence and secret key."""
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


def told(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines()]


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.startswith("emitter-anyio: ")
    return line


class TestDemo:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tells_a_line_for_each_thing_that_happens(self, backend: str) -> None:
        done = demo("--backend", backend)
        assert done.stderr == ""
        assert done.returncode == 0
        assert told(done.stdout) == ["broker", *STORY]
        columns = {len(what) for what in re.findall(r"^\w+ +", done.stdout, re.MULTILINE)}
        assert len(columns) == 1
        assert done.stdout.count("replayed") == 2
        assert re.search(
            r"^message +'one for me, please' on demo/\w+/, from bob$", done.stdout, re.MULTILINE
        )
        assert re.findall(r"^presence +(.*)$", done.stdout, re.MULTILINE) == [
            "alice is here",
            "bob has come",
            "bob has left",
        ]
        assert not SECRET.search(done.stdout)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_runs_against_a_broker_that_is_up(self, backend: str) -> None:
        with broker() as (url, _, secret):
            by_flag = demo("--backend", backend, "--url", url, f"--secret={secret}")
            by_environment = demo("--backend", backend, "--url", url, secret=secret)
        for done in (by_flag, by_environment):
            assert done.stderr == ""
            assert done.returncode == 0
            assert told(done.stdout) == STORY

    def test_a_user_name_in_the_url_goes_before_those_of_the_story(self) -> None:
        with broker() as (url, _, secret):
            done = demo("--url", url.replace("//", "//carol:hush@"), secret=secret)
        assert done.returncode == 0
        assert "carol is here\n" in done.stdout
        assert "hush" not in done.stdout

    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        done = demo("--url", f"mqtt://127.0.0.1:{port}", secret="x")
        assert (done.returncode, done.stdout) == (1, "")
        line = only_line(done.stderr)
        assert f"mqtt://127.0.0.1:{port}" in line
        assert line.endswith("without --url the demo starts a broker of its own")

    def test_the_link_is_lost(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
            with running("-m", "emitter_anyio", "demo", "--url", url, "--secret=x") as process:
                link, _ = listener.accept()
                with link:
                    assert link.recv(1024)
                    link.sendall(CONNACK)
                    assert link.recv(1024)
                output, errors = process.communicate()
        assert process.returncode == 1
        assert told(output) == ["connect"]
        assert "is lost" in only_line(errors)

    def test_the_secret_is_not_the_brokers(self) -> None:
        wrong = "a" * 32
        with broker() as (url, _, _):
            done = demo("--url", url, secret=wrong)
        assert done.returncode == 1
        # Of 256 licences, one reads it as a master key of another contract, which is a 404.
        assert re.search("40[14]", only_line(done.stderr))
        assert wrong not in done.stderr

    def test_it_gives_up(self) -> None:
        done = demo("--timeout", "0")
        assert done.returncode == 1
        assert " 0 s" in only_line(done.stderr)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_ctrl_c_ends_it_as_a_shell_expects(self, backend: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
            arguments = ["--backend", backend, "--url", url, "--secret", "x"]
            with running("-m", "emitter_anyio", "demo", *arguments) as process:
                link, _ = listener.accept()
                with link:
                    # It has sent CONNECT, and waits for an answer that does not come.
                    assert link.recv(1)
                    process.send_signal(signal.SIGINT)
                    assert process.communicate() == ("", "")
        assert process.returncode == 128 + signal.SIGINT

    def test_a_reader_that_leaves_ends_it_without_a_word(self) -> None:
        with running("-m", "emitter_anyio", "demo") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 128 + 13


class TestBroker:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
    def test_prints_what_a_client_needs_and_ends_on_a_signal(
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
    def test_ends_while_a_client_is_connected(self, backend: str) -> None:
        with broker("--backend", backend) as (url, _, _):
            host, port = url.removeprefix("mqtt://").split(":")
            link = socket.create_connection((host, int(port)))
            link.sendall(CONNECT)
            assert link.recv(4) == CONNACK
        with link:
            assert link.recv(1) == b""

    def test_with_a_licence_the_keys_of_another_run_are_good(self) -> None:
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
            assert anyio.run(partial(_exchange, url, secret, ssl_context=tls.client_context())) == [
                "a/",
                "a/b/",
            ]

    @pytest.mark.parametrize("arguments", [[], ["--tls-key", __file__]])
    def test_tls_without_a_certificate(self, arguments: list[str]) -> None:
        done = run("-m", "emitter_anyio", "broker", "--tls-cert", __file__, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        line = only_line(done.stderr)
        assert all(path in line for path in [__file__, *arguments[1:]])
        assert "PEM" in line

    def test_matcher(self) -> None:
        with broker("--matcher", "mqtt") as (url, _, secret):
            assert anyio.run(partial(_exchange, url, secret, matcher="mqtt")) == ["a/"]

    def test_ctrl_c_before_anything_waits_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*args: object, **keywords: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(anyio, "run", interrupted)
        assert main(["broker"]) == 0
        assert main(["demo"]) == 128 + signal.SIGINT

    def test_a_port_that_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
            done = run("-m", "emitter_anyio", "broker", "--port", port)
        assert (done.returncode, done.stdout) == (1, "")
        line = only_line(done.stderr)
        assert port in line
        assert "--port 0" in line


async def _exchange(url: str, secret: str | None, **options: Any) -> list[str]:
    """Give which of two channels reach a subscriber of the first."""
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


class TestLicense:
    def test_its_secret_is_a_master_key_of_it(self) -> None:
        done = run("-m", "emitter_anyio", "license")
        assert (done.returncode, done.stderr) == (0, "")
        said = re.fullmatch(r"license (\S+:3)\nsecret key (\S+)\n", done.stdout)
        assert said is not None
        assert License.parse(said[1]).decrypt(said[2]).is_master

    def test_the_broker_takes_it(self) -> None:
        license = run("-m", "emitter_anyio", "license").stdout.split()[1]
        with broker("--license", license) as (_, same, _):
            assert same == license


WRONG = {
    "no command": ([], "COMMAND"),
    "unknown command": (["dance"], "invalid choice (choose from"),
    "unknown option": (["demo", "--louder"], "--louder"),
    "unknown backend": (["demo", "--backend", "curio"], "argument --backend: invalid"),
    "secret without url": (["demo", "--secret", "x"], "--url"),
    "url without secret": (["demo", "--url", "mqtt://127.0.0.1"], "EMITTER_SECRET"),
    "scheme": (["demo", "--url", "http://ann:hush@127.0.0.1", "--secret", "x"], "mqtt, mqtts"),
    "host": (["demo", "--url", "mqtt://ann:hush@", "--secret", "x"], "no host"),
    "no number": (["demo", "--timeout", "soon"], "expected a number of seconds"),
    "negative": (["demo", "--timeout", "-1"], "expected a number of seconds"),
    "dash": (["demo", "--url", "mqtt://127.0.0.1", "--secret", "-x"], "write --option=VALUE"),
    "key only": (["broker", "--tls-key", "key.pem"], "--tls-key needs --tls-cert"),
    "unknown matcher": (["broker", "--matcher", "exact"], "'emitter', 'mqtt'"),
    "port range": (["broker", "--port", "65536"], "expected a port from 0 to 65535"),
    "port": (["broker", "--port", "http"], "expected a port"),
    "URL": (["demo", "mqtt://ann:hush@h"], "unrecognized arguments (see"),
    "URL first": (["mqtt://ann:hush@h"], "invalid choice (choose from"),
    "channel": (["pub", "a b/"], "the character ' '"),
    "count": (["sub", "a/", "--last", "-1"], "expected a whole number from 0"),
    "large count": (["sub", "a/", "--last", "9999999999"], "expected a whole number from 0"),
    "no count": (["sub", "a/", "--count", "0"], "nothing to do for 0"),
    "no period": (["sub", "a/", "--stats", "0"], "0 seconds are too few"),
    "time": (["sub", "a/", "--since", "soon"], "expected a time"),
    "early time": (["sub", "a/", "--since", "5"], "from 2018 to 2066"),
    "user name": (["me", "--username", "\udcff"], "--username"),
    "extend key": (["keygen", "a/", "--key", "a b"], "--key: invalid key: it contains"),
    "link name": (["link", "abc", "a/"], "one or two letters or digits"),
    "group": (["sub", "a/", "--group", "a/b"], "must not contain a slash"),
    "licence": (["broker", "--license", "hush"], "not a licence of Emitter"),
}


ECHOES = [
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
    @pytest.mark.parametrize("arguments", ECHOES, ids=" ".join)
    def test_no_value_is_repeated_that_may_be_a_secret_in_a_wrong_place(
        self,
        arguments: list[str],
        secret: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(SystemExit) as left:
            main([each.format(secret) for each in arguments])
        assert left.value.code == 2
        assert "hush" not in only_line(capsys.readouterr().err).lower()

    @pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG)
    def test_what_is_wrong_is_said_in_one_line(
        self,
        arguments: list[str],
        says: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("EMITTER_SECRET", raising=False)
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert says in only_line(errors)
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
    def test_times(self, text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.time", lambda: 1800000000)
        assert moment(text) == seconds

    def test_what_a_task_beside_others_raises(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*args: object, **keywords: object) -> None:
            raise ExceptionGroup("", [ExceptionGroup("", [OSError()]), CommandError("a reason")])

        monkeypatch.setattr(anyio, "run", fail)
        assert main(["demo"]) == 1
        assert only_line(capsys.readouterr().err) == "emitter-anyio: a reason"

    def test_a_mistake_of_ours_is_shown_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **keywords: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(anyio, "run", fail)
        with pytest.raises(ZeroDivisionError):
            main(["demo"])

    def test_in_a_process(self) -> None:
        done = run("-m", "emitter_anyio", "demo", "--louder")
        assert (done.returncode, done.stdout) == (2, "")
        assert "see python -m emitter_anyio" in only_line(done.stderr)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
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
    def test_help_teaches_with_examples_as_it_was_called(
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
            (["demo"], f"  EMITTER_SECRET=... {shown} demo --url mqtt://127.0.0.1:8080\n"),
            (["broker"], f"  {shown} broker --port 0 "),
            (["license"], f"  {shown} license\n"),
        ):
            with pytest.raises(SystemExit) as left:
                main([*arguments, "--help"])
            assert left.value.code == 0
            assert example in capsys.readouterr().out
