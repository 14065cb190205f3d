from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import rich.console
import rich.live
import rich.progress

from emitter_anyio._cli import main
from tests.support import tls
from tests.support.background import Background, background
from tests.support.terminal import Terminal, standard_streams_on, terminal

# Importing Rich reads the current directory, which blockbuster forbids while a loop runs.
RICH = (rich.console, rich.live, rich.progress)


@pytest.fixture(scope="module")
def server() -> Iterator[Background]:
    """A broker for all tests of a module. Each test uses its own channel."""
    with background() as made:
        yield made


@pytest.fixture(scope="module")
def secure() -> Iterator[Background]:
    """A broker with TLS."""
    with background(ssl_context=tls.server_context()) as made:
        yield made


@pytest.fixture
def cafile(tmp_path: Path) -> str:
    """The name of a file with the certificate authority of that broker."""
    tls.authority().cert_pem.write_to_path(tmp_path / "ca.pem")
    return str(tmp_path / "ca.pem")


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EMITTER_URL", "EMITTER_KEY", "EMITTER_SECRET", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@dataclass(frozen=True)
class Done:
    """The exit code and the output of a command."""

    code: int
    output: str
    errors: str

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    @property
    def error(self) -> str:
        """The only line of stderr, without the name of the program."""
        (line,) = self.errors.splitlines()
        assert line.startswith("emitter-anyio: ")
        return line.removeprefix("emitter-anyio: ")


Cli = Callable[..., Done]


def code_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as left:
        return int(str(left.code))


@contextlib.contextmanager
def _readable(stdin: bytes | int) -> Iterator[TextIO]:
    """Open a pipe that contains these bytes, or a descriptor."""
    if isinstance(stdin, int):
        with open(stdin) as file:
            yield file
        return
    reading, writing = os.pipe()
    # Write in a thread, because the bytes might exceed the capacity of the pipe.
    writer = threading.Thread(target=_fill, args=(writing, stdin))
    writer.start()
    with open(reading) as file:
        yield file
    writer.join()


def _fill(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(descriptor, "wb") as pipe:
        pipe.write(data)


@pytest.fixture
def cli(
    server: Background, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Cli:
    """Return a function that runs a command in this process against the broker of the module."""

    def run(*arguments: str, stdin: bytes | int = b"", secret: bool = True) -> Done:
        monkeypatch.setenv("EMITTER_URL", server.url)
        if secret:
            monkeypatch.setenv("EMITTER_SECRET", server.secret)
        with _readable(stdin) as file:
            monkeypatch.setattr(sys, "stdin", file)
            code = code_of(list(arguments))
        printed = capfd.readouterr()
        return Done(code, printed.out, printed.err)

    return run


@pytest.fixture
def on_terminal(server: Background, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that does the same as ``cli`` on a pseudo-terminal."""
    with terminal() as made:

        def run(*arguments: str) -> tuple[int, Terminal]:
            monkeypatch.setenv("EMITTER_URL", server.url)
            monkeypatch.setenv("EMITTER_SECRET", server.secret)
            with standard_streams_on(made):
                code = code_of(list(arguments))
            return code, made

        run.terminal = made  # type: ignore[attr-defined]  # for tests that type input
        yield run
