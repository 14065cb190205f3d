"""The broker and the keys, from options, files and the environment."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from emitter_anyio._cli import _source
from tests.cli.conftest import Cli
from tests.support import tls
from tests.support.background import Background, background
from tests.support.command import running

CLOSED_PORT = "mqtt://127.0.0.1:1"


class TestPrecedence:
    def test_option_precedes_file_and_file_precedes_environment(
        self, cli: Cli, server: Background, unique: str, tmp_path: Path
    ) -> None:
        good, bad = server.key(unique, "w"), "b" * 32
        file = tmp_path / "env"
        publish = ("pub", unique, "hello", "--env-file", str(file))
        file.write_text(f"EMITTER_KEY={bad}\n")
        assert cli(*publish).code == 1
        assert cli(*publish, "--key", good).code == 0
        file.write_text(f"# a comment\n\nexport EMITTER_KEY='{good}'  # to write\nOTHER=\n")
        assert cli(*publish, secret=False).code == 0
        file.write_text(f"EMITTER_URL={CLOSED_PORT}")
        assert CLOSED_PORT in cli(*publish).error
        assert cli(*publish, "--url", server.url).code == 0

    def test_missing_key_is_reported(self, cli: Cli, unique: str) -> None:
        done = cli("pub", unique, "hello", secret=False)
        assert done.code == 2
        assert "EMITTER_KEY" in done.error

    def test_malformed_key_is_reported(self, cli: Cli, unique: str) -> None:
        for wrong in ("--key", "--secret"):
            done = cli("sub", unique, wrong, "\udcff")
            assert done.code == 2
            assert "invalid key: it contains" in done.error
        assert cli("keygen", unique, "--secret", "a b").code == 2

    @pytest.mark.parametrize("channel", ["{}", "{}+/", "{}+/a/", "{}#/", "{}+/+/"])
    def test_key_is_generated_with_the_secret(self, cli: Cli, unique: str, channel: str) -> None:
        arguments = "--timeout", "0", "--matcher", "mqtt"
        assert cli("sub", channel.format(unique), *arguments).code == 0

    def test_key_is_generated_for_all_channels(self, cli: Cli) -> None:
        assert cli("sub", "+/", "--last=0", "--timeout", "0").code == 0


class TestUrl:
    @pytest.mark.parametrize("place", ["option", "variable"])
    def test_host_and_port_mean_mqtt(
        self,
        cli: Cli,
        server: Background,
        place: str,
        backend: str,
        tmp_path: Path,
    ) -> None:
        address = server.url.removeprefix("mqtt://")
        (tmp_path / "env").write_text(f"EMITTER_URL={address}")
        option = ("--url", address) if place == "option" else ("--env-file", f"{tmp_path}/env")
        done = cli("me", *option, "--backend", backend)
        assert (done.code, done.errors) == (0, "")

    def test_ipv6_address_and_port(self, cli: Cli) -> None:
        done = cli("me", "--url", "[::1]:1")
        assert (done.code, "mqtt://[::1]:1" in done.error) == (1, True)

    def test_host_without_port_is_rejected_without_its_name(self, cli: Cli) -> None:
        done = cli("me", "--url", "hush")
        assert done.code == 2
        assert "mqtt://" in done.error
        assert "hush" not in done.error


class TestRefusedKey:
    @pytest.mark.parametrize(
        "command", [["keygen", "{}"], ["pub", "{}", "x"], ["sub", "{}"], ["ban", "k" * 32]]
    )
    def test_error_names_the_origin_of_the_secret(
        self, cli: Cli, unique: str, command: list[str], backend: str, tmp_path: Path
    ) -> None:
        wrong = "b" * 32
        (tmp_path / "env").write_text(f"EMITTER_SECRET={wrong}")
        command = [each.format(unique) for each in command] + ["--backend", backend]
        for option, origin in (
            (["--secret", wrong], "--secret"),
            (["--env-file", f"{tmp_path}/env"], f"{tmp_path}/env"),
        ):
            done = cli(*command, *option)
            assert done.code == 1
            assert done.error.endswith(f"; the secret key is from {origin}")
            assert wrong not in done.error

    def test_error_names_the_variable_of_the_secret(
        self, cli: Cli, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EMITTER_SECRET", "b" * 32)
        done = cli("keygen", unique, secret=False)
        assert (done.code, "EMITTER_SECRET" in done.error) == (1, True)

    @pytest.mark.parametrize("qos", ["0", "1"])
    def test_error_names_the_variable_of_the_key(
        self, cli: Cli, server: Background, unique: str, monkeypatch: pytest.MonkeyPatch, qos: str
    ) -> None:
        monkeypatch.setenv("EMITTER_KEY", server.key(unique, "r"))
        done = cli("pub", unique, "hello", "--qos", qos)
        assert done.code == 1
        assert done.error.endswith("; the key is from EMITTER_KEY")

    def test_extend_key_is_named(self, cli: Cli, server: Background, unique: str) -> None:
        done = cli("keygen", unique, "--key", server.key(unique, "r"))
        assert done.code == 1
        assert done.error.endswith("; the key is from --key")

    def test_malformed_key_is_named(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EMITTER_SECRET", "a/b")
        done = cli("keygen", "a/", secret=False)
        assert (done.code, done.error.startswith("EMITTER_SECRET: invalid key")) == (2, True)


class TestPassword:
    @pytest.mark.parametrize("user", ["option", "URL"])
    def test_password_is_read_from_a_file(
        self, cli: Cli, tmp_path: Path, user: str, backend: str
    ) -> None:
        (tmp_path / "password").write_text("opensesame\n")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            url = ["--url", address, "--username", "ann"]
            if user == "URL":
                url = ["--url", f"mqtt://ann@{address}"]
            arguments = [*url, "--password-file", f"{tmp_path}/password", "--backend", backend]
            with running("-m", "emitter_anyio", "me", *arguments) as process:
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(1024).endswith(b"\0\x03ann\0\x0aopensesame")
                process.communicate()

    def test_password_without_user_name_is_rejected(self, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "password").write_text("hush")
        done = cli("me", "--password-file", f"{tmp_path}/password")
        assert done.code == 2
        assert "password requires username" in done.error
        assert "hush" not in done.error

    def test_second_password_is_rejected(self, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "password").write_text("hush")
        url = "mqtt://ann:murmur@127.0.0.1"
        done = cli("me", "--url", url, "--password-file", f"{tmp_path}/password")
        assert done.code == 2
        assert "password" in done.error
        assert not {"hush", "murmur"} & {*done.error.split()}

    @pytest.mark.parametrize("content", [b"", b"hush\nhush\n", b"\xff"])
    def test_invalid_file_is_reported(self, cli: Cli, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "password").write_bytes(content)
        done = cli("me", "--username", "ann", "--password-file", f"{tmp_path}/password")
        assert done.code == 1
        assert done.error.startswith(f"cannot read {tmp_path}/password: ")
        assert "hush" not in done.error


class TestErrors:
    def test_missing_file_is_reported(self, cli: Cli) -> None:
        done = cli("me", "--env-file", "/no/such/file")
        assert done.code == 1
        assert "/no/such/file: No such file or directory" in done.error

    def test_file_that_is_not_utf_8_is_reported(self, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "env").write_bytes(b"\xff")
        done = cli("me", "--env-file", str(tmp_path / "env"))
        assert done.code == 1
        assert f"{tmp_path}/env" in done.error
        assert "UTF-8" in done.error

    @pytest.mark.parametrize("line", ["EMITTER_KEY", "EMITTER_KEY='hush", "EMITTER_KEY=hush hush"])
    def test_malformed_line_is_reported_without_its_value(
        self, cli: Cli, tmp_path: Path, line: str
    ) -> None:
        (tmp_path / "env").write_text(f"A=B\n{line}\n")
        done = cli("me", "--env-file", str(tmp_path / "env"))
        assert done.code == 1
        assert f"{tmp_path}/env: line 2" in done.error
        assert "NAME=VALUE" in done.error
        assert "hush" not in done.error

    def test_invalid_url_is_reported_with_its_origin(self, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "env").write_text("EMITTER_URL=http://ann:hush@x")
        done = cli("me", "--env-file", str(tmp_path / "env"))
        assert done.code == 2
        assert done.error.startswith(f"{tmp_path}/env: ")
        assert "'http'" in done.error
        assert "hush" not in done.errors

    def test_missing_wsproto_is_reported(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "wsproto", None)
        done = cli("me", "--url", "ws://127.0.0.1")
        assert done.code == 2
        assert "pip install '.[websocket]'" in done.error


class TestTls:
    def test_cafile_is_trusted(
        self, cli: Cli, secure: Background, cafile: str, backend: str
    ) -> None:
        done = cli("me", "--url", secure.url, "--cafile", cafile, "--backend", backend)
        assert (done.code, done.errors) == (0, "")

    def test_private_authority_is_not_trusted_by_default(
        self, cli: Cli, secure: Background
    ) -> None:
        done = cli("me", "--url", secure.url)
        assert done.code == 1
        assert "certificate" in done.error

    def test_invalid_cafile_is_reported(self, cli: Cli, secure: Background) -> None:
        done = cli("me", "--url", secure.url, "--cafile", __file__)
        assert done.code == 1
        assert __file__ in done.error

    def test_cafile_without_tls_is_rejected(self, cli: Cli, cafile: str) -> None:
        done = cli("me", "--cafile", cafile)
        assert done.code == 2
        assert "--cafile" in done.error


@pytest.fixture(scope="module")
def mutual() -> Iterator[Background]:
    """A broker that requires a client certificate."""
    context = tls.server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    tls.authority().configure_trust(context)
    trusting = tls.client_context()
    tls.certificate("ann").configure_cert(trusting)
    with background(ssl_context=context, client_context=trusting) as made:
        yield made


class TestClientCertificate:
    @pytest.mark.parametrize("files", [1, 2])
    def test_certificate_is_presented(
        self, cli: Cli, mutual: Background, cafile: str, tmp_path: Path, files: int, backend: str
    ) -> None:
        options = client_files(tmp_path, files)
        done = cli("me", "--url", mutual.url, "--cafile", cafile, *options, "--backend", backend)
        assert (done.code, done.errors) == (0, "")
        secret = ("--secret", mutual.secret)
        done = cli("doctor", "--url", mutual.url, "--cafile", cafile, *options, *secret)
        assert (done.code, done.errors) == (0, "")

    @pytest.mark.parametrize("command", ["me", "doctor"])
    def test_missing_certificate_is_reported(
        self, cli: Cli, cafile: str, command: str, backend: str
    ) -> None:
        with listener_that_requires_a_certificate() as address:
            url = f"mqtts://{address}"
            done = cli(command, "--url", url, "--cafile", cafile, "--backend", backend)
        assert done.code == 1
        assert "use --client-cert FILE" in done.output + done.errors

    def test_certificate_with_the_systems_authorities(
        self, cli: Cli, mutual: Background, tmp_path: Path
    ) -> None:
        done = cli("me", "--url", mutual.url, *client_files(tmp_path, 1))
        assert done.code == 1
        assert "--cafile FILE" in done.error

    def test_key_without_certificate_is_rejected(self, cli: Cli) -> None:
        done = cli("me", "--client-key", "key.pem")
        assert (done.code, "--client-key requires --client-cert" in done.error) == (2, True)

    def test_certificate_without_tls_is_rejected(self, cli: Cli) -> None:
        done = cli("me", "--client-cert", "cert.pem")
        assert (done.code, "--client-cert requires TLS" in done.error) == (2, True)

    def test_invalid_files_are_named(self, cli: Cli, mutual: Background, cafile: str) -> None:
        for option in ([], ["--client-key", cafile]):
            done = cli("me", "--url", mutual.url, "--client-cert", __file__, *option)
            assert done.code == 1
            assert all(path in done.error for path in [__file__, *option[1:]])

    def test_encrypted_key_requires_a_terminal(
        self, cli: Cli, mutual: Background, cafile: str, tmp_path: Path
    ) -> None:
        options = client_files(tmp_path, 2, passphrase=b"hush")
        done = cli("me", "--url", mutual.url, "--cafile", cafile, *options)
        assert done.code == 1
        assert f"cannot load {tmp_path}/key.pem: the key is encrypted" in done.error

    @pytest.mark.parametrize("typed", ["hush", "murmur"])
    def test_passphrase_is_asked_for_on_a_terminal(
        self,
        on_terminal: Any,
        mutual: Background,
        cafile: str,
        tmp_path: Path,
        typed: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked = []

        def ask(text: str) -> str:
            asked.append(text)
            return typed

        monkeypatch.setattr(_source, "getpass", ask)
        options = client_files(tmp_path, 2, passphrase=b"hush")
        code, screen = on_terminal("me", "--url", mutual.url, "--cafile", cafile, *options)
        assert code == (0 if typed == "hush" else 1)
        assert asked == [f"passphrase of {tmp_path}/key.pem: "]
        assert (typed == "hush") != (f"{tmp_path}/key.pem" in screen.text)


@contextmanager
def listener_that_requires_a_certificate() -> Iterator[str]:
    """Refuse a client without certificate, and keep its connection until it has read why."""
    context = tls.server_context()
    context.verify_mode = ssl.CERT_REQUIRED

    def refuse() -> None:
        connection, _ = listener.accept()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = context.wrap_bio(incoming, outgoing, server_side=True)
        with connection:
            while data := connection.recv(65536):
                incoming.write(data)
                with suppress(ssl.SSLError):
                    session.do_handshake()
                connection.sendall(outgoing.read())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=refuse)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def client_files(directory: Path, files: int, passphrase: bytes | None = None) -> list[str]:
    """Write the certificate and the key of a client, and return the options."""
    made = tls.certificate("ann")
    key = load_pem_private_key(made.private_key_pem.bytes(), None)
    protection = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
    certificate = made.cert_chain_pems[0].bytes()
    (directory / "cert.pem").write_bytes(certificate + (pem if files == 1 else b""))
    (directory / "key.pem").write_bytes(pem)
    options = ["--client-cert", str(directory / "cert.pem")]
    return options if files == 1 else [*options, "--client-key", str(directory / "key.pem")]
