"""What a command imports, and how it ends by a signal."""

from __future__ import annotations

import json
import signal
import socket

import pytest

from tests.support.command import running

BACKENDS = ["asyncio", "trio"]

_IMPORTS = """
import json, sys
from emitter_anyio._cli import main
try:
    main({arguments})
except SystemExit as left:
    assert left.code == 0
print(json.dumps([*sys.modules]), file=sys.stderr)
"""

CONNACK = bytes.fromhex("20020000")
SUBSCRIBE = 0x82
SUBACK = bytes.fromhex("9003")
DISCONNECT = bytes.fromhex("e000")


def loaded_by(*arguments: str) -> set[str]:
    """Return the modules that a command line has loaded when it ends."""
    program = _IMPORTS.format(arguments=[*arguments])
    with running("-c", program) as process:
        _, errors = process.communicate()
    loaded: list[str] = json.loads(errors)
    return {*loaded}


def commands_in(loaded: set[str]) -> set[str]:
    package = "emitter_anyio._cli."
    return {name.removeprefix(package) for name in loaded if name.startswith(package)}


class TestImports:
    def test_help_loads_no_command(self) -> None:
        loaded = loaded_by("--help")
        assert commands_in(loaded) == {"_main", "_commands", "_arguments", "_output"}
        assert not loaded & {"trio", "rich", "shtab", "wsproto", "emitter_anyio.testing"}

    def test_command_loads_only_its_own_module(self) -> None:
        loaded = loaded_by("pub", "--help")
        assert commands_in(loaded) & {"_pub", "_sub", "_demo", "_doctor", "_keys"} == {"_pub"}
        assert not loaded & {"trio", "rich", "shtab", "wsproto", "emitter_anyio.testing"}

    def test_license_loads_no_second_backend(self) -> None:
        assert not loaded_by("license") & {"trio", "rich", "shtab"}


class TestSignals:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
    def test_client_disconnects(self, backend: str, sent: signal.Signals) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"127.0.0.1:{listener.getsockname()[1]}"
            arguments = ("sub", "a/", "--key", "k" * 32, "--url", url, "--backend", backend)
            with running("-m", "emitter_anyio", *arguments) as process:
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(1024)
                    connection.sendall(CONNACK)
                    subscribe = connection.recv(1024)
                    assert subscribe[0] == SUBSCRIBE
                    connection.sendall(SUBACK + subscribe[2:4] + b"\0")
                    process.send_signal(sent)
                    assert b"".join(iter(lambda: connection.recv(1024), b"")) == DISCONNECT
                assert process.communicate() == ("", "")
        assert process.returncode == 128 + sent

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_sigterm_ends_a_command_that_waits_for_a_connection(self, backend: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"127.0.0.1:{listener.getsockname()[1]}"
            with running("-m", "emitter_anyio", "me", "-u", url, "--backend", backend) as process:
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(1)
                    process.send_signal(signal.SIGTERM)
                    assert process.communicate() == ("", "")
        assert process.returncode == 128 + signal.SIGTERM
