"""The processes of the soak test: the broker and the network in front of it."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support import command
from tests.support.ports import pick_port


class BrokerProcess:
    """
    A development broker that can be killed and restarted with the same port and licence.

    :param license: its licence
    """

    def __init__(self, license: str) -> None:
        self.port = pick_port()
        self._license = license
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it unless it is running, and return when it listens."""
        if self._process is not None:
            return
        self._process = command.start(
            *("-m", "emitter_anyio", "broker", "--port", str(self.port)),
            *("--license", self._license),
        )
        assert self._process.stdout is not None
        for _ in range(2):
            assert self._process.stdout.readline(), "the broker did not start"

    def kill(self) -> None:
        """Kill it without a clean shutdown, and return when it has ended."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


class NetworkProcess:
    """
    Proxies to a port, each of which can be made to fail.

    :param port: the broker's port
    :param count: the number of proxies
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

    def send(self, number: int, method: str, *arguments: object) -> None:
        """Make a proxy call a method of :class:`FaultProxy`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, method, *arguments]) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """End the proxies."""
        self._process.kill()
        self._process.communicate()
