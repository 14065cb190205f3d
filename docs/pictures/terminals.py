"""
Draw terminals: ``python docs/pictures/terminals.py``, with the extra ``cli``.

``terminals.svg`` shows two users of ``examples/terminal_chat.py``; one loses the connection for a
while. ``board.svg`` shows the live table of ``emitter-anyio presence``. This script runs the
programs and draws their output.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import sys
import termios
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from html import escape
from pathlib import Path
from subprocess import PIPE

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from emitter_anyio.testing import Broker, FaultProxy

HERE = Path(__file__).parent
CHAT = "examples/terminal_chat.py"
WIDTH, LINE, TOP = 470, 21, 68
COLOURS = {"$": "#8b949e", ">": "#e6edf3", "-": "#7ee787", "!": "#ffa657", " ": "#79c0ff"}
# By escape sequence: normal, bold, dim, bold green.
STYLES = {"0": "#c9d1d9", "1": "#e6edf3", "2": "#8b949e", "1;32": "#7ee787"}

Line = list[tuple[str, str]]


class Terminal:
    """
    A running program and its output.

    The first character of a line selects its colour: ``$`` the command, ``>`` typed text, ``-`` who
    is online, ``!`` a line of the log, and a space a message of another user.
    """

    def __init__(self, process: Process, name: str) -> None:
        assert process.stdin
        assert process.stdout
        self.name = name
        self.lines = [f"$ python {CHAT} {name}"]
        self._stdin = process.stdin
        self._output = BufferedByteReceiveStream(process.stdout)

    async def shows(self, pattern: str) -> None:
        """Read lines until one begins with a match of the pattern."""
        while True:
            line = (await self._output.receive_until(b"\n", 1000)).decode().rstrip()
            kind = "-" if line.startswith("--") else " " if re.match(r"\w+: ", line) else "!"
            # The port differs in each run.
            self.lines.append(kind + re.sub(r" to mqtt://[\d.:]*\d", "", line))
            if re.match(pattern, line):
                return

    @property
    def coloured(self) -> list[Line]:
        return [[(COLOURS[line[0]], line if line[0] == "$" else line[1:])] for line in self.lines]

    async def type(self, text: str) -> None:
        self.lines.append(f">{text}")
        await self._stdin.send(f"{text}\n".encode())


@asynccontextmanager
async def terminal(name: str, url: str, secret: str) -> AsyncIterator[Terminal]:
    environment = {**os.environ, "EMITTER_URL": url, "EMITTER_SECRET": secret}
    command = [sys.executable, CHAT, name]
    async with await anyio.open_process(command, env=environment, stderr=-2) as process:
        yield Terminal(process, name)
        process.kill()


def draw(label: str, *terminals: tuple[str, Sequence[Line]]) -> str:
    """
    Draw terminals beside each other.

    :param label: a description for screen readers
    :param terminals: the title and the lines of each, where a line is a list of coloured pieces
    """
    height = TOP + LINE * max(len(lines) for _, lines in terminals) + 12
    width = (WIDTH + 16) * len(terminals) - 16
    drawn = []
    for number, (title, lines) in enumerate(terminals):
        drawn.append(
            f'<g transform="translate({number * (WIDTH + 16)} 0)">'
            f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#161b22" stroke="#30363d"/>'
            '<circle cx="20" cy="20" r="6" fill="#ff5f57"/><circle cx="40" cy="20" r="6" '
            'fill="#febc2e"/><circle cx="60" cy="20" r="6" fill="#28c840"/>'
            f'<text x="{WIDTH / 2}" y="25" text-anchor="middle" fill="#8b949e">{title}</text>'
        )
        for row, line in enumerate(lines):
            pieces = "".join(f'<tspan fill="{hue}">{escape(text)}</tspan>' for hue, text in line)
            drawn.append(
                f'<text x="18" y="{TOP + row * LINE}" xml:space="preserve">{pieces}</text>'
            )
        drawn.append("</g>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        "font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', "
        f'monospace" font-size="14" aria-label="{label}">' + "\n".join(drawn) + "</svg>\n"
    )


async def chat() -> None:
    async with (
        Broker() as broker,
        FaultProxy(broker.host, broker.port) as network,
        terminal("ann", broker.url, broker.secret_key) as ann,
    ):
        await ann.shows("-- online: ann")
        await ann.type("is anyone here?")
        async with terminal("ben", network.url, broker.secret_key) as ben:
            await ben.shows("ann: is anyone here?")
            await ann.shows("-- online: ann, ben")
            await ben.type("yes, on the train")
            await ann.shows("ben: yes, on the train")
            await anyio.sleep(0.2)  # until Ben's client has received the acknowledgement
            network.stall()
            await network.cut(reset=False)
            await ben.shows("lost the connection")
            await ann.shows("-- online: ann")
            await ann.type("careful, a tunnel ahead")
            await ann.type("still there?")
            await anyio.sleep(0.5)
            network.resume()
            await ben.shows("ann: still there?")
            await ann.shows("-- online: ann, ben")
            await ben.type("yes, and I missed nothing")
            await ann.shows("ben: yes, and")
    label = "Two terminals: Ben's connection is lost, and he receives the messages that he missed"
    picture = draw(label, (ann.name, ann.coloured), (ben.name, ben.coloured))
    (HERE / "terminals.svg").write_text(picture)


class Screen:
    """A pseudo-terminal for a program that redraws its output."""

    def __init__(self, columns: int) -> None:
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._said = b""

    def close(self) -> None:
        os.close(self._ours)
        os.close(self.theirs)

    async def shows(self, text: str) -> None:
        while text.encode() not in self._said:
            await anyio.wait_readable(self._ours)
            self._said += os.read(self._ours, 4096)

    @property
    def coloured(self) -> list[Line]:
        """The lines as they were last drawn."""
        # The program clears each line before it draws the lines again.
        last = self._said.rpartition(b"\x1b[2K")[2].decode()
        return [self._colour(line.rstrip("\r")) for line in last.split("\n")]

    def _colour(self, line: str) -> Line:
        _, *parts = re.split("\x1b\\[([0-9;]+)m", f"\x1b[0m{line}")
        return [(STYLES[style], text) for style, text in zip(parts[::2], parts[1::2], strict=True)]


def stop(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()


async def board() -> None:
    shell: list[Line] = []

    def typed(command: str) -> list[str]:
        shell.append([(COLOURS["$"], "$ "), (COLOURS[">"], command)])
        return [sys.executable, "-m", "emitter_anyio", *shlex.split(command.rstrip(" &"))[1:]]

    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(Broker())
        environment = {
            **os.environ,
            "EMITTER_URL": broker.url,
            "EMITTER_SECRET": broker.secret_key,
            "TERM": "xterm-256color",
        }

        async def start(command: list[str], stdout: int = PIPE) -> Process:
            process = await anyio.open_process(command, env=environment, stdout=stdout)
            await stack.enter_async_context(process)
            stack.callback(stop, process)
            return process

        screen = Screen(54)
        stack.callback(screen.close)
        watch = "emitter-anyio presence chat/"
        await start([sys.executable, "-m", "emitter_anyio", *watch.split()[1:]], screen.theirs)
        await screen.shows("0 present")
        listening = []
        for name, channel in (("ann", "chat/"), ("ben", "chat/lobby/"), ("carl", "chat/")):
            listening.append(await start(typed(f"emitter-anyio sub {channel} --username {name} &")))
            await screen.shows(f"{name} joined")
        said = "tea is ready"
        await anyio.run_process(typed(f"emitter-anyio pub chat/ '{said}'"), env=environment)
        for number in (0, 2):
            stdout = listening[number].stdout
            assert stdout is not None
            assert (await stdout.receive()).decode() == f"{said}\n"
            shell.append([(COLOURS[" "], said)])
        stop(listening[2])
        shell.append([(COLOURS["$"], "$ "), (COLOURS[">"], "kill %3")])
        await screen.shows("carl left")
        title = [(COLOURS["$"], f"$ {watch}")]
        label = "A shell with three subscribers, and a live table of the members of the channel"
        picture = draw(label, ("a shell", shell), ("the live table", [title, *screen.coloured]))
        (HERE / "board.svg").write_text(picture)


async def main() -> None:
    await chat()
    await board()


anyio.run(main)
