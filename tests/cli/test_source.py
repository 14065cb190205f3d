"""The broker and the keys, from options, files and the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.support.background import Background

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
