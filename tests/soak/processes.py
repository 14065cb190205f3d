"""The broker, which dies and returns, and the network in front of it: processes of their own."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys

from tests.support import command


class BrokerProcess:
    """
    A development broker that can be killed, and started again as the same one.

    :param license: its licence
    """

    def __init__(self, license: str) -> None:
        self.port = _port_of_our_own()
        self._license = license
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, unless it runs; returns when it listens."""
        if self._process is not None:
            return
        self._process = command.start(
            *("-m", "emitter_anyio", "broker", "--port", str(self.port)),
            *("--license", self._license),
        )
        assert self._process.stdout is not None
        for _ in range(2):
            assert self._process.stdout.readline(), "the broker has not started"

    def kill(self) -> None:
        """Kill it as a crash does; returns when it is dead."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


class NetworkProcess:
    """
    Some proxies to a port, each of which can fail.

    :param port: the port
    :param count: how many
    """

    def __init__(self, port: int, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.network", str(port), str(count)],
            cwd=command.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.ports: list[int] = json.loads(self._process.stdout.readline())

    def tell(self, number: int, verb: str, *arguments: object) -> None:
        """Have a proxy do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, verb, *arguments]) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """End all of them."""
        self._process.kill()
        self._process.communicate()


def _port_of_our_own() -> int:
    # Not drawn by the seed, which two runs may share, nor one that the system hands out: while the
    # broker is dead, who connects from that very port would connect to itself, and the broker
    # could not return.
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
