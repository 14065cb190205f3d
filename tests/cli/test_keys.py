"""``keygen``, ``ban``, ``unban`` and ``me``: output and errors."""

from __future__ import annotations

import json
from typing import Any

from tests.cli.conftest import Cli
from tests.support.background import Background


class TestKeygen:
    def test_key_is_printed(self, cli: Cli, unique: str, backend: str) -> None:
        made = cli("keygen", unique, "--backend", backend)
        assert (made.code, made.errors, len(made.output)) == (0, "", 33)
        key = made.output.strip()
        assert cli("pub", unique, "hello", "--key", key, secret=False).code == 0

    def test_json(self, cli: Cli, unique: str) -> None:
        made = json.loads(cli("keygen", f"{unique}#", "p", "--ttl=60", "--json").output)
        assert made["channel"] == f"{unique}#/"
        assert len(made["key"]) == 32

    def test_extend_key_opens_a_private_channel(
        self, cli: Cli, server: Background, unique: str
    ) -> None:
        made = cli("keygen", unique, "--key", server.key(unique, "rwe"), secret=False)
        assert made.code == 0
        channel = made.error.removeprefix("the key is for ")
        assert channel.startswith(unique)
        key = made.output.strip()
        assert cli("pub", channel, "hello", "--key", key, secret=False).code == 0

    def test_missing_secret_is_reported(self, cli: Cli, unique: str) -> None:
        done = cli("keygen", unique, secret=False)
        assert done.code == 2
        assert "--secret or EMITTER_SECRET" in done.error

    def test_unknown_permission_is_rejected(self, cli: Cli, unique: str) -> None:
        done = cli("keygen", unique, "rz")
        assert done.code == 2
        assert "letters out of r" in done.error

    def test_invalid_target_is_rejected(self, cli: Cli) -> None:
        done = cli("keygen", "a b/")
        assert done.code == 2
        assert "does not accept" in done.error


class TestBan:
    def test_banned_key_is_refused_until_unbanned(
        self, cli: Cli, server: Background, unique: str, backend: str
    ) -> None:
        key = server.key(unique, "w")
        publish = ("pub", unique, "hello", "--key", key)
        done = cli("ban", key, "--backend", backend)
        assert (done.code, done.output, done.errors) == (0, "banned\n", "")
        assert cli(*publish).code == 1
        done = cli("unban", "--backend", backend, stdin=f"{key}\nmore".encode())
        assert (done.code, done.output, done.errors) == (0, "not banned\n", "")
        assert cli(*publish).code == 0

    def test_empty_standard_input_is_rejected(self, cli: Cli) -> None:
        done = cli("ban")
        assert (done.code, done.output) == (2, "")
        assert "key" in done.error

    def test_malformed_key_is_not_printed(self, cli: Cli) -> None:
        done = cli("ban", "a/b")
        assert done.code == 2
        assert "a/b" not in done.errors

    def test_key_is_read_from_a_terminal(
        self, on_terminal: Any, server: Background, unique: str
    ) -> None:
        on_terminal.terminal.type(f"{server.key(unique, 'w')}\n".encode())
        code, screen = on_terminal("ban")
        assert code == 0
        assert "enter the channel key\n" in screen.text
        assert screen.text.endswith("banned\n")


class TestMe:
    def test_text(self, cli: Cli, backend: str) -> None:
        done = cli("me", "--backend", backend, secret=False)
        assert (done.code, done.errors, len(done.output.strip())) == (0, "", 26)

    def test_json(self, cli: Cli) -> None:
        assert json.loads(cli("me", "--json").output)["links"] == {}
